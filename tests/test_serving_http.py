"""The HTTP application without a network, over a session that types characters: routes, errors, the gate, streams."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fakes_serving import Brake, Exchange, FakeSession, FakeTokenizer, Served, text_of, until
from pydantic import BaseModel, ValidationError

from subspec_cli.decoding.logprobs import TokenLogprobs
from subspec_cli.decoding.text_offsets import TextOffsets
from subspec_cli.errors import IntegrityError
from subspec_cli.metrics import GenerationStats
from subspec_cli.serving import gate, http_answers, orders
from subspec_cli.serving.gate import Access, is_loopback, named_hosts
from subspec_cli.serving.http_answers import HttpAnswers
from subspec_cli.serving.orders import OrderMaker
from subspec_cli.serving.request_body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from subspec_cli.serving.response_body import AnswerSoFar, logprobs_document
from subspec_cli.serving.service import State
from subspec_cli.session.answer import TextDelta

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAY = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "Letters-1B", "messages": SAY, "seed": 3, **more}


def serving(session: Any = None, **how: Any) -> AbstractContextManager[Served]:
    return Served(session or FakeSession(), **how).running()


def error_of(found: Exchange) -> dict[str, Any]:
    """The error, which has all fields of the API's."""
    assert set(found.json) == {"error"}
    assert set(found.json["error"]) == {"message", "type", "param", "code"}
    return found.json["error"]


# --- answers


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "json_object"}, True),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
        ({"type": "text"}, None),
    ],
)
def test_a_json_format_reaches_the_answer(wanted: dict[str, Any], schema: Any) -> None:
    with serving() as served:
        assert served.ask(CHAT, chat(response_format=wanted, max_tokens=2)).status == 200
        assert served.session.schemas[-1] == schema


def test_a_completion_takes_formats_and_both_limits() -> None:
    asked = {"prompt": "abcdef", "response_format": {"type": "json_object"}, "max_completion_tokens": 3}
    with serving() as served:
        found = served.ask(COMPLETION, asked).json
        assert served.session.schemas[-1] is True
    assert found["usage"]["completion_tokens"] == 3


def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {"tools": [], "functions": None, "parallel_tool_calls": True}
    with serving() as served:
        assert served.ask(CHAT, chat(**nothing)).status == 200
        assert served.ask(COMPLETION, {"prompt": "a", "echo": False, "suffix": ""}).status == 200
        with_mark = b"\xef\xbb\xbf" + json.dumps(chat()).encode()
        assert served.ask(CHAT, with_mark).status == 200


def test_a_chat_is_answered_whole() -> None:
    with serving() as served:
        found = served.ask(CHAT, chat(max_completion_tokens=4))
    assert found.status == 200
    body = found.json
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert (body["model"], body["system_fingerprint"]) == ("acme/Letters-1B", "subspec-letters")
    assert body["choices"] == [
        {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "hi/3", "refusal": None},
            "logprobs": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert (body["subspec"]["seed"], body["subspec"]["exactness"]) == (3, "exact")
    assert len(body["subspec"]["choices"]) == 1
    assert len(served.lines) == 1
    assert f"POST {CHAT} 200 · 2 tokens read, 1 cached · 4 written" in served.lines[0]
    assert "hi" not in served.lines[0]


def test_an_answer_without_a_limit_goes_on_to_its_end() -> None:
    with serving(FakeSession(context=2000)) as served:
        text = "a" * 900
        found = served.ask(CHAT, chat(messages=[{"role": "user", "content": text}]))
    assert found.json["choices"][0]["message"]["content"] == f"{text}/3/0"
    assert found.json["choices"][0]["finish_reason"] == "stop"


def test_a_completion_has_sixteen_tokens_by_default() -> None:
    with serving() as served:
        found = served.ask(COMPLETION, {"prompt": "abcdefghijklmnopqrst", "seed": 1})
    assert found.json["object"] == "text_completion"
    assert found.json["choices"] == [
        {"index": 0, "text": "abcdefghijklmnop", "finish_reason": "length", "logprobs": None}
    ]


def test_several_prompts_with_several_choices_each() -> None:
    with serving() as served:
        found = served.ask(COMPLETION, {"prompt": ["ab", "cd"], "n": 2, "seed": 5})
        ids = served.ask(COMPLETION, {"prompt": [[97, 98], [99]], "seed": 5})
        one = served.ask(COMPLETION, {"prompt": [97, 98], "seed": 5})
    assert [choice["text"] for choice in found.json["choices"]] == ["ab/5/0", "ab/5/1", "cd/5/0", "cd/5/1"]
    assert [choice["index"] for choice in found.json["choices"]] == [0, 1, 2, 3]
    assert found.json["usage"]["prompt_tokens"] == 4, "a prompt counts once"
    assert found.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert found.json["usage"]["completion_tokens"] == 24
    assert [choice["text"] for choice in ids.json["choices"]] == ["ab/5/0", "c/5/0"]
    assert one.json["choices"][0]["text"] == "ab/5/0"


def test_a_request_without_a_seed_takes_another_each_time_and_tells_it() -> None:
    with serving() as served:
        seeds = [served.ask(COMPLETION, {"prompt": "a"}).json["subspec"]["seed"] for _ in range(2)]
        again = served.ask(COMPLETION, {"prompt": "a", "seed": seeds[0]}).json
    assert seeds[0] != seeds[1]
    assert again["choices"][0]["text"] == text_of([97], seeds[0])[:16]


def test_log_probabilities_of_both_kinds() -> None:
    with serving() as served:
        of_chat = served.ask(CHAT, chat(logprobs=True, top_logprobs=1, max_tokens=2)).json
        of_completion = served.ask(COMPLETION, {"prompt": "ab", "logprobs": 1, "max_tokens": 2}).json
    entry = {"token": "i", "logprob": -0.5, "bytes": [105]}
    assert of_chat["choices"][0]["logprobs"]["content"][1] == {**entry, "top_logprobs": [entry]}
    assert of_completion["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }


class PartsTokenizer(FakeTokenizer):
    """Letters, two halves of a character, and a special token; the space before the first word is dropped."""

    settling = "whole characters"
    pieces = (b" a", b" b", b"\xc3", b"\xa9", b"<s>")

    def decode(self, token_ids: Any, *, special: bool = False) -> str:
        return (
            b"".join(self.pieces[each] for each in token_ids if each != 4)
            .decode(errors="replace")
            .lstrip(" ")
        )

    def drops(self, token_id: int, *, special: bool) -> bool:
        return token_id == 4

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def test_log_probabilities_tell_the_bytes_of_each_token() -> None:
    tokenizer: Any = PartsTokenizer()
    answer = AnswerSoFar(1, logprobs=[], offsets=TextOffsets(tokenizer))
    ids = (0, 2, 3, 1, 4)
    told = tuple(TokenLogprobs(each, -0.5, ((2, -1.0), (0, -2.0), (0, -3.0))) for each in ids)
    answer.add(TextDelta("aé b", ids, "stop", GenerationStats(), told))
    found = logprobs_document("chat", answer, 0, tokenizer)["content"]
    assert [each["token"] for each in found] == ["a", "bytes:\\xc3", "bytes:\\xa9", " b", "<s>"]
    assert found[-1]["bytes"] is None
    assert b"".join(bytes(each["bytes"]) for each in found[:-1]).decode() == answer.text
    later = logprobs_document("chat", answer, 3, tokenizer)["content"]
    assert later == found[3:]
    found = logprobs_document("completion", answer, 1, tokenizer)
    assert found["top_logprobs"][0] == {"bytes:\\xc3": -1.0, " a": -2.0}, "the likelier of two with one name"
    assert found["tokens"][2] == " b"


def test_token_ids_are_told_where_they_are_asked_for() -> None:
    asked = chat(return_token_ids=True, max_tokens=3, cache_prompt=True)
    with serving() as served:
        whole = served.ask(CHAT, asked).json["choices"][0]
        *events, _ = served.ask(CHAT, {**asked, "stream": True}).events
        without = served.ask(CHAT, chat(return_token_ids=False)).json["choices"][0]
    assert whole["token_ids"] == [104, 105, 47]
    assert [event["choices"][0].get("token_ids") for event in events] == [None, [104], [105], [47]]
    assert "token_ids" not in without


# --- streams


def test_a_chat_is_streamed() -> None:
    with serving() as served:
        found = served.ask(CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert found.headers["content-type"].startswith("text/event-stream")
    *events, usage, last = found.events
    assert last == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "hi/3/0"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 6 + ["stop"]
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert f"POST {CHAT} 200 " in served.lines[0]
    assert [("subspec" in event) for event in events] == [False] * 6 + [True]


def test_a_stream_without_usage_has_none() -> None:
    with serving() as served:
        found = served.ask(CHAT, chat(stream=True))
    assert not any("usage" in event for event in found.events[:-1])


def test_tokens_without_text_are_told_only_to_those_who_want_ids() -> None:
    session = FakeSession()
    session.held = 3
    with serving(session) as served:
        found = served.ask(CHAT, chat(stream=True))
        with_ids = served.ask(CHAT, chat(stream=True, return_token_ids=True))
    assert found.comments.count(": held back") == 2
    deltas = [event["choices"][0]["delta"].get("content") for event in found.events[:-1]]
    assert deltas == ["", "hi/", "3", "/", "0"]
    ids = [token for event in with_ids.events[:-1] for token in event["choices"][0].get("token_ids", [])]
    assert bytes(ids) == b"hi/3/0"


def test_a_streamed_completion_is_the_whole_one_in_pieces() -> None:
    asked = {"prompt": ["ab", "c"], "n": 2, "seed": 5, "logprobs": 1}
    with serving() as served:
        whole = served.ask(COMPLETION, asked).json["choices"]
        events = served.ask(COMPLETION, {**asked, "stream": True}).events
    assert events.pop() == "[DONE]"
    for index, choice in enumerate(whole):
        pieces = [each["choices"][0] for each in events if each["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name in choice["logprobs"]:
            assert [item for piece in pieces for item in piece["logprobs"][name]] == choice["logprobs"][name]


def test_a_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_answers, "_KEEP_ALIVE_S", 0.01)
    session = FakeSession()
    brake = Brake(session)

    async def streamed(served: Served) -> Exchange:
        found = served.begin(CHAT, chat(stream=True))
        await found.comes(": keep-alive\n\n: keep-alive\n\n")
        assert found.events == [], "nothing looks like a token before the first one"
        brake.release()
        return await found.ends()

    with serving(session) as served:
        found = asyncio.run(streamed(served))
    assert found.events[-1] == "[DONE]"


# --- what fails


def test_a_failure_before_the_first_token_is_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()

    def fail() -> None:
        raise IntegrityError("the weights\nchanged")

    with serving(session) as served:
        session.in_round = fail
        found = served.ask(CHAT, chat())
        session.in_round = lambda: None
        assert served.ask(CHAT, chat()).status == 200, "the next one is answered"
    assert found.status == 500
    assert error_of(found) == {
        "message": "the weights\nchanged",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert served.lines[0].endswith("the weights changed")


def test_a_schema_that_proves_impossible_ends_its_answer_with_the_reason() -> None:
    session = FakeSession()
    session.failure = "the parser has too many states"
    with serving(session) as served:
        found, streamed = served.ask(CHAT, chat()), served.ask(CHAT, chat(stream=True))
    assert (found.status, error_of(found)["type"]) == (400, "invalid_request_error")
    assert error_of(found)["message"] == streamed.events[-1]["error"]["message"] == session.failure
    assert not any("parser" in line for line in served.lines), "it may hold what was asked for"


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    session = FakeSession()
    count = iter(range(100))

    def fail_later() -> None:
        if next(count) == 2:
            raise OSError(5, "Input/output error")

    with serving(session) as served:
        session.in_round = fail_later
        found = served.ask(CHAT, chat(stream=True))
    assert found.status == 200
    assert found.events[-1]["error"]["message"] == "OSError: [Errno 5] Input/output error"
    assert found.events[-1]["error"]["type"] == "server_error"
    assert [each["choices"][0]["delta"].get("content") for each in found.events[:-1]] == ["", "h", "i"]
    assert " 500 " in served.lines[0]


def test_an_error_of_our_own_is_told_in_the_form_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    with serving() as served:
        monkeypatch.setattr(http_answers, "usage_document", fail)
        monkeypatch.setattr(
            HttpAnswers, "log_line", lambda answers, path, status: f"{status} {answers._told}"
        )
        whole = served.ask(CHAT, chat())
        streamed = served.ask(CHAT, chat(stream=True, stream_options={"include_usage": True}))
        monkeypatch.setattr(OrderMaker, "of_chat", fail)
        early = served.ask_for_fault(CHAT, chat())
    assert [whole.status, streamed.status, early.status] == [500, 200, 500]
    errors = [error_of(whole), streamed.events[-1]["error"], error_of(early)]
    assert [error["message"] for error in errors] == ["internal error: ZeroDivisionError"] * 3
    assert len(served.lines) == 3
    for line in served.lines:
        assert "500 " in line
        assert "internal error: ZeroDivisionError: secret (test_serving_http.py:" in line


def test_an_error_of_our_own_on_any_route_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("x")

    asked = {"origin": "http://pages.example"}
    with serving(access=Access(origins=("http://pages.example",))) as served:
        monkeypatch.setattr(served.session, "link_counters", fail)
        found = served.ask_for_fault("/v1/figures", headers=asked)
    assert (found.status, error_of(found)["type"]) == (500, "server_error")
    assert found.headers["access-control-allow-origin"] == "http://pages.example", "the page can read it"
    assert "GET /v1/figures 500 · internal error: KeyError" in served.lines[0]


def test_an_answer_that_cannot_begin_is_refused() -> None:
    with serving() as served:
        found = served.ask(COMPLETION, {"prompt": ""})
    assert found.status == 400
    assert (error_of(found)["message"], error_of(found)["param"]) == ("the prompt is empty", None)


# --- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_within_a_layer(stream: bool) -> None:
    session = FakeSession(places=1)
    brake = Brake(session)

    async def left(served: Served) -> None:
        found = served.begin(CHAT, chat(stream=stream))
        await asyncio.to_thread(brake.reached.wait)
        found.leave()
        await found.ends()

    with serving(session) as served:
        asyncio.run(left(served))
        brake.release()
        until(lambda: not session.made.in_flight)
        assert session.made.layers == 1
        assert " 499 " in served.lines[0]
        assert served.ask(CHAT, chat()).status == 200


def test_a_client_that_leaves_before_the_first_byte_takes_no_place() -> None:
    """The response is not sent: starlette's own stream would never begin, nor end."""
    session = FakeSession(places=1)
    brake = Brake(session)

    async def left(served: Served) -> None:
        first = served.begin(CHAT, chat(stream=True))
        await asyncio.to_thread(brake.reached.wait)
        second = served.begin(CHAT, chat(stream=True))
        second.leave()
        await second.ends()
        assert served.service.waiting == 0
        first.leave()
        await first.ends()

    with serving(session) as served:
        asyncio.run(left(served))
        brake.release()
        until(lambda: not session.made.in_flight)
    assert session.made.order == ["hi"]


def test_a_client_that_leaves_mid_stream_ends_its_answer() -> None:
    session = FakeSession(places=1)
    rounds = iter(range(1000))
    brake = Brake(session)
    held, session.in_layer = session.in_layer, lambda layer: None

    def hold_later() -> None:
        if next(rounds) == 2:
            session.in_layer = held

    session.in_round = hold_later

    async def left(served: Served) -> Exchange:
        found = served.begin(CHAT, chat(stream=True))
        await found.comes('"i"')
        await asyncio.to_thread(brake.reached.wait)
        found.leave()
        return await found.ends()

    with serving(session) as served:
        found = asyncio.run(left(served))
        brake.release()
        until(lambda: not session.made.in_flight)
    assert "[DONE]" not in found.text
    assert " 499 " in served.lines[0]


# --- a full queue, and times when nothing is answered


def test_a_full_queue_is_429_and_the_others_are_answered() -> None:
    session = FakeSession(places=1)
    brake = Brake(session)

    async def crowded(served: Served) -> list[Exchange]:
        first = served.begin(CHAT, chat())
        await asyncio.to_thread(brake.reached.wait)
        second = served.begin(CHAT, chat())
        await asyncio.to_thread(until, lambda: served.service.waiting == 1)
        third = await served.begin(CHAT, chat()).ends()
        brake.release()
        return [await first.ends(), await second.ends(), third]

    with serving(session, most_waiting=1) as served:
        *answered, refused = asyncio.run(crowded(served))
        metrics = served.ask("/metrics").text
    assert [each.status for each in answered] == [200, 200]
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) > 0
    assert error_of(refused)["code"] == "queue_full"
    assert error_of(refused)["type"] == "rate_limit_error"
    reason = "1 answers wait already, at most 1 may, and the request wants 1"
    assert reason in error_of(refused)["message"]
    assert f"POST {CHAT} 429" in served.lines[0]
    assert 'subspec_requests_total{status="429"} 1.0' in metrics


ANSWERED = [
    (CHAT, chat()),
    (COMPLETION, {"prompt": "a"}),
    ("/tokenize", {"prompt": "a"}),
    ("/v1/models", None),
]


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_while_loading_and_stopping_nothing_is_answered(path: str, body: Any) -> None:
    served = Served(FakeSession())
    with served.running(loaded=False):
        loading, health = served.ask(path, body), served.ask("/health")
        assert (loading.status, error_of(loading)["message"]) == (503, "the model is loading")
        assert int(loading.headers["retry-after"]) > 0
        assert (health.status, health.json) == (503, {"status": "loading"})
        served.may_load.set()
        until(lambda: served.ask("/health").json == {"status": "ok"})
        assert served.ask(path, body).status == 200
        served.service.stop()
        stopping, health = served.ask(path, body), served.ask("/health")
        assert (stopping.status, error_of(stopping)["message"]) == (503, "the server is stopping")
        assert error_of(stopping)["code"] == "not_ready"
        assert (health.status, health.json) == (503, {"status": "stopping"})


def test_when_loading_has_failed_that_is_said() -> None:
    served = Served(IntegrityError("damaged"))
    with served.running(loaded=False):
        served.may_load.set()
        until(lambda: served.service.state is State.FAILED)
    found, health = served.ask(CHAT, chat()), served.ask("/health")
    assert (found.status, health.json) == (503, {"status": "failed"})
    assert "has failed" in error_of(found)["message"]


# --- facts


def test_models_tokens_metrics_figures_and_the_page() -> None:
    with serving() as served:
        models = served.ask("/v1/models").json
        assert [each["id"] for each in models["data"]] == ["acme/Letters-1B"]
        for name in ("acme/Letters-1B", "Letters-1B"):
            assert served.ask(f"/v1/models/{name}").json["id"] == name
        unknown = served.ask("/v1/models/gpt-4")
        assert (unknown.status, error_of(unknown)["code"]) == (404, "model_not_found")
        assert served.ask("/tokenize", {"prompt": "ab"}).json == {
            "count": 2,
            "max_model_len": 100,
            "tokens": [97, 98],
        }
        assert served.ask("/tokenize", {"content": ""}).json["tokens"] == []
        assert served.ask("/tokenize", {"messages": SAY}).json["tokens"] == [104, 105]
        assert served.ask("/detokenize", {"tokens": [104, 105]}).json == {"prompt": "hi", "content": "hi"}
        served.ask(CHAT, chat())
        metrics = served.ask("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in (
            'subspec_requests_total{status="200"} 1.0',
            "subspec_generated_tokens_total 6.0",
            "subspec_cached_prompt_tokens_total 1.0",
            "subspec_answers_in_flight 0.0",
            "subspec_budget_bytes 1000.0",
        ):
            assert line in metrics.text
        assert served.ask("/v1/figures").json["parallel"] == 2
        page = served.ask("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "<html" in page.text
        described = served.ask("/openapi.json").json["paths"]
        assert CHAT in described
        assert list(described["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


# --- requests that are refused


BAD: list[tuple[str, Any, int, str | None, str]] = [
    (CHAT, b"{", 400, None, "the body is not JSON at byte 1: Expecting property name"),
    (CHAT, b"\xff", 400, None, "the body is not UTF-8 at byte 0"),
    (CHAT, b"\x1f\x8b\x08", 400, None, "the body is not UTF-8 at byte 1"),
    (CHAT, b"[" * 100_000, 400, None, "the body is nested too deeply"),
    (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, None, "a number that is too long"),
    (CHAT, b'{"seed": 1, "seed": 2}', 400, None, "the body has the key 'seed' twice"),
    (CHAT, chat(messages=[{"role": "user", "content": "a\ud800b"}]), 400, None, "holds \\ud800 alone"),
    (COMPLETION, {"prompt": "\udfff"}, 400, None, "holds \\udfff alone, which is half of a character"),
    ("/tokenize", {"prompt": "\ud800"}, 400, None, "holds \\ud800 alone"),
    (CHAT, chat(**{"\ud800": 1}), 400, None, "holds \\ud800 alone"),
    (CHAT, chat(**{"x" * 5000: 1}), 400, "x" * 100, "this field is not supported"),
    (CHAT, chat(int=1), 400, "int", "int: this field is not supported"),
    (CHAT, chat(tools=0), 400, "tools", "tool calls are not supported"),
    (CHAT, chat(tools=False), 400, "tools", "tool calls are not supported"),
    (COMPLETION, {"prompt": "a", "echo": 0}, 400, "echo", "echo is not supported"),
    (CHAT, chat(reasoning_effort=""), 400, "reasoning_effort", "a reasoning effort is not supported"),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"schema": 5}}),
        400,
        "response_format.json_schema.schema",
        "Input should be",
    ),
    ("/chat/completions", chat(), 404, None, "there is no /chat/completions, but /v1/chat/completions"),
    (CHAT, b"", 400, None, "the body must be a JSON object"),
    (CHAT, [1], 400, None, "the body holds a list, expected a JSON object"),
    (CHAT, {}, 400, "messages", "messages: this field is missing"),
    (CHAT, chat(messages=[]), 400, "messages", "at least 1 item"),
    (CHAT, chat(model="gpt-4"), 404, "model", "the model 'gpt-4' is not here, only 'acme/Letters-1B'"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "tool calls are not supported"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        None,
        "messages.0.content.0.",
    ),
    (CHAT, chat(messages=[*SAY, {"role": "assistant", "content": "a"}]), 400, "messages", "assistant's own"),
    (CHAT, chat(tempreature=1), 400, "tempreature", "tempreature: this field is not supported"),
    (CHAT, chat(temperature=-1), 400, "temperature", "greater than or equal to 0"),
    (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        400,
        "temperature",
        "finite",
    ),
    (CHAT, chat(stream_options={"include_usage": True}), 400, None, "stream_options needs stream: true"),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"$bad": 1}}}),
        400,
        "response_format",
        "the schema cannot be followed",
    ),
    (CHAT, chat(response_format={"type": "yaml"}), 400, None, "response_format"),
    (
        CHAT,
        chat(response_format={"type": "json_object"}, logit_bias={"999999999": 1}),
        400,
        "logit_bias",
        "the bias names no token",
    ),
    (CHAT, chat(messages=[{"role": "user", "content": "a" * 100}]), 400, None, "the prompt has 100 tokens"),
    (COMPLETION, {"prompt": []}, 400, None, "the prompt is empty"),
    (COMPLETION, {"prompt": ["a", ""]}, 400, None, "the prompt is empty"),
    (COMPLETION, {"prompt": ["a"] * 2049}, 400, "prompt", "wants 2049 answers, at most 2048"),
    (COMPLETION, {"prompt": "a" * 70_000}, 400, None, "70,000 characters, the context holds 100 tokens"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": "a" * 70_000}]),
        400,
        None,
        "more than 65,536 characters",
    ),
    ("/tokenize", {"prompt": "a" * 70_000}, 400, None, "70,000 characters"),
    (COMPLETION, {"prompt": ["a"] * 200, "n": 16}, 400, "prompt", "wants 3200 answers"),
    (COMPLETION, {"prompt": [0x110000]}, 400, "prompt", "the model has no token 1114112"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt.0", "greater than or equal to 0"),
    (COMPLETION, {"prompt": "a", "best_of": 2}, 400, "best_of", "Input should be 1"),
    ("/tokenize", {"prompt": "a", "content": "b"}, 400, None, "give one of prompt, content and messages"),
    ("/detokenize", {"tokens": [0x110000]}, 400, "tokens", "no token 1114112"),
]


@pytest.fixture(scope="module")
def letters() -> Any:
    with serving() as served:
        yield served


@pytest.mark.parametrize(("path", "body", "status", "param", "reason"), BAD)
def test_a_bad_request_says_what_is_wrong(
    letters: Served, path: str, body: Any, status: int, param: str | None, reason: str
) -> None:
    found = letters.ask(path, body, method="POST")
    assert found.status == status
    error = error_of(found)
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]
    assert param is None or error["param"] == param


MANY = 20_000
FULL_OF_FAULTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionBody, {"prompt": [1] * MANY + ["a"]}),
    (CompletionBody, {"prompt": ["a"] * 2000 + [1]}),
    (CompletionBody, {"prompt": [[1]] * 2000 + ["a"]}),
    (CompletionBody, {"prompt": [["a"] * MANY]}),
    (DetokenizeBody, {"tokens": ["a"] * MANY}),
    (ChatBody, {"messages": [{"role": "user"}] * 5000}),
    (ChatBody, {"messages": SAY * MANY}),
    (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatBody, chat(stop=[1] * MANY)),
    (ChatBody, chat(modalities=["audio"] * MANY)),
    (ChatBody, chat(logit_bias={f"k{number}": 1 for number in range(MANY)})),
    (ChatBody, chat(**{f"k{number}": 1 for number in range(MANY)})),
    (TokenizeBody, {"messages": [{"role": "user"}] * 5000}),
]


@pytest.mark.parametrize(("kind", "body"), FULL_OF_FAULTS)
def test_a_body_full_of_faults_is_given_up_early(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Each fault that is kept takes a kilobyte, and time in which nobody is answered."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() < 10


def test_refused_requests_for_answers_are_logged_without_their_content(letters: Served) -> None:
    letters.lines.clear()
    letters.ask(CHAT, chat(model="a secret"))
    letters.ask("/tokenize", {})
    assert [line[9:] for line in letters.lines] == [f"POST {CHAT} 404"]


def test_a_body_without_its_content_type_is_refused_with_the_remedy(letters: Served) -> None:
    """A page elsewhere may send text/plain without a preflight."""
    found = letters.ask(CHAT, chat(), headers={"content-type": "text/plain"})
    assert found.status == 400
    assert "Content-Type: application/json" in error_of(found)["message"]


@pytest.mark.parametrize(("path", "method", "status"), [("/v1/nothing", "GET", 404), (CHAT, "GET", 405)])
def test_unknown_routes_and_methods(letters: Served, path: str, method: str, status: int) -> None:
    found = letters.ask(path, method=method)
    assert found.status == status
    error_of(found)


# --- the gate


HOSTS = [
    ("127.0.0.1:8000", 200),
    ("localhost", 200),
    ("LOCALHOST:8000", 200),
    ("[::1]:8000", 200),
    ("192.168.1.5:8000", 200),
    ("box.local", 200),
    ("evil.example", 403),
    ("localhost.evil.example", 403),
    ("", 403),
    ("[::1", 403),
    ("localhost:99999", 403),
    ("evil.example@localhost", 403),
    ("localhost/evil", 403),
    ("local\thost", 403),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_a_server_answers_to_its_own_names(host: str, status: int) -> None:
    with serving(access=Access(hosts=("Box.local",))) as served:
        found = served.ask("/v1/models", headers={"host": host})
    assert found.status == status
    if status == 403:
        assert "--allowed-host" in error_of(found)["message"]
        assert "GET /v1/models 403" in served.lines[0]


ORIGINS = [
    ("http://127.0.0.1:8000", 200),
    ("http://pages.example", 200),
    ("http://127.0.0.1:9000", 403),
    ("http://evil.example", 403),
    ("http://[", 403),
    ("null", 403),
    ("", 403),
]


@pytest.mark.parametrize(("origin", "status"), ORIGINS)
def test_pages_from_elsewhere_may_not_ask(origin: str, status: int) -> None:
    with serving(access=Access(origins=("http://pages.example",))) as served:
        found = served.ask("/v1/models", headers={"origin": origin})
    assert found.status == status
    assert found.headers.get("access-control-allow-origin") == (
        "http://pages.example" if "pages" in origin else None
    )


def test_a_preflight_needs_no_key_and_only_allowed_pages_pass() -> None:
    access = Access(api_key="key", origins=("http://pages.example",))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(access=access) as served:
        allowed = served.ask(CHAT, method="OPTIONS", headers={"origin": "http://pages.example", **asked})
        refused = served.ask(CHAT, method="OPTIONS", headers={"origin": "http://evil.example", **asked})
    assert (allowed.status, refused.status) == (200, 403)
    assert allowed.headers["access-control-allow-origin"] == "http://pages.example"


def test_a_refusal_can_be_read_by_an_allowed_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_BODY_BYTES", 100)
    asked = {"origin": "http://pages.example"}
    key = {"authorization": "Bearer key"}
    with serving(access=Access(api_key="key", origins=("http://pages.example",))) as served:
        found = [
            served.ask("/v1/models", headers=asked),
            served.ask("/v1/models", headers={**asked, **key, "host": "evil.example"}),
            served.ask(CHAT, chat(), headers={**asked, **key, "content-length": "101"}),
            served.ask(CHAT, (b" " * 60, b" " * 60), headers={**asked, **key}),
        ]
        preflight = served.ask(
            CHAT,
            method="OPTIONS",
            headers={**asked, "access-control-request-method": "POST", "host": "evil.example"},
        )
    assert [each.status for each in found] == [401, 403, 413, 413]
    assert {each.headers["access-control-allow-origin"] for each in found} == {"http://pages.example"}
    assert preflight.status == 403
    assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize(
    "path", ["/", "/health", "/v1/models", "/v1/models/Letters-1B", "/v1/models/x", "/none"]
)
def test_head_is_answered_as_get_without_a_body(letters: Served, path: str) -> None:
    found, full = letters.ask(path, method="HEAD"), letters.ask(path)
    assert (found.status, found.headers, found.text) == (full.status, full.headers, "")


def test_any_page_where_all_are_allowed() -> None:
    with serving(access=Access(origins=("*",))) as served:
        assert served.ask("/v1/models", headers={"origin": "http://any.example"}).status == 200


KEYS = [
    ("Bearer key-1", 200),
    ("bearer key-1", 200),
    (None, 401),
    ("Bearer key-2", 401),
    ("Bearer ", 401),
    ("Basic key-1", 401),
    ("key-1", 401),
    ("Bearer kéy", 401),
]


@pytest.mark.parametrize(("given", "status"), KEYS)
def test_the_key_is_asked_for_but_where_nothing_is_said(given: str | None, status: int) -> None:
    headers = {} if given is None else {"authorization": given}
    with serving(access=Access(api_key="key-1")) as served:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/figures"):
            found = served.ask(path, headers=headers)
            assert found.status == status
            if status == 401:
                assert error_of(found)["code"] == "invalid_api_key"
                assert found.headers["www-authenticate"] == "Bearer"
        assert served.ask("/health", headers=headers).status == 200
        assert served.ask("/", headers=headers).status == 200
    assert not any("key-" in line for line in served.lines)


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_BODY_BYTES", 100)
    with serving() as served:
        said = served.ask(CHAT, chat(), headers={"content-length": "101"})
        lied = served.ask(CHAT, chat(), headers={"content-length": "²"})
        chunked = served.ask(CHAT, (b" " * 60, b" " * 60))
        fits = served.ask(CHAT, json.dumps({"messages": SAY}).encode())
    assert [each.status for each in (said, lied, chunked, fits)] == [413, 413, 413, 200]
    assert "more than 16 MiB" in error_of(chunked)["message"]
    assert [line[9:] for line in served.lines[:3]] == [f"POST {CHAT} 413"] * 3


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_BODY_S", 0.02)

    async def half_sent(served: Served) -> Exchange:
        found = served.begin(CHAT, (b"{", b"}"))
        found.hold_body()
        return await found.ends()

    with serving() as served:
        found = asyncio.run(half_sent(served))
    assert found.status == 408
    assert "not whole after" in error_of(found)["message"]


def test_a_client_that_leaves_in_its_body_is_no_fault() -> None:
    async def half_sent(served: Served) -> None:
        found = served.begin(CHAT, (b"{", b"}"))
        found.hold_body()
        found.leave()
        await found.ends()

    with serving() as served:
        asyncio.run(half_sent(served))
    assert not any(" 500" in line for line in served.lines)


LISTENING = {
    True: ("127.0.0.1", "127.9.9.9", "::1", "localhost"),
    False: ("0.0.0.0", "::", "192.168.1.5", "box.local", ""),
}


@pytest.mark.parametrize(("is_own", "host"), [(own, host) for own in LISTENING for host in LISTENING[own]])
def test_only_loopback_needs_no_key(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own


def test_a_server_has_the_name_that_it_listens_on() -> None:
    assert named_hosts("box.local", ["a", "box.local"]) == ("box.local", "a")


def test_the_most_answers_of_a_request_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "MOST_ANSWERS", 3)
    with serving() as served:
        assert served.ask(COMPLETION, {"prompt": ["a"] * 3, "max_tokens": 1}).status == 200
        assert served.ask(COMPLETION, {"prompt": ["a"] * 4, "max_tokens": 1}).status == 400
