"""Views of an answer during generation: rows of words above live statistics, or text alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from subspec_cli.cli.answer_rows import AnswerRows
from subspec_cli.cli.output import LiveArea, Output
from subspec_cli.cli.output_progress import ProgressLine, prefill_text
from subspec_cli.metrics import GenerationStats, PrefillProgress
from subspec_cli.units import counted, format_bytes, printable

if TYPE_CHECKING:
    from subspec_cli.session import Session, TextDelta


INTERRUPTED = "interrupted"
READING = "reading the prompt …"

_BLOCKS = "▁▂▃▄▅▆▇█"
_REDRAW_INTERVAL_S = 0.1
_SPARKLINE_WIDTH = 24
"""Passes shown, so that each line of statistics fits 80 columns."""


class View:
    """Receives an answer piece by piece. This base class shows nothing; leaving a view restores the terminal."""

    def feed(self, text: str, stats: GenerationStats) -> None:
        """Receive the next piece of text and the statistics so far."""

    def show_prefill(self, progress: PrefillProgress) -> None:
        """Receive how far the prompt is read."""

    def resume(self, text: str) -> None:
        """Receive what was shown of an answer that now goes on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; there is nothing to restore."""


class PlainView(View):
    """Writes text at once: unchanged into files and pipes, with control characters escaped on a terminal.

    Before the text, `progress` shows how far the prompt is read.
    """

    def __init__(self, stream: TextIO, progress: ProgressLine, *, escape: bool) -> None:
        self._stream = stream
        self._progress = progress
        self._escape = escape
        self._last = "\n"

    def __enter__(self) -> Self:
        self._progress.__enter__()
        self._progress.update(READING)
        return self

    def show_prefill(self, progress: PrefillProgress) -> None:
        """Redraw the line of progress, or add one now and then."""
        self._progress.show_prefill(progress)

    def feed(self, text: str, stats: GenerationStats) -> None:  # noqa: ARG002 - only the summary shows statistics
        """Write and flush, so that the reader of a pipe sees each piece at once."""
        self._progress.__exit__(None, None, None)
        if text:
            self._stream.write(printable(text) if self._escape else text)
            self._stream.flush()
            self._last = text[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the progress, and end the last line, unless writing failed."""
        self._progress.__exit__(kind, error, trace)
        if self._last != "\n" and not isinstance(error, OSError):
            self._stream.write("\n")
            self._stream.flush()


class LiveView(View):
    """Full rows scroll up as ordinary text; the unfinished row is shown above the statistics."""

    def __init__(
        self,
        area: LiveArea,
        *,
        memory_bytes: Callable[[], int],
        budget_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._area = area
        self._memory_bytes = memory_bytes
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._redraw_at_s = clock()
        self._rows = AnswerRows()

    def __enter__(self) -> Self:
        self._area.__enter__()
        self._area.show((), [READING])
        return self

    def resume(self, text: str) -> None:
        """Begin with the row that was not full."""
        self._rows.feed(printable(text), self._area.width)

    def show_prefill(self, progress: PrefillProgress) -> None:
        """Redraw the line of progress a few times a second."""
        if self._clock() >= self._redraw_at_s:
            self._area.show((), [prefill_text(progress)])
            self._redraw_at_s = self._clock() + _REDRAW_INTERVAL_S

    def feed(self, text: str, stats: GenerationStats) -> None:
        """Write full rows, and redraw the rest a few times a second."""
        for row in self._rows.feed(printable(text), self._area.width):
            self._area.write_row(row)
        if self._clock() >= self._redraw_at_s:
            statistics = statistics_lines(stats, self._memory_bytes(), self._budget_bytes)
            self._area.show(self._rows.unfinished(), statistics)
            self._redraw_at_s = self._clock() + _REDRAW_INTERVAL_S

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the statistics and leave the whole text."""
        self._area.__exit__(kind, error, trace)
        if (row := self._rows.unfinished()) and not isinstance(error, OSError):
            self._area.write_row(row)


def make_view(output: Output, session: Session) -> View:
    """The view for the kind of stdout."""
    if output.is_live:
        budget_bytes = session.description.budget_bytes
        return LiveView(output.area(), memory_bytes=session.memory_bytes, budget_bytes=budget_bytes)
    return PlainView(output.stdout, ProgressLine(output), escape=output.is_terminal)


def statistics_lines(stats: GenerationStats, memory_bytes: int, budget_bytes: int) -> list[str]:
    """The statistics under an unfinished answer: a line each for speed, time and memory."""
    speed = [f"{stats.decode_tok_per_s:.1f} tok/s"] if stats.decode_tok_per_s else []
    speed.append(counted(stats.new_tokens, "token"))
    if stats.drafted_tokens:
        speed += [f"tau {stats.tau:.2f}", f"accepted {sparkline(stats.recent_accepted[-_SPARKLINE_WIDTH:])}"]
    times = time_shares(stats)
    if stats.streamed_bytes:
        times.append(f"link {stats.link_gb_per_s:.2f} GB/s")
    memory = [f"memory {format_bytes(memory_bytes)} of {format_bytes(budget_bytes)}"]
    if stats.streamed_bytes:
        memory.append(f"{format_bytes(stats.streamed_bytes)} moved")
    return [" · ".join(parts) for parts in (speed, times, memory) if parts]


def time_shares(stats: GenerationStats) -> list[str]:
    """Shares of the decode time: drafting, the target's own computing and waiting for weights."""
    total_s = stats.draft_time_s + stats.verify_time_s
    if total_s <= 0:
        return []
    compute_s = stats.verify_time_s - stats.wait_time_s - stats.shadow_time_s
    shares = [f"draft {stats.draft_time_s / total_s:.0%}"]
    if stats.shadow_steps:
        hits = stats.shadow_hits / max(1, stats.passes)
        shares.append(f"in shadow {stats.shadow_time_s / total_s:.0%} (of use to {hits:.0%})")
    return [
        *shares,
        f"verify {compute_s / total_s:.0%}",
        f"waiting {stats.wait_time_s / total_s:.0%}",
    ]


def sparkline(counts: Sequence[int]) -> str:
    """Accepted tokens of the latest passes as a row of blocks; a full block is 8 or the most seen."""
    top = max(8, *counts) if counts else 8
    return "".join(_BLOCKS[round(count / top * (len(_BLOCKS) - 1))] for count in counts)


@dataclass
class Answer:
    """One answer, perhaps incomplete."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = INTERRUPTED
    """`stop` or `length` after the last piece; after Ctrl-C still `interrupted`."""
    stats: GenerationStats = field(default_factory=GenerationStats)

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C ended the answer."""
        return self.finish_reason == INTERRUPTED


def collect_answer(deltas: Iterator[TextDelta], view: View) -> Answer:
    """Show an answer while it is generated. Ctrl-C ends it early and keeps the text so far."""
    answer = Answer()
    try:
        with view:
            for delta in deltas:
                answer.text += delta.text
                answer.token_ids.extend(delta.token_ids)
                answer.stats = delta.stats
                view.feed(delta.text, delta.stats)
                if delta.finish_reason is not None:
                    answer.finish_reason = delta.finish_reason
    except KeyboardInterrupt:
        answer.finish_reason = INTERRUPTED
    finally:
        # Ctrl-C while drawing leaves the generator suspended, with its rows still in the cache.
        if isinstance(deltas, Generator):
            deltas.close()
    return answer
