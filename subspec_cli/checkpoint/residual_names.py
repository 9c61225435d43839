"""The names of a residual's tensors, and the byte that marks an escape."""

from __future__ import annotations

from typing import Final

RESIDUAL_PARTS: Final = ("starts", "residuals", "escapes")
"""The tensors of a residual, in the order in which they follow each other in a file."""
MARKER: Final = -128
"""Stands for a residual whose weight is in the list of escapes."""


def parts_of(matrix: str) -> list[str]:
    """The names of the tensors of a matrix's residual."""
    return [f"{matrix}.{part}" for part in RESIDUAL_PARTS]
