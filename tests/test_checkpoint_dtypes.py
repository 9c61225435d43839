"""The one table of element types agrees with torch."""

from __future__ import annotations

import pytest

from subspec_cli.checkpoint.dtypes import DTYPES, FLOAT_DTYPES, torch_dtype


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.torch_name])
def test_sizes_are_those_of_torch(name: str) -> None:
    assert torch_dtype(name).itemsize == DTYPES[name].size_bytes
    assert DTYPES[name].bits == 8 * DTYPES[name].size_bytes


def test_weights_are_floating_point() -> None:
    assert all(torch_dtype(name).is_floating_point for name in FLOAT_DTYPES)
