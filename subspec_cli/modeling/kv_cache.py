"""One KV cache for target and draft. Shapes: `L` layers, `H` kv heads, `C` cache rows,
`D` head dim.

Rows `[0, committed)` are exact: the target's own pass wrote them. The rows behind them are scratch: the draft
writes them while it grows a tree, the target overwrites them when it verifies, and `commit` moves the accepted
rows into place. Nothing else turns scratch rows into committed rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_description import AttentionShape, Mixer
from subspec_cli.limits import SMALL_BLOCK
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.recurrent_state import RecurrentState


@dataclass(frozen=True, slots=True)
class StepRows:
    """One layer's rows of a draft step, as views of the cache."""

    keys: Tensor
    """`[1, H, C, D]`: the rows in view."""
    values: Tensor
    """`[1, H, C, D]`."""
    written: Tensor
    """`[2, H, N, D]`: the rows that the step writes; all rows if `places` says which ones."""
    places: Tensor | None

    def write(self, key_values: Tensor) -> None:
        """Write `[2, H, N, D]` keys and values, after making zeros of what is not finite.

        A draft that overflows proposes nothing, but the target multiplies rows that it masks by zero.
        """
        key_values.nan_to_num_(0.0, 0.0, 0.0)
        if self.places is None:
            self.written.copy_(key_values)
        else:
            self.written.index_copy_(2, self.places, key_values)


class KVCache:
    """Keys and values `[L, 2, H, C, D]` of layers with heads of one kind, allocated once and zeroed.

    Zeros are finite where rows are masked. C is the capacity, rounded up to whole blocks of keys.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        *,
        context: int,
        scratch: int,
        dtype: torch.dtype,
        device: torch.device,
        recurrent: RecurrentState | None = None,
    ) -> None:
        """`mixers` is the attention of each layer; others have their state in `recurrent`."""
        self.capacity = context + scratch
        """Number of rows that can be written."""
        self.rows = -(-self.capacity // SMALL_BLOCK) * SMALL_BLOCK
        """Number of rows in memory, a multiple of `SMALL_BLOCK`."""
        self.recurrent = recurrent
        """State of the layers without attention; None if there are none."""
        shapes = {n: mixer for n, mixer in enumerate(mixers) if isinstance(mixer, AttentionShape)}
        kinds = [(shape.kv_heads, shape.head_dim) for shape in shapes.values()]
        self._memory = {
            kind: torch.zeros((kinds.count(kind), 2, kind[0], self.rows, kind[1]), dtype=dtype, device=device)
            for kind in dict.fromkeys(kinds)
        }
        number = {kind: index for index, kind in enumerate(self._memory)}
        self._places = {
            layer: (number[kind], kinds[:place].count(kind))
            for place, (layer, kind) in enumerate(zip(shapes, kinds, strict=True))
        }
        """Which of the memories holds a layer, and where."""
        memories = list(self._memory.values())
        self._layers = {layer: memories[kind][place] for layer, (kind, place) in self._places.items()}
        """`[2, H, C, D]` of each layer."""
        self._device = device
        self.context = context
        """Most rows that can be committed."""
        self._token_ids: list[int] = []
        self._prompt_tokens = 0
        self.prompt_tokens = torch.zeros((), dtype=torch.long, device=device)
        """Length of the answer's prompt, by which rows are turned; captured draft steps read it at its address."""

    def begin_answer(self, prompt_tokens: int) -> int:
        """Take the length of the next answer's prompt; return that of the last one's, 0 at first."""
        last, self._prompt_tokens = self._prompt_tokens, prompt_tokens
        self.prompt_tokens.fill_(prompt_tokens)
        return last

    @property
    def committed(self) -> int:
        """Number of exact rows."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> Sequence[int]:
        """Tokens whose keys and values are committed."""
        return tuple(self._token_ids)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write `[H, N, D]` keys and values to scratch rows from `start` on."""
        assert self.committed <= start
        end = start + keys.shape[1]
        assert end <= self.capacity
        self._layers[layer][0, :, start:end] = keys
        self._layers[layer][1, :, start:end] = values

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values of rows `[0, end)`, each `[H, end, D]`."""
        return self._layers[layer][0, :, :end], self._layers[layer][1, :, :end]

    def step_rows(self, start: int | Tensor, rows: int, end: int) -> Mapping[int, StepRows]:
        """Return what a draft step writes and reads, by layer; made for all layers in a few calls.

        It writes so many rows from `start` on, or the `[N]` rows in `start`, and reads rows `[0, end)`.
        """
        places = start if isinstance(start, Tensor) else None
        if not isinstance(start, Tensor):
            assert self.committed <= start
            assert start + rows <= self.capacity
        found = []
        for memory in self._memory.values():
            written = memory if isinstance(start, Tensor) else memory.narrow(3, start, rows)
            keys, values = memory.narrow(3, 0, end)[:, :, None].unbind(1)
            parts = zip(keys.unbind(), values.unbind(), written.unbind(), strict=True)
            found.append([StepRows(*part, places) for part in parts])
        return {layer: found[kind][place] for layer, (kind, place) in self._places.items()}

    def want_snapshot(self, position: int) -> None:
        """Let the pass to come keep what is needed to go back to where its chunk at `position` begins."""
        if self.recurrent is not None:
            self.recurrent.want_snapshot(position)

    def keep_snapshot(self) -> None:
        """Keep what is needed to go back to the present end."""
        if self.recurrent is not None:
            self.recurrent.keep_snapshot()

    def commit(self, nodes: Sequence[int], token_ids: Sequence[int]) -> None:
        """Commit scratch rows `committed + node` for ascending `nodes`, which hold `token_ids`; drop the others."""
        assert len(nodes) == len(token_ids)
        assert all(a < b for a, b in pairwise(nodes))
        first = self.committed
        assert first + len(nodes) <= self.context
        if not nodes:
            return
        if self.recurrent is not None:
            self.recurrent.commit(nodes)
        if list(nodes) != list(range(len(nodes))):
            self._move(nodes)
        self._token_ids.extend(token_ids)

    def move_scratch(self, rows: Sequence[int]) -> None:
        """Move scratch rows `committed + row`, in this order, to the beginning of the scratch rows."""
        if rows:
            self._move(rows)
            if self.recurrent is not None:
                self.recurrent.move_scratch(torch.tensor(rows, device=self._device))

    def _move(self, rows: Sequence[int]) -> None:
        first = self.committed
        source = torch.tensor(rows, device=self._device) + first
        for memory in self._memory.values():
            # The right side is gathered before anything is written, so the rows may overlap.
            memory[:, :, :, first : first + len(rows)] = memory[:, :, :, source]

    def rewind(self, committed: int) -> int:
        """Drop committed rows from `committed` on: after a reset, or for a prompt that differs from there.

        Returns how many are left: fewer if a recurrent state can only be had behind fewer tokens.
        """
        assert 0 <= committed <= self.committed
        if self.recurrent is not None:
            committed = self.recurrent.nearest(committed)
            self.recurrent.rewind(committed)
        del self._token_ids[committed:]
        return committed


def cache_for(
    math: LayerMath, *, context: int, scratch: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Allocate the empty state of one sequence: the KV cache, and the state of recurrent layers if there are any."""
    layers = math.delta_layers
    recurrent = RecurrentState.make(layers, scratch=scratch, dtype=dtype, device=device) if layers else None
    return KVCache(
        math.geometry.mixers,
        context=context,
        scratch=scratch,
        dtype=dtype,
        device=device,
        recurrent=recurrent,
    )
