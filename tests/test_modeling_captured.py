"""Captured draft steps: replays of recorded operations, with numbers frozen as a graph freezes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import CPU, VOCAB, Tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspec_cli.modeling import captured as module
from subspec_cli.modeling.attention import fast_attention
from subspec_cli.modeling.captured import CapturedDraft, launched
from subspec_cli.modeling.decoder import DraftDecoder, DraftLogits
from subspec_cli.modeling.embedding import table_embedding
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import TokenBatch
from subspec_cli.modeling.substitute import resident_layer

one_thread = tiny_models.one_thread
tiny = tiny_models.tiny
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
PROMPT = [(7 * n + n // 5) % VOCAB for n in range(40)]
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
"""Operations for which a card's host would have to wait, which no graph can hold."""


class Recorder(TorchDispatchMode):
    """Keeps every operation as it was called, numbers and all; replays them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITS), f"{func} waits for the card"
        assert "_to_copy" not in str(func) or "device" not in (kwargs or {}), "a copy to another device"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """All operations again; what one made before is overwritten, as memory of a graph is."""
        for func, args, kwargs, made in self.calls:
            self._overwrite(made, func(*args, **kwargs))

    def _overwrite(self, made: Any, again: Any) -> None:
        if isinstance(made, Tensor):
            if made.data_ptr() != again.data_ptr():
                made.copy_(again)
        elif isinstance(made, (tuple, list)):
            for old, new in zip(made, again, strict=True):
                self._overwrite(old, new)


@dataclass
class FakeGraphs:
    """Captures by recording; counts."""

    captures: int = 0
    replays: int = 0
    waits: list[int] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def capture(self, run: Callable[[], DraftLogits]) -> Callable[[], DraftLogits]:
        self.captures += 1
        recorder = Recorder()
        with torch.inference_mode(), recorder:
            found = run()
        for tensor in (found.logits, found.normed):
            if tensor is not None:
                tensor.fill_(torch.nan)  # a capture computes nothing yet

        def replay() -> DraftLogits:
            self.replays += 1
            with torch.inference_mode():
                recorder.replay()
            return found

        return replay

    def wait(self) -> None:
        self.waits.append(self.replays)

    def forget(self) -> None:
        self.forgotten.append(self.captures)


def draft_of(model: Tiny) -> DraftDecoder:
    source, math = model.source(), model.math(fast_attention)
    layers = [resident_layer(math, n, source.resident_matrices(n)) for n in range(model.geometry.layers)]
    return DraftDecoder(math, model.embed, model.head, layers)


def step(seed: int, kv: KVCache, rows: int, first: int) -> TokenBatch:
    """Rows after `first` others of the scratch, each seeing a few of them at random, the prefix and itself."""
    chance = torch.Generator().manual_seed(seed)
    start = kv.committed + first
    allowed = torch.rand((rows, start + rows), generator=chance) < 0.5
    allowed[:, : kv.committed] = True
    allowed[:, start:] = torch.eye(rows, dtype=torch.bool)
    positions = kv.committed + torch.randint(first + 1, (rows,), generator=chance)
    keys = torch.cat((torch.arange(start), positions))
    return TokenBatch(torch.randint(VOCAB, (rows,), generator=chance), positions, rows, start, allowed, keys)


@pytest.fixture(params=["qwen2", "qwen2 windowed", "qwen3"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Tiny]) -> Tiny:
    family, _, windowed = request.param.partition(" ")
    return tiny(family, dtype=torch.float32, **(WINDOWED if windowed else {}))


@pytest.mark.parametrize("gathers", [False, True])
def test_replayed_steps_are_the_steps_themselves(
    model: Tiny, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of all sizes at all places, replayed from few captures, against the draft run directly."""
    monkeypatch.setattr(module, "_COLUMNS", 48)
    draft, graphs = draft_of(model), FakeGraphs()
    plain, kept = model.kv(), model.kv()
    for kv in (plain, kept):
        model.prefill(model.target(), kv, PROMPT)
    gather = table_embedding(model.weights["model.embed_tokens.weight"]) if gathers else None
    captured = CapturedDraft(draft, kept, graphs, most_rows=4, device=CPU, gather=gather)
    first = 0
    for seed, rows in enumerate([1, 2, 1, 4, 2, 1, 1, 4, 1]):
        first = 0 if seed == 7 else first  # another tree, in fewer rows than were in view before
        batch = step(seed, plain, rows, first)
        wanted = draft.forward(batch, plain).logits
        found = captured.forward(batch, kept).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        first += rows
    for layer in range(model.geometry.layers):
        for ours, theirs in zip(kept.read(layer, 52), plain.read(layer, 52), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # One row, two and four while 48 cache rows are in view, then two and one; four and one for the next tree.
    assert (graphs.captures, graphs.replays) == (7, 9)
    assert graphs.forgotten == [0, 3, 5]
    assert graphs.waits == list(range(9)), "inputs are left alone until the step before is done"


def test_the_cache_bounds_what_is_in_view(tiny: Callable[..., Tiny]) -> None:
    model = tiny("qwen2", dtype=torch.float32)
    kv, graphs = model.kv(), FakeGraphs()
    captured = CapturedDraft(draft_of(model), kv, graphs, most_rows=2, device=CPU, gather=None)
    assert kv.capacity < module._COLUMNS
    assert captured.forward(step(0, kv, 2, 0), kv).logits.isfinite().all()


def test_on_the_cpu_nothing_is_captured(tiny: Callable[..., Tiny]) -> None:
    model = tiny("qwen2")
    draft = draft_of(model)
    assert launched(draft, model.kv(), most_rows=2, device=CPU, notify=pytest.fail) is draft


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is taken for a card, whose memory is the host's."""
    monkeypatch.setattr(module, "_Shared", lambda shape, dtype, _device: SharedOnHost(shape, dtype))
    return torch.device("cuda")


class SharedOnHost:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.host = self.card = torch.zeros(shape, dtype=dtype)


def test_on_a_card_steps_are_captured(
    tiny: Callable[..., Tiny], card: torch.device, monkeypatch: Any
) -> None:
    model, notes = tiny("qwen2"), []
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: FakeGraphs())
    found = launched(draft_of(model), model.kv(), most_rows=2, device=card, notify=notes.append)
    assert isinstance(found, CapturedDraft)
    assert not notes


def test_a_card_that_cannot_capture_is_told_of(
    tiny: Callable[..., Tiny], card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "operation not permitted when stream is capturing"

    class Refusing(FakeGraphs):
        def capture(self, run: Any) -> Any:
            raise RuntimeError(f"{reason}\nsee the manual")

    model, notes = tiny("qwen2"), []
    draft = draft_of(model)
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: Refusing())
    assert launched(draft, model.kv(), most_rows=2, device=card, notify=notes.append) is draft
    assert notes == [f"draft steps are launched kernel by kernel, which is slower: {reason}"]


def test_a_full_card_is_not_taken_for_one_that_cannot_capture(
    tiny: Callable[..., Tiny], card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FakeGraphs):
        def capture(self, run: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny("qwen2")
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: Full())
    with pytest.raises(torch.OutOfMemoryError):
        launched(draft_of(model), model.kv(), most_rows=2, device=card)
