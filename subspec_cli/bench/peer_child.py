"""The subprocess of a peer: loads a model with the library's own offload, and answers prompts that come by stdin."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import torch
import transformers

from subspec_cli.probe.machine_use import read_use
from subspec_cli.streaming.memory_meter import MemoryMeter, disk_read_bytes


class _Clock:
    """Notes when tokens come; `generate` gives it the prompt first."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, _: object) -> None:
        """Take the prompt, or a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Take the end."""


def main() -> None:
    """Load the model of the first line of stdin, then answer the prompt of each further line, until stdin ends."""
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    library: Any = transformers  # which is typed in part
    library.utils.logging.disable_progress_bar()
    order = json.loads(sys.stdin.readline())
    torch.set_num_threads(order["threads"])
    meter = MemoryMeter(torch.device(order["device"]))
    with tempfile.TemporaryDirectory(prefix="subspec-peer-") as folder:
        model = _loaded(library, order, folder)
        _say(replies, _about(model))
        for line in sys.stdin:
            _say(replies, {**_answer(model, json.loads(line)), "peak_bytes": meter.peak_bytes()})


def _loaded(library: Any, order: dict[str, Any], folder: str) -> Any:  # noqa: ANN401 - the library's
    is_cpu = order["device"] == "cpu"
    memory = (
        {"cpu": order["budget_bytes"]} if is_cpu else {0: order["budget_bytes"], "cpu": order["host_bytes"]}
    )
    model = library.AutoModelForCausalLM.from_pretrained(
        order["directory"],
        dtype="auto",
        device_map="auto",
        max_memory=memory,
        offload_folder=folder,
        local_files_only=True,
    )
    model.generation_config = library.GenerationConfig()  # the checkpoint's may sample
    return model.eval()


def _about(model: Any) -> dict[str, Any]:  # noqa: ANN401 - the library's
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {"": "cpu"}).items()}
    on_disk = [name for name, place in places.items() if place == "disk"]
    streamed = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.named_parameters()
        if any(not place or name.startswith(f"{place}.") for place in on_disk)
    )
    return {
        "name": "accelerate",
        "version": importlib.metadata.version("accelerate"),
        "streamed_bytes_per_token": streamed,
        "modules": dict(Counter(places.values())),
    }


def _answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - the library's
    prompt = torch.tensor([request["prompt"]], device=model.device if model.device.type == "cuda" else "cpu")
    clock, read_before, use_before = _Clock(), disk_read_bytes(), read_use()
    given = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=clock,
        do_sample=False,
        max_new_tokens=request["limit"],
        eos_token_id=request["end_ids"] or None,
        pad_token_id=(request["end_ids"] or [0])[0],
    )
    read_after, use = disk_read_bytes(), read_use().since(use_before)
    first, last = clock.times[2], clock.times[-1]  # of the tokens; before them came the start and the prompt
    return {
        "token_ids": given[0, prompt.shape[1] :].tolist(),
        "ttft_s": first - clock.times[0],
        "decode_s": last - first,
        "read_bytes": None if read_before is None or read_after is None else read_after - read_before,
        "use": dataclasses.asdict(use),
    }


def _say(replies: Any, message: dict[str, Any]) -> None:  # noqa: ANN401 - a text file
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
