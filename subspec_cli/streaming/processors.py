"""The processors that this process may use, and the code that they can run: read from the system, without torch."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from subspec_cli.streaming.cgroup import ROOT, processor_quota

_VECTOR_PREFIXES: Final = ("sse4", "fma", "avx", "amx", "asimd", "sve", "bf16")


@dataclass(frozen=True, slots=True)
class Processors:
    """What one process may use of a machine."""

    cores: int
    """Logical processors that the scheduler may choose."""
    physical_cores: int
    """Of them, those that share no execution units: as many threads as PyTorch starts on x86."""
    quota: float | None
    """Processors' worth of time that a container or a service may take; None if it is not limited."""

    @property
    def threads(self) -> int:
        """Threads that can work at the same time. With more, each waits for others that the quota has stopped."""
        return self.physical_cores if self.quota is None else min(self.physical_cores, math.ceil(self.quota))


def usable_processors(root: Path = ROOT, allowed: Set[int] | None = None) -> Processors:
    """Read what this process may use; `allowed` are the processors of its affinity mask."""
    if allowed is None:
        has_mask = hasattr(os, "sched_getaffinity")
        allowed = os.sched_getaffinity(0) if has_mask else set(range(os.cpu_count() or 1))
    return Processors(
        len(allowed), len({_siblings(root, number) for number in allowed}), processor_quota(root)
    )


def processor_model(root: Path = ROOT) -> tuple[str, list[str]]:
    """Return the name of the processor, and its vector instructions, of which a virtual machine may hide some."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = values.get("model name") or platform.processor() or platform.machine()
    flags = values.get("flags", values.get("Features", "")).split()
    return name, sorted(flag for flag in flags if flag.startswith(_VECTOR_PREFIXES))


def gpu_models(root: Path = ROOT) -> list[str]:
    """Return the models of the NVIDIA GPUs that the driver reports."""
    return sorted(
        line.partition(":")[2].strip()
        for path in root.glob("proc/driver/nvidia/gpus/*/information")
        for line in path.read_text(errors="replace").splitlines()
        if line.startswith("Model:")
    )


def _siblings(root: Path, number: int) -> str:
    try:
        return (root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)
