"""A GGUF file: its metadata and its tensors, whose names and shapes are checked before a value is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from smollm2.errors import SmolLM2Error

if TYPE_CHECKING:
    from gguf import ReaderTensor

T = TypeVar("T")


@dataclass(frozen=True)
class GgufModel:
    """Metadata by key and tensors by name. The tensors lie in the file, which must stay while they are read."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    def field(self, name: str, kind: type[T]) -> T:
        """The value of a key. Raises SmolLM2Error if it is missing or of another type."""
        value = self.fields.get(name)
        if type(value) is not kind:
            raise SmolLM2Error(f"the GGUF file has no {name} of type {kind.__name__}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the order of torch; GGUF lists the fastest dimension first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def values(self, name: str) -> torch.Tensor:
        """The values of a tensor in float32."""
        from gguf import dequantize

        tensor = self.tensors[name]
        try:
            found = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise SmolLM2Error(f"{name} has a type that gguf does not read: {error}") from error
        return torch.from_numpy(found.copy()).reshape(self.shape(name))


def read_gguf(path: Path) -> GgufModel:
    """Read the metadata and the places of the tensors. Raises SmolLM2Error for a damaged file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise SmolLM2Error("the package gguf is missing: pip install gguf") from error
    if path.stat().st_size == 0:
        raise SmolLM2Error(f"{path} is empty")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise SmolLM2Error(f"{path} is no intact GGUF file: {error}") from error
    return GgufModel(fields, {tensor.name: tensor for tensor in reader.tensors})
