"""Probing the machine in a subprocess.

The memory that dummies and kernels leave behind ends with that process. So the budget of the run that follows is the
model's alone, on the CPU and on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.repository import read_repository
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes.settings import SubstituteSettings

_START: Final = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import main; main()"
"""The subprocess imports from where this process does, and not from the working directory."""


class ProbeFailedError(Exception):
    """The machine could not be timed; the text says why in a few words."""


def probe_in_subprocess(
    directory: Path,
    settings: SubstituteSettings,
    device: str,
    reporter: Reporter,
) -> MachineCosts:
    """Measure the costs of the model in `directory` and of substitutes with these settings in a subprocess.

    `device` is `cpu` or `cuda`. Raises ProbeFailedError if the subprocess cannot be started or ends without a result.
    """
    order = {
        "directory": str(directory),
        "device": device,
        "bits": settings.bits,
        "optimizer": settings.optimizer,
        "overrides": settings.overrides,
    }
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            process = subprocess.Popen(  # noqa: S603 - this very module
                [sys.executable, "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
        except OSError as error:
            raise ProbeFailedError(str(error)) from error
        with process:
            try:
                found = _follow(process, json.dumps(order), reporter)
            except BaseException:
                process.kill()
                raise
        if found is None:
            complaints.seek(0)
            lines = complaints.read().splitlines() or [f"it ended with {process.returncode}"]
            raise ProbeFailedError(lines[-1])
    return found


def _follow(process: subprocess.Popen[str], order: str, reporter: Reporter) -> MachineCosts | None:
    """Send the order and read the replies, one JSON object a line, until the process ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as orders:
            orders.write(order)
    except BrokenPipeError:
        return None
    found = None
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # printed by a library
        said = json.loads(line)
        if "doing" in said:
            reporter.progress(said["doing"])
        else:
            found = MachineCosts.from_dict(said["costs"])
    return found


def main() -> None:
    """Run the subprocess: read an order from stdin, write progress and costs to stdout."""
    import torch

    from subspec_cli.probe.machine import probe_machine

    order = json.load(sys.stdin)
    overrides = tuple((name, bits) for name, bits in order["overrides"])
    settings = SubstituteSettings(order["bits"], order["optimizer"], overrides)
    checkpoint = open_checkpoint(Path(order["directory"]))
    repository = read_repository(checkpoint)
    checkpoint = replace(checkpoint, tensors=repository.tensors)
    device = torch.device(order["device"])
    _say({"doing": "timing this machine"})
    reporter = Reporter(progress=lambda doing: _say({"doing": f"timing this machine: {doing}"}))
    costs = probe_machine(repository.geometry, settings, checkpoint, device, reporter)
    _say({"costs": costs.as_dict()})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
