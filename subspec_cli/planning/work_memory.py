"""Where a working byte comes from: activations, masks, rotary tables and the states of recurrent layers."""

from __future__ import annotations

from typing import Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.limits import GATE_ROWS, GUARD, LARGE_BLOCK, MOST_ROWS, SMALL_BLOCK, SNAPSHOTS, TREE_STATES

_HOST_ROW_BYTES: Final = 128
"""Token ids, positions and texts of one row of context."""


def activation_bytes(geometry: ModelGeometry) -> int:
    """Return the activations of one row: the most of norm, attention and feed-forward, which follow each other."""
    hidden, element_bytes = geometry.hidden, geometry.element_bytes
    qk_width = max(shape.query_width + shape.key_width for shape in geometry.attention)
    qkv_width = max(shape.query_width + 2 * shape.key_width for shape in geometry.attention)
    # A norm is computed in float32. Rotating makes a few copies of queries and keys.
    norm = (2 * element_bytes + 3 * 4) * hidden
    attention = 2 * element_bytes * hidden + 6 * element_bytes * qkv_width
    if geometry.arithmetic.qk_norm is not None:
        attention += 3 * 4 * qk_width
    feed_forward = element_bytes * (4 * hidden + 2 * geometry.feed_forward)
    return max(norm, attention, feed_forward, _delta_activation_bytes(geometry))


def _delta_activation_bytes(geometry: ModelGeometry) -> int:
    """Return the activations of one row in a recurrent layer: convolved, and split in float32."""
    if not geometry.delta:
        return 0
    shape, element_bytes = geometry.delta[0], geometry.element_bytes
    inputs = (2 * geometry.hidden + 3 * shape.conv_width + 3 * shape.value_width) * element_bytes
    return inputs + 4 * (5 * shape.conv_width + 2 * shape.value_width)


def recurrent_bytes(geometry: ModelGeometry, scratch_rows: int, sequences: int = 1) -> int:
    """Return the memory of recurrent layers.

    For each sequence it is the committed state, the next one and snapshots, each with the last inputs of the
    convolution, and what target and draft keep of each scratch row, as in `modeling.recurrent_state`. For all it is
    the states of a tree's branches and the padded projections of decay and share.
    """
    if not geometry.delta:
        return 0
    shape, layers, element_bytes = geometry.delta[0], len(geometry.delta), geometry.element_bytes
    tail = (shape.kernel - 1) * shape.conv_width * element_bytes
    moments = (2 + SNAPSHOTS) * layers * (shape.state_elements * 4 + tail)
    kept = (shape.conv_width + shape.key_heads * shape.key_dim + shape.value_width) * element_bytes
    rows = scratch_rows * layers * (kept + 3 * shape.value_heads * 4)
    gates = layers * -(-2 * shape.value_heads // GATE_ROWS) * GATE_ROWS * geometry.hidden * element_bytes
    return sequences * (moments + rows) + gates + TREE_STATES * shape.state_elements * 4


def work_row_bytes(geometry: ModelGeometry, sequences: int = 1) -> int:
    """Return the work space for one row of every sequence's context.

    Sequences share rotary positions, masks of a draft step, hidden states while prompts are read, and the copy of one
    layer's keys and values that an attention kernel may make: they take turns, or share the rows of a pass.
    """
    shapes = geometry.attention
    rotary = 4 * max(shape.head_dim for shape in shapes) * geometry.rope_tables
    elements = rotary + geometry.hidden + 2 * max(shape.key_width for shape in shapes)
    masks = MOST_ROWS * sum(group + 1 for _, group in geometry.mask_keys)
    return (elements + masks) * geometry.element_bytes + sequences * _HOST_ROW_BYTES


def mask_table_bytes(window: int | None, group: int, element_bytes: int) -> int:
    """Return the size of the masks of layers with one window, for `group` query heads per kv head.

    They are the tables of `WindowMasks` in `modeling.key_blocks`.
    """
    elements = (LARGE_BLOCK + GUARD + SMALL_BLOCK) * SMALL_BLOCK
    if window is not None:
        elements += 2 * LARGE_BLOCK * LARGE_BLOCK
    return elements * group * element_bytes
