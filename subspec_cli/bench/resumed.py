"""Answers of an interrupted benchmark, read from its record so that they need not be given again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.bench.answers import AnswerPair, ArmAnswer, BestPlainAnswer, PeerAnswer
from subspec_cli.bench.record_comparison import differences
from subspec_cli.bench.report import LinkFigures
from subspec_cli.errors import UsageError
from subspec_cli.metrics import GenerationStats, RangeTotals
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.probe.machine_use import MachineUse

_HINT: Final = "resume with the settings of the record, or leave out --resume to begin anew"
_SESSION_FIELDS: Final = ("model", "revision", "device")


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """What an interrupted benchmark had measured."""

    pairs: tuple[AnswerPair, ...] = ()
    """The first pairs of the suite, in its order."""
    best_plain: tuple[BestPlainAnswer, ...] = ()
    link: LinkFigures | None = None
    seed: int | None = None
    """Seed of the noise; None if no session was opened yet."""
    session: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Model and plan of the answers; empty if no session was opened yet."""


def kept_answers(document: Mapping[str, Any], now: Mapping[str, Any]) -> KeptAnswers:
    """Return the answers in a record.

    Args:
        document: the record.
        now: suite, settings, versions and machine of this run, as a record has them.

    Raises:
        UsageError: nothing is left to measure, a setting differs, or the record was changed.
    """
    if not document.get("interrupted"):
        raise UsageError("the record is complete: nothing is left to measure", "leave out --resume")
    if found := differences(document, now):
        raise UsageError(f"--resume: the record was made with other settings: {'; '.join(found)}", _HINT)
    try:
        link = document["link"]
        return KeptAnswers(
            pairs=tuple(map(_pair, document["answers"])),
            best_plain=tuple(map(_best_plain, document["best_plain_answers"])),
            link=None if link is None else LinkFigures(**_fields_of(LinkFigures, link)),
            seed=document.get("seed"),
            session=session_layout(document, document["plan"]) if "plan" in document else {},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--resume: the record was changed: {error!r}", "leave out --resume") from error


def check_session(kept: KeptAnswers, context: Mapping[str, Any], plan: OffloadPlan) -> None:
    """Raise UsageError, which names the difference, unless a session has the model and the plan of the record."""
    now = session_layout(context, plan.as_dict(reason="", assumptions=()))
    for name, before in kept.session.items():
        if before != now[name]:
            raise UsageError(f"--resume: {name} was {before} in the record and is {now[name]} now", _HINT)


def session_layout(context: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the figures of two sessions must share."""
    return {
        **{name: context.get(name) for name in _SESSION_FIELDS},
        "context": plan["context"],
        "resident layers": len(plan["resident_layers"]),
    }


def _pair(found: Mapping[str, Any]) -> AnswerPair:
    return AnswerPair(
        found["question_id"],
        found["category"],
        found["turn"],
        plain=_arm(found["plain"]),
        speculative=_arm(found["speculative"]),
        repetition=found["repetition"],
        peer=None if found["peer"] is None else _peer(found["peer"]),
    )


def _peer(found: Mapping[str, Any]) -> PeerAnswer:
    return PeerAnswer(_arm(found), found["read_bytes"], found["streamed_weight_bytes"])


def _best_plain(found: Mapping[str, Any]) -> BestPlainAnswer:
    return BestPlainAnswer(found["question_id"], found["when"], _arm(found))


def _arm(found: Mapping[str, Any]) -> ArmAnswer:
    return ArmAnswer(
        tuple(found["token_ids"]),
        found["text"],
        found["finish_reason"],
        _stats(found),
        MachineUse(**found["processors"]),
    )


def _stats(found: Mapping[str, Any]) -> GenerationStats:
    ranges = {
        item["least_rows"]: RangeTotals(**_fields_of(RangeTotals, item)) for item in found["by_cached_rows"]
    }
    totals: dict[str, Any] = {
        entry.name: _value(found[entry.name]) for entry in dataclasses.fields(GenerationStats) if entry.repr
    }
    empty = GenerationStats(**totals)
    return dataclasses.replace(
        empty, by_cached_rows=tuple(ranges.get(item.least_rows, item) for item in empty.by_cached_rows)
    )


def _fields_of(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: found[entry.name] for entry in dataclasses.fields(kind)}


def _value(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
