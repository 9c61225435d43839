"""The texts around an answer: the loading line, the banner, the summary and the JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.cli.documents import plan_document
from subspec_cli.cli.live import Answer
from subspec_cli.cli.plan_text import acceptance_text, budget_text, reason_text
from subspec_cli.cli.sampling_text import chat_sampling_line, sampling_words
from subspec_cli.config import Config
from subspec_cli.planning.comparison import Comparison, compare
from subspec_cli.units import counted, format_bytes, format_seconds, printable
from subspec_cli.versions import __version__

if TYPE_CHECKING:
    from subspec_cli.session import Session
    from subspec_cli.session.description import SessionDescription

_FREE_SHARE: Final = 0.25
"""Share of a chat's context below which the user is warned."""


def loading_line(config: Config, file: Path | None, command: str = "") -> str:
    """The line printed before anything heavy is imported, so that the program never looks hung."""
    model = config.model.model
    if model is None:
        from subspec_cli.substitutes.prepared_names import last_used_id

        used = last_used_id(config.model.bits)
        model = "the model prepared last" if used is None else f"{printable(used)}, the model used last"
    source = f" (settings from {file})" if file is not None else ""
    return " · ".join(
        part for part in (f"subspec {__version__}", command, f"loading {model} …{source}") if part
    )


def session_lines(session: Session) -> list[str]:
    """The banner: model, device and exactness, sampling; the plan and its reason."""
    return description_lines(session.description)


def description_lines(about: SessionDescription) -> list[str]:
    """The banner of a session that may be in another process."""
    plan = about.plan
    first = [
        f"model {about.model_id}",
        f"{about.device} {about.dtype}",
        f"context {about.context_tokens:,} tokens",
    ]
    first.append(f"{about.exactness} ({about.exactness_reason})")
    if (words := sampling_words(about.config.sampling)) != "greedy":
        first.append(words)
    if not about.config.sampling.is_greedy:
        first.append(f"seed {about.seed}{' (fresh)' if about.fresh_seed else ''}")
    second = [f"plan: {plan.resident_layers} resident + {plan.streamed_layers} streamed layers"]
    if about.fits:
        second.append("fits in the budget")
    second.append("speculation on" if about.speculation else "plain decoding")
    planned_bytes = sum(line.size_bytes for line in plan.lines)
    second.append(
        f"{format_bytes(planned_bytes)} of {format_bytes(about.budget_bytes)} planned{budget_text(plan)}"
    )
    second.append(reason_text(plan.reason))
    if about.speculation:
        second.append(acceptance_text(plan.prediction))
    return [" · ".join(part for part in line if part) for line in (first, second)]


def note_lines(session: Session) -> list[str]:
    """What did not go as planned while loading."""
    return [f"note: {note}" for note in session.description.notes]


def summary_line(answer: Answer, session: Session) -> str:
    """The line that stays after an answer."""
    stats, about = answer.stats, session.description
    rate = f" at {stats.decode_tok_per_s:.1f} tok/s" if stats.decode_tok_per_s else ""
    parts = [f"{counted(stats.new_tokens, 'token')} ({answer.finish_reason}){rate}"]
    if stats.drafted_tokens:
        parts.append(f"tau {stats.tau:.2f}")
    if not stats.new_tokens:  # interrupted while the prompt was read
        return " · ".join(parts)
    parts.append(f"first token {format_seconds(stats.ttft_s)}")
    passes = f" in {stats.prefill_passes} passes" if stats.prefill_passes > 1 else ""
    parts.append(f"prompt {stats.prompt_tokens} ({stats.prefilled_tokens} prefilled{passes})")
    parts.append(f"context {stats.prompt_tokens + stats.new_tokens:,} of {about.context_tokens:,}")
    if stats.streamed_bytes:
        parts.append(f"{format_bytes(stats.streamed_bytes)} at {stats.link_gb_per_s:.2f} GB/s")
    parts.append(
        f"memory {format_bytes(session.peak_memory_bytes())} of {format_bytes(about.budget_bytes)} "
        f"(whole process {format_bytes(session.process_peak_bytes())})"
    )
    parts.append(about.exactness)
    return " · ".join(parts)


def chat_line(answer: Answer, session: Session) -> str:
    """The line that stays after an answer of a chat."""
    stats, about = answer.stats, session.description
    parts = [f"{counted(stats.new_tokens, 'token')} ({answer.finish_reason})"]
    if stats.decode_tok_per_s:
        parts.append(f"{stats.decode_tok_per_s:.1f} tok/s")
    parts.append(f"context {stats.prompt_tokens + stats.new_tokens:,} of {about.context_tokens:,}")
    return " · ".join([*parts, about.exactness])


def chat_header(session: Session) -> list[str]:
    """The lines that begin a chat, two or three, short enough for 40 columns."""
    about = session.description
    first = f"{about.model_id} · {about.device} · {about.exactness}"
    held = f"context {about.context_tokens:,}"
    if sampling_words(about.config.sampling) == "greedy":
        return [first, f"{held} · greedy · /help for more"]
    return [first, f"{held} · /help lists commands", chat_sampling_line(session)]


def fullness_warning(answer: Answer, session: Session) -> str:
    """The warning that a chat's context is nearly full; empty before."""
    held = session.description.context_tokens
    left = held - answer.stats.prompt_tokens - answer.stats.new_tokens
    if left > held * _FREE_SHARE:
        return ""
    if left <= 0:
        return f"the context is full, all {held:,} tokens: /drop forgets the oldest turns, /reset all"
    share = 100 * (held - left) // held
    return (
        f"the context is {share}% full: {left:,} of {held:,} tokens are left; "
        "a message that does not fit is refused; /drop forgets the oldest turns, /reset all"
    )


def continue_hint(answer: Answer, session: Session, turns: int) -> str:
    """How an answer that was cut short goes on; empty if it is whole, or if the context has no room for more."""
    if answer.finish_reason == "stop":
        return ""
    cut = "interrupted" if answer.is_interrupted else "ended by length"
    used = answer.stats.prompt_tokens + answer.stats.new_tokens
    if used < session.description.context_tokens:
        return f"{cut}: /continue goes on"
    return f"{cut}: /continue goes on after /drop" if turns > 1 else ""


def comparison_of(answer: Answer, session: Session) -> Comparison:
    """Compare the plan's prediction with the measured answer."""
    about = session.description
    drafted = answer.stats.drafted_tokens > 0
    return compare(about.plan.prediction, about.costs, [answer.stats], drafted=drafted)


def answer_document(answer: Answer, session: Session) -> dict[str, Any]:
    """The document of `run --json`."""
    stats, about = answer.stats, session.description
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": stats.prompt_tokens,
        "prefilled_tokens": stats.prefilled_tokens,
        "new_tokens": stats.new_tokens,
        "finish_reason": answer.finish_reason,
        "end_ids": list(about.end_ids),
        "exactness": about.exactness,
        "exactness_reason": about.exactness_reason,
        "speculation": about.speculation,
        "seed": about.seed,
        "model": about.model_id,
        "revision": about.revision,
        "stats": {
            **stats.as_dict(),
            "peak_memory_bytes": session.peak_memory_bytes(),
            "budget_bytes": about.budget_bytes,
            "bare_process_bytes": session.bare_process_bytes(),
            "process_peak_bytes": session.process_peak_bytes(),
        },
        "predicted_beside_measured": comparison_of(answer, session).as_dict(),
        "plan": plan_document(about.plan),
        "costs": about.costs.as_dict(),
        "config": about.config.as_dict(),
        "versions": about.versions,
    }
