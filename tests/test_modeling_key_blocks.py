"""Key blocks: borders by position alone, masks that agree with a window's definition, tables of trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec_cli.config_file import resolve_config
from subspec_cli.errors import UsageError
from subspec_cli.limits import GUARD, LARGE_BLOCK, MOST_DEPTH, SMALL_BLOCK
from subspec_cli.modeling.key_blocks import (
    Span,
    WindowMasks,
    first_small_block,
    large_blocks,
    spans,
    tree_spans,
)
from subspec_cli.planning.work_memory import mask_table_bytes

CPU = torch.device("cpu")
POSITIONS = st.integers(0, 6000)
WINDOWS = st.one_of(st.none(), st.integers(1, 5000))
FAST = settings(max_examples=60, deadline=None)
GROUP = 2


def seen_keys(position: int, window: int | None) -> range:
    return range(0 if window is None else max(0, position - window + 1), position + 1)


@given(POSITIONS)
def test_the_blocks_of_a_row_are_all_keys_up_to_it(position: int) -> None:
    large = large_blocks(position)
    assert large * LARGE_BLOCK == first_small_block(position) * SMALL_BLOCK
    assert large == 0 or large * LARGE_BLOCK <= position - GUARD, "a large block never holds a row of a tree"
    assert position - large * LARGE_BLOCK < LARGE_BLOCK + GUARD


@given(POSITIONS, st.integers(1, 2000))
def test_spans_cover_positions_and_agree_on_their_large_blocks(first: int, count: int) -> None:
    found = list(spans(first, first + count))
    assert [p for span in found for p in range(span.first, span.end)] == list(range(first, first + count))
    for span in found:
        assert {large_blocks(p) for p in range(span.first, span.end)} == {span.large}
        assert [p for tile in span.tiles(70) for p in range(tile.first, tile.end)] == list(
            range(span.first, span.end)
        )


def shown(mask: torch.Tensor | None, size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool) if mask is None else mask == 0


@FAST
@given(POSITIONS, WINDOWS, st.integers(1, 40))
def test_every_key_in_the_window_is_seen_once_and_no_other(
    first: int, window: int | None, count: int
) -> None:
    """Blocks without a mask, with one, and left out, as rows at consecutive positions read them."""
    masks = WindowMasks(window, GROUP, torch.float32, CPU)
    for span in spans(first, first + count):
        seen = {position: torch.zeros(position + 2 * SMALL_BLOCK, dtype=torch.long)
                for position in range(span.first, span.end)}  # fmt: skip
        begin, cut, end = masks.large_range(span)
        assert begin <= cut <= end == span.large
        for block in range(begin, end):
            start = block * LARGE_BLOCK
            rows = (
                len(span) if block >= cut else masks.rows_that_see(span.first - start, len(span), LARGE_BLOCK)
            )
            table = None if block >= cut else masks.large_rows(span.first - start, rows)
            for row in range(rows):
                mask = None if table is None else table[row * GROUP]
                seen[span.first + row][start : start + LARGE_BLOCK] += shown(mask, LARGE_BLOCK)
        for block in range(masks.first_small(span), span.small.stop):
            start = block * SMALL_BLOCK
            above = max(0, start - span.first)
            distance = span.first + above - start
            rows = masks.rows_that_see(distance, len(span) - above, SMALL_BLOCK)
            table = masks.small_rows(distance, rows)
            assert torch.equal(table[::GROUP], table[1::GROUP])
            for row in range(rows):
                seen[span.first + above + row][start : start + SMALL_BLOCK] += shown(
                    table[row * GROUP], SMALL_BLOCK
                )
        for position, times in seen.items():
            expected = torch.zeros_like(times)
            expected[list(seen_keys(position, window))] = 1
            assert torch.equal(times, expected), f"row at {position}"


@FAST
@given(st.integers(0, 600), WINDOWS, st.sampled_from([SMALL_BLOCK, LARGE_BLOCK]))
def test_masks_by_distance_are_those_of_consecutive_rows(offset: int, window: int | None, size: int) -> None:
    masks = WindowMasks(window, GROUP, torch.float32, CPU)
    if size == LARGE_BLOCK and window is None:
        return
    first = offset if size == SMALL_BLOCK else masks.first_distance + offset
    distances = torch.arange(first, first + 5)
    rows, table = (
        (masks.small_rows, masks.small_masks)
        if size == SMALL_BLOCK
        else (masks.large_rows, masks.large_masks)
    )
    unseen = masks.unseen(distances, size)
    assert unseen.tolist() == [
        not set(seen_keys(10_000 + int(d), window)) & set(range(10_000, 10_000 + size)) for d in distances
    ]
    assert torch.equal(table(distances)[~unseen], rows(first, 5)[::GROUP][~unseen])
    assert not table(distances)[unseen].any(), "open, so that the kernel gives no NaN"
    assert masks.rows_that_see(first, 5, size) == int((~unseen).sum())


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 500, 576, 577, 1024, 4096])
def test_whether_a_large_block_has_a_mask_depends_on_the_row_s_border_alone(window: int | None) -> None:
    """Two rows with the same large blocks never take a block differently, whatever is computed beside them."""
    masks = WindowMasks(window, GROUP, torch.float32, CPU)
    for large in range(1, 12):
        first = large * LARGE_BLOCK + GUARD
        choices = set()
        for at in (0, 1, 63, 64, 300, LARGE_BLOCK - 1):
            begin, cut, _ = masks.large_range(Span(first + at, first + at + 1))
            whole = masks.large_range(Span(first, first + LARGE_BLOCK))
            assert begin >= whole[0]
            choices |= {(block, block >= cut) for block in range(begin, large)}
        assert len(choices) == len({block for block, _ in choices})


@pytest.mark.parametrize("committed", [0, 3, 63, 64, 100, 511, 512, 559, 570, 576, 600])
def test_a_tree_reads_each_position_from_the_row_of_its_ancestor(committed: int) -> None:
    parents = [-1, 0, 1, 1, 3, 0, 4, 6]
    depths = [0]
    path = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        depths.append(depths[parent] + 1)
        path[node] |= path[parent]
    positions = torch.tensor(depths) + committed
    found = tree_spans(positions, path, committed)
    assert sorted(int(node) for span in found for node in span.nodes) == list(range(len(parents)))
    for span in found:
        for row, node in enumerate(span.nodes.tolist()):
            position = committed + depths[node]
            assert span.span.large == large_blocks(position)
            assert int(span.positions[row]) == position
            read = [*range(span.span.large * LARGE_BLOCK)]
            read += [
                key
                for block in span.in_place
                for key in range(block * SMALL_BLOCK, (block + 1) * SMALL_BLOCK)
            ]
            first = span.gathered.start * SMALL_BLOCK
            read += span.slots[row, : position + 1 - first].tolist()
            ancestors = {depths[n]: n for n in range(len(parents)) if path[node, n]}
            assert read == [*range(committed), *(committed + ancestors[d] for d in range(depths[node] + 1))]


@pytest.mark.parametrize("window", [None, 1, 64, 600, 4096])
def test_the_tables_are_no_larger_than_planned(window: int | None) -> None:
    masks = WindowMasks(window, GROUP, torch.bfloat16, CPU)
    assert masks.size_bytes <= mask_table_bytes(window, GROUP, 2)


def test_no_tree_is_deeper_than_the_guard() -> None:
    """Or a large block would hold rows of the tree."""
    assert MOST_DEPTH <= GUARD
    assert resolve_config({"draft": {"depth": GUARD}}).draft.depth == GUARD
    with pytest.raises(UsageError):
        resolve_config({"draft": {"depth": GUARD + 1}})
