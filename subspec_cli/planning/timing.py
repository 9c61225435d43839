"""What a plan will give, from what its parts take: pass, draft step, best depth, tokens per second.

One cycle is a target pass and the draft steps before it. While the draft runs, the link fills the slots; while
weights arrive, the draft goes on in the shadow of the stream, which helps if its guess is taken to the end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.planning.costs import MachineCosts, PlanCosts, RowTimes, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_ROWS: Final = 2
"""Rows of an ordinary draft step: the chain and a node beside it."""
SHADOW_STEP_ROWS: Final = 4
"""Rows of a step in the shadow of the stream, where several likely ends are followed at once."""
DEPTHS: Final = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
NODE_BUDGETS: Final = (16, 32, 48, 64, 128)
_SHADOW_SHARE: Final = 0.9
"""Share of the link's spare time that is planned for drafting."""
_HIT_SHARE: Final = 0.95
"""Chance that the token after a tree that was taken whole is the one drafted meanwhile."""
_HOST_GATHER_S: Final = 10e-6
"""What it takes a GPU to read a draft step's embedding rows, some kilobytes each, in host memory."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan is expected to give."""

    plain_pass_s: float
    """Pass of one row, nothing drafted."""
    pass_s: float
    """Pass over a tree of `depth`, as long as it is waited for."""
    step_s: float
    depth: int
    """Best depth; 0 if drafting would not pay."""
    tau: float
    """Tokens per pass at that depth."""
    plain_tok_per_s: float
    """Under the same plan."""
    tok_per_s: float
    survival: float
    """Chance that one more level of the draft holds."""
    origin: str
    """Where the costs come from: `measured` or `assumed`."""
    assumptions: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Over plain decoding under the same plan."""
        return self.tok_per_s / self.plain_tok_per_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return {**values, "assumptions": list(self.assumptions), "speedup": self.speedup}


class Cycle(NamedTuple):
    """What bears on a cycle beside its depth; a tuple, for thousands are made for a plan."""

    link_s: float
    prefetch_s: float
    """Link time of the slots, which fill while the draft runs."""
    step_s: float
    """A draft step of STEP_ROWS."""
    shadow_step_s: float
    """A draft step of SHADOW_STEP_ROWS."""
    shadow_share: float
    """Share of the link's spare time in which steps can be taken without holding it up; 0 is no shadow drafting."""


class Pace(NamedTuple):
    """A depth of the tree, and what follows from it alone."""

    depth: int
    tau: float
    """Tokens per pass, the bonus token included."""
    hit: float
    """Chance that what was drafted in the shadow is what comes next."""
    compute_s: float
    """Computing of a pass over the tree, weights at hand."""


class Placed(Protocol):
    """What times need to know of a plan."""

    @property
    def streamed(self) -> tuple[int, ...]: ...

    @property
    def shared(self) -> tuple[int, ...]: ...

    @property
    def pinned_layers(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> str: ...

    @property
    def draft_head_bits(self) -> int: ...

    @property
    def embedding(self) -> str: ...


def plan_costs(machine: MachineCosts, geometry: ModelGeometry, plan: Placed) -> PlanCosts:
    """What the passes and draft steps of one plan take, from the parts that were timed or assumed."""
    from_disk = len(plan.streamed) - len(plan.pinned_layers) if plan.device == "cuda" else 0
    return PlanCosts(
        link_s=link_s(machine, geometry.layer_matrix_bytes, len(plan.streamed), from_disk),
        compute=pass_compute(machine, geometry),
        step=step_times(machine, geometry, len(plan.shared), plan.draft_head_bits, plan.embedding),
    )


def link_s(machine: MachineCosts, layer_bytes: int, streamed: int, from_disk: int) -> float:
    """Seconds until the streamed layers of one pass have arrived; disk and bus work side by side."""
    return max(
        streamed * layer_bytes / machine.link_bytes_per_s, from_disk * layer_bytes / machine.disk_bytes_per_s
    )


def pass_compute(machine: MachineCosts, geometry: ModelGeometry) -> RowTimes:
    """Computing of one target pass, all weights at hand."""
    return weighted_sum([(geometry.layers, machine.target_layer), (1, machine.target_head)])


def step_times(
    machine: MachineCosts, geometry: ModelGeometry, shared: int, head_bits: int, embedding: str
) -> RowTimes:
    """One draft step: substitutes, shared layers, the draft's head and what comes beside them."""
    gather_s = _HOST_GATHER_S if embedding == "host" else 0.0
    return weighted_sum(
        [
            (geometry.layers - shared, machine.substitute_layer),
            (shared, machine.shared_layer),
            (1, machine.low_bit_head if head_bits == 4 else machine.draft_head),
            (1, RowTimes((1,), (machine.step_overhead_s + gather_s,))),
        ]
    )


def verified_rows(depth: int, most_nodes: int) -> int:
    """Rows of a pass: the root, the chain and about as many nodes beside it."""
    return min(most_nodes, 2 * depth + 1)


def node_budget(link_time_s: float, compute: RowTimes, most_nodes: int) -> int:
    """Largest tree whose computing still hides behind the link."""
    fitting = [n for n in NODE_BUDGETS if n <= most_nodes and compute.at(n) <= link_time_s]
    return fitting[-1] if fitting else min(NODE_BUDGETS[0], most_nodes)


def pass_s(cycle: Cycle, depth: int, compute_s: float) -> float:
    """A pass as it is waited for: what the link brought while the draft ran is there already."""
    return max(cycle.link_s - min(cycle.prefetch_s, depth * cycle.step_s), compute_s)


def predict(cycle: Cycle, pace: Pace) -> float:
    """Seconds of one cycle: THE formula; tokens per second are the pace's tau over it."""
    waited_s = pass_s(cycle, pace.depth, pace.compute_s)
    spare_s = cycle.shadow_share * _SHADOW_SHARE * (waited_s - pace.compute_s)
    in_shadow = min(pace.depth, int(spare_s / cycle.shadow_step_s))
    return waited_s + (pace.depth - pace.hit * in_shadow) * cycle.step_s


def _link_told(machine: MachineCosts) -> str:
    rate, pageable = machine.link_bytes_per_s, machine.pageable_bytes_per_s
    unpinned = "" if pageable == rate else f", {pageable / 1e9:.3g} from memory that is not pinned"
    return f"link {rate / 1e9:.3g} GB/s ({machine.origin}{unpinned})"


def pace_of(depth: int, survival: float, compute: RowTimes, most_nodes: int) -> Pace:
    """A depth with all that does not depend on where the layers lie; depth 0 is plain decoding."""
    return Pace(
        depth,
        tau=sum(survival**level for level in range(depth + 1)),
        hit=_HIT_SHARE * survival**depth,
        compute_s=compute.at(verified_rows(depth, most_nodes)),
    )


def best_pace(cycle: Cycle, paces: Sequence[Pace]) -> tuple[float, Pace]:
    """The fastest of some depths: tokens per second, and the pace."""
    rates = [pace.tau / predict(cycle, pace) for pace in paces]
    best = max(rates)
    return best, paces[rates.index(best)]


def prediction_of(
    cycle: Cycle, pace: Pace, plain: Pace, machine: MachineCosts, *, survival: float, is_measured: bool
) -> Prediction:
    """The figures of one plan at its best depth, and the names of what was assumed.

    `plain` is the pace of depth 0; `is_measured` tells whether `survival` is.
    """
    origin = machine.origin
    return Prediction(
        plain_pass_s=pass_s(cycle, 0, plain.compute_s),
        pass_s=pass_s(cycle, pace.depth, pace.compute_s),
        step_s=cycle.step_s,
        depth=pace.depth,
        tau=pace.tau,
        plain_tok_per_s=1 / predict(cycle, plain),
        tok_per_s=pace.tau / predict(cycle, pace),
        survival=survival,
        origin=origin,
        assumptions=(
            _link_told(machine),
            f"draft step {cycle.step_s * 1e3:.3g} ms ({origin})",
            f"target compute {plain.compute_s * 1e3:.3g} ms a pass ({origin})",
            f"survival {survival:.3g} a level ({'measured' if is_measured else 'assumed'})",
        ),
    )
