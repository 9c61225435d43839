"""Timing the parts of a model's passes and draft steps on dummy weights of its shapes.

A few layers of dummy weights, more than the CPU's caches hold, run through the decoders that a session uses. Of the
model's files only some blocks are read, to time the link. A probe takes seconds, and its result is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, LAYER_MATRICES, block_entries
from subspec_cli.drafting.draft_steps import rank
from subspec_cli.drafting.graph_capture import CudaGraphs, Run
from subspec_cli.modeling.decoder import Block, DraftDecoder, DraftHead, DraftLogits, Head, TargetDecoder
from subspec_cli.modeling.exact_attention import AttentionRules, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.rope import RopeTable
from subspec_cli.modeling.row_group import chunk_group
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.substitute import (
    LowBitHead,
    SubstituteLayer,
    dummy_substitute,
    load_substitute,
    low_bit_table,
    resident_layer,
)
from subspec_cli.modeling.token_batch import TokenBatch, causal_batch
from subspec_cli.planning.costs import MachineCosts, RowTimes, snapped
from subspec_cli.probe.timers import copy_rate, disk_rate, reading, time_rows
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.substitutes.settings import SubstituteSettings

_BEYOND_CACHES_BYTES: Final = 160 << 20
_PREFIX: Final = 256
"""Committed rows that attention reads."""
_TIMED_PASS_ROWS: Final = (1, 8, 16, 32, 48, 64, 128)
_TIMED_STEP_ROWS: Final = (1, 2, 3, 4, 6, 8)
_DISK_LAYERS: Final = 4
"""Layers whose blocks are read to time the disk, spread over the model."""
_TREE_S: Final = MappingProxyType({"cpu": 0.5e-3, "cuda": 0.1e-3})
"""Time of a draft step for batch and tree. It differs too little between machines to matter. With a GPU the host does
this work while the previous step is in flight."""


def probe_machine(
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    checkpoint: Checkpoint,
    device: torch.device,
    reporter: Reporter,
) -> MachineCosts:
    """Time the link, target layers, draft layers and heads. Every time is snapped to the grid."""
    layouts = _disk_layouts(geometry, checkpoint)
    on_cpu = device.type == "cpu"
    workbench = _Workbench(geometry, settings, device)
    reporter.progress("link and target")
    if on_cpu:
        # A pass and the reader share cores and memory, so each is timed while the other runs.
        with reading(layouts) as beside:
            target = workbench.target_layer()
        link = pageable = disk = beside.bytes_per_s
    else:
        target, disk = workbench.target_layer(), disk_rate(layouts)
        link, pageable = copy_rate(device, pinned=True), copy_rate(device, pinned=False)
    reporter.progress("the draft's layers")
    return MachineCosts(
        link_bytes_per_s=link,
        pageable_bytes_per_s=pageable,
        disk_bytes_per_s=disk,
        target_layer=target.snapped(),
        target_head=workbench.target_head().snapped(),
        substitute_layer=workbench.substitute_layer().snapped(),
        shared_layer=workbench.shared_layer().snapped(),
        draft_head=workbench.draft_head(16).snapped(),
        low_bit_head=workbench.draft_head(4).snapped(),
        step_overhead_s=snapped(_TREE_S[device.type]),
        origin="measured",
    )


def _disk_layouts(geometry: ModelGeometry, checkpoint: Checkpoint) -> list[BlockLayout]:
    step = max(1, geometry.layers // _DISK_LAYERS)
    return [
        layout_block(entries)
        for layer in range(0, geometry.layers, step)
        for entries in block_entries(checkpoint.tensors, layer)
    ]


@dataclass(frozen=True, slots=True)
class _DummyBlocks:
    """Blocks of dummy layers in memory."""

    layers: tuple[dict[str, Tensor], ...]

    @property
    def most_held(self) -> int:
        """All blocks stay in memory."""
        return len(LAYER_BLOCKS)

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:  # noqa: ARG002
        """Yield the blocks of one pass."""
        for number, matrices in enumerate(self.layers):
            for kind, names in LAYER_BLOCKS.items():
                yield Block(number, kind, {name: matrices[name] for name in names})


class _NoHead:
    """Stands in for a head, so that layers are timed without one."""

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Return the hidden states."""
        return DraftLogits(hidden)


class _Workbench:
    """Times a few layers of dummy weights in the decoders of a session."""

    def __init__(self, geometry: ModelGeometry, settings: SubstituteSettings, device: torch.device) -> None:
        self._sizes, self._settings, self._device = geometry, settings, device
        self._dtype = torch_dtype(geometry.dtype)
        self.rules = RowRules(2) if device.type == "cpu" else RowRules(64, fixed_rows=True)

    @torch.inference_mode()
    def target_layer(self) -> RowTimes:
        """Time one layer of the target by rows."""
        layers = self._matrices(self._count(self._sizes.layer_matrix_bytes))
        math = self._math(len(layers))
        attention = ExactAttention(
            math.geometry, AttentionRules("fused", 4), dtype=self._dtype, device=self._device
        )
        head = Head(self._ones(self._sizes.hidden), self._ones(1, self._sizes.hidden), 1e-6)
        decoder = TargetDecoder(math, attention, self._states, head, _DummyBlocks(layers), self.rules)
        kv = self._cache(len(layers))

        def run(rows: int) -> None:
            flow = decoder.begin([chunk_group([0] * rows, _PREFIX, self.rules)], kv)
            for _ in decoder.layers(flow):
                pass

        return self._per_layer(run, _TIMED_PASS_ROWS, len(layers))

    @torch.inference_mode()
    def shared_layer(self) -> RowTimes:
        """Time one layer of the draft that is a resident layer of the target, by rows."""
        matrices = self._matrices(self._count(self._sizes.layer_matrix_bytes))
        math = self._math(len(matrices))
        return self._draft(math, [resident_layer(math, number, held) for number, held in enumerate(matrices)])

    @torch.inference_mode()
    def substitute_layer(self) -> RowTimes:
        """Time one layer of the draft made of its substitute, by rows."""
        shapes = self._sizes.layer_shapes()
        stored = {
            name: value
            for matrix in LAYER_MATRICES
            for name, value in dummy_substitute(
                matrix, shapes[matrix], self._settings.bits_of(matrix), self._dtype
            ).items()
        }
        count = self._count(self._sizes.layer_matrix_bytes // 4)
        math = self._math(count)
        layers = [load_substitute(math, n, stored, self._settings, self._device) for n in range(count)]
        return self._draft(math, layers)

    @torch.inference_mode()
    def target_head(self) -> RowTimes:
        """Time the target's head by rows."""
        head = self._head()
        return time_rows(
            lambda rows: head.logits(self._ones(self.rules.padded(rows), self._sizes.hidden), self.rules),
            _TIMED_PASS_ROWS,
            finish=self._finish,
        )

    @torch.inference_mode()
    def draft_head(self, bits: int) -> RowTimes:
        """Time the draft's head of 16 or 4 bits and the ranking of its logits, by rows.

        If no 4-bit kernel takes the table's shape, the 16-bit head is timed.
        """
        whole = self._head()
        table = low_bit_table(whole.weight) if bits == 4 else None
        head: DraftHead = whole
        if table is not None:
            head = LowBitHead(whole.norm_weight, table, whole.weight, whole.eps)

        def run(states: Tensor) -> None:
            rank(head.guess(states), None)

        steps = self._launched(lambda rows: partial(run, self._ones(rows, self._sizes.hidden)))
        return time_rows(steps, _TIMED_STEP_ROWS, finish=self._finish)

    def _head(self) -> Head:
        return Head(self._ones(self._sizes.hidden), self._ones(self._sizes.vocab, self._sizes.hidden), 1e-6)

    def _draft(self, math: LayerMath, layers: list[SubstituteLayer]) -> RowTimes:
        kv = self._cache(len(layers))
        draft = DraftDecoder(math, self._states, _NoHead(), layers)

        def run(batch: TokenBatch) -> None:
            draft.run(self._states(batch.positions), batch, kv)

        steps = self._launched(lambda rows: partial(run, causal_batch([0] * rows, _PREFIX).to(self._device)))
        return self._per_layer(steps, _TIMED_STEP_ROWS, len(layers))

    def _launched(self, step_of: Callable[[int], Run]) -> Callable[[int], object]:
        """Return draft steps by rows, launched as in a session: captured as graphs on a GPU, if possible."""
        steps = {rows: step_of(rows) for rows in _TIMED_STEP_ROWS}
        if self._device.type == "cuda":
            steps = self._captured(steps)
        return lambda rows: steps[rows]()

    def _captured(self, steps: dict[int, Run]) -> dict[int, Run]:
        graphs = CudaGraphs(self._device)
        try:
            return {rows: graphs.capture(torch.inference_mode()(run)) for rows, run in steps.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return steps  # the session tries again and reports why capturing failed

    def _per_layer(self, run: Callable[[int], object], row_counts: tuple[int, ...], layers: int) -> RowTimes:
        times = time_rows(run, row_counts, finish=self._finish)
        return RowTimes(times.rows, tuple(seconds / layers for seconds in times.seconds))

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _count(self, layer_bytes: int) -> int:
        """Return how many layers to run, so that the CPU's caches cannot hold them all."""
        return min(self._sizes.layers, -(-_BEYOND_CACHES_BYTES // layer_bytes))

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self._dtype, device=self._device)

    def _states(self, token_ids: Tensor) -> Tensor:
        return self._ones(len(token_ids), self._sizes.hidden)

    def _matrices(self, count: int) -> tuple[dict[str, Tensor], ...]:
        shapes = self._sizes.layer_shapes()
        return tuple({name: self._ones(*shapes[name]) for name in LAYER_MATRICES} for _ in range(count))

    def _math(self, layers: int) -> LayerMath:
        sizes = replace(self._sizes, layers=layers, windows=self._sizes.windows[:layers])
        small = {
            name: self._ones(*s) for name, s in sizes.layer_shapes().items() if name not in LAYER_MATRICES
        }
        table = self._ones(_PREFIX + max(_TIMED_PASS_ROWS), 1, sizes.head_dim)
        return LayerMath(sizes, (small,) * layers, RopeTable(table, table))

    def _cache(self, layers: int) -> KVCache:
        kv = KVCache(
            layers=layers,
            kv_heads=self._sizes.kv_heads,
            head_dim=self._sizes.head_dim,
            context=_PREFIX,
            scratch=max(_TIMED_PASS_ROWS),
            dtype=self._dtype,
            device=self._device,
        )
        kv.commit(range(_PREFIX), [0] * _PREFIX)
        return kv
