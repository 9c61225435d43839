"""Who used the processors while something was measured: this process, others, or the host of a virtual machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_STAT: Final = Path("/proc/stat")
_BUSY_COLUMNS: Final = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of a line of /proc/stat; time of guests is part of user."""
_STEAL_COLUMN: Final = 7
_LEAST_CORE_S: Final = 1.0
"""The kernel counts in ticks of 10 ms, so that shares of shorter times say little."""


@dataclass(frozen=True, slots=True)
class MachineUse:
    """Processor time over one or more spans of wall time, on the cores that this process may use."""

    core_s: float = 0.0
    """Wall time times cores: all the time that there was."""
    own_s: float = 0.0
    """Time that this process got."""
    busy_s: float = 0.0
    """Time that all processes got, this one included."""
    steal_s: float = 0.0
    """Time that the host of a virtual machine kept for itself."""

    @property
    def own_share(self) -> float | None:
        """Share of the cores that this process got; None if too little time passed to tell."""
        return self.own_s / self.core_s if self.core_s >= _LEAST_CORE_S else None

    @property
    def others_share(self) -> float | None:
        """Share of the cores that others took, the host's steal included; None if too little time passed."""
        if self.core_s < _LEAST_CORE_S:
            return None
        return max(0.0, self.busy_s - self.own_s + self.steal_s) / self.core_s

    def plus(self, other: MachineUse) -> MachineUse:
        """Use over both spans."""
        return MachineUse(
            self.core_s + other.core_s,
            self.own_s + other.own_s,
            self.busy_s + other.busy_s,
            self.steal_s + other.steal_s,
        )

    def since(self, before: MachineUse) -> MachineUse:
        """Use between two readings of `read_use`."""
        return MachineUse(
            self.core_s - before.core_s,
            self.own_s - before.own_s,
            self.busy_s - before.busy_s,
            self.steal_s - before.steal_s,
        )


NOTHING_USED: Final = MachineUse()


def total_use(uses: Iterable[MachineUse]) -> MachineUse:
    """Use over all spans."""
    total = NOTHING_USED
    for use in uses:
        total = total.plus(use)
    return total


def read_use() -> MachineUse:
    """Read the counters now; only the difference of two readings means anything. Zeros where /proc is absent."""
    try:
        text = _STAT.read_text()
    except OSError:
        return NOTHING_USED
    cores = os.sched_getaffinity(0)
    busy_s, steal_s = cpu_times(text, cores, os.sysconf("SC_CLK_TCK"))
    return MachineUse(time.perf_counter() * len(cores), time.process_time(), busy_s, steal_s)


def cpu_times(stat: str, cores: Iterable[int], ticks_per_s: int) -> tuple[float, float]:
    """Return busy and stolen seconds of some cores, from the text of /proc/stat."""
    names = {f"cpu{core}" for core in cores}
    busy = steal = 0
    for name, *columns in (line.split() for line in stat.splitlines() if line.startswith("cpu")):
        if name in names:
            busy += sum(int(columns[column]) for column in _BUSY_COLUMNS)
            steal += int(columns[_STEAL_COLUMN]) if len(columns) > _STEAL_COLUMN else 0
    return busy / ticks_per_s, steal / ticks_per_s


def read_load_per_core() -> float | None:
    """Return the mean number of processes that ran or waited in the last minute, per core; None if it is unknown."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None
