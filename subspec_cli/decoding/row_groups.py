"""Row groups of prompts and trees, made on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.modeling.row_group import RowGroup, chunk_group


def prompt_groups(token_ids: Sequence[int], start: int) -> Iterator[RowGroup]:
    """Yield the chunks of a prompt's tokens from position `start` on; they end at multiples of one constant."""
    while start < len(token_ids):
        end = (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK
        yield chunk_group(token_ids[start:end], start)
        start = end


def prompt_passes(groups: Iterable[RowGroup], most_rows: int) -> list[list[RowGroup]]:
    """Distribute the chunks of a prompt to passes of at most `most_rows` rows, but at least one chunk each."""
    passes: list[list[RowGroup]] = []
    rows = most_rows
    for group in groups:
        if rows + group.rows > most_rows:
            passes.append([])
            rows = 0
        passes[-1].append(group)
        rows += group.rows
    return passes


def tree_group(tree: TokenTree, committed: int) -> RowGroup:
    """Return a tree in scratch rows from `committed` on; a node attends to the prefix, its ancestors and itself."""
    return RowGroup(
        torch.tensor(tree.token_ids),
        torch.tensor(tree.depths) + committed,
        committed,
        tree.ancestor_mask(),
    )
