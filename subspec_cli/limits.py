"""Bounds shared by planning and running. A run never takes more than was planned."""

from __future__ import annotations

from typing import Final

from subspec_cli.units import MIB

MOST_DEPTH: Final = 48
"""Largest depth of a draft tree, at any costs."""


MOST_ROWS: Final = 8
"""Most rows of a draft step, at any costs."""


LARGE_BLOCK: Final = 512
"""Keys of a large block of the target's attention."""
SMALL_BLOCK: Final = 64
"""Keys of a small block. The KV cache has a multiple of it in rows."""
MOST_PROMPT_BYTES: Final = 16 * MIB
"""Longest prompt that is read, and longest text that a chat template may make of a conversation."""
GUARD: Final = 64
"""Least distance of a row from its large blocks: the depth of the deepest tree that a user can ask for."""
ATTENTION_WORK_BYTES: Final = 8 * MIB
"""Most bytes for the results of the blocks of a tile of rows, before they are summed."""
PREFILL_CHUNK: Final = 256
"""Rows of a prompt that go through a layer together. Chunks end at multiples of it, for every budget and mode."""
ROW_SIZES: Final = (8, 16, 24, 32, 40, 48, 56, 64)
"""Row counts that a pass of the target is padded to, and multiples of the last."""
SHADOW_ROWS: Final = 128
"""Cache rows for what is drafted while the target's weights arrive."""
LEAST_RING_SLOTS: Final = 2
"""Fewest pinned buffers between disk and GPU: one is copied while another is read."""
SEED_BITS: Final = 53
"""Bits of a fresh or derived seed: as many as every reader of JSON keeps of a number."""
NOISE_ROWS: Final = 64
"""Positions whose sampling noise is kept: as many as a tree and its shadow have levels."""
SNAPSHOTS: Final = 2
"""Recurrent states that are kept to go back to, the newest ones."""
TREE_STATES: Final = 8
"""Most recurrent states of a tree in one layer at a time: about log2 of its nodes."""
GATE_ROWS: Final = 64
"""Features of a recurrent layer's small product are padded to a multiple of this."""
