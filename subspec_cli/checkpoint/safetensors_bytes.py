"""The bytes of a safetensors file whose tensors keep the order in which they are given, from a page's start on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subspec_cli.checkpoint.dtypes import DTYPES
from subspec_cli.files.direct_io import page_ceil

if TYPE_CHECKING:
    from torch import Tensor


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The whole file. The header is padded, so that data which is streamed begins with a page."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _type_name(tensor), "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    length = page_ceil(8 + len(text)) - 8
    data = bytearray(8 + length + end)
    data[:8], data[8 : 8 + length] = length.to_bytes(8, "little"), text.ljust(length)
    for name, tensor in tensors.items():
        first, last = (8 + length + offset for offset in header[name]["data_offsets"])
        data[first:last] = _data(tensor)
    return bytes(data)


def _type_name(tensor: Tensor) -> str:
    wanted = str(tensor.dtype).removeprefix("torch.")
    return next(name for name, dtype in DTYPES.items() if dtype.torch_name == wanted)


def _data(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
