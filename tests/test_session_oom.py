"""Out of memory: figures, a hint and an exit status instead of a traceback, whoever ran out and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes_session
import pytest
import torch
from fake_gpu import Machine, copies_first
from fakes_session import answer_to, open_tiny
from tiny_models import CPU

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.repository import read_repository
from subspec_cli.errors import ExitCode, IntegrityError, ResourceError
from subspec_cli.modeling.decoder import TargetDecoder
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.reporter import Reporter
from subspec_cli.session import blocks, load, opening
from subspec_cli.session.found_model import FoundModel
from subspec_cli.session.oom import oom_as_error
from subspec_cli.session.opening import Opening
from subspec_cli.streaming.gpu_streamer import GpuStreamer
from subspec_cli.streaming.memory_meter import MemoryMeter
from subspec_cli.units import GIB

CARD_TEXT = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "70.00 GiB is free. 8.00 GiB allowed; "
)


class Meter(MemoryMeter):
    """A peak of 7.25 GiB."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def peak_bytes(self) -> int:
        return 29 * GIB // 4


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def told(error: Exception) -> ResourceError:
    """What becomes of an error."""
    with pytest.raises(ResourceError) as info:
        run_out(raising(error))
    assert info.value.exit_code == ExitCode.RESOURCE
    return info.value


def run_out(work: Callable[[], Any]) -> None:
    with oom_as_error("loading the model", budget_bytes=8 * GIB, meter=Meter()):
        work()


def test_a_full_gpu_is_told_with_budget_peak_and_what_was_wanted() -> None:
    found = told(torch.cuda.OutOfMemoryError(CARD_TEXT))
    assert found.message == (
        "out of device memory while loading the model (1.50 GiB more were wanted): "
        "the budget is 8.00 GiB, 7.25 GiB were taken at most"
    )
    assert "--context" in found.hint
    assert "--vram-gb" in found.hint


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_allocations_past_the_allocator_are_told_too(text: str) -> None:
    assert told(RuntimeError(text)).message.startswith("out of device memory while loading the model: ")


def test_the_hosts_own_allocator_is_told_with_its_bytes() -> None:
    with pytest.raises(
        ResourceError, match=r"^out of host memory while loading the model \(1024\.0 TiB more"
    ):
        run_out(lambda: torch.empty(1 << 50, dtype=torch.uint8))
    assert told(MemoryError()).message.startswith("out of host memory while loading the model: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), IntegrityError("torn"), KeyboardInterrupt()]
)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as info:
        run_out(raising(error))
    assert info.value is error


def test_opening_tells_a_shortage(shelf: fakes_session.Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "cache_for", raising(torch.cuda.OutOfMemoryError(CARD_TEXT)))
    with pytest.raises(ResourceError, match=r"while loading the model .*budget is 1\.00 GiB"):
        open_tiny(shelf.model("llama"))


def test_answering_tells_a_shortage_and_the_session_lives_on(
    shelf: fakes_session.Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(shelf.model("llama")) as session:
        before = answer_to(session, "Rivers", 8).outcome
        with monkeypatch.context() as patch:
            patch.setattr(TargetDecoder, "begin", raising(torch.cuda.OutOfMemoryError(CARD_TEXT)))
            with pytest.raises(ResourceError, match=r"while answering \(1\.50 GiB more were wanted\)"):
                answer_to(session, "Rivers", 8)
        assert answer_to(session, "Rivers", 8).outcome == before


def test_the_gpu_cap_leaves_out_what_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 GiB on a GPU of 24, all but the context may be reserved."""
    capped = {}
    monkeypatch.setattr(opening, "total_bytes", lambda _device: 24 * GIB)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, capped_device: capped.update({capped_device.type: share * 24 * GIB}),
    )
    opening.cap_allocator(8 * GIB, torch.device("cuda"))
    assert capped["cuda"] == pytest.approx(8 * GIB - device_profile("cuda").context_bytes)
    opening.cap_allocator(8 * GIB, CPU)
    assert list(capped) == ["cuda"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A simulated GPU for the loader's part in streaming."""
    return Machine(copies_first).install(monkeypatch)


def opening_for(directory: Path, streamed: tuple[int, ...], notes: list[str]) -> Opening:
    """An opening on a GPU, of a model of three layers."""
    checkpoint = open_checkpoint(directory)
    geometry = read_repository(checkpoint).geometry
    resident = tuple(layer for layer in range(geometry.layers) if layer not in streamed)
    nothing: Any = None
    plan = OffloadPlan(
        device="cuda",
        budget_bytes=GIB,
        context=64,
        resident=resident,
        shared=(),
        streamed=streamed,
        pinned_layers=streamed,
        ring_slots=0,
        slots=2,
        drafts=False,
        substitute_bits=4,
        draft_head_bits=16,
        embedding="tied",
        tree_nodes=16,
        shadow_rows=0,
        draft_rows=8,
        prompt_rows=512,
        company_rows=0,
        lines=(),
        host_lines=(),
        streamed_bytes_per_pass=0,
        prediction=nothing,
        reason=nothing,
        fits=False,
    )
    found = FoundModel(nothing, checkpoint, read_repository(checkpoint))
    return Opening(found, plan, nothing, torch.device("cuda"), Reporter(note=notes.append))


@pytest.mark.parametrize("free_layers", [3, 1.5])
def test_for_a_gpu_layers_are_pinned_as_far_as_host_memory_goes(
    shelf: fakes_session.Shelf, gpu: Machine, monkeypatch: pytest.MonkeyPatch, free_layers: float
) -> None:
    """With room for fewer, the files are read on, and whether they changed is asked before every token."""
    notes: list[str] = []
    opening = opening_for(shelf.model("llama"), (0, 2), notes)
    layouts = [blocks.layer_layout(opening.found.checkpoint, layer) for layer in (0, 2)]
    layer_bytes = layouts[0].whole.buffer_bytes
    free_bytes = int(free_layers * (layer_bytes + 2 * 4096) / blocks._PINNED_SHARE)
    monkeypatch.setattr(blocks, "available_bytes", lambda _device: free_bytes)
    streamer = blocks.open_streamer(opening)
    assert isinstance(streamer, GpuStreamer)
    assert streamer.reads_files is (free_layers < 2)
    assert [note.partition(" ")[0] for note in notes] == (["pinned"] if free_layers < 2 else [])
    asked: list[object] = []
    monkeypatch.setattr(load, "check_unchanged", asked.append)
    load.source_check(opening, TargetBlocks(3, {}, streamer))()
    assert bool(asked) is (free_layers < 2)
    names = [name for block in streamer.blocks() for name in block]
    assert names == [entry.name for layout in layouts for block in layout.blocks for entry in _entries(block)]
    streamer.close()
    assert not gpu.pinned


def _entries(block: Any) -> list[Any]:
    return [item.entry for item in block]
