"""Preparation despite kills, full disks, damaged sources and other processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import bf16, tiny_tensors, write_checkpoint, write_weights
from fakes_store import LAYERS, Quantizer, content, place_of, resolve_model, run

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.errors import BusyError, ExitCode, IntegrityError, ResourceError
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.temp_names import temp_path
from subspec_cli.hub.source_model import ResolvedModel
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes import preparation
from subspec_cli.substitutes.manifest import (
    HEAD_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    layer_file_name,
)
from subspec_cli.substitutes.prepared_model import find_prepared, load_layer

FINISHED = [".lock", HEAD_NAME, *(layer_file_name(layer) for layer in range(LAYERS)), MANIFEST_NAME]


@pytest.fixture(autouse=True)
def subspec_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path) -> ResolvedModel:
    return resolve_model(str(write_checkpoint(tmp_path / "model", layers=LAYERS, shards=2)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stop_at", range(LAYERS))
def test_interrupted_at_each_layer_then_continued_to_the_same_bytes(model, stop_at, error):
    whole = content(run(model).directory)
    place = place_of(model)
    for path in place.iterdir():
        path.unlink()
    with pytest.raises(error):
        run(model, Quantizer(stop_at, error))
    done = [f"layer-{layer:05d}.safetensors" for layer in range(stop_at)]
    assert sorted(content(place)) == sorted([*done, JOURNAL_NAME] if done else [])
    seen, quantizer = [], Quantizer()
    run(model, quantizer, seen=seen)
    assert quantizer.calls == LAYERS - stop_at
    assert seen[-1].reused_layers == stop_at
    assert content(place) == whole


def test_killed_at_every_step_then_continued_to_the_same_bytes(model, monkeypatch):
    """The process dies at each fsync and rename in turn, without cleaning up, as after a SIGKILL."""
    whole = content(run(model).directory)
    place = place_of(model)

    class Killed(BaseException):
        pass

    for step in range(100):
        for path in place.iterdir():
            path.unlink()
        with monkeypatch.context() as patch:
            calls = []

            def die(real, *args, calls=calls, step=step):
                calls.append(1)
                if len(calls) > step:
                    raise Killed
                return real(*args)

            patch.setattr(os, "getpid", lambda: 4_190_001)  # no process has it
            patch.setattr(os, "fsync", partial(die, os.fsync))
            patch.setattr(os, "replace", partial(die, os.replace))
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            try:
                run(model)
            except Killed:
                pass
            else:
                break
        run(model)
        assert content(place) == whole
    assert step == 3 * (2 * (LAYERS + 1) + 1)  # each file is synced, renamed, and its directory synced


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", range(6))
def test_disk_fault_while_remaking_leaves_the_earlier_set_usable(model, monkeypatch, step, number):
    earlier = run(model)
    calls = []

    def fsync(handle, real=os.fsync):
        calls.append(handle)
        if len(calls) > step:
            raise OSError(number, os.strerror(number))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ResourceError, match=errno.errorcode[number]):
            run(model, force=True)
    assert not [name for name in content(earlier.directory) if ".tmp." in name]
    found = find_prepared(model.model_id)
    for layer in range(LAYERS):
        load_layer(found, layer)
    run(model)
    assert sorted(path.name for path in earlier.directory.iterdir()) == sorted(FINISHED)


def test_source_that_changes_meanwhile_gives_no_manifest(model):
    class Meddler(Quantizer):
        def __call__(self, layer, tensors):
            os.utime(model.directory / "model-00001-of-00002.safetensors")
            return super().__call__(layer, tensors)

    with pytest.raises(IntegrityError, match="changed while it was in use"):
        run(model, Meddler())
    assert MANIFEST_NAME not in content(place_of(model))
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 0


def test_damaged_source_shard(model):
    checkpoint = open_checkpoint(model.directory)
    shard = model.directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.safetensors ends at byte"):
        run(model, checkpoint=checkpoint)
    assert MANIFEST_NAME not in content(place_of(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, value):
    tensors = tiny_tensors(layers=LAYERS)
    bias = np.ones(32, np.float32)
    bias[3:5] = value
    write_weights(model.directory, tensors | {"model.layers.0.self_attn.q_proj.bias": bf16(bias)}, shards=2)
    with pytest.raises(IntegrityError, match=r"layers.0.self_attn.q_proj.bias holds 2 values"):
        run(model)
    assert content(place_of(model)) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 511, 32 * 64 - 1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(model, value, place):
    weight = np.ones(64 * 32, np.float32)
    weight[place] = value
    name = "model.layers.0.mlp.gate_proj.weight"
    write_weights(
        model.directory, tiny_tensors(layers=LAYERS) | {name: bf16(weight.reshape(64, 32))}, shards=2
    )
    with pytest.raises(IntegrityError, match=rf"{name} holds 1 values"):
        run(model)


def test_refusals_leave_nothing(model, monkeypatch):
    with pytest.raises(IntegrityError, match="holds 3 layers, its config says 4"):
        run(model, layers=4)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(
        ResourceError, match=r"preparing .* needs 16\.. MiB of disk, .* has 1.00 MiB free"
    ) as caught:
        run(model)
    assert caught.value.exit_code == ExitCode.RESOURCE
    assert not Path(os.environ["SUBSPEC_HOME"]).exists()


def test_refused_remaking_leaves_the_earlier_set_as_it_is(model, monkeypatch):
    before = content(run(model).directory)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(ResourceError, match=r"has 1\.00 MiB free"):
        run(model, force=True)
    assert content(place_of(model)) == before


def test_place_that_is_a_file(model):
    place = place_of(model)
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with pytest.raises(ResourceError, match="EEXIST"):
        run(model)
    assert place.read_text() == "mine"


def test_a_second_preparation_waits_and_finds_it_done(model):
    """One run works. The other reports which process it waits for, makes nothing again and succeeds."""
    notices, seen, quantizer = [], [], Quantizer()
    at_work, go_on = threading.Event(), threading.Event()

    class Slow(Quantizer):
        def __call__(self, layer, tensors):
            at_work.set()
            assert go_on.wait(20)
            return super().__call__(layer, tensors)

    first = threading.Thread(target=run, args=(model, Slow()))
    first.start()
    assert at_work.wait(20)

    def notify(text):
        notices.append(text)
        go_on.set()

    prepared = run(model, quantizer, seen=seen, reporter=Reporter(note=notify))
    first.join()
    place = place_of(model)
    assert notices == [f"waiting: another process (pid {os.getpid()}) is preparing {place}"]
    assert quantizer.calls == 0
    assert seen[-1].reused_layers == LAYERS
    assert prepared == find_prepared(model.model_id)


def test_a_lock_that_is_held_is_an_error_for_who_does_not_wait(tmp_path):
    with (
        directory_lock(tmp_path),
        pytest.raises(BusyError, match=rf"another process \(pid {os.getpid()}\)") as caught,
        directory_lock(tmp_path),
    ):
        pass
    assert caught.value.exit_code == ExitCode.BUSY


def test_lock_of_a_dead_process_does_not_block(model):
    place = place_of(model)
    place.mkdir(parents=True)
    code = (
        "import os, sys; from pathlib import Path; from subspec_cli.files.lock import directory_lock\n"
        "with directory_lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    root = Path(preparation.__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, str(place)], cwd=root, check=False)
    assert killed.returncode == -9
    assert (place / ".lock").read_text().strip().isdigit()
    run(model)


def test_file_system_without_locks(model, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run(model)


def test_lock_that_cannot_be_written(tmp_path):
    with pytest.raises(ResourceError, match="ENOENT"), directory_lock(tmp_path / "no"):
        pass


def test_marks_of_killed_users_are_swept(model):
    place = run(model).directory
    old, young = (place / f"in-use-{pid}-{'0' * 8}" for pid in (1, 2))
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    run(model)
    assert not old.exists()
    assert young.exists()


def test_stale_temporary_files_are_swept(model, monkeypatch):
    place = place_of(model)
    place.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 4_190_001)
        temp_path(place / "layer-00000.safetensors").write_bytes(b"half")
    assert sorted(path.name for path in run(model).directory.iterdir()) == sorted(FINISHED)


class OtherBuild(Quantizer):
    """Gives other bytes of the same size, as another version of a library would."""

    def __call__(self, layer, tensors):
        made, quality = super().__call__(layer, tensors)
        return {name: tensor ^ 1 for name, tensor in made.items()}, quality


@pytest.fixture
def useless_locks(monkeypatch):
    """Two containers on a network disk: flock excludes nobody, and both processes have one id."""
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)
    monkeypatch.setattr(os, "getpid", lambda: 7)


@pytest.mark.usefixtures("useless_locks")
@pytest.mark.parametrize("other", [Quantizer, OtherBuild])
def test_two_preparations_where_locks_do_not_work(model, other):
    """The first stops before its last layer, until the other has ended. Each leaves files that fit its manifest."""
    first_waits, other_done = threading.Event(), threading.Event()
    results = []

    class Slow(Quantizer):
        def __call__(self, layer, tensors):
            if self.calls == LAYERS - 1:
                first_waits.set()
                assert other_done.wait(20)
            return super().__call__(layer, tensors)

    slow = Slow()
    first = threading.Thread(target=lambda: results.append(run(model, slow)))
    first.start()
    assert first_waits.wait(20)
    found = run(model, other(), versions={"torch": "other"})
    for layer in range(LAYERS):
        load_layer(found, layer)
    other_done.set()
    first.join()
    (made,) = results
    assert made == find_prepared(model.model_id)
    for layer in range(LAYERS):
        load_layer(made, layer)
    assert slow.calls == (LAYERS if other is Quantizer else 2 * LAYERS - 1)
    assert sorted(path.name for path in made.directory.iterdir()) == sorted(FINISHED)


@pytest.mark.usefixtures("useless_locks")
def test_two_preparations_side_by_side_where_locks_do_not_work(model):
    """Both write all files at the same time; nobody loses one, and the set that stands is whole."""
    faults, barrier = [], threading.Barrier(2)

    def prepare(force):
        try:
            for _ in range(5):
                barrier.wait(20)
                run(model, force=force)
        except BaseException as error:
            faults.append(error)
            barrier.abort()

    threads = [threading.Thread(target=prepare, args=(force,)) for force in (True, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    found = run(model)
    for layer in range(LAYERS):
        load_layer(found, layer)
    assert sorted(path.name for path in found.directory.iterdir()) == sorted(FINISHED)


@pytest.mark.usefixtures("useless_locks")
def test_another_process_that_never_stops_is_named(model, monkeypatch):
    real = preparation.check_unchanged

    def meddle(checkpoint):
        (place_of(model) / "layer-00001.safetensors").write_bytes(b"other")
        real(checkpoint)

    monkeypatch.setattr(preparation, "check_unchanged", meddle)
    quantizer = Quantizer()
    with pytest.raises(BusyError, match="the disk's locks do not keep it out") as caught:
        run(model, quantizer)
    assert caught.value.hint
    assert quantizer.calls == LAYERS + 2
    assert MANIFEST_NAME not in content(place_of(model))
