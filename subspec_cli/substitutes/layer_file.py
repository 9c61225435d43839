"""The file of a layer's substitute: what decides its bytes, and making it from the layer's 16-bit tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.checkpoint.tensor_reader import check_finite
from subspec_cli.substitutes.manifest import LayerFile, layer_file_name
from subspec_cli.substitutes.quality import MatrixQuality

if TYPE_CHECKING:
    import torch

Quantizer: TypeAlias = (
    "Callable[[int, dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, MatrixQuality]]]"
)
"""From a layer's number and 16-bit tensors, keyed by the name inside the layer, to the tensors to write and their
quality."""


def made_layer(
    layer: int, tensors: dict[str, torch.Tensor], source_sha256: str, quantizer: Quantizer
) -> tuple[LayerFile, bytes]:
    """The record and the bytes of a layer's file; `tensors` is emptied.

    Raises IntegrityError for weights that are not finite.
    """
    from safetensors.torch import save

    check_finite(tensors)
    prefix = layer_prefix(layer)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    packed, quality = quantizer(layer, own)
    own.clear()
    tensors.clear()  # free them before the bytes of the file take memory
    data = save({name: packed[name].contiguous() for name in sorted(packed)})
    sha256 = hashlib.sha256(data).hexdigest()
    return LayerFile(layer_file_name(layer), layer, len(data), sha256, source_sha256, quality), data
