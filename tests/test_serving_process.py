"""A server as users start it, over the demo model, and the clients that they have."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes_serving import until

ROOT = Path(__file__).resolve().parent.parent
MOST_S = 120
SAMPLED = {"temperature": 1.5, "seed": 11}
SAY: Any = [{"role": "user", "content": "Tell me about rivers."}]
ENDLESS = {"logit_bias": {"2": -100}}
"""Bans the token that ends an answer, so that only the limit does."""


PREPARE = """
import sys
from checkpoints import geometry_in
from subspec_cli.__main__ import main
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.probe.timed_machine import TimedMachine
from subspec_cli.session import machine_costs

def assumed(directory, settings, device, *_):
    costs = assumed_costs(geometry_in(directory), device, link_gb_per_s=1, settings=settings)
    return TimedMachine(costs, others_share=None, spread=0.0)

machine_costs.probe_in_subprocess = assumed
sys.exit(main(["prepare", "demo", "--no-tune"]) or main(["run", "-m", "demo", "-n", "1", "Hello"]))
"""
"""Prepares the demo, and keeps costs for it: to time the machine takes longer than all the rest."""


class Process:
    """One command line, whose lines on stderr are kept."""

    def __init__(self, home: Path, *arguments: str) -> None:
        """`arguments` are those of Python."""
        environment = os.environ | {
            "SUBSPEC_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        }
        environment.pop("SUBSPEC_API_KEY", None)
        self.run = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.run.stderr is not None
        self.said.extend(iter(self.run.stderr.readline, ""))

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the status and what went to stdout."""
        assert self.run.stdout is not None
        with self.run.stdout:
            output = self.run.stdout.read()
        status = self.run.wait(MOST_S)
        self._reader.join(MOST_S)
        assert self.run.stderr is not None
        self.run.stderr.close()
        assert "Traceback" not in self.text
        return status, output

    def kill(self) -> None:
        if self.run.poll() is None:
            self.run.kill()
            self.ended()

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def url(self) -> str:
        """Where a server listens, once it has said so."""
        until(lambda: "listening on" in self.text or self.run.poll() is not None, MOST_S)
        found = re.search(r"listening on (http://\S+)/ ", self.text)
        assert found, self.text
        return found[1]

    def is_ready(self) -> bool:
        assert self.run.poll() is None, self.text
        return httpx.get(f"{self.url}/health").status_code == 200


Start = Callable[..., Process]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start command lines under one home, in which the demo is prepared."""
    home = tmp_path_factory.mktemp("home")
    begun: list[Process] = []

    def starting(*arguments: str) -> Process:
        begun.append(Process(home, "-m", "subspec_cli", *arguments))
        return begun[-1]

    preparing = Process(home, "-c", PREPARE)
    assert preparing.ended()[0] == 0, preparing.text
    yield starting
    for process in begun:
        process.kill()


def serve(start: Start, *arguments: str) -> Process:
    return start("serve", "demo", "--memory-gb", "1", "--port", "0", *arguments)


def client_of(process: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0, timeout=MOST_S)


@pytest.fixture(scope="module")
def server(start: Start) -> Process:
    process = serve(start, "--parallel", "4", "--queue", "20", "--context", "1024")
    until(process.is_ready, MOST_S)
    return process


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with client_of(server) as found:
        yield found


def answer(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "demo", "messages": SAY, "max_tokens": 24} | more)


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = answer(client, **SAMPLED)
    chunks = list(answer(client, **SAMPLED, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, (
        "the second one finds the first one's cache"
    )
    assert chunks[0].system_fingerprint == whole.system_fingerprint


def test_stop_seed_and_choices(client: openai.OpenAI) -> None:
    two = answer(client, **SAMPLED, n=2).choices
    assert two[0].message.content != two[1].message.content
    again = answer(client, **SAMPLED).choices[0].message.content
    assert again == two[0].message.content
    word = again.split()[2]
    cut = answer(client, **SAMPLED, stop=[word]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == again[: again.index(word)]


def test_log_probabilities_of_both_kinds(client: openai.OpenAI) -> None:
    told = answer(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    tokens = told.logprobs.content
    assert "".join(token.token for token in tokens) == told.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob < 0 for token in tokens), (
        "greedy takes the likeliest"
    )
    assert {len(token.top_logprobs) for token in tokens} == {3}
    ids = httpx.post(f"{client.base_url}".removesuffix("v1/") + "tokenize", json={"messages": SAY}).json()[
        "tokens"
    ]
    bare = client.completions.create(
        model="demo", prompt=ids, max_tokens=24, temperature=0, logprobs=1
    ).choices[0]
    assert bare.text == told.message.content
    assert bare.logprobs is not None
    assert bare.logprobs.token_logprobs == [token.logprob for token in tokens]


def test_a_client_that_leaves_makes_room(client: openai.OpenAI, server: Process) -> None:
    for _ in range(8):
        with answer(client, stream=True, max_tokens=900, **ENDLESS) as stream:
            next(iter(stream))
    assert answer(client).choices[0].message.content
    until(lambda: "subspec_answers_in_flight 0.0" in httpx.get(f"{server.url}/metrics").text)
    assert sum(" 499 " in line for line in server.said) == 8


def test_eight_clients_at_once_get_what_one_gets(client: openai.OpenAI) -> None:
    asked = [[{"role": "user", "content": f"Say {number}."}] for number in range(8)]

    def text(messages: Any) -> str:
        return answer(client, messages=messages, **SAMPLED).choices[0].message.content

    alone = [text(messages) for messages in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, asked)) == alone


def test_bad_requests_raise_what_the_client_expects(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tool calls are not supported"):
        answer(client, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' is not here"):
        answer(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError) as refused:
        answer(client, messages=[{"role": "user", "content": "word " * 2000}])
    assert refused.value.code == "context_length_exceeded"
    assert client.models.list().data[0].id == client.models.retrieve("demo").id == "demo"


def test_the_same_seed_gives_the_same_text_everywhere(
    client: openai.OpenAI, start: Start, tmp_path: Path
) -> None:
    words = SAY[0]["content"]
    sampling = ["--temperature", "1.5", "--seed", "11", "-n", "24"]
    run = start("run", "--json", "-m", "demo", *sampling, words)
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": SAY, "max_tokens": 24, **SAMPLED}
    lines = [{"prompt": words, "seed": 11}, {"custom_id": "a", "url": "/v1/chat/completions", "body": body}]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = start("batch", "-m", "demo", *sampling, str(requests), str(results))
    expected = answer(client, **SAMPLED).choices[0].message.content
    status, output = run.ended()
    assert (status, json.loads(output)["text"]) == (0, expected)
    assert batch.ended()[0] == 0, batch.text
    records = [json.loads(line) for line in results.read_text().splitlines()]
    answers = [record["response"]["body"]["choices"][0]["message"]["content"] for record in records]
    assert answers == [expected] * 2


def test_a_port_that_is_taken(start: Start, server: Process) -> None:
    port = server.url.rpartition(":")[2]
    process = start("serve", "demo", "--port", port)
    assert process.ended()[0] == 7
    assert f"cannot listen on 127.0.0.1 port {port}" in process.text
    assert "--port 0 takes a free port" in process.text


def test_other_machines_are_not_answered_by_accident(start: Start) -> None:
    process = start("serve", "demo", "--host", "0.0.0.0", "--port", "0")
    assert process.ended()[0] == 2
    assert "--host 0.0.0.0 lets other machines ask, and there is no key" in process.text


def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(start: Start, tmp_path: Path) -> None:
    process = start("serve", str(tmp_path), "--port", "0")
    assert process.ended()[0] not in (0, 1)
    assert "subspec: error:" in process.text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_while_the_model_loads(start: Start, number: int, status: int) -> None:
    process = serve(start)
    assert httpx.get(f"{process.url}/health").status_code in (200, 503)
    process.run.send_signal(number)
    assert process.ended()[0] == status


def test_a_second_signal_ends_at_once_and_tells_those_in_flight(start: Start) -> None:
    process = serve(start, "--context", "4096")
    until(process.is_ready, MOST_S)
    with client_of(process) as client, answer(client, stream=True, max_tokens=4000, **ENDLESS) as stream:
        next(iter(stream))
        process.run.send_signal(signal.SIGTERM)
        until(lambda: "stopping: 1 answers in flight have 30 s" in process.text)
        process.run.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
    assert process.ended()[0] == 143


def test_at_sigterm_an_answer_in_flight_is_finished(client: openai.OpenAI, server: Process) -> None:
    """The last test: it ends the server of the module."""
    with answer(client, stream=True, max_tokens=120, **ENDLESS) as stream:
        chunks = [next(iter(stream))]
        server.run.send_signal(signal.SIGTERM)
        chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.ended()[0] == 143
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) != 0
