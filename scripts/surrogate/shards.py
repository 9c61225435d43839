"""Weight files of a surrogate: cut into shards, written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from surrogate.values import Plan, make_blocks, workers

GB = 10**9
ALIGNMENT = 4096  # of a shard's data section, so that direct I/O can read it
REPORT_SECONDS = 2


def shard_plans(plans: list[Plan], limit: float) -> list[list[Plan]]:
    """Return `plans` cut into shards of at most `limit` bytes, or of one tensor if that is larger."""
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + plan.nbytes > limit:
            shards.append([])
        shards[-1].append(plan)
    return shards


def header_bytes(plans: list[Plan]) -> bytes:
    """Return a safetensors header for `plans` that ends at a multiple of `ALIGNMENT` bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        start, end = end, end + plan.nbytes
        entries[plan.name] = {"dtype": plan.source.dtype, "shape": plan.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file; it gets the name `path` once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_shards(out: Path, shards: list[list[Plan]], noise: float, seed: int, log: TextIO) -> None:
    """Write the weights, with an index if there are several files; report progress to `log` now and then."""
    total = sum(plan.nbytes for plans in shards for plan in plans)
    weight_map: dict[str, str] = {}
    begun = reported = time.monotonic()
    done = 0
    for number, plans in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        with replacing(out / f"model{part}.safetensors") as file, workers() as pool:
            file.write(header_bytes(plans))
            for plan in plans:
                for block in make_blocks(plan, noise, seed, pool):
                    file.write(block.view(torch.uint8).numpy().data)
                weight_map[plan.name] = f"model{part}.safetensors"
                done, now = done + plan.nbytes, time.monotonic()
                if now - reported >= REPORT_SECONDS or done == total:
                    reported, rate = now, done / max(now - begun, 1e-6) / 1e6
                    print(f"{done / GB:.2f} of {total / GB:.2f} GB, {rate:.0f} MB/s", file=log, flush=True)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", content)
