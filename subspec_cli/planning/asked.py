"""What a plan is asked for, from settings and sizes: the same request for a run and for `subspec plan`. No torch."""

from __future__ import annotations

from typing import Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.config import Config
from subspec_cli.errors import ResourceError
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.planning.memory import BARE_PROCESS_BYTES
from subspec_cli.planning.plan import LEAST_CONTEXT, SHADOW_ROWS, PlanRequest
from subspec_cli.substitutes.settings import SubstituteSettings, substitute_layer_bytes
from subspec_cli.units import format_bytes, gib_to_bytes

DEFAULT_SHARE: Final = 0.75
"""Share of the available memory taken when the user names no budget."""
_TREE_NODES: Final = {"cpu": 64, "cuda": 128}
"""More nodes give 1 to 3 % more tokens a second on two cores, and take the memory of a slot."""
_PROMPT_TOKENS: Final = 256
"""Room for a prompt beside the longest answer."""


def plan_request(
    config: Config,
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    costs: MachineCosts,
    *,
    device: str,
    budget_bytes: int,
    ram_bytes: int | None,
    tokenizer_bytes: int,
    survival: float | None = None,
) -> PlanRequest:
    """The request for one set of substitutes on one machine."""
    speculates = not config.draft.no_speculation
    if device == "cpu" and ram_bytes is not None:
        # The budget is RAM too: what the process takes before it counts comes off the bound on all of it.
        budget_bytes = min(budget_bytes, max(0, ram_bytes - BARE_PROCESS_BYTES))
    return PlanRequest(
        geometry=geometry,
        budget_bytes=budget_bytes,
        device=device,
        substitute_bytes=substitute_layer_bytes(geometry, settings) if speculates else None,
        substitute_bits=settings.bits,
        tokenizer_bytes=tokenizer_bytes,
        context=config.memory.context,
        least_context=max(LEAST_CONTEXT, config.run.max_new_tokens + _PROMPT_TOKENS),
        resident_layers=config.memory.resident_layers,
        tree_nodes=_most_tree_nodes(config, device),
        prefill_rows=PREFILL_CHUNK,
        model_context=geometry.max_positions,
        costs=costs,
        survival=survival,
        ram_bytes=ram_bytes,
        samples=not config.sampling.is_greedy,
        fixed_depth=config.draft.depth,
        fixed_width=config.draft.width,
        shadow_rows=0 if config.draft.no_shadow else SHADOW_ROWS,
    )


def _most_tree_nodes(config: Config, device: str) -> int:
    """Most nodes of a tree; a fixed shape may need more than the usual bound."""
    depth, width = config.draft.depth or 0, config.draft.width or 1
    return max(_TREE_NODES[device], depth * width + 1)


def budget_bytes(config: Config, device: str, total_bytes: int | None, available_bytes: int | None) -> int:
    """The budget that the user names, else a share of what is free.

    Raises:
        ResourceError: it is more than the device has, where `total_bytes` tells; or none is named and nobody
            knows what is free.
    """
    option = "--memory-gb" if device == "cpu" else "--vram-gb"
    if config.memory.memory_gib is None:
        if available_bytes is None:
            raise ResourceError(f"the memory of the {device} device is not known", f"name it: {option} 8")
        return int(available_bytes * DEFAULT_SHARE)
    budget = gib_to_bytes(config.memory.memory_gib, option)
    if total_bytes is not None and budget > total_bytes:
        raise ResourceError(
            f"a budget of {format_bytes(budget)} is more than this machine has: {format_bytes(total_bytes)}",
            f"{option} {total_bytes * 3 // 4 / (1 << 30):.1f} leaves a quarter to others",
        )
    return budget


def ram_bytes(config: Config, available_bytes: int | None) -> int | None:
    """The bound on host memory that the user names, else a share of what is free; None where nobody knows."""
    if config.memory.ram_gb is not None:
        return gib_to_bytes(config.memory.ram_gb, "--ram-gb")
    return None if available_bytes is None else int(available_bytes * DEFAULT_SHARE)
