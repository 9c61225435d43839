"""Stamps of a user's directory: which changes a run sees, and what they cost."""

from __future__ import annotations

import os
import shutil

import pytest
from checkpoints import write_checkpoint
from fakes_store import LAYERS, Quantizer, resolve_model, run

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.files import regular_file
from subspec_cli.substitutes import source_stamp
from subspec_cli.substitutes.prepared_model import check_pairing, find_prepared, find_prepared_sets
from subspec_cli.substitutes.source_stamp import is_of_source, make_stamp


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    return write_checkpoint(tmp_path / "model", layers=LAYERS, shards=2)


@pytest.fixture
def reads(monkeypatch):
    """The files that were opened to be sampled."""
    found = []
    monkeypatch.setattr(
        source_stamp, "open_regular", lambda path: (found.append(path), regular_file.open_regular(path))[1]
    )
    return found


def put_back_in_place(path, change):
    """Overwrite bytes of a file, and put its modification time back."""
    status = path.stat()
    data = change(path.read_bytes())
    assert len(data) == status.st_size
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_untouched_files_are_not_read(directory, reads):
    stamp = make_stamp(open_checkpoint(directory))
    assert len(reads) == 2
    assert is_of_source(stamp, open_checkpoint(directory))
    assert len(reads) == 2


def test_weights_of_the_same_shape_with_the_old_time_are_not_paired(directory):
    """As after a restore, or in a store where all files have one time."""
    run(resolve_model(str(directory)))
    prepared = find_prepared(str(directory))
    shard = directory / "model-00002-of-00002.safetensors"
    put_back_in_place(shard, lambda data: data[:-300] + data[-150:] + data[-300:-150])
    with pytest.raises(UnsupportedModelError, match="other weights are in place") as caught:
        check_pairing(prepared, open_checkpoint(directory))
    assert "make only the layers that differ: subspec prepare" in caught.value.hint
    quantizer = Quantizer()
    check_pairing(run(resolve_model(str(directory)), quantizer), open_checkpoint(directory))
    assert quantizer.calls == 1


def test_a_copy_that_keeps_times_is_the_same_source(directory, tmp_path, reads):
    prepared = run(resolve_model(str(directory)))
    run(resolve_model(str(directory)), bits=4)
    shutil.copytree(directory, tmp_path / "copy")  # keeps modification times; change times are new
    shutil.rmtree(directory)
    (tmp_path / "copy").rename(directory)
    reads.clear()
    check_pairing(prepared, open_checkpoint(directory))
    assert len(reads) == 2
    again = run(resolve_model(str(directory)), quantizer := Quantizer())
    assert quantizer.calls == 0
    assert again.manifest.source_stamp != prepared.manifest.source_stamp
    assert len(find_prepared_sets(str(directory))) == 2


def test_a_copy_with_new_times_is_told_from_other_weights_and_no_layer_is_made_again(directory):
    prepared = run(resolve_model(str(directory)))
    for path in directory.iterdir():
        os.utime(path)
    with pytest.raises(
        UnsupportedModelError, match=r"were copied or written again .*\(other sizes or times\)"
    ):
        check_pairing(prepared, open_checkpoint(directory))
    check_pairing(run(resolve_model(str(directory)), quantizer := Quantizer()), open_checkpoint(directory))
    assert quantizer.calls == 0


def test_stamps_of_earlier_versions_hold_times_alone(directory):
    checkpoint = open_checkpoint(directory)
    assert is_of_source(checkpoint.stamp, checkpoint)
    assert is_of_source("", checkpoint)
    assert not is_of_source("0" * 16, checkpoint)


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize("half", [0, 1])
def test_few_samples_are_spread_over_all_files(directory, monkeypatch, shard, half):
    monkeypatch.setattr(source_stamp, "_MAX_SAMPLES", 12)
    path = directory / f"model-0000{shard}-of-00002.safetensors"
    assert path.stat().st_size > 8 * 4096
    stamp = make_stamp(open_checkpoint(directory))
    middle = path.stat().st_size // 2

    def change(data):
        kept = data[:middle] if half else data[middle:]
        changed = bytes(byte ^ 1 for byte in (data[middle:] if half else data[4096:middle]))
        return kept + changed if half else data[:4096] + changed + kept

    put_back_in_place(path, change)
    assert not is_of_source(stamp, open_checkpoint(directory))
