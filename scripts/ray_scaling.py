"""Simulate a job over up to eight replicas: the dispatcher is the real one, the replicas are measured figures.

python scripts/ray_scaling.py OUT.jsonl [--start-s 1.5] [--load-s 5] [--call-s 0.001] [--write-s 0.0006] [--lines 512]

OUT.jsonl is the result of `subspec batch --resident-layers 0` in one process: the passes of its answers are taken as
they are, in turn, and the times of a pass as medians. Three cases: every replica with a machine and a disk of its
own, the same with a replica killed in the middle, and all on one disk. Efficiency is one replica's time over the
workers' times together.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from subspec_cli.planning.costs import overlapped_s
from subspec_cli.serving.dispatch import Answered, Dispatcher, Event, Lost, Ready
from subspec_cli.serving.job import JobLine
from subspec_cli.serving.line_answers import LineResult

Action = Callable[[], Event | None]
WORKERS = (1, 2, 4, 8)
_PARALLEL = 4
_REPORT_S = 1.0
"""As in `subspec_cli.serving.replica`."""


@dataclass(frozen=True)
class Figures:
    """What was measured."""

    passes: tuple[int, ...]
    """Passes of each answer, that over the prompt included."""
    link_s: float
    """Link time of one pass, alone on the disk."""
    compute_s: float
    """Compute time that overlaps with it."""
    draft_s: float
    """Time of drafting beside them."""
    start_s: float
    """From the command to a process that can load a model."""
    load_s: float
    call_s: float
    """From a call to its result, without the work."""
    write_s: float
    """To write a record and have it on the disk."""

    def pass_s(self, sharers: int) -> float:
        """Seconds of a pass while so many replicas read the same disk."""
        return self.draft_s + overlapped_s(self.link_s * sharers, self.compute_s)


def figures_in(path: Path, args: argparse.Namespace) -> Figures:
    """Read the passes and their times from a job's records."""
    bodies = [json.loads(line)["response"]["body"] for line in path.read_text().splitlines()]
    choices = [choice for body in bodies for choice in body.get("subspec", {}).get("choices", [])]
    timed = [each for each in choices if each["passes"] > 1]
    if not timed:
        raise SystemExit(f"{path}: no answer has more than one pass")

    def median(name: str) -> float:
        return statistics.median(each[name] / each["passes"] for each in timed)

    link_s = statistics.median(
        each["link_busy_share"] * each["decode_time_s"] / each["passes"] for each in timed
    )
    return Figures(
        tuple(each["passes"] + 1 for each in choices),
        link_s,
        median("verify_time_s") - median("wait_time_s"),
        median("draft_time_s"),
        args.start_s,
        args.load_s,
        args.call_s,
        args.write_s,
    )


@dataclass
class Replica:
    """A replica that has loaded the model."""

    waiting: deque[int] = field(default_factory=deque)
    """Lines without a place."""
    places: dict[int, int] = field(default_factory=dict)
    """Passes that are left, by line."""
    calls: deque[list[int]] = field(default_factory=deque)
    """Calls that have not begun."""
    began_s: float | None = None
    """When the call under way began; None between calls."""
    done: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SimulatedFacts:
    """What a replica says of itself."""

    parallel: int = _PARALLEL

    def check_like(self, _other: object) -> None:
        """All are alike."""


class Simulation:
    """A clock, the events to come, and replicas. It is the dispatcher's pool, its job and its results."""

    done = 0
    """Records that were there before."""

    def __init__(self, figures: Figures, lines: int, *, one_disk: bool, death_s: float | None) -> None:
        self.figures = figures
        self.identity = {"seed": 0}
        self.lines = lines
        self.one_disk = one_disk
        self.now_s = 0.0
        self.busy_s = 0.0
        """Time in passes, of all replicas."""
        self.lost_passes = 0
        self.ready: dict[int, Replica] = {}
        self.loading: set[int] = set()
        self._order = itertools.count()
        self._heap: list[tuple[float, int, int, int, Action]] = []
        """Time, order, replica and its life, and what happens."""
        self._lives = dict.fromkeys(range(max(WORKERS)), 0)
        """Times that each replica died: what a dead one would do does not happen."""
        if death_s is not None:
            self._at(death_s, 0, partial(self._die, 0))

    # The job and its results.

    def __iter__(self) -> Iterator[JobLine]:
        return (JobLine(number, None, None, None) for number in range(self.lines))

    def has(self, _line: object) -> bool:
        """No record is there before."""
        return False

    def write(self, _record: object) -> None:
        """Writing takes the command's time, in which it does nothing else."""
        self.now_s += self.figures.write_s

    # The pool.

    def start(self, replica: int) -> None:
        """A process, then the model; on one disk those that load read it one after another."""
        ahead = len(self.loading) if self.one_disk else 0
        self.loading.add(replica)
        load_s = self.figures.start_s + self.figures.load_s * (1 + ahead)
        self._at(self.now_s + load_s, replica, partial(self._loaded, replica))

    def work(self, replica: int, lines: list[JobLine], _seed: int) -> None:
        """A call is on its way."""
        at_s = self.now_s + self.figures.call_s / 2
        self._at(at_s, replica, partial(self._called, replica, at_s, [line.number for line in lines]))

    def events(self) -> list[Event]:
        """Let time pass until the command sees something."""
        while True:
            at_s, _, replica, life, action = heapq.heappop(self._heap)
            self.now_s = max(self.now_s, at_s)
            if life == self._lives[replica] and (event := action()) is not None:
                return [event]

    def _at(self, at_s: float, replica: int, action: Action) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), replica, self._lives[replica], action))

    def _loaded(self, replica: int) -> Event:
        self.loading.discard(replica)
        self.ready[replica] = Replica()
        return Ready(replica, SimulatedFacts())  # type: ignore[arg-type]

    def _called(self, replica: int, at_s: float, numbers: list[int]) -> None:
        state = self.ready[replica]
        state.calls.append(numbers)
        if state.began_s is None:
            self._begin(replica, at_s)

    def _begin(self, replica: int, at_s: float) -> None:
        state = self.ready[replica]
        state.began_s = at_s
        state.waiting.extend(state.calls.popleft())
        self._next_pass(replica, at_s)

    def _next_pass(self, replica: int, at_s: float) -> None:
        """Run a pass, or end the call if a line is done, a second is over or nothing is left."""
        state = self.ready[replica]
        assert state.began_s is not None
        if state.done or at_s > state.began_s + _REPORT_S or not (state.places or state.waiting):
            self._at(at_s + self.figures.call_s / 2, replica, partial(_answered, replica, state.done))
            state.done, state.began_s = [], None
            if state.calls:
                self._begin(replica, at_s)
            return
        while state.waiting and len(state.places) < _PARALLEL:
            line = state.waiting.popleft()
            state.places[line] = self.figures.passes[line % len(self.figures.passes)]
        working = sum(each.began_s is not None and bool(each.places) for each in self.ready.values())
        pass_s = self.figures.pass_s(working if self.one_disk else 1)
        self.busy_s += pass_s
        self._at(at_s + pass_s, replica, partial(self._passed, replica, at_s + pass_s))

    def _passed(self, replica: int, at_s: float) -> None:
        state = self.ready[replica]
        state.places = {line: left - 1 for line, left in state.places.items()}
        state.done = [line for line, left in state.places.items() if not left]
        state.places = {line: left for line, left in state.places.items() if left}
        self._next_pass(replica, at_s)

    def _die(self, replica: int) -> Event:
        state = self.ready.pop(replica)
        taken = self.figures.passes
        self.lost_passes = sum(taken[line % len(taken)] - left for line, left in state.places.items())
        self._lives[replica] += 1
        return Lost(replica, "killed")


def _answered(replica: int, numbers: list[int]) -> Event:
    return Answered(replica, tuple(LineResult(number, {}, is_refused=False) for number in numbers))


def simulated(
    figures: Figures, lines: int, workers: int, *, one_disk: bool = False, death_s: float | None = None
) -> Simulation:
    """Run a job to its end."""
    simulation = Simulation(figures, lines, one_disk=one_disk, death_s=death_s)
    dispatcher = Dispatcher(simulation, workers, lambda _: None)
    dispatcher.start()
    dispatcher.run(simulation, simulation)  # type: ignore[arg-type]
    assert dispatcher.progress.written == lines
    return simulation


def main() -> int:
    """Print the efficiency by workers, and where the rest of their time goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--start-s", type=float, default=1.5, help="until a replica's process runs")
    parser.add_argument("--load-s", type=float, default=5.0, help="until it has loaded the model")
    parser.add_argument("--call-s", type=float, default=0.001)
    parser.add_argument("--write-s", type=float, default=0.0006)
    parser.add_argument("--lines", type=int, default=512)
    args = parser.parse_args()
    figures = figures_in(args.results, args)
    print(
        f"{args.lines} lines of {min(figures.passes)} to {max(figures.passes)} passes, {_PARALLEL} at a time\n"
        f"a pass takes {figures.pass_s(1):.3f} s: link {figures.link_s:.3f}, compute {figures.compute_s:.3f}, "
        f"draft {figures.draft_s:.3f}\n"
    )
    print("| workers | own disks | efficiency | one killed | efficiency | one disk | efficiency |")
    print("|---|---|---|---|---|---|---|")
    alone = simulated(figures, args.lines, 1).now_s
    rest: list[str] = []
    for workers in WORKERS:
        own = simulated(figures, args.lines, workers)
        killed = simulated(figures, args.lines, workers, death_s=own.now_s / 2)
        disk = simulated(figures, args.lines, workers, one_disk=True)
        cells = [f"{run.now_s:.0f} s | {alone / workers / run.now_s:.0%}" for run in (own, killed, disk)]
        print(f"| {workers} | {' | '.join(cells)} |")
        loading = (figures.start_s + figures.load_s) / own.now_s
        idle = 1 - loading - own.busy_s / workers / own.now_s
        slower = figures.pass_s(workers) / figures.pass_s(1)
        rest.append(f"| {workers} | {loading:.1%} | {idle:.1%} | {killed.lost_passes} | {slower:.2f}x |")
    print(
        "\n| workers | loading | idle at the end and in calls | passes lost with the killed | pass on one disk |"
    )
    print("|---|---|---|---|---|")
    print("\n".join(rest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
