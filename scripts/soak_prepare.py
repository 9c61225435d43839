#!/usr/bin/env python3
"""Kill `subspec prepare --residual` with SIGKILL again and again while it downloads and quantizes one model.

A hub on 127.0.0.1 serves the model, slowly as long as kills are still to come. At the end the prepared files
must equal those of an undisturbed run, byte for byte, and the hub must have sent little more than the model.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_hub import MODEL, FakeHub, running  # noqa: E402 - the line above makes it importable

MOST_EXCESS = 1.1
DEMO = ROOT / "subspec_cli" / "demo"


@dataclass
class Soak:
    """Result of one soak."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    """Number of kills by the state of the preparation at the kill."""
    model_bytes: int = 0
    sent_bytes: int = 0
    is_identical: bool = False
    is_clean: bool = False
    elapsed_s: float = 0.0

    @property
    def is_passed(self) -> bool:
        """Whether files are identical, the cache is clean and hardly anything was sent twice."""
        return self.is_identical and self.is_clean and self.sent_bytes <= MOST_EXCESS * self.model_bytes

    def lines(self) -> list[str]:
        """The result as lines of text."""
        moments = ", ".join(f"{count} {name}" for name, count in sorted(self.moments.items()))
        excess = self.sent_bytes / self.model_bytes
        return [
            f"{self.kills} kills in {self.elapsed_s:.0f} s: {moments}",
            f"model {self.model_bytes / 1e6:.1f} MB, sent {self.sent_bytes / 1e6:.1f} MB: {excess:.3f}x",
            f"prepared files identical to an undisturbed run: {self.is_identical}",
            f"cache complete, verified and without leftovers: {self.is_clean}",
            "passed" if self.is_passed else "FAILED",
        ]


def soak(
    model: Path, work: Path, *, kills: int, span_s: float, rate: float, seed: int, limit_s: float
) -> Soak:
    """Prepare `model` undisturbed, then again with up to `kills` kills.

    Args:
        model: directory of the model.
        work: an empty directory for cache, home and results.
        kills: most kills; there are fewer if the preparation ends earlier.
        span_s: each kill comes within this many seconds of the first request of its process.
        rate: bytes per second of each connection as long as kills are still to come.
        seed: seed of the moments of the kills.
        limit_s: no kill after this time.
    """
    hub = FakeHub({path.name: path.read_bytes() for path in model.iterdir() if path.name != "README.md"})
    result = Soak()
    with running(hub):
        environment = child_environment(hub.url, work)
        run_to_end(environment)
        result.model_bytes = hub.sent_bytes
        undisturbed = prepared_files(work)
        for name in ("home", "hub"):
            shutil.rmtree(work / name)
        hub.sent_bytes, hub.bytes_per_s = 0, rate
        started = time.monotonic()
        chance = random.Random(seed)
        while result.kills < kills and time.monotonic() - started < limit_s:
            if not killed_once(environment, hub, chance.uniform(0, span_s)):
                break
            result.kills += 1
            result.moments[what_was_there(work)] += 1
        hub.bytes_per_s = None
        run_to_end(environment)
        result.elapsed_s = time.monotonic() - started
        result.sent_bytes = hub.sent_bytes
        result.is_identical = prepared_files(work) == undisturbed
        result.is_clean = is_clean(work, hub)
    return result


def child_environment(url: str, work: Path) -> dict[str, str]:
    """Environment that keeps all files of the program in `work` and allows the hub at `url` only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SUBSPEC"))}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(work),
        "SUBSPEC_HOME": str(work / "home"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def command() -> list[str]:
    """Command line of the preparation."""
    return [sys.executable, "-m", "subspec_cli", "prepare", MODEL, "--residual"]


def run_to_end(environment: dict[str, str]) -> None:
    """Prepare without a kill. On failure, show the message and raise CalledProcessError."""
    done = subprocess.run(command(), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()


def killed_once(environment: dict[str, str], hub: FakeHub, delay_s: float) -> bool:
    """Start a preparation and kill it `delay_s` after its first request; False if it ended earlier."""
    asked = len(hub.requests)
    process = subprocess.Popen(
        command(), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while len(hub.requests) == asked and process.poll() is None:
            time.sleep(0.002)
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def what_was_there(work: Path) -> str:
    """State of the preparation, in words."""
    made = len(list((work / "home").glob("prepared/*/layer-*.safetensors")))
    if list((work / "home").rglob("residual-*.safetensors")):
        return "with residuals made"
    partial = any(path.stat().st_size for path in (work / "hub").rglob("*.incomplete"))
    if list((work / "home").rglob("*.tmp.*")):
        return "while writing a layer"
    if partial:
        return "with layers made and files half there" if made else "with files half there"
    return "with layers made and all files there" if made else "with nothing there"


def prepared_files(work: Path) -> dict[str, str]:
    """SHA-256 of every prepared file, by name."""
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((work / "home").rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def is_clean(work: Path, hub: FakeHub) -> bool:
    """Whether the cache holds every file under its hash and no partial file."""
    repository = work / "hub" / "models--org--tiny"
    found = {path.name for path in (repository / "blobs").iterdir()}
    (snapshot,) = (repository / "snapshots").iterdir()
    names = [path.name for path in snapshot.iterdir()]
    is_whole = all((snapshot / name).read_bytes() == hub.files[name] for name in names)
    return is_whole and found == {hub.etag(name) for name in names}


def make_model(directory: Path, megabytes: int) -> Path:
    """Make a surrogate of the demo model of about this size, in files of 10 MB."""
    script = ROOT / "scripts" / "make_surrogate.py"
    layers = max(5, round((megabytes - 10) / 5.5))
    arguments = ["--hidden", "512", "--layers", str(layers), "--noise", "0.01", "--shard-gb", "0.01"]
    subprocess.run(
        [sys.executable, str(script), str(DEMO), str(directory), *arguments], check=True, capture_output=True
    )
    return directory


def main() -> int:
    """Run the soak; 1 if a check failed or the preparation ended before all kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a model (default: make one)")
    parser.add_argument("--megabytes", type=int, default=220, help="size of the model to make")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--span-s", type=float, default=7.0, help="latest kill after the first request")
    parser.add_argument("--rate", type=float, default=0.13e6, help="bytes/s of each of four connections")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="no kill after this time")
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="subspec-soak-") as place:
        work = Path(place)
        model = wanted.model or make_model(work / "model", wanted.megabytes)
        (work / "places").mkdir()
        result = soak(
            model,
            work / "places",
            kills=wanted.kills,
            span_s=wanted.span_s,
            rate=wanted.rate,
            seed=wanted.seed,
            limit_s=wanted.limit_s,
        )
    print("\n".join(result.lines()))
    return 0 if result.is_passed and result.kills >= wanted.kills else 1


if __name__ == "__main__":
    sys.exit(main())
