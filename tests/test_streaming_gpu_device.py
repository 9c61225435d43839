"""On a real GPU: streams bring the files' bytes, memory goes back, sessions keep their promise and their budget."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import make_layers
from fakes import LateSteps, OneSequence
from fakes_session import Shelf, answer_to, open_tiny
from test_drafting_captured_steps import SAMPLERS, SIZES, step
from test_modeling_substitute import layer_tensors
from tiny_models import VOCAB, Tiny

from subspec_cli.drafting.captured_steps import make_draft_steps
from subspec_cli.drafting.draft_steps import Feed, Found
from subspec_cli.errors import ResourceError
from subspec_cli.modeling.decoder import DraftDecoder, Head
from subspec_cli.modeling.embedding import table_embedding
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import LayerMath, OutputMath
from subspec_cli.modeling.quantization import quantize_layer
from subspec_cli.modeling.rope import build_rope_tables
from subspec_cli.modeling.substitute import load_substitute
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.reporter import Reporter
from subspec_cli.session.opening import cap_allocator
from subspec_cli.streaming.gpu_layers import read_resident_layer
from subspec_cli.streaming.gpu_streamer import open_gpu_streamer
from subspec_cli.streaming.mapped_memory import gpu_view
from subspec_cli.streaming.pinned_memory import PinnedBuffer, PinRefusedError, pin
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import GIB, MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("pinned", [6, 3, 0])
@pytest.mark.parametrize("slots", [2, 3])
def test_every_pass_brings_the_files_content(tmp_path: Path, pinned: int, slots: int) -> None:
    """Kernels that are slow beside copies that are fast, and the other way round: a race would show."""
    layers, values = make_layers(tmp_path, 6, most=400_000)
    stream = open_gpu_streamer(
        layers,
        pinned_layers=pinned,
        ring_slots=2,
        slots=slots,
        most_bytes=1 << 30,
        device=CUDA,
        reporter=Reporter(),
    )
    slow = torch.ones((2048, 2048), device=CUDA)
    for number in range(20):
        found = {}
        for block in stream.blocks():
            if number % 2:
                slow = (slow @ slow).clamp_(0, 1)
            found |= {name: tensor.clone() for name, tensor in block.items()}
        assert all(torch.equal(found[name].cpu(), values[name]) for name in values)
    counted = stream.counters()
    assert counted.streamed_bytes == 20 * sum(layer.whole.tensor_bytes for layer in layers)
    assert counted.read_time_s > 0
    stream.close()


def test_pinned_memory_is_pinned_until_given_back() -> None:
    buffer = PinnedBuffer(3 * MIB, CUDA)
    assert buffer.tensor.is_pinned()
    assert buffer.tensor.numel() == 3 * MIB
    buffer.release()
    assert buffer.tensor.numel() == 0


def test_a_refused_pin_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA remembers the refusal; a kernel that has nothing to do with it must not fail for it."""
    memory = mmap.mmap(-1, MIB)
    monkeypatch.setattr("subspec_cli.streaming.pinned_memory._map", lambda size_bytes: memory)
    buffer = PinnedBuffer(MIB, CUDA)
    with pytest.raises(PinRefusedError, match="CUDA error"):
        PinnedBuffer(MIB, CUDA)  # pinned already
    assert torch.ones(4, device=CUDA).sum().item() == 4
    buffer.release()


def test_resident_layers_lie_in_a_page_as_in_the_file(tmp_path: Path) -> None:
    (layer, *_), values = make_layers(tmp_path, 2)
    for block, placements in zip(read_resident_layer(layer, CUDA), layer.blocks, strict=True):
        for item in placements:
            tensor = block[item.entry.name]
            assert tensor.data_ptr() % 4096 == item.entry.offset_bytes % 4096
            assert torch.equal(tensor.cpu(), values[item.entry.name])


def test_the_cap_holds() -> None:
    try:
        cap_allocator(device_profile("cuda").context_bytes + 64 * MIB, CUDA)
        torch.cuda.empty_cache()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(128 * MIB, dtype=torch.uint8, device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bfloat16])
def test_kernels_read_pinned_memory_where_it_lies(dtype: torch.dtype) -> None:
    memory = torch.arange(12).to(dtype).view(3, 4).pin_memory()
    seen = gpu_view(memory, CUDA)
    assert seen.device.type == "cuda"
    assert torch.equal(seen.long().cpu(), torch.arange(12).view(3, 4))
    memory.fill_(7)
    assert (seen.long() == 7).all().item()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_captured_draft_steps_are_the_steps_themselves(tiny: Callable[..., Tiny], kind: str) -> None:
    """Sizes come back, so that steps are replayed and not only captured; rounding is all that may differ."""
    model, notes, sampler = tiny("qwen2"), [], SAMPLERS[kind]()
    draft, (plain, kept) = on_gpu(model), (gpu_cache(model), gpu_cache(model))
    made = make_draft_steps(
        draft, kept, most_rows=4, vocab=VOCAB, device=CUDA, reporter=Reporter(note=notes.append)
    )
    assert not notes
    late, direct, first = OneSequence(made, kept), OneSequence(LateSteps(draft), plain), 0
    for steps in (direct, late):
        steps.begin(sampler)
    for number, (rows, feeds) in enumerate(SIZES):
        batch = step(number, plain, rows, first)
        for steps in (direct, late):
            steps.start(batch, [feed and Feed(*feed) for feed in feeds])
        if number:
            check_scores(late.read(), direct.read())
        first += rows
    check_scores(late.read(), direct.read())


def check_scores(ours: Found, theirs: Found) -> None:
    """The best scores of each row; of tokens that are all but equally likely, another may be the best."""
    np.testing.assert_allclose(ours.scores[:, 0], theirs.scores[:, 0], atol=0.1, rtol=0.02)


def test_a_table_in_host_memory_is_gathered_by_the_gpu() -> None:
    table = torch.arange(60_000).bfloat16().view(2000, 30)
    unpin = pin(table, CUDA)
    ids = torch.tensor([3, 1999, 0], device=CUDA)
    assert torch.equal(table_embedding(gpu_view(table, CUDA))(ids).cpu(), table[ids.cpu()])
    unpin()


def on_gpu(model: Tiny) -> DraftDecoder:
    """A draft of dummy substitutes for a tiny model, on the GPU."""
    geometry = model.geometry
    small = tuple({name: tensor.to(CUDA) for name, tensor in layer.items()} for layer in model.math().small)
    ropes = build_rope_tables(
        model.repository.ropes, geometry.arithmetic, positions=64, dtype=model.dtype, device=CUDA
    )
    math_ = LayerMath(geometry, small, ropes)
    settings = SubstituteSettings(4, "minmax")
    layers = [
        load_substitute(math_, n, quantize_layer(layer_tensors(model, n), settings).tensors, settings, CUDA)
        for n in range(geometry.layers)
    ]
    table = model.weights["model.embed_tokens.weight"].to(CUDA)
    output = OutputMath(geometry.arithmetic, model.weights["model.norm.weight"].to(CUDA))
    head = Head(output, table)
    return DraftDecoder(math_, table_embedding(table), head, layers)


def gpu_cache(model: Tiny) -> KVCache:
    geometry = model.geometry
    return KVCache(
        geometry.attention,
        context=0,
        scratch=64,
        dtype=model.dtype,
        device=CUDA,
    )


@pytest.mark.parametrize("resident", [0, 1])
def test_a_session_answers_alike_with_and_without_speculation(shelf: Shelf, resident: int) -> None:
    memory = {"vram_gb": 2.0, "device": "cuda", "resident_layers": resident, "context": 256}
    with open_tiny(shelf.model("qwen2"), memory=memory) as session:
        assert session.description.device == "cuda"
        for prompt in ("Rivers", "Why is the sky blue?"):
            plain = answer_to(session, prompt, 24, plain=True)
            speculative = answer_to(session, prompt, 24)
            if session.description.exactness == "exact":
                assert plain.outcome == speculative.outcome
            assert speculative.stats.streamed_bytes > 0
        assert session.peak_memory_bytes() < 2 * GIB - device_profile("cuda").context_bytes


def test_a_full_gpu_is_an_error_with_figures(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(**_: object) -> torch.Tensor:
        return torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr("subspec_cli.session.load.KVCache", too_large)
    with pytest.raises(ResourceError, match=r"out of device memory while loading .* more were wanted"):
        open_tiny(shelf.model("qwen2"), memory={"vram_gb": 2.0, "device": "cuda"})
