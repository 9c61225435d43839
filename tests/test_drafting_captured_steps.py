"""Captured draft steps: replays of recorded operations, with numbers frozen as a graph freezes them.

The stand-in for a GPU is late, too: what is launched runs only when the host waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fakes import LateSteps, OneSequence, sampled
from fakes_session import Shelf, answer_to, open_tiny
from test_lossless import SAMPLINGS, check_speculates
from tiny_models import CPU, VOCAB, Tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspec_cli.decoding.penalties import Penalties, begin_path
from subspec_cli.decoding.sampler import GreedySampler, Sampler
from subspec_cli.drafting import captured_steps as module
from subspec_cli.drafting import step_buffers
from subspec_cli.drafting.captured_steps import CapturedSteps, StepSizes, make_draft_steps
from subspec_cli.drafting.draft_steps import DirectSteps, Feed
from subspec_cli.modeling import substitute
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.modeling.token_batch import TokenBatch
from subspec_cli.reporter import Reporter
from subspec_cli.session import load

WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
PROMPT = [(7 * n + n // 5) % VOCAB for n in range(40)]
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
"""Operations for which a GPU's host would have to wait, which no graph can hold."""
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "greedy": GreedySampler,
    "sampled": lambda: sampled(3, temperature=0.8),
    "filtered": lambda: sampled(3, temperature=0.8, top_p=0.9, top_k=40),
}


OTHERS: dict[str, dict[str, Any]] = {
    "free": {"temperature": 1.0, "seed": 9},
    "penalized": {"temperature": 0.8, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
}


class Recorder(TorchDispatchMode):
    """Keeps every operation as it was called, numbers and all; replays them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITS), f"{func} waits for the GPU"
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
    """Captures by recording; what is launched is done when somebody waits, and in order."""

    captures: int = 0
    replays: int = 0
    forgotten: list[int] = field(default_factory=list)
    queue: deque[Callable[[], None]] = field(default_factory=deque)

    def capture(self, run: Callable[[], object], *, keep: Sequence[Tensor] = ()) -> Callable[[], object]:
        self.run_queue(len(self.queue))
        self.captures += 1
        kept = [tensor.clone() for tensor in keep]
        recorder = Recorder()
        with torch.inference_mode(), recorder:
            run()
        for tensor, before in zip(keep, kept, strict=True):
            tensor.copy_(before)

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():
                recorder.replay()

        return lambda: self.queue.append(replay)

    def mark(self) -> Callable[[], None]:
        launched = self.replays + len(self.queue)
        return lambda: self.run_queue(launched - self.replays)

    def run_queue(self, count: int) -> None:
        for _ in range(count):
            self.queue.popleft()()

    def forget(self) -> None:
        self.forgotten.append(self.captures)


def captured_steps(draft: DraftDecoder, kv: KVCache, graphs: FakeGraphs, most_rows: int = 4) -> OneSequence:
    return OneSequence(CapturedSteps(draft, lambda: graphs, StepSizes(most_rows, VOCAB), CPU), kv)


def draft_of(model: Tiny) -> DraftDecoder:
    source, math = model.source(), model.math()
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
    return TokenBatch(torch.randint(VOCAB, (rows,), generator=chance), positions, start, allowed, keys)


@pytest.fixture(params=["qwen2", "qwen2 windowed", "qwen3"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Tiny]) -> Tiny:
    family, _, windowed = request.param.partition(" ")
    return tiny(family, dtype=torch.float32, **(WINDOWED if windowed else {}))


SIZES: list[tuple[int, list[tuple[int, int] | None]]] = [
    (1, [None]),
    (2, [None, (0, 0)]),
    (1, [(1, 2)]),
    (4, [(0, 3), None, (0, 1), None]),
    (2, [(3, 0), (0, 7)]),
    (1, [None]),
    (1, [(0, 0)]),
    (4, [None, None, (0, 0), (0, 1)]),
    (1, [(2, 1)]),
]
"""Rows of steps, and which of them take the token that the step before has found."""


@pytest.mark.parametrize("kind", SAMPLERS)
def test_steps_that_are_replayed_late_are_the_steps_themselves(
    model: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of all sizes at all places, read one late, against a draft that computes each as it comes."""
    monkeypatch.setattr(module, "_COLUMNS", 48)
    draft, graphs, sampler = draft_of(model), FakeGraphs(), SAMPLERS[kind]()
    plain, kept = model.kv(), model.kv()
    for kv in (plain, kept):
        model.prefill(model.target(), kv, PROMPT)
    direct, late = OneSequence(LateSteps(draft), plain), captured_steps(draft, kept, graphs)
    for steps in (direct, late):
        steps.begin(sampler)
    first = 0
    for number, (rows, feeds) in enumerate(SIZES):
        if number == 7:  # another tree, in fewer rows than were in view before
            first = 0
        batch = step(number, plain, rows, first)
        for steps in (direct, late):
            steps.start(batch, [feed and Feed(*feed) for feed in feeds])
        if number:
            check_found(late, direct, rows=SIZES[number - 1][0])
        first += rows
    check_found(late, direct, rows=1)
    for layer in range(model.geometry.layers):
        for ours, theirs in zip(kept.read(layer, 52), plain.read(layer, 52), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # One row, two and four while 48 cache rows are in view, then two and one; four and one for the next tree.
    assert (graphs.captures, graphs.replays) == (7, 9)
    assert graphs.forgotten == [0, 3, 5]


def check_found(late: OneSequence, direct: OneSequence, *, rows: int) -> None:
    ours, theirs = late.read(), direct.read()
    assert ours.token_ids.shape == (rows, 8)
    assert np.array_equal(ours.token_ids, theirs.token_ids)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_one_graph_serves_other_numbers_of_the_same_rule(tiny: Callable[..., Tiny]) -> None:
    """Temperature, filters and seed are inputs: another request takes them along, and captures nothing."""
    model = tiny("qwen2", dtype=torch.float32)
    draft, graphs = draft_of(model), FakeGraphs()
    plain, kept = model.kv(), model.kv()
    direct, late = OneSequence(LateSteps(draft), plain), captured_steps(draft, kept, graphs)
    for seed, settings in enumerate([{"top_k": 3}, {"top_p": 0.3}, {"top_k": 9, "temperature": 2.0}]):
        sampler = sampled(seed, **settings)
        for steps in (direct, late):
            steps.begin(sampler)
            steps.start(step(1, plain, 1, 0), [None])
        check_found(late, direct, rows=1)
    assert (graphs.captures, graphs.replays) == (1, 3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_penalties_are_an_input_that_waits_for_the_step_in_flight(
    tiny: Callable[..., Tiny], kind: str
) -> None:
    """Each root brings its own numbers. One graph serves all, and one more serves answers without penalties."""
    model = tiny("qwen2", dtype=torch.float32)
    draft, graphs, sampler = draft_of(model), FakeGraphs(), SAMPLERS[kind]()
    plain, kept = model.kv(), model.kv()
    direct, late = OneSequence(LateSteps(draft), plain), captured_steps(draft, kept, graphs)
    rule = Penalties(repetition=1.5, presence=0.8, frequency=0.4, bias=((5, 30.0), (9, -30.0)))
    state = begin_path(rule, PROMPT[:5], VOCAB)
    assert state is not None
    for steps in (direct, late):
        steps.begin(sampler)
    for number, root in enumerate([state, state.after(5, 5, 7), None, state.after(8)]):
        for steps in (direct, late):
            steps.penalize(root)
            steps.start(step(1, plain, 1, 0), [None])
        if number:  # one was in flight while the numbers changed
            check_found(late, direct, rows=1)
    check_found(late, direct, rows=1)
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_noise_of_far_positions_takes_turns_in_the_same_place(
    tiny: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that a step in flight still reads is written to when the step is done."""
    monkeypatch.setattr(step_buffers, "_NOISE_PLACES", 2)
    model = tiny("qwen2", dtype=torch.float32)
    draft, graphs, sampler = draft_of(model), FakeGraphs(), sampled(1)
    plain, kept = model.kv(), model.kv()
    direct, late = OneSequence(LateSteps(draft), plain), captured_steps(draft, kept, graphs)
    for steps in (direct, late):
        steps.begin(sampler)
    for first in range(8):
        for steps in (direct, late):
            steps.start(chain_step(plain, first), [None])
        if first:
            check_found(late, direct, rows=1)
    check_found(late, direct, rows=1)


def chain_step(kv: KVCache, first: int) -> TokenBatch:
    """One row whose position is two places on from that of the row before."""
    position = torch.tensor([2 * first])
    keys = 2 * torch.arange(first + 1)
    allowed = torch.ones((1, first + 1), dtype=torch.bool)
    return TokenBatch(torch.tensor([first]), position, kv.committed + first, allowed, keys)


def test_after_a_step_that_was_interrupted_turns_agree_again(tiny: Callable[..., Tiny]) -> None:
    """The GPU has counted a turn that the host has not."""
    model = tiny("qwen2", dtype=torch.float32)
    draft, graphs = draft_of(model), FakeGraphs()
    plain, kept = model.kv(), model.kv()
    direct, late = OneSequence(LateSteps(draft), plain), captured_steps(draft, kept, graphs)
    late.start(step(0, plain, 2, 0), [None, None])
    late.sequence._buffers.host_turn = 0
    for number in range(3):
        for steps in (direct, late):
            steps.begin(GreedySampler())
            steps.start(step(number, plain, 2, 0), [None, None])
        check_found(late, direct, rows=2)


def test_inputs_of_a_step_in_flight_are_left_alone(tiny: Callable[..., Tiny]) -> None:
    model = tiny("qwen2", dtype=torch.float32)
    kv = model.kv()
    steps = captured_steps(draft_of(model), kv, FakeGraphs())
    for first in range(2):
        steps.start(step(0, kv, 1, first), [None])
    with pytest.raises(AssertionError, match="reused only after its step is done"):
        steps.start(step(0, kv, 1, 2), [None])


def test_the_cache_bounds_what_is_in_view(tiny: Callable[..., Tiny]) -> None:
    model = tiny("qwen2", dtype=torch.float32)
    kv = model.kv()
    steps = captured_steps(draft_of(model), kv, FakeGraphs())
    assert kv.capacity < module._COLUMNS
    steps.start(step(0, kv, 2, 0), [None, None])
    assert np.isfinite(steps.read().scores).all()


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        pytest.param("qwen2", {}, id="qwen2"),
        pytest.param("qwen3", {"depth": 9, "width": 3}, id="qwen3", marks=pytest.mark.slow),
        pytest.param("qwen2", {"depth": 9, "width": 3}, id="qwen2-fixed", marks=pytest.mark.slow),
        pytest.param("qwen3", {}, id="qwen3-free", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, *OTHERS])
def test_a_session_over_captured_steps_answers_as_without_speculation(
    shelf: Shelf, family: str, sampling: str, draft: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = FakeGraphs()
    # What records a graph here sees torch's operations alone.
    torch_product = torch._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(substitute, "int4_product", lambda device, outputs: torch_product)
    monkeypatch.setattr(
        load,
        "make_draft_steps",
        lambda draft, kv, *, most_rows, **_: captured_steps(draft, kv, graphs, most_rows).steps,
    )
    settings = (SAMPLINGS | OTHERS)[sampling]
    with open_tiny(shelf.model(family, tied=True), sampling=settings, draft=draft) as session:
        for prompt in ("Rivers", "Why is the sky blue?"):
            answers = [
                answer_to(session, prompt, 40, plain=plain, request_number=3) for plain in (False, True)
            ]
            assert answers[0].outcome == answers[1].outcome
            check_speculates(session, answers[:1])
    assert graphs.replays > graphs.captures


def test_on_the_cpu_nothing_is_captured(tiny: Callable[..., Tiny]) -> None:
    model = tiny("qwen2")
    found = make_draft_steps(
        draft_of(model), model.kv(), most_rows=2, vocab=VOCAB, device=CPU, reporter=Reporter(note=pytest.fail)
    )
    assert isinstance(found, DirectSteps)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is taken for a GPU, whose memory is the host's."""
    monkeypatch.setattr(
        step_buffers, "MappedTensor", lambda shape, dtype, _device: MappedOnHost(shape, dtype)
    )
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **how: zeros(*shape, **how))
    return torch.device("cuda")


class MappedOnHost:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.host = self.gpu = torch.zeros(shape, dtype=dtype)


def launched(model: Tiny, gpu: torch.device, notes: list[str]) -> object:
    return make_draft_steps(
        draft_of(model),
        model.kv(),
        most_rows=2,
        vocab=VOCAB,
        device=gpu,
        reporter=Reporter(note=notes.append),
    )


def test_on_a_gpu_steps_are_captured(tiny: Callable[..., Tiny], gpu: torch.device, monkeypatch: Any) -> None:
    notes: list[str] = []
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: FakeGraphs())
    assert isinstance(launched(tiny("qwen2"), gpu, notes), CapturedSteps)
    assert not notes


class Refusing(FakeGraphs):
    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error

    def capture(self, run: Any, *, keep: Sequence[Tensor] = ()) -> Any:
        raise self.error


def test_a_gpu_that_cannot_capture_is_reported(
    tiny: Callable[..., Tiny], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason, notes = "operation not permitted when stream is capturing", []
    error = RuntimeError(f"{reason}\nsee the manual")
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: Refusing(error))
    assert isinstance(launched(tiny("qwen2"), gpu, notes), DirectSteps)
    assert notes == [f"draft steps are launched kernel by kernel, which is slower: {reason}"]


def test_a_full_gpu_is_not_taken_for_one_that_cannot_capture(
    tiny: Callable[..., Tiny], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(module, "CudaGraphs", lambda _device: Refusing(error))
    with pytest.raises(torch.OutOfMemoryError):
        launched(tiny("qwen2"), gpu, [])
