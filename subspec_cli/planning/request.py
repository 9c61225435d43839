"""What a plan is made from: a `PlanRequest`, from the settings and the sizes of model and machine.

`subspec plan` and a run make the same request. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.config import Config
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.limits import PREFILL_CHUNK, SHADOW_ROWS
from subspec_cli.planning.acceptance import LEAST_TOKENS, Acceptance
from subspec_cli.planning.assumed_costs import assumed_survival
from subspec_cli.planning.costs import BASE_CACHED_ROWS, MachineCosts
from subspec_cli.planning.device_profile import DeviceKind, DeviceProfile, device_profile
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.library_memory import bare_process_bytes
from subspec_cli.substitutes.settings import SubstituteSettings, substitute_layer_bytes
from subspec_cli.units import GIB, counted, format_bytes

DEFAULT_CONTEXT: Final = 4096
LEAST_CONTEXT: Final = 512
DEFAULT_SHARE: Final = 0.75
"""Share of the available host memory that is taken when the user gives no limit."""
_LEAST_GPU_RESERVE: Final = GIB // 2
_PROMPT_TOKENS: Final = 256
"""Context kept for a prompt beside the longest answer."""
_CONTEXTS: Final = (4096, 3072, 2048, 1536, 1024, 768, 512, 256)
"""Contexts to try when the user gives none, longest first."""
_CONTEXT_STEP: Final = 64
"""A context made for a prompt is a multiple of this number."""


@dataclass(frozen=True, slots=True)
class WantedTokens:
    """The tokens of a prompt that is known before the plan is made."""

    prompt: int
    answer: int
    """Longest answer."""
    is_whole: bool = False
    """Whether a budget that holds less of the answer is too small."""

    @property
    def total(self) -> int:
        """Tokens of prompt and longest answer together."""
        return self.prompt + self.answer

    @property
    def context(self) -> int:
        """A context that holds both, in round numbers."""
        return -(-self.total // _CONTEXT_STEP) * _CONTEXT_STEP


@dataclass(frozen=True, slots=True)
class AutomaticBudget:
    """A budget that leaves what others use, and some of what is free now."""

    free_bytes: int
    reserve_bytes: int
    """Left free, for a screen and for what grows meanwhile."""

    @property
    def size_bytes(self) -> int:
        """The budget."""
        return max(0, self.free_bytes - self.reserve_bytes)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Sizes, speeds, a budget, and what the user fixed."""

    geometry: ModelGeometry
    budget_bytes: int
    device: DeviceKind
    substitute_bytes: LayerSizes | None
    """Bytes of one layer's substitute in memory; None plans plain decoding, which needs none."""
    tokenizer_bytes: int
    """Size of the tokenizer's files; the host memory of a loaded tokenizer is proportional to it."""
    context: int | None
    """Tokens of prompt and answer that the user gave; None lets the plan choose."""
    resident_layers: int | None
    """Number of resident layers that the user gave; None lets the plan decide."""
    tree_nodes: int
    """Most nodes of a draft tree."""
    prefill_rows: int
    model_context: int
    """Most positions that the model was trained for."""
    costs: MachineCosts
    substitute_bits: int = 4
    survival: float | None = None
    """Learned probability that the target accepts one more level of the draft; None assumes it from the bits."""
    learned_tokens: int = 0
    """Tokens from which it was learned."""
    ram_bytes: int | None = None
    """Limit of host memory for the process beside a GPU; None is no limit."""
    shadow_rows: int = SHADOW_ROWS
    """Cache rows for drafting in the shadow of a pass; 0 switches it off."""
    least_context: int = LEAST_CONTEXT
    """Context that is not given up for speed."""
    cached_rows: int = BASE_CACHED_ROWS
    """Tokens in the cache for which times are predicted. They do not follow `context`: room alone costs no time."""
    samples: bool = False
    """Whether the temperature is above 0, so that every token of the vocabulary needs noise."""
    fixed_depth: int | None = None
    """Depth of the draft tree that the user gave."""
    fixed_width: int | None = None
    """Rows of a draft step that the user gave."""
    wanted: WantedTokens | None = None
    """The prompt to answer; None lets the plan weigh context against speed."""
    automatic: AutomaticBudget | None = None
    """How the budget came about, if the user gave none."""
    sequences: int = 1
    """Answers in flight at the same time, each with a context of its own."""
    takes_grammars: bool = False
    """Whether answers may have to follow a grammar."""
    streams_residuals: bool = False
    """Whether the streamed sizes of the geometry are those of residuals, which are rebuilt to 16 bits."""

    @property
    def profile(self) -> DeviceProfile:
        """The device's profile."""
        return device_profile(self.device)

    @property
    def scratch_rows(self) -> int:
        """Most cache rows beside the context."""
        return self.tree_nodes + (self.shadow_rows if self.substitute_bytes is not None else 0)

    @property
    def pass_nodes(self) -> int:
        """Most nodes of the trees of one pass."""
        return pass_nodes(self.tree_nodes, self.sequences)

    @property
    def likely_survival(self) -> float:
        """Probability that the target accepts one more level of the draft, learned or assumed."""
        return assumed_survival(self.substitute_bits).middle if self.survival is None else self.survival

    def for_parallel(self, parallel: int | None) -> PlanRequest:
        """Return this request for answers at a time, each with sampling settings of its own; None is this one."""
        return (
            self if parallel is None else replace(self, sequences=parallel, samples=True, takes_grammars=True)
        )

    def after_runs(self, acceptance: Acceptance | None) -> PlanRequest:
        """Return this request with what earlier runs have learned; the same if that is too little."""
        if acceptance is None or acceptance.tokens < LEAST_TOKENS:
            return self
        survival = acceptance.survival(assumed_survival(self.substitute_bits).middle)
        return replace(self, survival=survival, learned_tokens=round(acceptance.tokens))


def pass_nodes(tree_nodes: int, sequences: int) -> int:
    """Return the most nodes of the trees of one pass: those of one tree, or as many more as a chunk has rows."""
    return max(tree_nodes, min(sequences * tree_nodes, PREFILL_CHUNK))


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """The memory that a run may take."""

    device: DeviceKind
    budget_bytes: int
    """Memory of the device; on the CPU it counts from a bare process."""
    ram_bytes: int | None
    """Host memory of the whole process; None is no limit."""
    automatic: AutomaticBudget | None = None
    """How the budget came about, if the user gave none."""


def plan_request(
    config: Config,
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    costs: MachineCosts,
    *,
    limits: MemoryLimits,
    tokenizer_bytes: int,
    wanted: WantedTokens | None = None,
) -> PlanRequest:
    """Make the request for one set of substitutes on one machine."""
    speculates = not config.draft.no_speculation
    profile, budget_bytes, ram_bytes = device_profile(limits.device), limits.budget_bytes, limits.ram_bytes
    if profile.budget_is_ram and ram_bytes is not None:
        budget_bytes = min(budget_bytes, max(0, ram_bytes - bare_process_bytes(profile, geometry)))
    least_context = max(LEAST_CONTEXT, config.run.max_new_tokens + _PROMPT_TOKENS)
    return PlanRequest(
        geometry=geometry,
        budget_bytes=budget_bytes,
        device=profile.kind,
        substitute_bytes=LayerSizes(substitute_layer_bytes(geometry, settings)) if speculates else None,
        substitute_bits=settings.bits,
        tokenizer_bytes=tokenizer_bytes,
        context=config.memory.context,
        least_context=least_context,
        cached_rows=_mean_cached_rows(config.memory.context or least_context, geometry.max_positions, wanted),
        resident_layers=config.memory.resident_layers,
        tree_nodes=_most_tree_nodes(config, profile),
        prefill_rows=PREFILL_CHUNK,
        model_context=geometry.max_positions,
        costs=costs,
        ram_bytes=ram_bytes,
        samples=not config.sampling.is_greedy,
        fixed_depth=config.draft.depth,
        fixed_width=config.draft.width,
        shadow_rows=0 if config.draft.no_shadow else SHADOW_ROWS,
        wanted=wanted,
        automatic=limits.automatic,
    )


def _mean_cached_rows(context: int, model_context: int, wanted: WantedTokens | None) -> int:
    """Return the mean number of cached rows of an answer's passes, for which times are predicted."""
    if wanted is not None:
        return min(wanted.prompt + wanted.answer // 2, model_context)
    # The mean of a context that fills up. One that nobody asked for is room that most answers leave empty.
    return min(context, model_context) // 2


def check_prompt_fits(wanted: WantedTokens, context: int | None, model_context: int) -> None:
    """Raise UsageError if a prompt leaves no row for an answer in the model's positions, or in the user's context."""
    if wanted.prompt >= model_context:
        raise UsageError(
            f"the prompt has {counted(wanted.prompt, 'token')}, the model was made for {model_context} positions, "
            "one of them for an answer",
            "shorten the prompt, or take a model with more positions",
        )
    if context is not None and wanted.prompt >= context:
        raise UsageError(
            f"the prompt has {counted(wanted.prompt, 'token')}, --context {context} holds {context}, "
            "one of them for an answer",
            f"leave --context out, or give --context {min(wanted.context, model_context)}",
        )


def _most_tree_nodes(config: Config, profile: DeviceProfile) -> int:
    """Return the most nodes of a tree; a fixed shape may need more than the device's usual number."""
    depth, width = config.draft.depth or 0, config.draft.width or 1
    return max(profile.tree_nodes, depth * width + 1)


def budget_bytes(
    config: Config,
    device: str,
    total_bytes: int | None,
    available_bytes: int | None,
    owner: str = "this machine has",
) -> int:
    """Return the budget that the user gave, else the automatic one.

    Raises:
        ResourceError: the budget exceeds `total_bytes`, the memory of the device, where that is known; or there is
            no budget and the free memory is not known. `owner` says who has or allows no more than `total_bytes`.
    """
    option = device_profile(device).budget_option
    if config.memory.memory_gib is None:
        automatic = automatic_budget(config, device, total_bytes, available_bytes)
        if automatic is None:
            raise ResourceError(f"the memory of the {device} device is not known", f"name it: {option} 8")
        return automatic.size_bytes
    budget = int(config.memory.memory_gib * GIB)
    if total_bytes is not None and budget > total_bytes:
        raise ResourceError(
            f"a budget of {format_bytes(budget, math.ceil)} is more than {owner}: "
            f"{format_bytes(total_bytes, math.floor)}",
            f"{option} {total_bytes * 3 / 4 / GIB:.2f} leaves a quarter to others",
        )
    return budget


def automatic_budget(
    config: Config, device: str, total_bytes: int | None, available_bytes: int | None
) -> AutomaticBudget | None:
    """Return the budget from what is free; None if the user gave one, or if nothing is known.

    On the CPU a quarter of the free memory is left. A GPU's free memory does not move as much: half a GiB, or a
    sixteenth of the device, is left for a screen and other programs.
    """
    if config.memory.memory_gib is not None or available_bytes is None:
        return None
    if device_profile(device).budget_is_ram:
        return AutomaticBudget(available_bytes, available_bytes - int(available_bytes * DEFAULT_SHARE))
    return AutomaticBudget(available_bytes, max(_LEAST_GPU_RESERVE, (total_bytes or available_bytes) // 16))


def ram_bytes(config: Config, available_bytes: int | None) -> int | None:
    """Return the limit of host memory that the user gave, else a share of the free memory; None if unknown."""
    if config.memory.ram_gb is not None:
        return int(config.memory.ram_gb * GIB)
    return None if available_bytes is None else int(available_bytes * DEFAULT_SHARE)


def usual_contexts(model_context: int) -> tuple[int, ...]:
    """Return the contexts to choose from where the user gives none, longest first."""
    most = min(model_context, DEFAULT_CONTEXT)
    return (most, *(context for context in _CONTEXTS if context < most))
