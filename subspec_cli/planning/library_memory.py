"""What a plan counts beside a model's tensors: a tokenizer, code that libraries compile, widened weights of 8 bits.

The figures were measured with transformers 5.23, tokenizers 0.22 and torch 2.13 on Linux, and are upper bounds.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, matrices_of
from subspec_cli.limits import MOST_ROWS, ROW_SIZES
from subspec_cli.planning.device_profile import DeviceProfile
from subspec_cli.units import MIB

_COMPILER_BYTES: Final = 152 * MIB
"""151 MiB measured where numba compiles the draft's products, 109 MiB where it finds them in its cache."""

_GRAMMAR_TOKEN_BYTES: Final = 512
"""Of llguidance's index of a vocabulary, 339 measured where tokens are short."""
_GRAMMAR_STATE_BYTES: Final = 4 * MIB
"""Of the states of the grammars in use."""
_PAGE_BYTES: Final = 4096
_TOKENIZER_BASE_BYTES: Final = 10 * MIB
"""Of any tokenizer, most of it the words that it remembers."""
_TOKENIZER_FACTOR: Final = 5.5
"""Memory of a loaded tokenizer, as a multiple of the bytes of its files: 4.5 to 5.3."""
_TOKENIZER_LOADING_FACTOR: Final = 22
"""The same while its files are parsed into Python objects: 11 to 21.5."""
_SMALL_ROW_BLOCKS: Final = 1
"""Row blocks below the row sizes. The self-check tries more only on machines where two rows do not hold."""


def tokenizer_bytes(file_bytes: int, later_bytes: int) -> int:
    """Return the memory of a tokenizer with files of this size.

    It is loaded first. What it needs only while it loads counts as far as it exceeds `later_bytes`, the memory that
    is taken afterwards in any case.
    """
    loaded_bytes = _TOKENIZER_BASE_BYTES + int(_TOKENIZER_FACTOR * file_bytes)
    loading_bytes = _TOKENIZER_BASE_BYTES + _TOKENIZER_LOADING_FACTOR * file_bytes
    return max(loaded_bytes, loading_bytes - later_bytes)


def grammar_bytes(vocab: int) -> int:
    """Return the memory of grammars over a vocabulary; 0 if the library for them is not installed."""
    return vocab * _GRAMMAR_TOKEN_BYTES + _GRAMMAR_STATE_BYTES if find_spec("llguidance") else 0


def target_kernels(geometry: ModelGeometry, prefill_rows: int, tree_nodes: int) -> int:
    """Return how many kernels the target's linears compile: one for each shape of weights and row count in use."""
    return _layer_shapes(geometry) * _row_sizes(prefill_rows) + _row_sizes(tree_nodes)


def shared_layer_kernels(geometry: ModelGeometry) -> int:
    """Return how many kernels draft steps compile for resident layers, whose rows they do not pad."""
    return _layer_shapes(geometry) * MOST_ROWS


def _layer_shapes(geometry: ModelGeometry) -> int:
    """Distinct shapes of a layer's linears; one with a bias has kernels of its own."""
    found = set()
    for layer in geometry.representatives:
        shapes = geometry.layer_shapes(layer)
        found |= {(shapes[name], name.replace("weight", "bias") in shapes) for name in matrices_of(shapes)}
    return len(found)


def _row_sizes(most_rows: int) -> int:
    """Row counts after padding, for up to `most_rows` rows."""
    largest = ROW_SIZES[-1]
    return _SMALL_ROW_BLOCKS + len(ROW_SIZES) + max(0, -(-most_rows // largest) - 1)


def bare_process_bytes(profile: DeviceProfile, geometry: ModelGeometry) -> int:
    """Host memory of a process that has loaded no model: with the compiler, if draft or target use it."""
    compiles = profile.kind == "cpu" or bool(geometry.delta) or geometry.stored is not None
    has_compiler = compiles and find_spec("numba") is not None
    return profile.process_bytes + (_COMPILER_BYTES if has_compiler else 0)


def widened_bytes(profile: DeviceProfile, geometry: ModelGeometry) -> int:
    """Return the memory in which streamed blocks of an 8-bit source are widened; 0 for other models."""
    if geometry.stored is None:
        return 0
    block_bytes = max(geometry.block_bytes.values()) + len(LAYER_MATRICES) * _PAGE_BYTES
    return profile.widened_blocks * block_bytes
