"""Draw a plan: the budget as a bar, its lines, the place of each layer, and the predicted speed."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from rich.text import Text

from subspec_cli.cli.plan_text import (
    acceptance_text,
    advice_text,
    assumptions,
    budget_text,
    prompt_text,
    range_lines,
    reason_text,
)
from subspec_cli.units import counted, format_bytes, format_seconds, printable

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.planning.memory import PlanLine
    from subspec_cli.planning.plan import OffloadPlan
    from subspec_cli.planning.prediction import Prediction
    from subspec_cli.session.forecast import Forecast

_BAR_CELLS: Final = 76
_LINE_CELLS: Final = 12
_STRIP_CELLS: Final = 64
_COLOURS: Final = ("cyan", "green", "yellow", "blue", "magenta", "red", "bright_cyan", "bright_green",
                   "bright_yellow", "bright_blue", "bright_magenta", "bright_red", "white",
                   "bright_white")  # fmt: skip
_KEYS: Final = string.ascii_lowercase
_LEGEND: Final = {
    "R": "resident, drafts too",
    "T": "resident for the target",
    "·": "streamed from pinned memory",
    "d": "streamed from disk",
}


def title(found: Forecast) -> str:
    """The model and the device of the plan."""
    geometry = found.geometry
    dtype = geometry.dtype.lower() if geometry.stored is None else f"8 bits and {geometry.dtype.lower()}"
    size = f"{counted(geometry.layers, 'layer')}, {format_bytes(geometry.stored_bytes)} in {dtype}"
    return printable(f"{found.model_id} · {size} · {found.device} ({found.device_reason})")


def show_plan(found: Forecast, output: Output) -> None:
    """Print the whole plan to stdout, 80 columns wide."""
    plan = found.plan
    assert plan is not None
    for part in wrapped(title(found), 80):
        output.result(part)
    output.styled(_budget_bar(plan))
    for number, line in enumerate(plan.lines):
        output.styled(_line(number, line, plan.budget_bytes))
    spare = plan.budget_bytes - plan.total_bytes
    output.result(f"  {'spare':<19}{format_bytes(spare):>10}{spare / plan.budget_bytes:>7.1%}")
    output.result("")
    for text in _strip(plan):
        output.result(text)
    output.result("")
    for name, text in _facts(found, plan):
        for index, part in enumerate(wrapped(text, 66)):
            output.result(f"{name if not index else '':<13}{part}")


def _budget_bar(plan: OffloadPlan) -> Text:
    """The budget as a bar: each line of the plan fills its share with its letter, and dots are spare."""
    bar, done_bytes, drawn = Text("["), 0, 0
    for number, line in enumerate(plan.lines):
        done_bytes += line.size_bytes
        cells = round(done_bytes / plan.budget_bytes * _BAR_CELLS) - drawn
        bar.append(_KEYS[number] * cells, style=f"reverse {_colour(number)}")
        drawn += cells
    return bar.append("·" * (_BAR_CELLS - drawn)).append("]")


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _line(number: int, line: PlanLine, budget_bytes: int) -> Text:
    share = line.size_bytes / budget_bytes
    text = Text(_KEYS[number], style=f"bold {_colour(number)}")
    text.append(
        f" {line.label:<19}{format_bytes(line.size_bytes):>10}{share:>7.1%} ", style="default not bold"
    )
    bar = "#" * round(share * _LINE_CELLS)
    text.append(f"{bar:<{_LINE_CELLS}}" if line.note else bar)
    return text.append(f" {printable(line.note)}" if line.note else "", style="dim not bold")


def _strip(plan: OffloadPlan) -> Iterator[str]:
    """A letter for each layer in order, and a legend."""
    letters = "".join(_letter(plan, layer) for layer in range(plan.resident_layers + plan.streamed_layers))
    for start in range(0, len(letters), _STRIP_CELLS):
        yield f"{'layers' if not start else '':<13}{letters[start : start + _STRIP_CELLS]}"
    legend = (f"{letter} {text}" for letter, text in _LEGEND.items() if letter in letters)
    # \0 keeps `wrapped` from breaking an item at its own spaces.
    for part in wrapped("   ".join(item.replace(" ", "\0") for item in legend), 66):
        yield f"{'':<13}{part.strip()}".replace("\0", " ")


def _letter(plan: OffloadPlan, layer: int) -> str:
    if layer in plan.shared:
        return "R"
    if layer in plan.resident:
        return "T"
    return "·" if layer in plan.pinned_layers else "d"


def _facts(found: Forecast, plan: OffloadPlan) -> Iterator[tuple[str, str]]:
    bounds = found.bounds
    assert bounds is not None
    host = ", ".join(f"{line.label} {format_bytes(line.size_bytes)}" for line in plan.host_lines)
    planned, budget = format_bytes(plan.total_bytes), format_bytes(plan.budget_bytes)
    least = f"{format_bytes(bounds.least_budget_bytes)} with a context of {bounds.least_context}"
    yield "why", reason_text(plan.reason)
    yield "budget", f"{planned} of {budget} planned{budget_text(plan)}; the least that works is {least}"
    longer = f"; up to {bounds.largest_context} would fit, slower"
    yield "context", f"{plan.context} tokens planned{longer if bounds.largest_context > plan.context else ''}"
    yield "prompt", prompt_text(plan)
    if plan.device == "cpu":
        whole = f"{format_bytes(plan.process_bytes)} in all, as a task manager shows it"
        yield "process", f"{whole}: {planned} planned, {host} beside the budget"
    else:
        yield "host RAM", f"{format_bytes(plan.process_bytes)} for the whole process: {host}"
        if plan.prediction.origin == "assumed":
            yield "GPU", "no figure was measured on this GPU: speeds are assumed until a run has timed it"
    yield "disk", _disk(found, plan)
    yield from _speeds(found, plan)
    if found.advice is not None:
        yield "advice", advice_text(found.advice)


def _disk(found: Forecast, plan: OffloadPlan) -> str:
    text = f"{format_bytes(found.geometry.stored_bytes)} of weights"
    if plan.drafts:
        text += f" + {format_bytes(found.substitute_disk_bytes)} of substitutes"
    return f"{text}; {_download(found)}{'' if found.is_prepared else _preparation(found)}"


def _download(found: Forecast) -> str:
    if not found.download_bytes:
        return "all downloaded"
    text = f"{format_bytes(found.download_bytes)} to download"
    if found.download_s is None or found.download_bytes_per_s is None:
        return text
    measured = f"{found.download_bytes_per_s / 1e6:.3g} MB/s, as measured last time"
    return f"{text}, about {format_seconds(found.download_s)} at {measured}"


def _preparation(found: Forecast) -> str:
    if found.prepare_s is None:
        return ", not prepared yet"
    return f", not prepared yet, which takes about {format_seconds(found.prepare_s)} at the last one's rate"


def _speeds(found: Forecast, plan: OffloadPlan) -> Iterator[tuple[str, str]]:
    guess = plan.prediction
    plain = f"{rate(guess.plain_tok_per_s)}, {format_seconds(guess.plain_pass_s)} a pass"
    if found.best_plain is not None:
        own = rate(found.best_plain.prediction.plain_tok_per_s)
        layers = found.best_plain.resident_layers
        plain += f"; {own} under its own best plan, {counted(layers, 'layer')} resident"
    yield "plain", plain
    if guess.depth:
        steps = f"{counted(guess.depth, 'draft step')} of {short_time(guess.step_s)}"
        if guess.sequences > 1:
            steps = f"{counted(guess.depth, 'level')} drafted in {short_time(guess.step_s)} each"
        each = f"tau {guess.tau:.1f} by {steps} and a pass of {short_time(guess.pass_s)}"
        if guess.sequences > 1:
            each = f"{guess.sequences} answers at a time together, {each}"
        ends = range_lines(guess)
        source = f"{acceptance_text(guess)}{', as no run here has shown it yet' if ends else ''}"
        yield "subspec", f"{speed_text(guess)}: {each}; {source}"
        yield from ends
    else:
        yield "subspec", f"{rate(guess.tok_per_s)}: plain decoding, which drafting would not speed up"
    yield "assuming", ", ".join(assumptions(guess))


def speed_text(guess: Prediction) -> str:
    """The predicted speed and speed-up; a range from low to high while acceptance is assumed."""
    if guess.low is None or guess.high is None:
        return f"{rate(guess.tok_per_s)}, {guess.speedup:.1f}x"
    plain = guess.plain_tok_per_s
    return (
        f"{guess.low.tok_per_s:.3g} to {rate(guess.high.tok_per_s)}, "
        f"{guess.low.tok_per_s / plain:.1f}x to {guess.high.tok_per_s / plain:.1f}x; "
        f"planned with {rate(guess.tok_per_s)}"
    )


def rate(tok_per_s: float) -> str:
    """Tokens per second with about three digits."""
    return f"{tok_per_s:.{2 if tok_per_s < 10 else 1}f} tok/s"


def short_time(seconds: float) -> str:
    """Like `format_seconds`, with a decimal below 10 ms."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else format_seconds(seconds)


def wrapped(text: str, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` cells."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines
