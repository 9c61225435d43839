#!/usr/bin/env python3
"""Break what can break around `subspec serve` and `subspec batch`, and print what came of it as a table.

Clients leave, lie, stall and come all at once; the model's file is cut in the middle of an answer; processes are
killed. The server must answer the next request, or end with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
KEY = "faults"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SAY = [{"role": "user", "content": "Tell me about rivers."}]
MOST_S = 180.0
MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """What came of one fault."""

    found: str
    is_sound: bool


class Server:
    """A server over one model, and its lines on stderr."""

    def __init__(self, home: Path, model: str, *options: str) -> None:
        command = ["serve", model, "--port", "0", "--parallel", "4", "--context", "2048", *options]
        self.process = start(home, *command)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(iter(self.process.stderr.readline, ""))

    def wait(self) -> None:
        """Wait until it answers."""
        until(lambda: any("ready:" in line for line in self.said) or self.process.poll() is not None)
        found = re.search(r"listening on (http://\S+)/ ", self.text)
        assert found, self.text
        assert self.process.poll() is None, self.text
        self.url = found[1]

    @property
    def text(self) -> str:
        """All lines."""
        return "".join(self.said)

    @property
    def port(self) -> int:
        """The port that it took."""
        return int(self.url.rpartition(":")[2])

    def ask(self, **more: object) -> httpx.Response:
        """Ask for an answer in a conversation."""
        body = {"messages": SAY, "max_tokens": 16, "temperature": 0, **more}
        return httpx.post(self.url + CHAT, json=body, headers=HEADERS, timeout=MOST_S)

    @contextmanager
    def stream(self, **more: object) -> Iterator[Iterator[str]]:
        """Stream an answer that does not end by itself soon."""
        body = {"messages": SAY, "stream": True, "max_tokens": 1500, "temperature": 1.5, **more}
        with httpx.stream("POST", self.url + CHAT, json=body, headers=HEADERS, timeout=MOST_S) as response:
            yield (line for line in response.iter_lines() if line.startswith("data: "))

    @property
    def in_flight(self) -> int:
        """Answers in flight."""
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS, timeout=MOST_S).text
        found = re.search(r"^subspec_answers_in_flight (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    def serves(self) -> bool:
        """Whether the next request is answered."""
        return self.ask().status_code == 200

    def connect(self, data: bytes, *, receive_bytes: int | None = None) -> socket.socket:
        """Send bytes over a connection of their own."""
        found = socket.socket()
        if receive_bytes is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        found.settimeout(MOST_S)
        found.connect(("127.0.0.1", self.port))
        found.sendall(data)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        status = self.process.wait(MOST_S)
        self._reader.join(MOST_S)
        return status


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command line."""
    environment = os.environ | {"SUBSPEC_HOME": str(home), "PYTHONPATH": str(ROOT), "SUBSPEC_API_KEY": KEY}
    command = [sys.executable, "-m", "subspec_cli", *arguments]
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
    }
    return subprocess.Popen(command, env=environment, text=True, cwd=home, **pipes)


def until(is_so: Callable[[], bool], most_s: float = MOST_S) -> float:
    """Wait; return the seconds that it took."""
    began_s = time.monotonic()
    while not is_so():
        if time.monotonic() - began_s > most_s:
            raise TimeoutError
        time.sleep(0.01)
    return time.monotonic() - began_s


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a command that must succeed."""
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said


@dataclass(frozen=True)
class Use:
    """What a server takes of the machine."""

    memory_mib: float
    threads: int
    files: int


def use_of(server: Server) -> Use:
    """Read it from the kernel."""
    folder = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Use(
        int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), len(list((folder / "fd").iterdir()))
    )


def head(length: int, *more: str) -> bytes:
    """Return the head of a request for an answer."""
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Authorization: Bearer {KEY}", f"Content-Length: {length}", "", ""]).encode()


# --- clients


def client_gone(server: Server) -> Finding:
    """A client leaves in the middle of a stream."""
    times = []
    for _ in range(10):
        with server.stream() as lines:
            next(lines)
        times.append(until(lambda: server.in_flight == 0))
    return Finding(f"place free after {max(times):.2f} s at most, 10 times", server.serves())


def connections_at_once(server: Server) -> Finding:
    """200 connections at once."""
    with ThreadPoolExecutor(200) as pool:
        statuses = Counter(pool.map(lambda _: server.ask(max_tokens=4).status_code, range(200)))
    sound = set(statuses) <= {200, 429} and statuses[200] >= 64 and server.serves()
    return Finding(", ".join(f"{count} times {status}" for status, count in sorted(statuses.items())), sound)


def slow_reader(server: Server) -> Finding:
    """A client that hardly reads its stream."""
    body = json.dumps({"messages": SAY, "stream": True, "max_tokens": 400, "temperature": 1.5}).encode()
    with server.connect(head(len(body)) + body, receive_bytes=2048) as slow:
        began_s, answered = time.monotonic(), 0
        while time.monotonic() - began_s < 5:
            slow.recv(1)
            answered += server.serves()
    until(lambda: server.in_flight == 0)
    return Finding(f"{answered} others answered meanwhile", answered > 2)


def large_body(server: Server) -> Finding:
    """50 MB, said and unsaid."""
    data = b" " * 50_000_000
    before = use_of(server).memory_mib
    statuses = []
    for content in (data, iter([data[:MIB]] * 50)):
        try:
            sent = {"Content-Type": "application/json", **HEADERS}
            found = httpx.post(server.url + CHAT, content=content, headers=sent, timeout=MOST_S)
            statuses.append(str(found.status_code))
        except httpx.TransportError:
            statuses.append("closed")
    grown = use_of(server).memory_mib - before
    sound = set(statuses) <= {"413", "closed"} and "413" in statuses and server.serves()
    return Finding(f"{', '.join(statuses)}; {grown:.0f} MiB taken", sound)


def bad_json(server: Server) -> Finding:
    """JSON that is none, and some that is 5 million lists deep."""
    sent = {"Content-Type": "application/json", **HEADERS}
    bodies = [
        b"{",
        b"\xff\xfe",
        b"[" * 5_000_000,
        b'{"a":' * 1_000_000,
        b'{"messages": 1e999}',
        b"null",
        b'"a"',
    ]
    found = [httpx.post(server.url + CHAT, content=body, headers=sent, timeout=MOST_S) for body in bodies]
    sound = all(each.status_code == 400 and "message" in each.json()["error"] for each in found)
    return Finding(
        f"{len(found)} bodies: {Counter(each.status_code for each in found)}", sound and server.serves()
    )


def wrong_key(server: Server) -> Finding:
    """A wrong key, and none."""
    given: list[dict[str, str]] = [{"Authorization": "Bearer wrong"}, {}]
    found = [httpx.get(f"{server.url}/v1/models", headers=each).status_code for each in given]
    return Finding(f"{found}", found == [401, 401] and KEY not in server.text)


def huge_headers(server: Server) -> Finding:
    """A header of 1 MB, and 20,000 of them."""
    found = []
    for lines in (["X: " + "a" * 1_000_000], [f"X-{number}: a" for number in range(20_000)]):
        try:
            with server.connect(head(2, *lines)) as connection:
                found.append(connection.recv(100).split(b"\r\n")[0].decode())
        except ConnectionError:
            found.append("closed")
    return Finding(
        ", ".join(found), all("400" in each or each == "closed" for each in found) and server.serves()
    )


def half_sent(server: Server) -> Finding:
    """200 requests whose head or body never ends, sent byte by byte."""
    sockets = [server.connect(head(100)[:50]) for _ in range(100)]
    sockets += [server.connect(head(100) + b"{") for _ in range(100)]
    serves = server.serves()
    ended: set[int] = set()

    def trickle() -> bool:
        for number, each in enumerate(sockets[:100]):
            try:
                each.sendall(b"x")
            except OSError:
                ended.add(number)
        time.sleep(0.5)
        return len(ended) == 100

    took_s = until(trickle, 60)
    statuses = {each.recv(12).decode() for each in sockets[100:]}
    for each in sockets:
        each.close()
    return Finding(
        f"heads closed after {took_s:.0f} s, bodies answered {statuses}",
        serves and statuses == {"HTTP/1.1 408"} and server.serves(),
    )


# --- the machine


def disk_error(home: Path, model: Path, folder: Path) -> Finding:
    """The model's file is cut in the middle of an answer."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    finish(start(home, "prepare", str(copy), "--no-tune"))
    server = Server(home, str(copy), "--memory-gb", "2", "--resident-layers", "0")
    server.wait()
    shard = next(copy.glob("*.safetensors"))
    with server.stream() as lines:
        next(lines)
        os.truncate(shard, shard.stat().st_size // 2)
        last = list(lines)[-1]
    told = json.loads(last.removeprefix("data: ")).get("error", {}).get("message", last[:60])
    following = server.ask()
    server.stop()
    sound = shard.name in told and following.status_code == 500 and shard.name in following.text
    return Finding(f"stream: {told[:90]!r}; next request: {following.status_code} with the reason", sound)


def sigterm(server: Server) -> Finding:
    """SIGTERM with an answer in flight."""
    with server.stream(max_tokens=100, temperature=0) as lines:
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        last = list(lines)[-1]
    status = server.process.wait(MOST_S)
    return Finding(f"{last!r}, exit status {status}", last == "data: [DONE]" and status == 143)


def killed_batch(home: Path, model: str, folder: Path, kills: int, chance: random.Random) -> Finding:
    """`subspec batch` is killed again and again, and goes on."""
    requests, whole, broken = (folder / name for name in ("in.jsonl", "whole.jsonl", "broken.jsonl"))
    lines = [{"custom_id": f"r{n}", "prompt": f"Say {n}.", "temperature": 1.5} for n in range(300)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["-m", model, "--memory-gb", "1", "-n", "60", "--seed", "7", str(requests)]
    began_s = time.monotonic()
    undisturbed = start(home, "batch", *options, str(whole))
    finish(undisturbed)
    took_s = time.monotonic() - began_s
    torn, counts = 0, [0]
    for number in range(kills):
        running = start(home, "batch", *options, str(broken))
        if number % 2:  # while records are written, not while the model is loaded
            until(partial(has_grown, broken, counts[-1], len(lines)))
            time.sleep(chance.uniform(0, 0.3))
        else:
            time.sleep(chance.uniform(0.1, 1) * took_s)
        running.kill()
        running.communicate()
        counts.append(len(records_in(broken)))
        torn += broken.exists() and bool(broken.read_bytes()) and not broken.read_bytes().endswith(b"\n")
    last = start(home, "batch", *options, str(broken))
    finish(last)
    count, is_equal = len(records_in(broken)), texts_in(whole) == texts_in(broken)
    return Finding(
        f"{kills} kills at {', '.join(map(str, counts[1:]))} records, {torn} torn lines: {count} records, "
        f"texts equal to an undisturbed run's: {is_equal}",
        count == len(lines) and is_equal,
    )


def records_in(path: Path) -> list[str]:
    """Return the lines of a batch's results, also of those that are not there yet."""
    return path.read_text().splitlines() if path.exists() else []


def has_grown(path: Path, count: int, most: int) -> bool:
    """Whether a batch has written a record, or has none left to write."""
    return len(records_in(path)) > count or count == most


def texts_in(path: Path) -> dict[str, str]:
    """Return the texts of a batch's results by their ids."""
    records = [json.loads(line) for line in records_in(path)]
    return {
        each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in records
    }


def mixed_load(server: Server, minutes: float, chance: random.Random) -> Finding:
    """Streams, whole answers, clients that leave and bad requests, for minutes."""
    counts = Counter[str]()
    end_s = time.monotonic() + 60 * minutes

    def ask(seed: int) -> None:
        own = random.Random(seed)
        while time.monotonic() < end_s:
            messages = [{"role": "user", "content": f"Say {own.randrange(50)}. " * own.randrange(1, 60)}]
            kind = own.choice(("whole", "stream", "leaves", "bad"))
            if kind == "whole":
                counts[str(server.ask(messages=messages, n=2, logprobs=True).status_code)] += 1
            elif kind == "bad":
                counts[str(server.ask(messages=messages, tools=[1]).status_code)] += 1
            else:
                with server.stream(messages=messages, max_tokens=60) as lines:
                    taken = [
                        line for line, _ in zip(lines, range(3 if kind == "leaves" else 999), strict=False)
                    ]
                counts["left" if kind == "leaves" else taken[-1][6:12]] += 1

    samples: list[Use] = []
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, chance.randrange(1 << 30)) for _ in range(8)]
        while time.monotonic() < end_s:
            time.sleep(max(0.5, 60 * minutes / 60))
            samples.append(use_of(server))
        for each in asking:
            each.result()
    until(lambda: server.in_flight == 0)
    time.sleep(6)  # idle connections end
    third = len(samples) // 3
    early, late = (
        max(sample.memory_mib for sample in part)
        for part in (samples[third : 2 * third], samples[2 * third :])
    )
    end = use_of(server)
    files = end.files - min(sample.files for sample in samples)
    memory = httpx.get(f"{server.url}/v1/figures", headers=HEADERS).json()
    is_within = memory["peak_memory_bytes"] <= memory["budget_bytes"]
    return Finding(
        f"{dict(counts)}; resident {early:.0f} MiB in the second third, {late:.0f} in the last; threads "
        f"{samples[third].threads} to {end.threads}; files at the end {files:+d}; peak "
        f"{memory['peak_memory_bytes'] / MIB:.0f} of {memory['budget_bytes'] / MIB:.0f} MiB",
        set(counts) <= {"200", "400", "left", "[DONE]"}
        and late < 1.03 * early + 5
        and is_within
        and files <= 0,
    )


def main() -> int:
    """Break everything, or what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory whose file is cut; the demo unless given")
    parser.add_argument("--minutes", type=float, default=5, help="length of the mixed load")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="name of a fault; may be given several times")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    clients = (
        client_gone,
        connections_at_once,
        slow_reader,
        large_body,
        bad_json,
        wrong_key,
        huge_headers,
        half_sent,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        finish(start(home, "prepare", "demo", "--no-tune"))
        server = Server(home, "demo", "--memory-gb", "1", "--queue", "100")
        faults: dict[str, Callable[[], Finding]] = {each.__name__: partial(each, server) for each in clients}
        faults["mixed_load"] = lambda: mixed_load(server, arguments.minutes, chance)
        faults["sigterm"] = lambda: sigterm(server)
        faults["disk_error"] = lambda: disk_error(
            home, arguments.model or ROOT / "subspec_cli" / "demo", folder
        )
        faults["killed_batch"] = lambda: killed_batch(home, "demo", folder, arguments.kills, chance)
        return report(faults, arguments.only or list(faults), server)


def report(faults: dict[str, Callable[[], Finding]], chosen: list[str], server: Server) -> int:
    """Run the chosen faults and print a row for each; 1 if one was not borne."""
    failed = 0
    try:
        print("| fault | found | borne |\n|---|---|---|")
        server.wait()
        for name in chosen:
            try:
                finding = faults[name]()
            except Exception as error:
                finding = Finding(f"{type(error).__name__}: {error}", False)
            failed += not finding.is_sound
            print(f"| {name} | {finding.found} | {'yes' if finding.is_sound else 'NO'} |", flush=True)
    finally:
        if server.process.poll() is None:
            server.stop()
    if "Traceback" in server.text:
        print(f"the server said:\n{server.text}")
        failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
