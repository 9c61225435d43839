"""Where the 4-bit codes of a matrix are in the layout of a kernel, which differs between instruction sets.

The layout is found by packing the indices of the codes themselves, 4 bits at a time. Shapes: `[R, C]` codes of
all packed rows; a *unit* is a number of rows whose codes are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

_MOST_UNIT_ROWS: Final = 512
_BITS: Final = 4
_FEW_COLUMNS: Final = 128
"""Columns of the index that is packed first; whether wider matrices lie alike is then tried with random codes."""


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Units of rows in which the codes of a column are contiguous, and lie alike in every column and every unit."""

    first_row: int
    rows: int
    """Rows that lie like this, a multiple of those of a unit."""
    order: Tensor
    """`[rows of a unit]` int32: the place of each row in a column, counted in codes."""

    def codes(self, packed: Tensor, columns: int, first: int, end: int) -> Tensor:
        """The codes of packed rows `first` to `end`, in uint8, by torch operations."""
        data, skipped = _units_with(packed, columns, (self.first_row, len(self.order)), (first, end))
        order = self.order.to(packed.device)
        halves = data.view(-1, columns, len(order) // 2).transpose(1, 2)
        found = halves[:, order >> 1] >> ((order & 1) << 2).to(torch.uint8)[None, :, None]
        return found.bitwise_and_(15).view(-1, columns)[skipped : skipped + end - first]


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """Units of rows in which codes are anywhere."""

    first_row: int
    rows: int
    places: Tensor
    """`[rows of a unit, C]` int32: places in the unit, counted in codes."""

    def codes(self, packed: Tensor, columns: int, first: int, end: int) -> Tensor:
        """The codes of packed rows `first` to `end`, in uint8, by torch operations."""
        data, skipped = _units_with(packed, columns, (self.first_row, len(self.places)), (first, end))
        places = self.places.to(packed.device).flatten()
        found = data.view(-1, places.numel() // 2).index_select(1, places >> 1)
        found = (found >> ((places & 1) << 2).to(torch.uint8)).bitwise_and_(15)
        return found.view(-1, columns)[skipped : skipped + end - first]


def _units_with(
    packed: Tensor, columns: int, units: tuple[int, int], rows: tuple[int, int]
) -> tuple[Tensor, int]:
    """The bytes of the whole units that hold some rows, and the rows in them before the first one.

    `units` are the row at which they begin, and the rows of one.
    """
    first_row, unit_rows = units
    low = (rows[0] - first_row) // unit_rows * unit_rows + first_row
    high = -(-(rows[1] - first_row) // unit_rows) * unit_rows + first_row
    return packed.view(torch.uint8).flatten()[low * columns // 2 : high * columns // 2], rows[0] - low


PackedLayout = tuple[UnitLayout | IndexLayout, ...]
"""The parts of a packed matrix, in order of rows."""


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """The 4-bit code of a matrix, as the draft's kernel holds it: some rows of a packed matrix."""

    packed: Tensor
    scales_and_zeros: Tensor
    """`[C / group, packed rows, 2]` bfloat16."""
    layout: PackedLayout
    first_row: int
    """Row of the packed matrix at which this one begins."""
    shape: tuple[int, int]

    def codes(self, first: int, end: int) -> Tensor:
        """The codes of some rows, `[end - first, C]` uint8, by torch operations."""
        columns, found = self.shape[1], []
        for part in self.layout:
            low = max(first + self.first_row, part.first_row)
            high = min(end + self.first_row, part.first_row + part.rows)
            if low < high:
                found.append(part.codes(self.packed, columns, low, high))
        return torch.cat(found)


def find_layout(
    pack: Callable[[Tensor], Tensor], rows: int, columns: int, device: torch.device
) -> PackedLayout:
    """Find where `pack` puts the codes of a matrix; it packs `[R, C]` uint8, and pieces of 512 rows by themselves."""
    whole = rows // _MOST_UNIT_ROWS * _MOST_UNIT_ROWS
    parts: list[UnitLayout | IndexLayout] = []
    for first_row, piece_rows, count in ((0, _MOST_UNIT_ROWS, whole), (whole, rows - whole, rows - whole)):
        if count:
            parts += _piece_layout(pack, (piece_rows, columns), device, first_row, count)
    return tuple(parts)


def _piece_layout(
    pack: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    device: torch.device,
    first_row: int,
    rows: int,
) -> list[UnitLayout | IndexLayout]:
    """The layouts of `rows` rows, which are packed in pieces of `shape`."""
    piece_rows, columns = shape
    few = _places(pack, piece_rows, min(columns, _FEW_COLUMNS), device)
    units = _unit_layouts(few, first_row)
    repeats = rows > piece_rows
    if units and columns % 8 == 0 and not (repeats and len(units) > 1):
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        packed = pack(codes.to(device))
        found = [
            unit.codes(packed, columns, unit.first_row, unit.first_row + unit.rows)
            for unit in (replace(unit, first_row=unit.first_row - first_row) for unit in units)
        ]
        if torch.equal(torch.cat(found).cpu(), codes):
            return [replace(units[0], rows=rows)] if repeats else list(units)
    return [IndexLayout(first_row, rows, _places(pack, piece_rows, columns, device))]


def _places(pack: Callable[[Tensor], Tensor], rows: int, columns: int, device: torch.device) -> Tensor:
    """The place of every code of a piece, `[rows, columns]` int32."""
    count = rows * columns
    index = torch.arange(count, dtype=torch.int32, device=device).view(rows, columns)
    found = torch.zeros(count, dtype=torch.int32, device=device)
    for shift in range(0, (count - 1).bit_length(), _BITS):
        data = pack(((index >> shift) & 15).to(torch.uint8)).view(torch.uint8).flatten()
        halves = torch.stack((data & 15, data >> 4), dim=1).flatten()
        found |= halves.int() << shift
    places = torch.empty_like(found)
    places[found.long()] = torch.arange(count, dtype=torch.int32, device=device)
    return places.view(rows, columns).cpu()


def _unit_layouts(places: Tensor, first_row: int) -> list[UnitLayout]:
    """Units as large as they can be, and smaller ones for the rows that are left; none if a column is scattered."""
    piece_rows, columns = places.shape
    if not piece_rows:
        return []
    unit_rows = int(places[0, 1] - places[0, 0])
    if not 0 < unit_rows <= piece_rows or unit_rows % 16:
        return []
    whole = piece_rows // unit_rows * unit_rows
    rest = places[whole:] - whole * columns
    smaller = _unit_layouts(rest, first_row + whole)
    if len(rest) and not smaller:
        return []
    return [UnitLayout(first_row, whole, places[:unit_rows, 0].contiguous()), *smaller]
