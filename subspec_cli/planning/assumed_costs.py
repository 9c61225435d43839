"""Costs of a machine on which nothing was timed yet: bytes over rates plus operations over rates.

The figures are those of a common machine of its kind, so a plan made from them is a guess and says so. The user can
give the link's rate; everything else is measured at the first run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final, NamedTuple

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import matrices_of
from subspec_cli.planning.costs import ATTENTION_ROWS, MachineCosts, RowTimes
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.substitutes.settings import SubstituteSettings, substitute_head_bytes, substitute_layer_bytes

_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class SurvivalRange(NamedTuple):
    """Probabilities that the target accepts one more level of the draft, of a model that has not run yet."""

    low: float
    """As for a small model that samples prose."""
    middle: float
    """As for a small model's most likely tokens; plans are chosen by it."""
    high: float
    """As published for a model of 7B parameters."""


# 4 bits: SmolLM2-135M at temperature 1 and at 0 to 0.7, as measured, and what the method's authors measured on a 7B
# model. The highest of the others are from our own runs; what is below them is scaled.
_SURVIVAL: Final = MappingProxyType(
    {
        8: SurvivalRange(0.92, 0.955, 0.99),
        4: SurvivalRange(0.86, 0.92, 0.974),
        2: SurvivalRange(0.55, 0.65, 0.75),
    }
)


@dataclass(frozen=True, slots=True)
class _Rates:
    """Bytes and operations per second of a kind of machine."""

    link: float
    pageable: float
    disk: float
    exact_memory: float
    """16-bit weights as the target reads them, with padded rows."""
    fast_memory: float
    """16-bit weights as the draft reads them."""
    low_bit_memory: float
    exact_ops: float
    fast_ops: float
    low_bit_ops: float
    attention_ops: float
    """Scores, softmax and weighted sum: small products, and an exponential for each score."""
    layer_s: float
    """Overhead of a layer of any size: calls, norms, attention over a short prefix."""
    widening: float
    """Bytes of 8-bit weights a second that become 16 bits."""
    rebuilding: float
    """Bytes of 16-bit weights a second that compiled loops rebuild from residuals; 0 where nothing is known of it."""
    step_s: float
    """Overhead of a draft step beside its layers and head."""


# Two cores with AVX-512 and one NVMe disk, as measured on a model of 24 layers and 1.4 GB: a draft step of
# 14 ms for one row and 25 ms for four, a target pass of 0.2 s to 0.25 s for up to 30 rows, 1.3 to 1.7 GB/s.
_CPU: Final = _Rates(
    link=1.4e9,
    pageable=1.4e9,
    disk=1.4e9,
    exact_memory=7e9,
    fast_memory=20e9,
    low_bit_memory=40e9,
    exact_ops=0.8e12,
    fast_ops=0.4e12,
    low_bit_ops=0.4e12,
    attention_ops=0.1e12,
    layer_s=0.2e-3,
    widening=3e9,
    rebuilding=5e9,
    step_s=0.5e-3,
)
# A GPU with PCIe 4.0 x16 and 1 TB/s of memory, as published for an RTX 4090: a pinned copy reaches 22 to
# 24 GB/s, a copy that the driver has to stage about a third of it; kernels read 80 % of the memory's rate; the disk
# behind it is an NVMe.
_CUDA: Final = _Rates(
    link=24e9,
    pageable=8e9,
    disk=3e9,
    exact_memory=600e9,
    fast_memory=800e9,
    low_bit_memory=800e9,
    exact_ops=40e12,
    fast_ops=80e12,
    low_bit_ops=40e12,
    attention_ops=20e12,
    layer_s=0.03e-3,
    widening=300e9,
    rebuilding=0.0,
    step_s=0.3e-3,
)
_OPERATIONS_SHARE: Final = 0.05
"""Rate at which torch operations rebuild weights on a CPU, as a share of that of compiled loops."""
_RATES: Final = MappingProxyType({"cpu": _CPU, "cuda": _CUDA})


def assumed_survival(bits: int) -> SurvivalRange:
    """Return what may be expected of a draft by substitutes with so many bits before it was tried."""
    return _SURVIVAL[bits]


def assumed_costs(
    geometry: ModelGeometry,
    device: str,
    link_gb_per_s: float | None = None,
    settings: SubstituteSettings | None = None,
) -> MachineCosts:
    """Return the costs of a machine on which nothing was timed.

    Args:
        geometry: of the model whose parts are to take time.
        device: `cpu` or `cuda`.
        link_gb_per_s: the link's rate in 1e9 bytes per second, where it is known; on `cpu` the disk's.
        settings: of the substitutes; None means 4 bits.
    """
    profile = device_profile(device)
    rates = _RATES[profile.kind]
    link = rates.link if link_gb_per_s is None else link_gb_per_s * 1e9
    sizes = substitute_layer_bytes(geometry, settings or SubstituteSettings(4, "minmax"))
    substitute_bytes = sizes[geometry.largest_layer]
    shapes = geometry.layer_shapes(geometry.largest_layer)
    layer_weights = sum(math.prod(shapes[name]) for name in matrices_of(shapes))
    head_weights = geometry.vocab * geometry.hidden

    def times(size_bytes: float, weights: int, memory: float, ops: float, fixed_s: float) -> RowTimes:
        # The first row is computed while the weights are read; each further row costs its operations.
        seconds = (fixed_s + size_bytes / memory + (rows - 1) * 2 * weights / ops for rows in _ROWS)
        return RowTimes(_ROWS, tuple(seconds))

    def attention(memory: float) -> RowTimes:
        # Keys and values of the further cached rows are read once. Each query multiplies with all of them twice.
        cached_bytes = ATTENTION_ROWS * geometry.kv_row_bytes / geometry.layers
        products = 2 * ATTENTION_ROWS * max(shape.query_width for shape in geometry.attention)
        return times(cached_bytes, products, memory, rates.attention_ops, 0.0)

    layer_bytes, head_bytes = geometry.layer_matrix_bytes, geometry.table_bytes
    return MachineCosts(
        link_bytes_per_s=link,
        pageable_bytes_per_s=link * rates.pageable / rates.link,
        disk_bytes_per_s=link if profile.streams_from_disk else rates.disk,
        target_layer=times(layer_bytes, layer_weights, rates.exact_memory, rates.exact_ops, rates.layer_s),
        target_head=times(head_bytes, head_weights, rates.exact_memory, rates.exact_ops, 0.0),
        substitute_layer=times(
            substitute_bytes, layer_weights, rates.low_bit_memory, rates.low_bit_ops, rates.layer_s
        ),
        shared_layer=times(layer_bytes, layer_weights, rates.fast_memory, rates.fast_ops, rates.layer_s),
        draft_head=times(head_bytes, head_weights, rates.fast_memory, rates.fast_ops, 0.0),
        low_bit_head=times(
            substitute_head_bytes(geometry), head_weights, rates.low_bit_memory, rates.low_bit_ops, 0.0
        ),
        target_attention=attention(rates.exact_memory),
        draft_attention=attention(rates.fast_memory),
        step_overhead_s=rates.step_s,
        origin="assumed",
        widen_bytes_per_s=0.0 if geometry.stored is None else rates.widening,
        rebuild_bytes_per_s=rates.rebuilding * (1 if find_spec("numba") else _OPERATIONS_SHARE),
    )
