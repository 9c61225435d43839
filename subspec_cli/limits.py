"""Bounds shared by planning and running. A run never takes more than was planned."""

from __future__ import annotations

from typing import Final

from subspec_cli.units import MIB

MOST_DEPTH: Final = 48
"""Largest depth of a draft tree, at any costs."""


MOST_ROWS: Final = 8
"""Most rows of a draft step, at any costs."""


ATTENTION_TILE_BYTES: Final = 4 * MIB
"""Most bytes of one tile of float64 attention scores; a few such temporaries are alive at a time."""


PREFILL_CHUNK: Final = 256
"""Prompt rows per pass. Chunks end at absolute multiples of this number, for every budget and mode."""
SHADOW_ROWS: Final = 128
"""Cache rows for what is drafted while the target's weights arrive."""
LEAST_RING_SLOTS: Final = 2
"""Fewest pinned buffers between disk and GPU: one is copied while another is read."""
NOISE_ROWS: Final = 64
"""Positions whose sampling noise is kept: as many as a tree and its shadow have levels."""
