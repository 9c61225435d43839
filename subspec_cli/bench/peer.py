"""A peer: the library's own offload (transformers with accelerate) answers the same turns under the same budget.

It runs in a subprocess of its own, which holds its weights while this process holds ours. One of both computes at a
time. Weights that the peer leaves on disk are mapped files, so the system's page cache serves them where memory is
left. Then its speed is the one of memory, not of the link, and means nothing beside ours.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Final

from subspec_cli.bench.answers import ArmAnswer, PeerAnswer
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.metrics import GenerationStats
from subspec_cli.probe.machine_use import MachineUse
from subspec_cli.units import printable

PEER_MODULE: Final = "subspec_cli.bench.peer_child"
_START: Final = (
    "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_module(sys.argv[1], run_name='__main__')"
)
"""The subprocess imports from where this process does, and not from the working directory."""


@dataclass(frozen=True, slots=True)
class PeerOrder:
    """What the peer is to load."""

    directory: str
    """The model's own files."""
    device: str
    budget_bytes: int
    host_bytes: int
    """Host memory for weights that the device does not hold; on the CPU the budget is the host's."""
    threads: int


class Peer:
    """A loaded peer, which answers one prompt at a time."""

    def __init__(self, process: subprocess.Popen[str], order: PeerOrder, complaints: deque[str]) -> None:
        self._process = process
        self._complaints = complaints
        self.about: dict[str, Any] = self._ask(dataclasses.asdict(order))
        """Version, how many bytes it streams for each token, and where its layers are."""

    def answer(self, prompt: Sequence[int], *, limit: int, end_ids: Sequence[int]) -> PeerAnswer:
        """Answer greedily. Raises ResourceError if the peer has ended."""
        said = self._ask({"prompt": list(prompt), "limit": limit, "end_ids": list(end_ids)})
        self.about["peak_bytes"] = said["peak_bytes"]
        tokens = tuple(said["token_ids"])
        stats = GenerationStats(
            prompt_tokens=len(prompt),
            prefilled_tokens=len(prompt),
            prefill_passes=1,
            new_tokens=len(tokens),
            ttft_s=said["ttft_s"],
            decode_time_s=said["decode_s"],
            passes=len(tokens) - 1,
        )
        return PeerAnswer(
            ArmAnswer(
                tokens, "", "length" if len(tokens) == limit else "stop", stats, MachineUse(**said["use"])
            ),
            read_bytes=said["read_bytes"],
            streamed_bytes=self.about["streamed_bytes_per_token"] * len(tokens),
        )

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # others are printed by a library
                said: dict[str, Any] = json.loads(line)
                return said
        status = self._process.wait()
        why = printable(self._complaints[-1].strip())[:300] if self._complaints else f"it ended with {status}"
        raise ResourceError(f"accelerate failed: {why}", "leave out --peer, or give a larger budget")


def check_peer(*, temperature: float) -> None:
    """Raise UsageError if accelerate is not installed, or if answers are sampled, which it would do its own way."""
    if temperature > 0:
        raise UsageError("--peer answers greedily alone", "add --temperature 0")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            "--peer accelerate takes accelerate, which is not installed", "pip install 'subspec-cli[peer]'"
        )


@contextmanager
def running_peer(order: PeerOrder, *, module: str = PEER_MODULE) -> Iterator[Peer]:
    """Start a peer and end it afterwards.

    Raises ResourceError if it cannot be started, or cannot load the model.
    """
    complaints: deque[str] = deque(maxlen=1)
    try:
        process = subprocess.Popen(  # noqa: S603 - a module of this package
            [sys.executable, "-c", _START, module, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ResourceError(f"accelerate cannot be started: {error}") from error
    assert process.stderr is not None
    # Its own thread, so that a full pipe stops nobody.
    listener = Thread(target=complaints.extend, args=(filter(str.strip, process.stderr),), daemon=True)
    listener.start()
    try:
        yield Peer(process, order, complaints)
    finally:
        process.kill()
        listener.join()
        with suppress(BrokenPipeError):
            process.__exit__(None, None, None)
