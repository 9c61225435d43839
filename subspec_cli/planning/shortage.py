"""Errors of a plan that cannot be made: what is too small, the least that works, and what would lower it."""

from __future__ import annotations

import math

from subspec_cli.errors import ResourceError
from subspec_cli.planning.memory import MemoryModel, PromptPass
from subspec_cli.planning.request import PlanRequest, WantedTokens, usual_contexts
from subspec_cli.planning.search import LayoutSearch
from subspec_cli.units import GIB, counted, format_bytes


def shortage(search: LayoutSearch) -> ResourceError:
    """Return the error for a budget or a limit of host memory that holds no layout."""
    request = search.request
    if not search.front:
        return _ram_shortage(request, search.memory)
    contexts = usual_contexts(request.model_context)
    is_whole = request.wanted is not None and request.wanted.is_whole
    held = 0 if is_whole else search.largest_context(request.budget_bytes)
    if request.wanted is not None and request.context is None and held:
        return _prompt_shortage(search, request.wanted, held)
    context = request.context or _wanted_context(request) or contexts[-1]
    least = search.front[0]
    least_bytes = search.total_bytes(least, context)
    largest = max(
        search.memory.lines(least.layout, context, PromptPass(0, 0)), key=lambda line: line.size_bytes
    )
    lower = ["a smaller --context"] if request.context and request.context > contexts[-1] else []
    lower += ["a smaller --parallel"] if request.sequences > 1 else []
    # Two-bit codes lie in memory as four-bit ones, so only eight bits can become fewer.
    lower += ["substitutes of 4 bits"] if request.substitute_bytes and request.substitute_bits > 4 else []
    ways = " or ".join(lower)
    return ResourceError(
        f"a budget of {format_bytes(request.budget_bytes, math.floor)} is too small: "
        f"{format_bytes(least_bytes, math.ceil)} is the least, "
        f"of which {largest.label} {format_bytes(largest.size_bytes)}"
        f"{f'; a context of {held} would fit' if held else ''}",
        f"{request.profile.budget_option} {_enough_gib(least_bytes):.2f} works with a context of {context}"
        f"{f'; less is needed with {ways}' if ways else ''}",
    )


def _prompt_shortage(search: LayoutSearch, wanted: WantedTokens, held: int) -> ResourceError:
    """Return the error for a budget that holds the model, but not the prompt."""
    request = search.request
    context = min(wanted.context, request.model_context)
    answer = min(wanted.answer, context - wanted.prompt)
    enough_bytes = search.total_bytes(search.front[0], context)
    return ResourceError(
        f"the prompt has {counted(wanted.prompt, 'token')}, a budget of {format_bytes(request.budget_bytes)} "
        f"holds {held}, one of them for an answer",
        f"{request.profile.budget_option} {_enough_gib(enough_bytes):.2f} holds the prompt and "
        f"{counted(answer, 'token')} of answer; or shorten the prompt"
        f"{', or give a smaller --parallel' if request.sequences > 1 else ''}",
    )


def _wanted_context(request: PlanRequest) -> int | None:
    wanted = request.wanted
    return None if wanted is None else min(wanted.context, request.model_context)


def _ram_shortage(request: PlanRequest, memory: MemoryModel) -> ResourceError:
    least_bytes = memory.least_host_bytes()
    return ResourceError(
        f"{format_bytes(request.ram_bytes or 0, math.floor)} of host memory are too little: "
        f"{format_bytes(least_bytes, math.ceil)} is the least, with every streamed layer read from disk",
        f"--ram-gb {_enough_gib(least_bytes):.2f} works, and more lets layers wait in pinned memory",
    )


def _enough_gib(size_bytes: int) -> float:
    """Return GiB rounded up to hundredths, so that the printed number works as it stands."""
    return -(-size_bytes * 100 // GIB) / 100
