"""Timing how fast streamed 8-bit weights become 16 bits, by the loops of sessions."""

from __future__ import annotations

from functools import partial

import torch

from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.widening import widen
from subspec_cli.probe.timers import time_rows


@torch.inference_mode()
def widen_rate(geometry: ModelGeometry, device: torch.device) -> float:
    """Bytes of 8-bit weights a second that become 16 bits; 0.0 for a model that has none."""
    if geometry.stored is None:
        return 0.0
    codes = torch.ones(geometry.feed_forward, geometry.hidden, device=device).to(torch.float8_e4m3fn)
    out = torch.empty_like(codes, dtype=torch_dtype(geometry.dtype))
    scale = torch.ones(1, device=device)
    times = time_rows(lambda _rows: widen(codes, scale, out), (1,), finish=partial(_finish, device))
    return codes.numel() / times.seconds[0]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
