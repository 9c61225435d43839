"""`subspec plan`: predict memory and speed of a model on this machine from its headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli.completion import complete_model
from subspec_cli.cli.options import FollowLinksOpt, JsonOpt, Settings, number, with_settings
from subspec_cli.config import DraftConfig, MemoryConfig, ModelConfig
from subspec_cli.errors import UsageError
from subspec_cli.setting_rules import MOST_PARALLEL
from subspec_cli.units import GIB, parse_size_gib

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.planning.prediction import Prediction
    from subspec_cli.session.forecast import BudgetRow, Forecast

_HEADERS = ("GiB", "resident", "context", "plain tok/s", "subspec tok/s", "speedup", "RAM")

ModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, local directory or demo; nothing of it need be here.",
        show_default="the settings' model",
        autocompletion=complete_model,
    ),
]
LinkOpt = Annotated[
    float | None,
    typer.Option(
        "--link-gb-per-s",
        parser=number,
        metavar="RATE",
        help="Rate of the link (on cpu, the disk) in 1e9 bytes per second.",
        show_default="assumed",
    ),
]
CompareOpt = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="SIZE,SIZE,…",
        help="Plan these budgets side by side, such as 6,8,12 or 500MB,1GiB.",
    ),
]

ParallelOpt = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        min=1,
        max=MOST_PARALLEL,
        metavar="N",
        help="Plan for N answers at a time, as batch and serve take them.",
        show_default="one, by this command's settings",
    ),
]


@with_settings(ModelConfig, MemoryConfig, DraftConfig, without=("memory.reprobe",))
def plan(
    settings: Settings,
    model: ModelArg = None,  # noqa: ARG001 - it is config.model.model
    link_gb_per_s: LinkOpt = None,
    compare: CompareOpt = None,
    parallel: ParallelOpt = None,
    follow_links: FollowLinksOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show what MODEL needs and how fast it would be, before anything is downloaded or prepared."""
    config = settings.config
    if config.model.model is None:
        raise UsageError("no model is named", "subspec plan MODEL --vram-gb 8")
    if link_gb_per_s is not None and not 0 < link_gb_per_s < 1e5:
        raise UsageError(f"--link-gb-per-s {link_gb_per_s:g} is no rate", "give 1e9 bytes per second: 24")
    compared = budgets(compare)
    from subspec_cli.cli.output import Output
    from subspec_cli.reporter import Reporter
    from subspec_cli.session.forecast import forecast

    output = Output(plain=config.run.plain)
    found = forecast(
        config.model.model,
        config,
        link_gb_per_s=link_gb_per_s,
        compare_gib=compared,
        parallel=parallel,
        follow_links=follow_links,
        reporter=Reporter(note=output.note),
    )
    if as_json:
        from subspec_cli.cli.documents import forecast_document

        output.document(forecast_document(found))
    else:
        _show(found, output)


def budgets(text: str | None) -> list[float]:
    """Parse the budgets of `--compare` in GiB, smallest first; raises UsageError if one is not a size."""
    if text is None:
        return []
    try:
        return sorted({parse_size_gib(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise UsageError(f"--compare {text[:80]!r} is no list of sizes", "--compare 6,8,12,24") from error


def _show(found: Forecast, output: Output) -> None:
    from subspec_cli.cli.output_plan import show_plan, title, wrapped

    if found.plan is None:
        output.result(title(found))
    else:
        show_plan(found, output)
    if found.compared:
        output.table(_HEADERS, [_row(row) for row in found.compared], has_total=False)
        for row in found.compared:
            if row.plan is None:
                for part in wrapped(f"{row.budget_bytes / GIB:g} GiB is too small: {row.problem}", 80):
                    output.result(part)


def _span(guess: Prediction, unit: float, digits: int) -> str:
    """The predicted speed in a unit, from low to high while acceptance is assumed."""
    if guess.low is None or guess.high is None:
        return f"{guess.tok_per_s / unit:.{digits}f}"
    return f"{guess.low.tok_per_s / unit:.{digits}f}-{guess.high.tok_per_s / unit:.{digits}f}"


def _row(row: BudgetRow) -> list[str]:
    budget = f"{row.budget_bytes / GIB:g}"
    plan = row.plan
    if plan is None:
        return [budget, *["-"] * (len(_HEADERS) - 1)]
    guess = plan.prediction
    return [
        budget,
        f"{plan.resident_layers}/{plan.resident_layers + plan.streamed_layers}",
        str(plan.context),
        f"{guess.plain_tok_per_s:.2f}",
        _span(guess, 1.0, 2),
        f"{_span(guess, guess.plain_tok_per_s, 1)}x",
        f"{plan.host_bytes / GIB:.1f} GiB",
    ]
