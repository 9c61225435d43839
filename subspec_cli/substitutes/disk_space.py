"""Whether the disks have the free space that a preparation needs, checked before its first large write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from subspec_cli.checkpoint.checkpoint import Checkpoint, layer_entries
from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.files.free_space import check_free_space, on_one_disk
from subspec_cli.hub.weight_downloads import WeightDownloads
from subspec_cli.substitutes.manifest import Manifest
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import format_bytes, printable

_SLACK_BYTES = 16 << 20  # manifest, journal, file system


def check_disk_space(
    goal: Manifest, weight_downloads: WeightDownloads, directory: Path, estimates: Mapping[str, int]
) -> None:
    """Refuse if the disks lack the space for the bytes still to be written. Files to be replaced count as free.

    Args:
        goal: what is prepared.
        weight_downloads: the weights that are still to be downloaded.
        directory: where the substitutes go.
        estimates: bytes of the files that are still to be made, by name.

    Raises:
        ResourceError: with the bytes needed for each purpose, and the bytes free.
    """
    what = f"preparing {printable(goal.model_id)}"
    missing_bytes, need_bytes = weight_downloads.missing_bytes, 0
    if estimates:
        paths = [directory / name for name in estimates]
        replaced_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        # The old and the new file of one part exist side by side for a moment.
        sizes = estimates.values()
        need_bytes = max(sum(sizes) - replaced_bytes, max(sizes)) + _SLACK_BYTES
    if missing_bytes and need_bytes and on_one_disk(weight_downloads.directory, directory):
        shares = f"download {format_bytes(missing_bytes)}, substitutes {format_bytes(need_bytes)}"
        check_free_space(directory, missing_bytes + need_bytes, f"{what} ({shares})")
        return
    if missing_bytes:
        check_free_space(weight_downloads.directory, missing_bytes, f"downloading for {what}")
    if need_bytes:
        check_free_space(directory, need_bytes, what)


def estimate_file_bytes(checkpoint: Checkpoint, layer: int, settings: SubstituteSettings) -> int:
    """Upper estimate of one substitute file: codes, a 16-bit scale and shift per group, 5 % for the rest."""
    prefix = layer_prefix(layer)
    scale_bits = 32 / settings.group_size if settings.group_size else 0
    bits = sum(
        math.prod(entry.shape) * (settings.bits_of(entry.name.removeprefix(prefix)) + scale_bits)
        for entry in layer_entries(checkpoint, layer)
    )
    return int(bits / 8 * 1.05)
