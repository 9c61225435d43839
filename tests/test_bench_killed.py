"""A benchmark that is killed with SIGKILL: its record holds every question that was done, and is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ["bench", "sample", "-m", "demo", "--limit", "3", "-n", "12"]


@pytest.fixture
def subspec(tmp_path):
    """Start a command line with a home of its own."""
    environment = os.environ | {"SUBSPEC_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def start(*arguments):
        return subprocess.Popen([sys.executable, "-m", "subspec_cli", *arguments], env=environment, **pipes)

    preparing = start("prepare", "demo")
    said = preparing.communicate(timeout=120)[0]
    assert preparing.returncode == 0, said
    return start


@pytest.mark.slow
def test_a_killed_benchmark_loses_the_question_in_work_alone(subspec, tmp_path):
    record = tmp_path / "record.json"
    running = subspec(*BENCH, "--output", str(record))
    deadline, done = time.monotonic() + 120, 0
    while not done and time.monotonic() < deadline and running.poll() is None:
        if record.exists():
            done = len(json.loads(record.read_text())["answers"])
        time.sleep(0.002)
    running.kill()
    said = running.communicate()[0]
    assert running.returncode == -signal.SIGKILL, said
    before = json.loads(record.read_text())
    assert before["interrupted"]
    kept = before["answers"]
    assert 2 <= len(kept) < 6
    assert len(kept) % 2 == 0, "whole questions of two turns each"
    resumed = subspec(*BENCH, "--resume", str(record))
    said = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, said
    after = json.loads(record.read_text())
    assert not after["interrupted"]
    assert after["answers"][: len(kept)] == kept
    assert len(after["answers"]) == 6
