"""Probing the machine in a subprocess.

The memory that dummies and kernels leave behind ends with that process. So the budget of the run that follows is the
model's alone, on the CPU and on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, Final

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.repository import read_repository
from subspec_cli.probe.timed_machine import TimedMachine
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
    rebuilds: bool = False,
) -> TimedMachine:
    """Measure the costs of the model in `directory` and of substitutes with these settings in a subprocess.

    `device` is `cpu` or `cuda`; `rebuilds` times residuals too. Raises ProbeFailedError if the subprocess cannot be
    started or ends without a result.
    """
    order = {
        "directory": str(directory),
        "device": device,
        "bits": settings.bits,
        "optimizer": settings.optimizer,
        "overrides": settings.overrides,
        "rebuilds": rebuilds,
    }
    complaints: deque[str] = deque(maxlen=1)
    try:
        process = subprocess.Popen(  # noqa: S603 - this very module
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ProbeFailedError(str(error)) from error
    with process:
        assert process.stderr is not None
        # Its own thread, so that a full pipe stops nobody. A temporary file would need a place for one.
        listener = Thread(target=complaints.extend, args=(filter(str.strip, process.stderr),), daemon=True)
        listener.start()
        try:
            found = _follow(process, json.dumps(order), reporter)
        except BaseException:
            process.kill()
            raise
        finally:
            listener.join()
    if found is None:
        reason = complaints.pop() if complaints else f"it ended with {process.returncode}"
        raise ProbeFailedError(reason.strip())
    return found


def _follow(process: subprocess.Popen[str], order: str, reporter: Reporter) -> TimedMachine | None:
    """Send the order and read the replies, one JSON object a line, until the process ends.

    Its standard input stays open: its end tells the process that this one has ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(order + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            process.stdin.close()  # it would try to send the rest
        return None
    found = None
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # printed by a library
        said = json.loads(line)
        if "doing" in said:
            reporter.progress(said["doing"])
        else:
            found = TimedMachine.from_dict(said["timed"])
    return found


def main() -> None:
    """Run the subprocess: read an order from stdin, write progress and costs to stdout."""
    order = json.loads(sys.stdin.readline())
    Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from subspec_cli.probe.machine import probe_machine

    overrides = tuple((name, bits) for name, bits in order["overrides"])
    settings = SubstituteSettings(order["bits"], order["optimizer"], overrides)
    checkpoint = open_checkpoint(Path(order["directory"]))
    repository = read_repository(checkpoint)
    checkpoint = replace(checkpoint, tensors=repository.tensors)
    device = torch.device(order["device"])
    _say({"doing": "timing this machine"})
    reporter = Reporter(progress=lambda doing: _say({"doing": f"timing this machine: {doing}"}))
    timed = probe_machine(repository.geometry, settings, checkpoint, device, reporter, order["rebuilds"])
    _say({"timed": timed.as_dict()})


def _end_with_parent() -> None:
    """End this process when the other end of its standard input is gone, however the parent has ended."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
