"""A short form of the soak: a few kills of the real command, over a model that takes a second to serve."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from fake_hub import FakeHub, running

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak_prepare.py"
_spec = importlib.util.spec_from_file_location("soak_prepare", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
sys.modules["soak_prepare"] = script  # dataclasses look their module up there
_spec.loader.exec_module(script)


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path):
    model = write_checkpoint(tmp_path / "model", hidden=256, shards=3)
    (tmp_path / "work").mkdir()
    result = script.soak(model, tmp_path / "work", kills=3, span_s=0.8, rate=0.1e6, seed=3, limit_s=30)
    assert result.kills == 3
    assert result.moments["with files half there"] >= 2
    assert result.is_identical
    assert result.is_clean
    assert result.sent_bytes <= result.model_bytes + 3 * 4 * (64 << 10), "what was on its way at a kill"


@pytest.mark.parametrize(
    ("number", "status", "told"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_f51_a_signal_ends_it_at_once_and_what_came_is_kept(tmp_path, number, status, told):
    model = write_checkpoint(tmp_path / "model", hidden=256, shards=3)
    hub = FakeHub({path.name: path.read_bytes() for path in model.iterdir()})
    hub.bytes_per_s = 0.2e6
    with running(hub):
        environment = script.child_environment(hub.url, tmp_path / "work")
        process = subprocess.Popen(
            script.command(),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in a shell's background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while sum(name.endswith(".safetensors") for name, _ in hub.ranges) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        asked_s = time.monotonic()
        errors = process.communicate(timeout=20)[1]
        assert time.monotonic() - asked_s < 5
    assert process.returncode == status, errors
    assert errors.splitlines()[-1] == f"subspec: {told}"
    partials = list((tmp_path / "work").rglob("*.incomplete"))
    assert sum(path.stat().st_size for path in partials) >= 3 * 256 << 10
    assert not list((tmp_path / "work").rglob("*.tmp.*"))
    assert not list((tmp_path / "work").rglob("manifest.json"))
