"""Timing the machine in a process of its own.

What stand-ins and kernels leave behind ends with that process, so that the budget of the run that follows is the
model's alone, on the CPU as on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.geometry import read_geometry
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes.settings import SubstituteSettings

if TYPE_CHECKING:
    import torch

_START: Final = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import main; main()"
"""The other process imports from where this one does, and not from whatever lies in the working directory."""


class ProbeFailedError(Exception):
    """The machine could not be timed; says why in a few words."""


def probe_apart(
    directory: Path,
    settings: SubstituteSettings,
    device: torch.device,
    reporter: Reporter,
) -> MachineCosts:
    """Costs of the model in `directory` and substitutes of these settings, measured by another process.

    Raises ProbeFailedError if it cannot be started, or ends without a result.
    """
    order = {
        "directory": str(directory),
        "device": device.type,
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
    """Give the order and read what comes back, a JSON object a line, until the process ends."""
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
            continue  # a library's word
        said = json.loads(line)
        if "doing" in said:
            reporter.progress(said["doing"])
        else:
            found = MachineCosts.from_dict(said["costs"])
    return found


def main() -> None:
    """The other process: an order on stdin, progress and costs on stdout."""
    import torch

    from subspec_cli.probe.machine import probe_machine

    order = json.load(sys.stdin)
    overrides = tuple((name, bits) for name, bits in order["overrides"])
    settings = SubstituteSettings(order["bits"], order["optimizer"], overrides)
    checkpoint = open_checkpoint(Path(order["directory"]))
    geometry = read_geometry(checkpoint.config, checkpoint.tensors)
    device = torch.device(order["device"])
    _say({"doing": "timing this machine"})
    reporter = Reporter(progress=lambda doing: _say({"doing": f"timing this machine: {doing}"}))
    costs = probe_machine(geometry, settings, checkpoint, device, reporter)
    _say({"costs": costs.as_dict()})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
