"""Element types by their safetensors names: sizes and torch types. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type."""

    torch_name: str
    """Name of the dtype in the torch module."""
    size_bytes: int


DTYPES: Final[Mapping[str, Dtype]] = {
    "BOOL": Dtype("bool", 1),
    "U8": Dtype("uint8", 1),
    "I8": Dtype("int8", 1),
    "U16": Dtype("uint16", 2),
    "I16": Dtype("int16", 2),
    "F16": Dtype("float16", 2),
    "BF16": Dtype("bfloat16", 2),
    "U32": Dtype("uint32", 4),
    "I32": Dtype("int32", 4),
    "F32": Dtype("float32", 4),
    "U64": Dtype("uint64", 8),
    "I64": Dtype("int64", 8),
    "F64": Dtype("float64", 8),
}
"""All element types that a file may hold."""
WEIGHT_DTYPES: Final = ("BF16", "F16", "F32")
"""Element types that a model's weights may have."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors element type."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return found
