"""The target's blocks in memory: resident layers are read once, the others are streamed in every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.layer_tensors import block_entries
from subspec_cli.checkpoint.packed_codes import CodedMatrix
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.limits import LEAST_RING_SLOTS
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.session.opening import Opening
from subspec_cli.streaming.disk_streamer import DiskStreamer, read_resident
from subspec_cli.streaming.gpu_layers import LayerLayout, layout_layer, read_resident_layer
from subspec_cli.streaming.gpu_streamer import open_gpu_streamer
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.streaming.memory_meter import available_bytes
from subspec_cli.streaming.rebuilt_blocks import RebuiltBlocks, block_recipe
from subspec_cli.streaming.streamer import Streamer
from subspec_cli.streaming.widened_blocks import WidenedBlocks, widen_resident, widened_bytes
from subspec_cli.substitutes.residual_set import ResidualSet

_PINNED_SHARE: Final = 0.9
"""Most of the free host memory to pin: no other program can use pinned memory."""


def open_blocks(
    opening: Opening, opened: ExitStack, coded: Callable[[int], Mapping[str, CodedMatrix]]
) -> TargetBlocks:
    """Read the resident layers and start the stream of the others; `opened` closes the stream.

    `coded` gives the 4-bit codes of a layer's matrices, by which residuals are rebuilt.
    """
    plan = opening.plan
    held = {}
    for number, layer in enumerate(plan.resident, start=1):
        opening.reporter.progress(f"loading resident layers {number}/{len(plan.resident)}")
        held[layer] = _read_blocks(opening, layer)
    streamer = open_streamer(opening)
    if streamer is not None:
        opened.callback(streamer.close)
        if opening.found.geometry.stored is not None:
            streamer = _widened(opening, streamer)
        elif opening.residuals is not None:
            streamer = _rebuilt(opening, opening.residuals, streamer, coded)
    return TargetBlocks(opening.found.geometry.layers, held, streamer)


def _widened(opening: Opening, streamer: Streamer) -> Streamer:
    """Return the stream with blocks in the model's type, as the plan counts their memory."""
    entries = opening.found.checkpoint.tensors
    region_bytes = max(
        widened_bytes({entry.name: entry.shape for entry in block}, opening.dtype)
        for layer in opening.plan.streamed
        for block in block_entries(entries, layer)
    )
    regions = device_profile(opening.device.type).widened_blocks
    return WidenedBlocks(streamer, region_bytes, regions=regions, dtype=opening.dtype, device=opening.device)


def _rebuilt(
    opening: Opening,
    residuals: ResidualSet,
    streamer: Streamer,
    coded: Callable[[int], Mapping[str, CodedMatrix]],
) -> Streamer:
    """Return the stream with blocks that are rebuilt from residuals."""
    checkpoint = opening.found.checkpoint
    recipes = [
        block_recipe(source, streamed, coded(layer))
        for layer in opening.plan.streamed
        for source, streamed in zip(
            block_entries(checkpoint.tensors, layer), residuals.blocks(checkpoint.tensors, layer), strict=True
        )
    ]
    regions = device_profile(opening.device.type).widened_blocks
    return RebuiltBlocks(streamer, recipes, regions=regions, device=opening.device)


def _streamed_entries(opening: Opening, layer: int) -> list[list[TensorEntry]]:
    """Return what is streamed for each block of a layer."""
    checkpoint, residuals = opening.found.checkpoint, opening.residuals
    if residuals is None:
        return block_entries(checkpoint.tensors, layer)
    return residuals.blocks(checkpoint.tensors, layer)


def open_streamer(opening: Opening) -> Streamer | None:
    """Start the stream of the plan's streamed layers; None if every layer is resident.

    Raises what `open_gpu_streamer` raises.
    """
    plan = opening.plan
    if not plan.streamed:
        return None
    entries = [_streamed_entries(opening, layer) for layer in plan.streamed]
    if opening.device.type == "cpu":
        return DiskStreamer([layout_block(block) for blocks in entries for block in blocks], plan.slots)
    return open_gpu_streamer(
        [layout_layer(blocks) for blocks in entries],
        pinned_layers=len(plan.pinned_layers),
        ring_slots=max(plan.ring_slots, LEAST_RING_SLOTS),
        slots=plan.slots,
        most_bytes=int(available_bytes(torch.device("cpu")) * _PINNED_SHARE),
        device=opening.device,
        reporter=opening.reporter,
    )


def layer_layout(checkpoint: Checkpoint, layer: int) -> LayerLayout:
    """Return where a layer lies in the files and in a slot of a GPU."""
    return layout_layer(block_entries(checkpoint.tensors, layer))


def block_layouts(checkpoint: Checkpoint, layer: int) -> list[BlockLayout]:
    """Return where each block of a layer lies in the files and in a slot of main memory."""
    return [layout_block(entries) for entries in block_entries(checkpoint.tensors, layer)]


def _read_blocks(opening: Opening, layer: int) -> list[dict[str, Tensor]]:
    checkpoint = opening.found.checkpoint
    if opening.device.type == "cpu":
        blocks = read_resident(block_layouts(checkpoint, layer))
    else:
        blocks = read_resident_layer(layer_layout(checkpoint, layer), opening.device)
    if opening.found.geometry.stored is None:
        return blocks
    return [widen_resident(block, opening.dtype) for block in blocks]
