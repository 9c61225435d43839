"""Check a GPU end to end: its tests, then plain and speculative decoding of a model that the budget cannot hold.

The check makes a surrogate of a 7B model's shape from the demo model, prepares it and measures it under a budget with
`subspec bench`. One table goes to stdout, everything else to stderr. The exit status is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "subspec_cli" / "demo"
GIB = 1 << 30
MOST_SECONDS = 480
LINK_BYTES = GIB
OK, FAILED, NONE = "ok", "FAILED", ""


@dataclass(frozen=True)
class Geometry:
    """Sizes of the surrogate and the flags under which it is measured."""

    hidden: int
    layers: int
    feed_forward: int
    vocab: int
    flags: tuple[str, ...]

    @property
    def text(self) -> str:
        """The sizes in words."""
        return f"hidden {self.hidden}, {self.layers} layers, feed-forward {self.feed_forward}, {self.vocab} tokens"


SEVEN_B = Geometry(3584, 28, 18944, 152064, ("--vram-gb", "8", "--context", "1024"))
SMALL = Geometry(512, 8, 1600, 5000, ("--vram-gb", "0.4", "--context", "256", "--resident-layers", "0"))


@dataclass(frozen=True)
class Arm:
    """One way of speculating, measured beside plain decoding in a run of its own."""

    name: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    figure: str
    verdict: str = NONE


@dataclass
class Check:
    """A check: its device, its model, and the rows found so far."""

    device: str
    geometry: Geometry
    work: Path
    rows: list[Row] = field(default_factory=list)

    @property
    def model(self) -> Path:
        """Folder of the surrogate."""
        return self.work / "surrogate"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one command of the repository; its stderr is passed on, its stdout is kept."""
        say(" ".join(command))
        places = {"SUBSPEC_HOME": str(self.work / "home"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **places}
        whole = [sys.executable, *command]
        return subprocess.run(
            whole, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )


def speculative_arms() -> list[Arm]:
    """The ways of speculating to compare."""
    return [Arm("shadow"), Arm("serial", ("--no-shadow",))]


def main(arguments: list[str] | None = None) -> int:
    """Run the check and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses without a GPU"
    )
    parser.add_argument("--small", action="store_true", help="a model of megabytes instead of 15 GB")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep model and results there, and reuse them"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="subspec-gpu-check-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        check = Check(options.device, SMALL if options.small else SEVEN_B, work)
        started = time.monotonic()
        for step in (find_gpu, run_tests, make_model, prepare_model, measure):
            if not step(check):
                break
        check.rows.append(time_row(time.monotonic() - started))
    print(table(check.rows), flush=True)
    return exit_status(check.rows)


def find_gpu(check: Check) -> bool:
    """Name the GPU; without one there is nothing to check."""
    if check.device == "cpu":
        return True
    import torch

    if not torch.cuda.is_available():
        return add(check, "GPU", "none can be used here; --device cpu --small rehearses without one", False)
    about = torch.cuda.get_device_properties(0)
    return add(check, "GPU", f"{about.name}, {about.total_memory / GIB:.1f} GiB", True)


def run_tests(check: Check) -> bool:
    """The tests that are marked for a GPU; on the CPU they are only collected."""
    done = check.run("-m", "pytest", "-m", "gpu", "-rs", "tests")
    say(done.stdout)
    check.rows.append(row_of_tests(done.stdout, done.returncode, wants_gpu=check.device == "cuda"))
    return True  # measurements are useful even if a test failed


def make_model(check: Check) -> bool:
    """Build the surrogate."""
    sizes = check.geometry
    started = time.monotonic()
    done = check.run(
        "scripts/make_surrogate.py", str(DEMO), str(check.model), "--hidden", str(sizes.hidden),
        "--layers", str(sizes.layers), "--feed-forward", str(sizes.feed_forward), "--vocab", str(sizes.vocab),
        "--noise", "0.01", "--shard-gb", "4",
    )  # fmt: skip
    size_bytes = sum(path.stat().st_size for path in check.model.glob("*.safetensors"))
    figure = f"{size_bytes / 1e9:.2f} GB: {sizes.text}; made in {time.monotonic() - started:.0f} s"
    return add(check, "surrogate", figure, done.returncode == 0)


def prepare_model(check: Check) -> bool:
    """Write the substitutes."""
    started = time.monotonic()
    done = check.run("-m", "subspec_cli", "prepare", str(check.model))
    return add(check, "prepare", f"{time.monotonic() - started:.0f} s", done.returncode == 0)


def measure(check: Check) -> bool:
    """Run every arm, and the link by itself for comparison."""
    raw_gb_per_s = raw_link_gb_per_s(check.device, check.model)
    check.rows.append(Row("link alone", f"{raw_gb_per_s:.2f} GB/s in one big {transfer_name(check.device)}"))
    for arm in speculative_arms():
        target = check.work / f"{arm.name}.json"
        target.unlink(missing_ok=True)
        done = check.run(
            "-m", "subspec_cli", "bench", "sample", "--model", str(check.model), "--device", check.device,
            "--limit", "2", "--max-new-tokens", "48", "--plain-tokens", "8", "--output", str(target),
            *check.geometry.flags, *arm.flags,
        )  # fmt: skip
        if not add(check, f"{arm.name}: bench", f"exit status {done.returncode}", done.returncode == 0):
            say(done.stdout)
        if target.is_file():
            check.rows += arm_rows(
                arm, json.loads(target.read_text()), raw_gb_per_s, reserved_bytes(check.device)
            )
    return True


def add(check: Check, what: str, figure: str, good: bool) -> bool:
    """Add a row that is right or wrong; returns which."""
    check.rows.append(Row(what, figure, OK if good else FAILED))
    return good


def reserved_bytes(device: str) -> int:
    """Part of the budget that PyTorch's count of its memory leaves out."""
    from subspec_cli.planning.device_profile import device_profile

    return device_profile(device).context_bytes


def transfer_name(device: str) -> str:
    """Describe the link."""
    return "copy from pinned memory" if device == "cuda" else "read past the page cache"


def raw_link_gb_per_s(device: str, model: Path) -> float:
    """Speed of the link with nothing beside it: one big pinned copy, or one big read of the weights."""
    return gpu_link_gb_per_s() if device == "cuda" else disk_link_gb_per_s(model)


def gpu_link_gb_per_s() -> float:
    """The best of some copies of one pinned buffer to the GPU."""
    import torch

    from subspec_cli.streaming.pinned_memory import PinnedBuffer

    device = torch.device("cuda")
    buffer = PinnedBuffer(LINK_BYTES, device)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    best_ms = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(buffer.tensor, non_blocking=True)
        end.record()
        end.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    buffer.release()
    del target
    torch.cuda.empty_cache()
    return LINK_BYTES / best_ms / 1e6


def disk_link_gb_per_s(model: Path) -> float:
    """One read of the largest weight file, a gigabyte of it at most."""
    from subspec_cli.checkpoint.safetensors_header import TensorEntry
    from subspec_cli.files.direct_io import DirectReader, allocate_buffer
    from subspec_cli.streaming.layout import layout_block

    path = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    size_bytes = min(path.stat().st_size, LINK_BYTES)
    layout = layout_block([TensorEntry("all", "U8", (size_bytes,), path, 0, size_bytes)])
    buffer, reader = memoryview(allocate_buffer(layout.buffer_bytes)), DirectReader()
    started = time.perf_counter()
    reader.read_extents(layout.extents, buffer)
    seconds = time.perf_counter() - started
    reader.close()
    return size_bytes / seconds / 1e9


def row_of_tests(output: str, status: int, *, wants_gpu: bool) -> Row:
    """Return the outcome of the marked tests; if all are skipped, that fails only where a GPU is wanted."""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    figure = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if kind in counts
    )
    passed = status == 0 and counts.get("passed", 0) > 0 and (not wants_gpu or "skipped" not in counts)
    if not wants_gpu and status == 0:
        return Row("CUDA tests", figure)
    return Row("CUDA tests", figure or f"exit status {status}", OK if passed else FAILED)


def arm_rows(arm: Arm, report: dict[str, Any], raw_gb_per_s: float, reserved: int) -> Iterator[Row]:
    """The table's lines of one arm, from the document of `subspec bench`."""
    if not report["rows"]:
        yield Row(f"{arm.name}: answers", "none", FAILED)
        return
    total, link = report["rows"][-1], report["link"]
    same = total["identical"] == total["answers"] > 0
    yield Row(f"{arm.name}: plain", rate(total["plain_tok_per_s"]))
    ratio = f", {total['speedup_same_plan']:.2f}x" if total["speedup_same_plan"] else ""
    yield Row(f"{arm.name}: tokens", rate(total["speculative_tok_per_s"]) + ratio)
    identical = f"{total['identical']} of {total['answers']} ({report['exactness']})"
    yield Row(f"{arm.name}: identical answers", identical, OK if same else FAILED)
    if link and link["gb_per_s"]:
        share = f", {link['gb_per_s'] / raw_gb_per_s:.0%} of the link alone" if raw_gb_per_s else ""
        yield Row(f"{arm.name}: link", f"{link['gb_per_s']:.2f} GB/s{share}")
    else:
        yield Row(f"{arm.name}: link", "nothing was streamed", FAILED)
    yield Row(f"{arm.name}: tau", f"{total['tau']:.2f}" if total["tau"] else "-")
    yield draft_row(arm, report["answers"])
    if report["ceiling_tok_per_s"] and total["speculative_tok_per_s"]:
        share = total["speculative_tok_per_s"] / report["ceiling_tok_per_s"]
        yield Row(f"{arm.name}: share of ceiling", f"{share:.0%} of {report['ceiling_tok_per_s']:.2f} tok/s")
    taken, budget = report["peak_memory_bytes"] + reserved, report["budget_bytes"]
    yield Row(
        f"{arm.name}: memory",
        f"{taken / GIB:.2f} of {budget / GIB:.2f} GiB",
        OK if taken <= budget else FAILED,
    )


def draft_row(arm: Arm, answers: Sequence[dict[str, Any]]) -> Row:
    """Return the time of a draft step before a pass; shadow steps, which share the machine, do not count."""
    steps = sum(answer["speculative"]["draft_steps"] for answer in answers)
    seconds = sum(answer["speculative"]["draft_time_s"] for answer in answers)
    if not steps:
        return Row(f"{arm.name}: draft step", "nothing was drafted", FAILED)
    return Row(f"{arm.name}: draft step", f"{seconds / steps * 1000:.2f} ms")


def time_row(seconds: float) -> Row:
    """Return how long the check took; a slow check is reported and is no failure."""
    return Row(
        "time", f"{seconds:.0f} s" + ("" if seconds < MOST_SECONDS else f", more than {MOST_SECONDS} s")
    )


def rate(tokens_per_s: float | None) -> str:
    """Tokens per second."""
    return f"{tokens_per_s:.2f} tok/s" if tokens_per_s else "-"


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    cells = [("what", "figure", "verdict"), *((row.what, row.figure, row.verdict) for row in rows)]
    first, second = (max(len(line[column]) for line in cells) for column in (0, 1))
    lines = [f"{what:<{first}}  {figure:<{second}}  {verdict}".rstrip() for what, figure, verdict in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def exit_status(rows: Sequence[Row]) -> int:
    """1 if anything failed."""
    return int(any(row.verdict == FAILED for row in rows))


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
