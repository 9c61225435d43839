"""The tensors of a surrogate and their values, computed in parallel, one block of rows at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BLOCK_VALUES = 1 << 20  # values per block, so that memory use hardly depends on the size of the result
WORKERS = min(16, os.cpu_count() or 1)
IDENTITY_SCALE = 0.02  # standard deviation of random values


@dataclass(frozen=True)
class Source:
    """A tensor of the small model: its file, name, shape and safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Form:
    """`row_copies` x `len(columns)` copies of a tensor, with extra rows and columns after them.

    `columns` holds the factor of each copy along the last dimension; a vector counts as one row. Extra rows are
    random, or the mean of the copied rows. Extra columns are zero.
    """

    row_copies: int
    columns: tuple[float, ...]
    extra_rows: int = 0
    extra_columns: int = 0
    is_mean: bool = False


@dataclass(frozen=True)
class Plan:
    """A tensor to write: copies of `source` in the given form, or a `fill` of the same shape."""

    name: str
    source: Source
    form: Form
    fill: str = "copy"  # or "ones", "zeros", "random"

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, width = self.source.shape
        form = self.form
        return (
            *(n * form.row_copies + form.extra_rows for n in rows),
            width * len(form.columns) + form.extra_columns,
        )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.source.dtype].itemsize


def shares(k: int) -> tuple[float, ...]:
    """Return k powers of two whose sum is 1. Dividing by k itself would round every bfloat16 weight."""
    whole = 1 << (k.bit_length() - 1)
    extra = k - whole
    return (1 / whole,) * (whole - extra) + (0.5 / whole,) * (2 * extra)


def make_blocks(plan: Plan, noise: float, seed: int, pool: Executor) -> Iterator[torch.Tensor]:
    """Yield the values of `plan` in order, as blocks of whole rows [rows, width] that are computed in parallel."""
    source, width, total = plan.source, plan.shape[-1], math.prod(plan.shape[:-1])
    with safe_open(source.file, framework="pt") as weights:
        small = weights.get_tensor(source.name).view(-1, source.shape[-1])
    # The noise is relative to the small matrix and is divided with it. Vectors get no noise.
    is_matrix = len(plan.shape) > 1
    deviation = noise * small.norm(dtype=torch.float32).item() / math.sqrt(small.numel()) * is_matrix
    step = max(1, BLOCK_VALUES // width)

    def make(start: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}/{plan.name}/{start}".encode()).digest()
        dice = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        rows = torch.arange(start, min(start + step, total))
        block = (
            _copies(plan, small, rows, deviation, dice) if plan.fill == "copy" else _fill(plan, rows, dice)
        )
        return block.to(DTYPES[source.dtype])

    yield from _in_order(make, range(0, total, step), pool)


def _in_order(
    make: Callable[[int], torch.Tensor], starts: Iterable[int], pool: Executor
) -> Iterator[torch.Tensor]:
    """Yield the results in order, with a few more in progress than the caller has taken."""
    waiting: deque[Future[torch.Tensor]] = deque()
    for start in starts:
        waiting.append(pool.submit(make, start))
        if len(waiting) > 2 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fill(plan: Plan, rows: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    shape = (len(rows), plan.shape[-1])
    if plan.fill == "random":
        return torch.randn(shape, generator=dice).mul_(IDENTITY_SCALE)
    return torch.full(shape, float(plan.fill == "ones"))


def _copies(
    plan: Plan, small: torch.Tensor, rows: torch.Tensor, deviation: float, dice: torch.Generator
) -> torch.Tensor:
    """Rows of the wide matrix, [rows, width]: copies of the small matrix's rows, then the extra rows."""
    form, copied = plan.form, len(small) * plan.form.row_copies
    extra = rows >= copied
    tiled = small[rows % len(small)].float()
    if form.is_mean and extra.any():
        tiled[extra] = small.float().mean(0)
    tiled = tiled.unsqueeze(1).repeat(1, len(form.columns), 1)  # [rows, copies, small width]
    if deviation:
        tiled.add_(torch.randn(tiled.shape, generator=dice), alpha=deviation)
    block = tiled.mul_(torch.tensor(form.columns).view(1, -1, 1)).view(len(rows), -1)
    if not form.is_mean and extra.any():
        block[extra] = torch.randn((int(extra.sum()), block.shape[1]), generator=dice).mul_(IDENTITY_SCALE)
    return torch.nn.functional.pad(block, (0, form.extra_columns)) if form.extra_columns else block


@contextmanager
def workers() -> Iterator[Executor]:
    """A pool of threads that use one core each; with a team of threads per worker they would slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
