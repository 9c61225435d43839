"""A run in its own process stays within its budget, and has imported everything before its memory is metered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import geometry_in

from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.library_memory import bare_process_bytes
from subspec_cli.units import GIB, MIB

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from subspec_cli.__main__ import main
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.probe.timed_machine import TimedMachine
from subspec_cli.session import machine_costs
from checkpoints import geometry_in

machine_costs.probe_in_subprocess = lambda directory, settings, device, *_rest: TimedMachine(
    assumed_costs(geometry_in(directory), device, link_gb_per_s=0.001, settings=settings), None, 0.0
)
import subspec_cli.streaming.memory_meter as memory_meter
bare = []
begin = memory_meter.MemoryMeter.__init__

def counted(self, device):
    begin(self, device)
    bare.append(set(sys.modules))

memory_meter.MemoryMeter.__init__ = counted
status = main(sys.argv[2:])
assert len(bare) == 1
print(json.dumps(sorted(set(sys.modules) - bare[0])))
sys.exit(status)
"""


def run_alone(*arguments: str) -> tuple[dict[str, Any], list[str]]:
    """The document of `run --json` in a process of its own, and the modules imported after the meter began."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(sys.path), "run", "--json", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert child.returncode == 0, child.stderr
    document, modules = child.stdout.splitlines()
    return json.loads(document), json.loads(modules)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_run_stays_within_its_budget_and_imports_first(shelf, family: str) -> None:
    """For llama, transformers' configuration alone imports 860 modules."""
    model: Path = shelf.model(family, layers=6, hidden=256)
    budget_bytes = 150 * MIB
    document, modules = run_alone(
        *("--model", str(model), "--device", "cpu", "--context", "384"),
        *("--memory-gb", str(budget_bytes / GIB), "--resident-layers", "1"),
        *("--temperature", "1", "--top-p", "0.95", "--max-new-tokens", "24", "word " * 60),
    )
    stats = document["stats"]
    assert stats["streamed_bytes"] > 0
    assert 0 < stats["peak_memory_bytes"] <= stats["budget_bytes"] == budget_bytes
    assert stats["process_peak_bytes"] == stats["bare_process_bytes"] + stats["peak_memory_bytes"]
    assert stats["bare_process_bytes"] <= bare_process_bytes(device_profile("cpu"), geometry_in(model))
    assert len(modules) <= 8, modules
