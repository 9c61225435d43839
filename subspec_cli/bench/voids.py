"""When a measured figure means nothing: pure rules, each with its reason.

One plan cannot make speculative decoding faster than tau times plain decoding: a pass with a tree takes no less time
than a pass with one row. A best plan is not slower than another one. What breaks these rules, or was measured while
others used the processors, says something about the machine and nothing about the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from subspec_cli.bench.answers import AnswerPair
from subspec_cli.bench.figures import ARMS_OF, PEER_FIGURES, Arm, Figure, Spread
from subspec_cli.probe.machine_use import MachineUse

MOST_OF_TAU: Final = 1.05
"""Largest ratio to plain decoding, in tau; two measurements of the same thing differ by a few percent."""
LEAST_OF_OTHER_PLAN: Final = 0.95
"""Least speed under the best plan, in that under another one."""
MOST_OTHERS_SHARE: Final = 0.1
"""Largest share of the cores that others may take."""
LEAST_READ: Final = 0.5
"""Least share of the peer's weights that must come from storage and not from the page cache."""
MOST_LOAD_PER_CORE: Final = 0.5
"""Largest load before, where an arm was too short, or the system is not one, to tell the share of others."""
_ARM_NAMES: Final[Mapping[Arm, str]] = {
    "plain": "plain decoding",
    "speculative": "speculative decoding",
    "best_plain": "plain decoding under its own best plan",
    "peer": "accelerate",
}


@dataclass(frozen=True, slots=True)
class Void:
    """A figure that means nothing."""

    figure: Figure
    reason: str


@dataclass(frozen=True, slots=True)
class PeerReads:
    """What the peer's answers took from disk."""

    read_bytes: int | None
    """Bytes that storage delivered; None if the system does not report them."""
    streamed_bytes: int
    """Bytes of weights that it needed from disk."""


@dataclass(frozen=True, slots=True)
class PlainRates:
    """Plain decoding of the same turns under two plans, in tokens/s; None if it was not measured."""

    best_plan: float | None
    other_plan: float | None


def row_voids(
    measured: Mapping[Figure, Spread],
    tau: float | None,
    uses: Mapping[Arm, MachineUse],
    rates: PlainRates,
    load_per_core: float | None,
    peer: PeerReads | None = None,
) -> tuple[Void, ...]:
    """Return the figures of a row that are void; a figure may be void for several reasons."""

    def reasons(figure: Figure) -> Iterator[str | None]:
        for arm in ARMS_OF[figure]:
            yield busy_reason(arm, uses[arm], load_per_core)
        if figure in ("speedup_same_plan", "speedup"):
            yield ratio_reason(measured[figure].most, tau)
        if figure == "speedup":
            yield plan_reason(rates)
        if figure in PEER_FIGURES and peer is not None:
            yield cache_reason(peer)

    return tuple(Void(figure, reason) for figure in measured for reason in reasons(figure) if reason)


def pair_reasons(pair: AnswerPair, load_per_core: float | None) -> tuple[str, ...]:
    """Return why the ratio of two answers means nothing; empty if it does mean something."""
    found = (
        busy_reason("plain", pair.plain.use, load_per_core),
        busy_reason("speculative", pair.speculative.use, load_per_core),
        ratio_reason(pair.speedup_same_plan, pair.speculative.stats.tau),
    )
    return tuple(reason for reason in found if reason)


def ratio_reason(ratio: float, tau: float | None) -> str | None:
    """Return why a speed-up is impossible; None if it is possible."""
    if tau is None or ratio <= MOST_OF_TAU * tau:
        return None
    return f"a ratio above {MOST_OF_TAU} tau is impossible: plain decoding got less of the machine"


def plan_reason(rates: PlainRates) -> str | None:
    """Return why the best plan was not measured well; None if it was as fast as the other plan."""
    if not rates.best_plan or not rates.other_plan:
        return None
    if rates.best_plan >= LEAST_OF_OTHER_PLAN * rates.other_plan:
        return None
    return (
        f"plain decoding's own best plan was slower than the plan of both arms: "
        f"{rates.best_plan:.2f} and {rates.other_plan:.2f} tok/s for the same turns"
    )


def cache_reason(peer: PeerReads) -> str | None:
    """Return why the peer's speed is not the one of its storage; None if it is, or if it needed none."""
    if not peer.streamed_bytes:
        return None
    if peer.read_bytes is None:
        return "the system does not say what accelerate read from storage"
    if peer.read_bytes >= LEAST_READ * peer.streamed_bytes:
        return None
    return f"the page cache served accelerate: storage gave less than {LEAST_READ:.0%} of the weights that it needed"


def busy_reason(arm: Arm, use: MachineUse, load_per_core: float | None) -> str | None:
    """Return why an arm did not have the machine for itself; None if it did, or if nothing is known."""
    share = use.others_share
    if share is not None:
        if share <= MOST_OTHERS_SHARE:
            return None
        most = f"{MOST_OTHERS_SHARE:.0%} of the cores"
        return f"the machine was busy: others took more than {most} during {_ARM_NAMES[arm]}"
    if load_per_core is None or load_per_core <= MOST_LOAD_PER_CORE:
        return None
    return f"the machine was busy: the load before was above {MOST_LOAD_PER_CORE:g} a core"
