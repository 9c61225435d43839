"""The head's file: what prepare writes of the vocabulary table, what a rerun adds, and what a run loads."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_checkpoint
from fakes_store import LAYERS, Quantizer, content, place_of, quantize_head, resolve_model, run
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.geometry import EMBEDDING, HEAD
from subspec_cli.checkpoint.safetensors_header import TensorEntry, read_header
from subspec_cli.errors import IntegrityError
from subspec_cli.modeling import quantization
from subspec_cli.modeling.substitute import Int4Linear, load_table, low_bit_table, unpack_codes
from subspec_cli.substitutes import head_file
from subspec_cli.substitutes.head_file import head_entry, head_file_bytes, read_head, write_head
from subspec_cli.substitutes.integrity import Verifier
from subspec_cli.substitutes.inventory import list_stored
from subspec_cli.substitutes.manifest import HEAD_NAME, JOURNAL_NAME, MANIFEST_NAME, read_manifest
from subspec_cli.substitutes.prepared_model import PreparedModel, find_prepared
from subspec_cli.substitutes.repair import drop_damaged
from subspec_cli.substitutes.settings import substitute_head_bytes

VOCAB, HIDDEN = 208, 128
"""Three pieces of 64 rows, and one of 16."""


@pytest.fixture(autouse=True)
def small_pieces(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(head_file, "_PIECE_WEIGHTS", 64 * 32)


@pytest.fixture
def model(tmp_path):
    return resolve_model(str(write_checkpoint(tmp_path / "model", layers=LAYERS, shards=2)))


def table_in(directory, dtype=torch.bfloat16, **changes) -> tuple[torch.Tensor, TensorEntry]:
    """A random table in a file of its own, and its entry."""
    table = torch.randn((VOCAB, HIDDEN), generator=torch.Generator().manual_seed(0)).to(dtype)
    table.flatten()[list(changes.get("places", []))] = float("nan")
    directory.mkdir()
    save_file({"other": table[:3].clone(), HEAD: table}, directory / "weights.safetensors")
    return table, next(e for e in read_header(directory / "weights.safetensors").entries if e.name == HEAD)


def written(directory, entry, quantizer=None):
    return write_head(directory, entry, quantizer or quantization.quantize_head, torch.bfloat16)[0]


def stored_head(model, directory, file) -> PreparedModel:
    """A set whose head is this file."""
    return PreparedModel(directory, replace(run(model).manifest, head=file))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pieces_hold_what_quanto_makes_of_the_whole_table(tmp_path, dtype):
    table, entry = table_in(tmp_path / "m", dtype)
    file = written(tmp_path / "m", entry)
    data = (tmp_path / "m" / HEAD_NAME).read_bytes()
    assert file.size_bytes == len(data) == head_file_bytes((VOCAB, HIDDEN))
    found = load_safetensors(data)
    assert sorted(found) == [
        f"{row:07d}.{part}" for row in (0, 64, 128, 192) for part in ("codes", "scale", "shift")
    ]
    whole, quality = quantization.quantize_head(table.bfloat16())
    for part in ("scale", "shift"):
        assert torch.equal(torch.cat([found[name] for name in sorted(found) if part in name]), whole[part])
    codes = torch.cat([unpack_codes(found[name], 4) for name in sorted(found) if "codes" in name])
    assert torch.equal(codes, unpack_codes(whole["codes"], 4))
    assert file.quality.sqnr_db == pytest.approx(quality.sqnr_db, abs=1e-6)
    assert 15 < quality.sqnr_db < 25


def test_a_loaded_table_multiplies_as_the_stored_one(tmp_path, model):
    table, entry = table_in(tmp_path / "m")
    prepared = stored_head(model, tmp_path / "m", written(tmp_path / "m", entry))
    loaded = load_table(read_head(prepared, (VOCAB, HIDDEN)), (VOCAB, HIDDEN), torch.device("cpu"))
    rows = torch.randn((3, HIDDEN), generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = (rows.float() @ table.float().T).flatten()
    made_at_load = low_bit_table(table)
    assert isinstance(made_at_load, Int4Linear)
    for linear in (loaded, made_at_load):  # what a set without a head gets
        error = linear(rows).float().flatten() - exact
        assert 100 < exact.square().sum() / error.square().sum() < 1000  # 20 to 30 dB
    assert loaded.packed.shape == made_at_load.packed.shape


@pytest.mark.parametrize("hidden", [128, 192, 160])
def test_the_plan_counts_the_bytes_that_are_held(hidden):
    """With smaller groups there are more scales."""
    table = low_bit_table(torch.ones((VOCAB, hidden)).bfloat16())
    held_bytes = table.packed.nbytes + table.scales_and_zeros.nbytes
    assert held_bytes == substitute_head_bytes(SimpleNamespace(vocab=VOCAB, hidden=hidden))


def test_no_more_than_a_piece_is_in_memory_at_a_time(tmp_path):
    _, entry = table_in(tmp_path / "m")
    seen = []

    def watch(rows):
        seen.append(len(rows))
        return quantization.quantize_head(rows)

    written(tmp_path / "m", entry, quantizer=watch)
    assert seen == [64, 64, 64, 16]


def test_a_value_that_is_not_finite_leaves_no_file(tmp_path):
    _, entry = table_in(tmp_path / "m", places=[5, 70 * HIDDEN])
    with pytest.raises(IntegrityError, match=r"lm_head.weight holds 1 values"):
        written(tmp_path / "m", entry)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["weights.safetensors"]


def test_a_stored_head_is_taken_before_the_embedding_and_odd_shapes_are_left_out():
    def entry(name, *shape):
        return TensorEntry(name, "BF16", shape, None, 0, 2 * shape[0] * shape[1])

    tied, head = entry(EMBEDDING, 256, 32), entry(HEAD, 256, 32)
    assert head_entry({EMBEDDING: tied}) is tied
    assert head_entry({EMBEDDING: tied, HEAD: head}) is head
    assert head_entry({EMBEDDING: entry(EMBEDDING, 250, 32)}) is None


# --- preparing --------------------------------------------------------------------------------------------------


def test_it_is_the_last_file_and_a_kill_in_it_loses_it_alone(model):
    whole = content(run(model).directory)
    for path in place_of(model).iterdir():
        path.unlink()
    calls = []

    def die(rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quantize_head(rows)

    with pytest.raises(KeyboardInterrupt):
        run(model, head_quantizer=die)
    assert sorted(content(place_of(model))) == sorted(
        whole.keys() - {HEAD_NAME, MANIFEST_NAME} | {JOURNAL_NAME}
    )
    quantizer, seen = Quantizer(), []
    run(model, quantizer, seen=seen)
    assert quantizer.calls == 0
    assert [state.done_bytes - state.reused_bytes for state in seen] == [0] * LAYERS + [256 * 32 * 2]
    assert content(place_of(model)) == whole


def as_format_2(prepared, **changes) -> None:
    """Make of a set what an earlier version wrote."""
    (prepared.directory / HEAD_NAME).unlink()
    path = prepared.directory / MANIFEST_NAME
    fields = json.loads(path.read_text()) | {"format_version": 2} | changes
    del fields["head"]
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("versions", [{"torch": "2.13.0"}, {"torch": "2.12.0"}])
def test_an_older_set_is_usable_and_gets_its_head_alone(model, versions):
    prepared = run(model)
    whole = content(prepared.directory)
    as_format_2(prepared, library_versions=versions)
    assert find_prepared(model.model_id).manifest.head is None
    assert [stored.state for stored in list_stored()] == ["complete"]
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 0
    assert content(prepared.directory) == whole


def test_a_head_that_no_kernel_takes_is_left_out_and_told(tmp_path):
    model = resolve_model(str(write_checkpoint(tmp_path / "odd", hidden=48)))
    notices = []
    prepared = run(model, notices=notices)
    assert prepared.manifest.head is None
    assert HEAD_NAME not in content(prepared.directory)
    assert notices == ["no 4-bit kernel takes the shape of the head, so the draft will use the 16-bit head"]
    quantizer = Quantizer()
    assert run(model, quantizer) == prepared
    assert quantizer.calls == 0


# --- damage -----------------------------------------------------------------------------------------------------


def flip(path, offset) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def findings():
    (stored,) = list_stored()
    return stored, Verifier([stored], lambda state: None).verify(stored)


@pytest.mark.parametrize("offset", [3, 20, 1000, -1])
def test_a_flipped_bit_is_found_when_loaded_and_verified_and_is_repaired(model, offset):
    prepared = run(model)
    whole = content(prepared.directory)
    assert len(list(read_head(prepared, (256, 32)))) == 4
    flip(prepared.directory / HEAD_NAME, offset)
    with pytest.raises(IntegrityError) as caught:
        list(read_head(prepared, (256, 32)))
    assert "models verify" in caught.value.hint
    stored, found = findings()
    assert [item.path.name for item in found] == [HEAD_NAME]
    drop_damaged(stored, found)
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 0
    assert content(prepared.directory) == whole
    assert findings()[1] == []


def test_a_table_of_another_shape_is_refused(model):
    with pytest.raises(IntegrityError, match=r"head\.safetensors does not hold a table of 512 x 32"):
        list(read_head(run(model), (512, 32)))


def test_a_flipped_bit_in_the_16_bit_table_is_found(model):
    prepared = run(model)
    entry = open_checkpoint(model.directory).tensors[EMBEDDING]
    status = entry.path.stat()
    flip(entry.path, entry.offset_bytes + 9)
    os.utime(entry.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (found,) = findings()[1]
    assert found.what == "wrong SHA-256 of the 16-bit head"
    assert found.expected == prepared.manifest.head.source_sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../x"}, "names '../../x' as the file of the head"),
        ({"sha256": "a" * 63}, "a size or a hash that cannot be, at the head"),
        ({"size_bytes": 0}, "a size or a hash"),
        ({"quality": {"q": {}}}, "unknown keys: 'q'"),
        ({"layer": 3}, "unknown keys: 'layer'"),
    ],
)
def test_its_record_is_strict(model, change, message):
    prepared = run(model)
    path = prepared.directory / MANIFEST_NAME
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"head": fields["head"] | change}))
    with pytest.raises(IntegrityError, match=message):
        read_manifest(path)
