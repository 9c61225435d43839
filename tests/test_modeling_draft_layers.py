"""The draft's own arithmetic: close to the target's, in few operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tiny_models import Tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspec_cli.checkpoint.layer_description import NormKind
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.draft_layers import draft_norm, turn_of
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.layers import normalized
from subspec_cli.modeling.rope import Rotation, rotate
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.modeling.token_batch import TokenBatch

MOST_OPERATIONS = 28
"""Of one layer over resident matrices on a CPU; a GPU's kernel for norms saves 6, fused projections 4."""
MOST_BESIDE_LAYERS = 20


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", get_args(NormKind))
@pytest.mark.parametrize("shape", [(48,), (3, 48)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)]
)
def test_norms_are_those_of_the_target_within_rounding(
    kind: NormKind, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, atol: float
) -> None:
    rows = (
        random(1, 5, 3, 48, dtype=dtype) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 0.0]).to(dtype)[:, None, None]
    )
    weight, bias = (
        random(2, *shape, dtype=dtype),
        (random(3, *shape, dtype=dtype) if has_bias and kind != "rounded_then_scaled" else None),
    )
    expected = normalized("layer" if kind == "fused_layer" else kind, rows, weight, bias, 1e-5)
    kept = rows.clone()
    found = draft_norm(kind, weight, bias, 1e-5)(rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-2)
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("turned", [16, 12])
@pytest.mark.parametrize("rounds_once", [False, True])
def test_states_are_turned_in_place(is_interleaved: bool, turned: int, rounds_once: bool) -> None:
    angles = random(1, 4, 1, turned)
    rotation = Rotation(angles.cos(), angles.sin(), is_interleaved, rounds_once)
    whole = random(2, 4, 5, 16)
    states = whole[:, :3]  # the values behind them stay
    expected, behind = rotate(states, rotation), whole[:, 3:].clone()
    turn_of(rotation, torch.float32).apply_(states)
    torch.testing.assert_close(states, expected)
    assert torch.equal(whole[:, 3:], behind)


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy; views cost a GPU nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        writes = any(part.alias_info and part.alias_info.is_write for part in func._schema.arguments)
        given = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
        first = made[0] if isinstance(made, (tuple, list)) else made
        self.count += writes or (
            isinstance(first, Tensor) and first.untyped_storage().data_ptr() not in given
        )
        return made


def operations_of(model: Tiny) -> int:
    """One step of three rows whose cache rows are a tensor, as it is captured."""
    source, math, kv = model.source(), model.math(), model.kv()
    layers = [resident_layer(math, n, source.resident_matrices(n)) for n in range(model.geometry.layers)]
    draft = DraftDecoder(math, model.embed, model.head, layers)
    rows, allowed = torch.tensor([5, 6, 7]), torch.ones((3, 40), dtype=torch.bool)
    hidden = model.embed(rows)
    with torch.inference_mode(), Operations() as seen:
        batch = TokenBatch(rows, rows, rows, allowed, torch.arange(40))
        draft.run(hidden.clone(), [DraftRows(batch, kv)])
    return seen.count


def test_a_layer_of_a_captured_step_is_few_operations(tiny: Callable[..., Tiny]) -> None:
    """What was 38 operations in a layer; masks, rotations and views of the cache are made once for all layers."""
    short, long = (operations_of(tiny("llama", layers=layers)) for layers in (2, 4))
    layer = (long - short) / 2
    assert layer <= MOST_OPERATIONS
    assert short - 2 * layer <= MOST_BESIDE_LAYERS
