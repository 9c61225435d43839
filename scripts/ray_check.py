"""Kill a replica in the middle of a job on Ray, and compare the records with those of one process.

python scripts/ray_check.py [--model demo] [--memory-gb 1] [--replicas 2] [--prompts 40] [--ray local]

Each run is a `subspec batch` of its own. Exit status 1 if a record is missing, doubled or different.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOPICS = ("rivers", "bread", "the moon", "maps", "winter", "bees", "glass", "music", "lists", "paths")
_LENGTHS = (8, 96, 24, 160, 48)
_KILL_AFTER = 5
"""Records that are there when the replica is killed."""


@dataclass(frozen=True)
class Run:
    """One run of the job."""

    name: str
    document: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def answers(self) -> dict[str, Any]:
        """What must not depend on where an answer was given."""
        return {record["custom_id"]: _answer(record) for record in self.records}

    @property
    def doubled(self) -> int:
        """Records beyond one for each request."""
        return sum(Counter(record["custom_id"] for record in self.records).values()) - len(self.answers)


def _answer(record: dict[str, Any]) -> tuple[object, ...]:
    body = record["response"]["body"]
    usage = {key: body["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
    return record["id"], body["choices"], usage, body["subspec"]["seed"], body["system_fingerprint"]


def main() -> int:
    """Run the job three times; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory-gb", default="1")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--ray", default="local")
    args = parser.parse_args()
    common = ["--model", args.model, "--memory-gb", args.memory_gb]
    ray = ["--ray", args.ray, "--replicas", str(args.replicas)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run_job(Path(folder), "one process", args.prompts, common),
            run_job(Path(folder), f"{args.replicas} replicas", args.prompts, common + ray),
            run_job(Path(folder), "one killed", args.prompts, common + ray, kills=1),
        ]
    print("| run | records | doubled | same as one process | restarts | seconds | tok/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    is_good = True
    for run in runs:
        same = sum(run.answers.get(key) == value for key, value in runs[0].answers.items())
        is_good &= run.doubled == 0 and same == len(run.answers) == args.prompts
        print(
            f"| {run.name} | {len(run.records)} | {run.doubled} | {same} | {run.document['restarts']} "
            f"| {run.document['elapsed_s']:.1f} | {run.document['tok_per_s']:.1f} |"
        )
    return 0 if is_good and runs[2].document["restarts"] == 1 else 1


def write_requests(path: Path, prompts: int) -> None:
    """Write prompts whose answers are of uneven lengths, some of them sampled."""
    lines = [
        {
            "custom_id": f"p{number}",
            "prompt": f"Tell me about {_TOPICS[number % len(_TOPICS)]}, part {number}.",
            "max_tokens": _LENGTHS[number % len(_LENGTHS)],
            "temperature": 0.8 if number % 3 == 0 else 0.0,
        }
        for number in range(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_job(folder: Path, name: str, prompts: int, options: list[str], *, kills: int = 0) -> Run:
    """Run one job to its end in a process of its own; `kills` replicas die on the way."""
    requests, results = folder / "requests.jsonl", folder / f"{name.replace(' ', '-')}.jsonl"
    write_requests(requests, prompts)
    command = [sys.executable, "-m", "subspec_cli", "batch", str(requests), str(results), "--seed", "7"]
    # A replica's share of the cores is one thread where they are few: one process takes as many.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(
        [*command, *options, "--json"], stdout=subprocess.PIPE, text=True, env=environment
    ) as job:
        while kills and job.poll() is None:
            time.sleep(0.02)
            if results.exists() and results.read_bytes().count(b"\n") >= _KILL_AFTER:
                victim = replica_processes(job.pid)[0]
                os.kill(victim, signal.SIGKILL)
                print(f"{name}: killed replica process {victim}", file=sys.stderr)
                kills -= 1
        output, _ = job.communicate()
    if job.returncode:
        raise SystemExit(f"{name}: exit status {job.returncode}")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return Run(name, json.loads(output), records)


def replica_processes(ancestor: int) -> list[int]:
    """Processes of replicas below `ancestor`, as Ray names them; those on other machines are not seen."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat, name = (entry / "stat").read_text(), (entry / "cmdline").read_text()
            except OSError:
                continue  # it has ended meanwhile
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = name

    def is_below(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [pid for pid, name in names.items() if name.startswith("ray::Replica") and is_below(pid)]


if __name__ == "__main__":
    sys.exit(main())
