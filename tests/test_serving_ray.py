"""Jobs and the server on a Ray of their own: a replica is killed in mid-job, and answers are those of one process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fakes_session import prepare_quietly

from subspec_cli.config_file import resolve_config
from subspec_cli.session import open_session

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from ray_check import replica_processes, run_job

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
MODEL = ["--model", "demo", "--memory-gb", "1"]
RAY = ["--ray", "local", "--replicas", "2"]
START_S = 240


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the demo prepared; the first test's session keeps what the machine is assumed to cost."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("SUBSPEC_HOME", str(folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        prepare_quietly(Path("demo"))
        yield folder


@pytest.fixture
def costs(home: Path) -> None:
    """Costs of the machine are kept, so that no replica times it."""
    config = resolve_config({"model": {"model": "demo"}, "memory": {"vram_gb": 1.0, "device": "cpu"}})
    open_session(config, parallel=4).close()


def test_a_killed_replica_loses_and_doubles_nothing(costs: None, tmp_path: Path) -> None:
    alone = run_job(tmp_path, "one process", 40, MODEL)
    killed = run_job(tmp_path, "one killed", 40, MODEL + RAY, kills=1)
    assert killed.document["restarts"] == 1
    assert killed.document["replicas"] == 2
    assert len(killed.records) == len(killed.answers) == 40
    assert killed.answers == alone.answers


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "subspec_cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_what_every_replica_would_fail_with_ends_the_job(home: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    job = started("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "/no/such/model", *RAY)
    _, said = job.communicate(timeout=START_S)
    assert job.returncode == 2
    assert "no such directory: /no/such/model" in said
    assert "at the same path on every node" in said


def test_an_interrupted_job_ends_its_replicas(costs: None, tmp_path: Path) -> None:
    lines = [{"prompt": f"Tell me about bees, {number}.", "max_tokens": 100} for number in range(400)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = started("batch", str(tmp_path / "in"), str(tmp_path / "out"), *MODEL, *RAY)
    deadline = time.monotonic() + START_S
    out = tmp_path / "out"
    while not (out.exists() and out.read_bytes()) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    replicas = replica_processes(job.pid)
    assert replicas
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "left, the same command goes on" in said
    while any(Path(f"/proc/{pid}").exists() for pid in replicas):  # ended by Ray, maybe a moment later
        time.sleep(0.05)
        assert time.monotonic() < deadline + 60


def test_the_server_answers_behind_the_proxy(costs: None, tmp_path: Path) -> None:
    import httpx

    said = tmp_path / "said"
    command = [
        sys.executable,
        "-m",
        "subspec_cli",
        "serve",
        *MODEL[1:],
        *RAY,
        "--port",
        "0",
        "--api-key",
        "k",
    ]
    with said.open("w") as file, subprocess.Popen([*command, "--parallel", "2"], stderr=file) as server:
        try:
            url = _url_when_ready(server, said)
            with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as client:
                _check_server(client)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=90)
    assert server.returncode == 130, said.read_text()
    assert " 499 " in said.read_text(), "the request that was cancelled is in the log"


def _url_when_ready(server: subprocess.Popen[bytes], said: Path) -> str:
    deadline = time.monotonic() + START_S
    while "ready: http" not in said.read_text() and server.poll() is None:
        time.sleep(0.1)
        assert time.monotonic() < deadline, said.read_text()
    return said.read_text().partition("ready: ")[2].partition(" ")[0]


def _check_server(client: Any) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 3}
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert client.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403
    whole = client.post("/v1/chat/completions", json=body).json()
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    long = {**body, "max_tokens": 4000, "temperature": 1.5, "logit_bias": {str(n): -100 for n in range(4)}}
    with client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as stream:
        next(stream.iter_lines())
    while not _is_cancelled(client):  # the replica that answered it is asked now and then
        time.sleep(0.05)


def _is_cancelled(client: Any) -> bool:
    lines = client.get("/metrics").text.splitlines()
    return 'subspec_requests_total{status="499"} 1.0' in lines and "subspec_answers_in_flight 0.0" in lines
