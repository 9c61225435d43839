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
    """Name of the dtype in the torch module; empty if no tensor of it is ever read."""
    bits: int

    @property
    def size_bytes(self) -> int:
        """Bytes of one element; of types of whole bytes only."""
        return self.bits // 8


DTYPES: Final[Mapping[str, Dtype]] = {
    "BOOL": Dtype("bool", 8),
    "F4": Dtype("", 4),
    "F6_E2M3": Dtype("", 6),
    "F6_E3M2": Dtype("", 6),
    "U8": Dtype("uint8", 8),
    "I8": Dtype("int8", 8),
    "F8_E4M3": Dtype("float8_e4m3fn", 8),
    "F8_E5M2": Dtype("", 8),
    "F8_E8M0": Dtype("", 8),
    "F8_E4M3FNUZ": Dtype("", 8),
    "F8_E5M2FNUZ": Dtype("", 8),
    "U16": Dtype("uint16", 16),
    "I16": Dtype("int16", 16),
    "F16": Dtype("float16", 16),
    "BF16": Dtype("bfloat16", 16),
    "U32": Dtype("uint32", 32),
    "I32": Dtype("int32", 32),
    "F32": Dtype("float32", 32),
    "C64": Dtype("", 64),
    "U64": Dtype("uint64", 64),
    "I64": Dtype("int64", 64),
    "F64": Dtype("float64", 64),
}
"""All element types that a file may hold."""
WEIGHT_DTYPES: Final = ("BF16", "F16", "F32")
"""Element types that a model's matrices may have."""
EIGHT_BIT_DTYPE: Final = "F8_E4M3"
"""Element type of matrices that are stored in 8 bits, each with a tensor of scales beside it."""
FLOAT_DTYPES: Final = (*WEIGHT_DTYPES, "F64")
"""Element types that a model's other tensors may have; they are cast to that of the matrices."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors element type."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return found
