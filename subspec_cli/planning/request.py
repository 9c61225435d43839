"""What a plan is asked for, and the ways to fill a budget that are weighed against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.limits import SHADOW_ROWS
from subspec_cli.planning.assumed_costs import assumed_survival
from subspec_cli.planning.costs import MachineCosts

DEFAULT_CONTEXT: Final = 4096
LEAST_CONTEXT: Final = 512


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made from."""

    geometry: ModelGeometry
    budget_bytes: int
    device: str
    """`cpu` or `cuda`."""
    substitute_bytes: int | None
    """Bytes of one layer's substitute in memory; None plans plain decoding, which needs none."""
    tokenizer_bytes: int
    """Size of the tokenizer's files, which cost host memory in proportion."""
    context: int | None
    """Tokens of prompt and answer; None lets the plan weigh context against speed."""
    resident_layers: int | None
    """Layers to keep resident, as the user said; None lets the plan decide."""
    tree_nodes: int
    """Most nodes of a draft tree."""
    prefill_rows: int
    model_context: int
    """Most positions the model was made for."""
    costs: MachineCosts
    substitute_bits: int = 4
    survival: float | None = None
    """Measured chance that one more level of the draft holds; None assumes it from the bits."""
    ram_bytes: int | None = None
    """Host memory that the process may take on a GPU; None is no bound."""
    shadow_rows: int = SHADOW_ROWS
    """Cache rows for drafting in the shadow of the stream; 0 switches it off."""
    least_context: int = LEAST_CONTEXT
    """Context that is not given away for speed."""
    samples: bool = False
    """Whether tokens are drawn at a temperature, which takes noise for every token of the vocabulary."""
    fixed_depth: int | None = None
    """Depth of the draft tree, as the user said."""
    fixed_width: int | None = None
    """Rows of a draft step, as the user said."""

    @property
    def scratch_rows(self) -> int:
        """Cache rows beside the context."""
        return self.tree_nodes + (self.shadow_rows if self.substitute_bytes is not None else 0)

    @property
    def likely_survival(self) -> float:
        """Chance that one more level of the draft holds, measured or assumed."""
        return assumed_survival(self.substitute_bits) if self.survival is None else self.survival


class Choice(NamedTuple):
    """One way to fill a budget, whatever the context."""

    shared: int
    """Resident layers that the draft runs too."""
    target_only: int
    """Resident layers beside which the draft keeps its substitutes."""
    drafts: bool
    """Whether there is a draft at all."""
    slots: int
    draft_head_bits: int
    """16 shares the target's head, 4 is a copy of the draft's own."""
    embedding: str
    """`tied` to the head, on the `device`, in `host` memory or on `disk`."""

    @property
    def resident(self) -> int:
        """Layers of the target that are held."""
        return self.shared + self.target_only
