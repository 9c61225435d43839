"""The stamp of a user's directory in a manifest: it tells whether weights are those that were prepared, unread.

A stamp has three parts, joined by dots: sizes and modification times, the bytes of sampled blocks, change times. A
manifest of an earlier version holds the first alone; that of a model on the hub is empty, for a commit never changes.

Other sizes or times are another source, until a preparation has compared all bytes. With equal sizes and times, the
change times decide, which no program can set back. If they differ as well (a copy that keeps times, another owner),
the sampled blocks decide: that costs 256 reads, and finds other weights of the same shape. A change of a few blocks
in between with its time put back is found by `prepare` and by `models verify`, which read every byte, not by a run.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.files.io_errors import read_error
from subspec_cli.files.regular_file import open_regular

_SAMPLE_BYTES: Final = 4096
_MAX_SAMPLES: Final = 256


def make_stamp(checkpoint: Checkpoint) -> str:
    """The stamp of the weight files as they are now. Errors as `open_regular`."""
    return f"{checkpoint.stamp}.{_sample_blocks(checkpoint)}.{_change_times(checkpoint)}"


def is_equal_stamp(recorded: str, current: str) -> bool:
    """Whether nothing was touched, by as many parts as `recorded` has."""
    return all(one == other for one, other in zip(recorded.split("."), current.split("."), strict=False))


def is_same_content(recorded: str, other: str) -> bool:
    """Whether two stamps are of the same weights; their change times may differ."""
    one, two = recorded.split(".")[:2], other.split(".")[:2]
    return all(part == found for part, found in zip(one, two, strict=False))


def has_same_times(recorded: str, checkpoint: Checkpoint) -> bool:
    """Whether sizes and modification times are the recorded ones."""
    return recorded.partition(".")[0] in ("", checkpoint.stamp)


def is_of_source(recorded: str, checkpoint: Checkpoint) -> bool:
    """Whether the weight files are those that were prepared, as far as this can be told. Errors as `open_regular`."""
    times, samples, changes = (*recorded.split("."), "", "")[:3]
    if times == "" or times != checkpoint.stamp:
        return times == ""
    return changes in ("", _change_times(checkpoint)) or samples == _sample_blocks(checkpoint)


def _change_times(checkpoint: Checkpoint) -> str:
    text = "\n".join(f"{file.name} {file.ctime_ns}" for file in checkpoint.files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sample_blocks(checkpoint: Checkpoint) -> str:
    """16 hex digits over blocks at even distances; over every byte of a model of at most 1 MiB."""
    total_bytes = sum(file.size_bytes for file in checkpoint.files)
    step = -(-total_bytes // (_MAX_SAMPLES * _SAMPLE_BYTES)) * _SAMPLE_BYTES
    digest = hashlib.sha256()
    for item in checkpoint.files:
        path = checkpoint.directory / item.name
        with open_regular(path) as file:
            if hasattr(os, "posix_fadvise"):  # no read-ahead: a disk reads what is asked for
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            try:
                for start in range(0, item.size_bytes, step):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
            except OSError as error:
                raise read_error(error, path) from error
    return digest.hexdigest()[:16]
