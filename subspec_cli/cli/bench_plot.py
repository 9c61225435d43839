"""The picture of a benchmark: speed-up by question, accepted lengths, and where time goes."""

from __future__ import annotations

import importlib.util
import io
import logging
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.bench.plotted import PARTS, Plotted, PlottedArm, PlottedQuestion, plotted
from subspec_cli.errors import UsageError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.units import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS: Final[Mapping[str, bytes]] = {".png": b"\x89PNG", ".svg": b"<?xml"}
"""File name endings, and how such a file begins."""
_BLUE, _RED, _GREY, _LIGHT, _INK = "#2f6db5", "#c2410c", "#9a9a9a", "#f2f4f7", "#333333"
_PART_NAMES: Final = {
    "draft": "drafting before a pass",
    "shadow": "drafting in a pass's shadow",
    "wait": "waiting for weights",
    "compute": "computing the pass",
    "rest": "verifying and the rest",
}
_PART_COLOURS: Final = dict(zip(PARTS, ("#e39b3b", "#f3d19c", "#b9bec6", _BLUE, "#7a8aa0"), strict=True))
_MOST_TICKS: Final = 40
_LEAST_PLACES: Final = 6
"""Bars of fewer questions are no wider than those of this many."""
_LEAST_PART: Final = 0.003
"""Share of the longest bar below which a part cannot be seen."""
_STYLE: Final = {
    "text.parse_math": False,  # names are not formulas, whatever signs they have
    "font.size": 10,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "subspec",
}


def check_plot(path: Path, *, force: bool) -> None:
    """Refuse a picture that could not be written later, or would replace what is no picture, unless `force`.

    Raises UsageError.
    """
    name, begins = printable(str(path)), _KINDS.get(path.suffix.lower())
    if begins is None:
        raise UsageError(f"--plot {name}: its name must end in .png or .svg", "--plot bench.png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot takes matplotlib, which is not installed", "pip install 'subspec-cli[plot]'")
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--plot {name} cannot be written", "name a file in a directory that exists")
    if path.exists() and not force:
        with path.open("rb") as file:
            if file.read(len(begins)) != begins:
                raise UsageError(f"{name} exists and is no picture", "--force overwrites it")


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw a record's figures. Raises UsageError if it holds none, ResourceError if the file cannot be written."""
    found = plotted(document)
    # The library talks on stderr of caches and of letters that its font lacks.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context

    content = io.BytesIO()
    with warnings.catch_warnings(), rc_context(_STYLE):
        warnings.simplefilter("ignore")
        kind = path.suffix.lower().removeprefix(".")
        dated: dict[str, Any] = {"Date": None} if kind == "svg" else {}  # equal records give equal pictures
        _figure(found).savefig(content, format=kind, dpi=150, facecolor="white", metadata=dated)
    atomic_write(path, content.getvalue())


def _figure(found: Plotted) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    notes = [f"void: {reason}" for reason in found.void_reasons]
    figure.suptitle(
        "\n".join((printable(found.title), *(line for note in notes for line in textwrap.wrap(note, 130)))),
        fontsize=11,
        x=0.01,
        ha="left",
    )
    _draw_speedups(top.subplots(), found)
    left, right = bottom.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_accepted(left, found)
    _draw_times(right, found.arms)
    return figure


def _draw_speedups(axes: Axes, found: Plotted) -> None:
    questions = found.questions
    places = range(len(questions))
    axes.set_title("Speed-up by question", pad=36 if len({item.category for item in questions}) > 10 else 20)
    axes.set_ylabel("times plain decoding, same plan")
    _draw_categories(axes, questions)
    axes.axhline(1, color=_INK, linewidth=0.8)
    shown = [(place, item, item.median) for place, item in zip(places, questions, strict=True)]
    drawn = [(place, item, median) for place, item, median in shown if median is not None]
    if drawn:
        heights = [median for _, _, median in drawn]
        below = [median - min(item.ratios) for _, item, median in drawn]
        above = [max(item.ratios) - median for _, item, median in drawn]
        axes.bar(
            [place for place, _, _ in drawn],
            heights,
            width=0.6,
            color=_BLUE,
            yerr=[below, above],
            error_kw={"ecolor": _INK, "elinewidth": 0.8, "capsize": 2},
            label="median of its answers, least to most",
        )
    ceilings = [(place, item.tau) for place, item in zip(places, questions, strict=True) if item.tau]
    if ceilings:
        axes.hlines(
            [tau for _, tau in ceilings],
            [place - 0.4 for place, _ in ceilings],
            [place + 0.4 for place, _ in ceilings],
            colors=_RED,
            linewidth=1.2,
            label="tau: tokens per pass, which no ratio exceeds",
        )
    void = [place for place, item, median in shown if item.void and median is None]
    if void:
        axes.scatter(void, [0.5] * len(void), marker="x", color=_GREY, s=36, label="void", zorder=3)
    if found.speedup is not None:
        axes.axhline(
            found.speedup,
            color=_BLUE,
            linewidth=1,
            linestyle="--",
            label=f"all questions: {found.speedup:.2f}x",
        )
    highest = max([*(tau for _, tau in ceilings), *(max(item.ratios) for _, item, _ in drawn), 1.5])
    axes.set_ylim(0, 1.12 * highest)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=9)


def _draw_categories(axes: Axes, questions: Sequence[PlottedQuestion]) -> None:
    """Shade every second category, and name questions below and categories above."""
    margin = max(0.6, (_LEAST_PLACES - len(questions)) / 2)
    axes.set_xlim(-margin, len(questions) - 1 + margin)
    categories = list(dict.fromkeys(item.category for item in questions))
    for number, category in enumerate(categories):
        places = [place for place, item in enumerate(questions) if item.category == category]
        if number % 2 == 0 and len(categories) > 1:
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=_LIGHT, zorder=0)
        name = textwrap.shorten(printable(category), 24, placeholder="…")
        axes.text(
            (places[0] + places[-1]) / 2,
            1.0,
            name,
            transform=axes.get_xaxis_transform(),
            ha="left" if len(categories) > 10 else "center",
            va="bottom",
            rotation=30 if len(categories) > 10 else 0,
            fontsize=9,
        )
    step = -(-len(questions) // _MOST_TICKS)
    ticks = list(range(0, len(questions), step))
    names = [
        textwrap.shorten(printable(questions[place].question_id), 16, placeholder="…") for place in ticks
    ]
    is_long = sum(map(len, names)) > 110
    axes.set_xticks(
        ticks, names, rotation=45 if is_long else 0, ha="right" if is_long else "center", fontsize=9
    )
    axes.set_xlabel("question")


def _draw_accepted(axes: Axes, found: Plotted) -> None:
    axes.set_title("Accepted lengths")
    axes.set_xlabel("drafted tokens accepted in a pass")
    axes.set_ylabel("share of passes (%)")
    passes = sum(found.accepted_passes)
    if not passes or found.accepted_passes[0] == passes:
        axes.text(0.5, 0.5, "nothing was accepted", transform=axes.transAxes, ha="center", color=_GREY)
        return
    lengths = range(len(found.accepted_passes))
    axes.bar(lengths, [100 * count / passes for count in found.accepted_passes], color=_BLUE, width=0.8)
    axes.locator_params(axis="x", integer=True)
    mean = sum(length * count for length, count in enumerate(found.accepted_passes)) / passes
    axes.axvline(mean, color=_RED, linewidth=1.2, label=f"mean {mean:.2f}")
    tau = "" if found.tau is None else f"tau {found.tau:.2f} in "
    axes.set_title(f"{tau}{passes} passes", loc="right", fontsize=9, fontweight="normal")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=9)


def _draw_times(axes: Axes, arms: Sequence[PlottedArm]) -> None:
    axes.set_title("Where time goes")
    axes.set_xlabel("milliseconds per token")
    names = [f"{arm.name}\n(void)" if arm.is_void else arm.name for arm in arms]
    longest, lefts = [sum(arm.part_ms.values()) for arm in arms], [0.0] * len(arms)
    for part in PARTS:
        widths = [arm.part_ms[part] for arm in arms]
        if max(widths) < _LEAST_PART * max(longest, default=0.0):
            continue
        bars = axes.barh(
            names, widths, left=lefts, color=_PART_COLOURS[part], height=0.55, label=_PART_NAMES[part]
        )
        for bar, arm in zip(bars, arms, strict=True):
            if arm.is_void:
                bar.set(hatch="///", edgecolor="white", alpha=0.55)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for name, total in zip(names, longest, strict=True):
        axes.text(total, name, f"  {total:.3g} ms", va="center", fontsize=9)
    axes.set_xlim(0, 1.18 * max([*longest, 1e-9]))
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, frameon=False, fontsize=9)
