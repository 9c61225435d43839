"""Timing how fast weights are rebuilt from residuals: the loop that sessions run, on a dummy matrix."""

from __future__ import annotations

import torch

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.residual import rebuild
from subspec_cli.modeling.residuals import dummy_residual
from subspec_cli.probe.timers import time_rows


@torch.inference_mode()
def rebuild_rate(geometry: ModelGeometry, device: torch.device) -> float:
    """Bytes of 16-bit weights a second, on all of torch's threads; 0.0 if no 4-bit kernel takes the shapes."""
    found = dummy_residual((geometry.feed_forward, geometry.hidden), device)
    if found is None:
        return 0.0
    stored, coded = found
    out = torch.empty(coded.shape, dtype=torch.bfloat16, device=device)

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = time_rows(lambda _rows: rebuild(stored, coded, out), (1,), finish=finish)
    return out.nbytes / times.seconds[0]
