"""JSON by a schema: valid, the same with and without speculation, and cheap where the grammar leaves no choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes_session
import numpy as np
import pytest
import tiny_models
import torch
from fakes import fake_cache, policy
from fakes_session import Shelf, open_tiny

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.penalties import NO_PENALTIES, begin_path
from subspec_cli.decoding.sampler import GreedySampler
from subspec_cli.drafting.captured_steps import CapturedSequence
from subspec_cli.drafting.draft_steps import SHARPENING, DirectSequence, rank
from subspec_cli.drafting.frontier import DraftContext, DraftRules, Frontier
from subspec_cli.drafting.growing_tree import GrowingTree
from subspec_cli.drafting.history import Calibration, History
from subspec_cli.drafting.ngram import NGramLookup
from subspec_cli.errors import UnsupportedModelError, UsageError
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.finite_schema import has_finite_answer
from subspec_cli.session.session import Session

grammar = pytest.importorskip("subspec_cli.modeling.grammar")
shelf = fakes_session.shelf
one_thread = tiny_models.one_thread
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pet": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"enum": ["yes", "no"]},
    {"type": "string", "pattern": "^[a-c]{3}$"},
    {"anyOf": [{"type": "null"}, {"const": 7}]},
    {
        "$defs": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "maxItems": 3,
    },
]


def model_of(shelf: Shelf) -> Path:
    return shelf.model("qwen2", dtype=torch.bfloat16, tied=False, eos_token_id=258)


def answered(
    session: Session, schema: Any, sampling: SamplingConfig, *, plain: bool
) -> tuple[str, list[int], float]:
    session.reset()
    prompt = session.encode_prompt("Rivers", system=None, raw=True)
    begun = session.begin_by(prompt, sampling, seed=5, schema=schema)
    deltas = list(session.go_on(begun, max_new_tokens=200, plain=plain))
    assert deltas[-1].finish_reason == "stop"
    return "".join(delta.text for delta in deltas), begun.token_ids, deltas[-1].stats.tau


def follows(value: Any, schema: Any) -> bool:
    """What the schemas above ask for."""
    if schema is PERSON:
        return (
            list(value) == ["name", "age", "pet"]
            and len(value["name"]) <= 6
            and type(value["age"]) is int
            and 0 <= value["age"] <= 150
            and value["pet"] in ("cat", "dog")
        )
    if "enum" in schema:
        return value in schema["enum"]
    if "pattern" in schema:
        return len(value) == 3 and set(value) <= set("abc")
    if "anyOf" in schema:
        return value in (None, 7)
    if "$defs" in schema:
        return len(value) <= 3 and all(type(item) is int and 0 <= item <= 9 for item in value)
    return 2 <= len(value) <= 4 and all(type(item) is bool for item in value)


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.9)], ids=["cold", "warm"]
)
def test_answers_follow_their_schema_and_speculation_changes_no_token(
    shelf: Shelf, sampling: SamplingConfig
) -> None:
    with open_tiny(model_of(shelf), memory={"context": 512}) as session:
        taus = []
        for schema in SCHEMAS:
            text, expected, _ = answered(session, schema, sampling, plain=True)
            assert follows(json.loads(text), schema), text
            _, found, tau = answered(session, schema, sampling, plain=False)
            assert found == expected
            taus.append(tau)
        assert max(taus) > 2, "the draft knows the grammar too"


def test_any_object_is_an_object(shelf: Shelf) -> None:
    with open_tiny(model_of(shelf), memory={"context": 512}) as session:
        prompt = session.encode_prompt("Rivers", system=None, raw=True)
        begun = session.begin_by(prompt, SamplingConfig(temperature=1.0), seed=5, schema=True)
        text = "".join(delta.text for delta in session.go_on(begun, max_new_tokens=60))
        assert text.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [{"type": "foo"}, {"properties": 5}, {"enum": []}, {"$ref": "http://127.0.0.1:1/x"}, {"not": {}}, False],
)
def test_a_schema_that_cannot_be_followed_is_refused(shelf: Shelf, schema: Any) -> None:
    with (
        open_tiny(model_of(shelf)) as session,
        pytest.raises(UsageError, match="the schema cannot be followed"),
    ):
        session.begin_by([1, 2], SamplingConfig(), seed=0, schema=schema)


LIST = {"type": "object", "properties": {"next": {"$ref": "#"}}}
ENDLESS: list[Any] = [
    {"$ref": "#"},
    {**LIST, "required": ["next"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {
        "allOf": [{"$ref": "#/$defs/a~1b"}],
        "$defs": {"a/b": {"$ref": "#/$defs/c"}, "c": {"$ref": "#/$defs/a~1b"}},
    },
    {"anyOf": [{"$ref": "#"}, {**LIST, "required": ["next"]}]},
]
ENDING: list[Any] = [
    LIST,
    True,
    {"$ref": "http://127.0.0.1:1/x"},
    {"anyOf": [{**LIST, "required": ["next"]}, {"type": "null"}]},
    {"type": ["array", "string"], "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{"$ref": "#/$defs/x"}], "minItems": 1, "$defs": {"x": {"enum": [1]}}},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_that_no_answer_ends_is_refused(shelf: Shelf, schema: Any) -> None:
    with open_tiny(model_of(shelf)) as session, pytest.raises(UsageError, match="no answer to it ever ends"):
        session.begin_by([1, 2], SamplingConfig(), seed=0, schema=schema)


@pytest.mark.parametrize("schema", ENDING)
def test_a_schema_that_refers_to_itself_may_have_an_end(schema: Any) -> None:
    assert has_finite_answer(schema)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (
            "secret(?!x)",
            "regex parse error: look-around, including look-ahead and look-behind, is not supported",
        ),
        (r"(secret)\1", "regex parse error: backreferences are not supported"),
        ("secret[", "regex parse error: unclosed character class"),
        (r"secret\p{Foo}", "regex parse error: Unicode property not found"),
    ],
)
def test_a_pattern_that_is_not_supported_is_refused_with_the_reason(
    shelf: Shelf, pattern: str, reason: str
) -> None:
    with open_tiny(model_of(shelf)) as session, pytest.raises(UsageError) as refused:
        session.begin_by([1, 2], SamplingConfig(), seed=0, schema={"type": "string", "pattern": pattern})
    assert refused.value.message == f"the schema cannot be followed: {reason}"


def test_a_reason_quotes_no_pattern() -> None:
    assert grammar._reason("Unable to tell if regex is empty:  (And (Regex /secret/))") == (
        "Unable to tell if regex is empty"
    )


def test_a_long_chain_of_references_takes_no_time() -> None:
    chain = {
        f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}, "minItems": 1} for n in range(5000)
    }
    assert has_finite_answer({"$ref": "#/$defs/d0", "$defs": chain})


def test_a_tokenizer_or_a_model_that_takes_no_grammar_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no form"):
        grammar.JsonGrammars(None, 10, [1])
    with pytest.raises(UnsupportedModelError, match="nothing ends"):
        grammar.JsonGrammars("{}", 10, [])
    with pytest.raises(UnsupportedModelError, match="no grammar can be applied"):
        grammar.JsonGrammars("{}", 10, [1])


class Only:
    """A constraint that allows some tokens, whatever came before."""

    failure = None

    def __init__(self, *token_ids: int, path: tuple[int, ...] = ()) -> None:
        self.token_ids, self.path = token_ids, path

    def after(self, token_id: int) -> Only:
        return Only(*self.token_ids, path=(*self.path, token_id))

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(8), self.token_ids)


def test_the_state_of_a_path_is_its_own() -> None:
    state = begin_path(NO_PENALTIES, [1, 2], 8, Only(3, 4))
    assert state is not None
    one, other = state.after(3), state.after(4, 4)
    assert isinstance(one.constraint, Only)
    assert isinstance(other.constraint, Only)
    assert (one.constraint.path, other.constraint.path) == ((3,), (4, 4))
    logits = np.arange(8.0)
    assert np.flatnonzero(np.isfinite(one.adjust(logits))).tolist() == [3, 4]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("is_rough", [False, True])
def test_the_draft_ranks_only_what_is_allowed(is_rough: bool) -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2], [2.0, 3, 4, 5, 6, 7, 8, 9]])
    allowed = torch.tensor([[False, False, True, False, True, False, False, False], [True] * 8])

    class Rough(DraftLogits):
        def __init__(self) -> None:
            object.__setattr__(self, "logits", logits)

        @property
        def is_rough(self) -> bool:
            return is_rough

        def rescored(self, ids: torch.Tensor) -> torch.Tensor:
            return logits.gather(1, ids)

    ids, scores = rank(Rough(), None, None, allowed)
    assert ids[0, :2].tolist() == [2, 4]
    assert not torch.isfinite(scores[0, 2:]).any()
    assert torch.isfinite(scores[1]).all()


class Unmasked(DirectSequence):
    takes_masks = CapturedSequence.takes_masks


@pytest.mark.parametrize("kind", [DirectSequence, Unmasked])
def test_masks_are_made_only_for_steps_that_read_them(kind: type[DirectSequence]) -> None:
    kv, rules = fake_cache(), DraftRules(policy(), History(), frozenset(), SHARPENING)
    context = DraftContext(rules, kind(kv, GreedySampler()), kv, NGramLookup(), Calibration())
    frontier = Frontier(GrowingTree(7, 20), context, Only(2, 5))
    part = frontier.prepare(frontier.offer(1, 1, 9).rows)
    assert (part.allowed is None) == (kind is Unmasked)
    if part.allowed is not None:
        assert np.flatnonzero(part.allowed[0]).tolist() == [2, 5]


def test_an_error_of_the_parser_is_told_without_its_state(shelf: Shelf) -> None:
    """The state holds the schema and the answer so far."""
    with open_tiny(model_of(shelf)) as session:
        first = session._grammars.first_state({"enum": ["secret"]})
        failed = next(
            state
            for token in range(258)
            if (state := first.after(token)).failure and not first.allowed()[token]
        )
    assert failed.failure
    assert failed.failure.startswith("the answer cannot go on by its schema")
