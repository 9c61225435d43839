"""The state of recurrent layers for one sequence: what is committed, a tree's scratch, and snapshots to go back to.

The committed state changes only in `commit`, as a whole. A prompt's pass writes the state behind its rows beside it;
a tree's pass keeps what each node put in, and `commit` computes the state behind the accepted path from that, with
the same operations in the same order, so the bits are those of the pass. A state cannot be cut back: a snapshot is
kept where a prompt's last chunk begins. Shapes: `L` recurrent layers, `H` value heads, `K` key features, `V` value
features, `C` features of the convolution, `T` tokens that it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec_cli.limits import SNAPSHOTS
from subspec_cli.modeling.delta import DeltaLayer, Gates
from subspec_cli.modeling.delta_kernel import chain_visits, run_rule


@dataclass(slots=True)
class _Moment:
    """The state of all layers behind some token."""

    states: Tensor
    """`[L, H, K, V]` float32."""
    tails: Tensor
    """`[L, T - 1, C]` the last inputs of the convolution."""
    position: int = 0
    """Number of tokens behind which the state is."""

    def zero(self) -> None:
        self.states.zero_()
        self.tails.zero_()

    def copy_from(self, other: _Moment) -> None:
        self.states.copy_(other.states)
        self.tails.copy_(other.tails)


@dataclass(slots=True)
class _Snapshot:
    moment: _Moment
    position: int | None = None
    """Tokens before it; None: it holds nothing."""


@dataclass(slots=True)
class DraftScratch:
    """What the draft keeps of each scratch row of one layer: its own deltas, as keys and values are for attention."""

    keys: Tensor
    """`[rows, key heads, K]`."""
    deltas: Tensor
    """`[rows, H, V]`."""
    log_decays: Tensor
    """`[rows, H]` sums along the path, from the committed state on."""


@dataclass(slots=True)
class _Scratch:
    """What target and draft keep of each scratch row: `[L, rows, ...]`."""

    inputs: Tensor
    log_decays: Tensor
    betas: Tensor
    draft: DraftScratch

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        draft = self.draft
        return self.inputs, self.log_decays, self.betas, draft.keys, draft.deltas, draft.log_decays


@dataclass(slots=True)
class RecurrentState:
    """The state of all recurrent layers."""

    layers: Mapping[int, DeltaLayer]
    """By the number of the layer."""
    _moments: tuple[_Moment, _Moment] = field(init=False)
    """The committed state and the next one. They change places in one step, which no interrupt divides."""
    _scratch: _Scratch = field(init=False)
    _snapshots: list[_Snapshot] = field(init=False)
    _places: dict[int, int] = field(init=False)
    _chain_end: int | None = None
    """Tokens behind which the next state is, while a prompt's pass has written it."""
    _wanted: int | None = None
    """Where the pass to come shall leave a snapshot."""
    _shift: int = 0
    """Rows that were committed since the scratch rows were counted."""

    @classmethod
    def make(
        cls, layers: Mapping[int, DeltaLayer], *, scratch: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentState:
        """Allocate the zeroed state of an empty sequence, with `scratch` scratch rows."""
        made, (shape, *_) = cls(layers), [layer.shape for layer in layers.values()]
        count = len(layers)

        def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((count, *sizes), dtype=dtype, device=device)

        def moment() -> _Moment:
            return _Moment(
                zeros(shape.value_heads, shape.key_dim, shape.value_dim),
                zeros(shape.kernel - 1, shape.conv_width, dtype=dtype),
            )

        made._places = {layer: place for place, layer in enumerate(layers)}
        made._moments = moment(), moment()
        made._snapshots = [_Snapshot(moment()) for _ in range(SNAPSHOTS)]
        made._scratch = _Scratch(
            zeros(scratch, shape.conv_width, dtype=dtype),
            zeros(scratch, shape.value_heads),
            zeros(scratch, shape.value_heads),
            DraftScratch(
                zeros(scratch, shape.key_heads, shape.key_dim, dtype=dtype),
                zeros(scratch, shape.value_heads, shape.value_dim, dtype=dtype),
                zeros(scratch, shape.value_heads),
            ),
        )
        return made

    @property
    def committed(self) -> int:
        """Number of tokens behind which the committed state is."""
        return self._now.position

    @property
    def _now(self) -> _Moment:
        return self._moments[0]

    @property
    def _next(self) -> _Moment:
        return self._moments[1]

    def before(self, layer: int, start: int) -> tuple[Tensor, Tensor]:
        """State `[H, K, V]` and inputs `[T - 1, C]` before a chunk or a tree at position `start` of a pass."""
        moment = self._now if start == self.committed else self._next
        place = self._places[layer]
        return moment.states[place], moment.tails[place]

    def begin_chunk(self, layer: int, start: int) -> None:
        """Note that a prompt's chunk from `start` on comes next in a layer, and keep a snapshot if one is wanted."""
        if start == self._wanted:
            state, tail = self.before(layer, start)
            place, snapshot = self._places[layer], self._snapshots[0]
            snapshot.position = None
            snapshot.moment.states[place].copy_(state)
            snapshot.moment.tails[place].copy_(tail)

    def behind_chunk(self, layer: int) -> Tensor:
        """The place `[1, H, K, V]` of the state behind a prompt's chunk."""
        return self._next.states[self._places[layer]][None]

    def end_chunk(self, layer: int, end: int, tail: Tensor) -> None:
        """Note that the state behind a prompt's chunk, which ends before position `end`, is in its place."""
        self._next.tails[self._places[layer]].copy_(tail)
        self._chain_end = end

    def keep_tree(self, layer: int, inputs: Tensor, gates: Gates) -> None:
        """Keep what a tree's nodes `[N, C]` put in."""
        place, rows, scratch = self._places[layer], len(inputs), self._scratch
        scratch.inputs[place, :rows] = inputs
        scratch.log_decays[place, :rows] = gates.log_decay
        scratch.betas[place, :rows] = gates.beta
        self._chain_end = None

    def scratch_inputs(self, layer: int) -> Tensor:
        """Inputs of the convolution `[rows, C]` of all scratch rows of a layer."""
        return self._scratch.inputs[self._places[layer]]

    def draft_scratch(self, layer: int) -> DraftScratch:
        """What the draft keeps of all scratch rows of a layer."""
        self._shift = 0  # what is not moved by now is dropped
        place, draft = self._places[layer], self._scratch.draft
        return DraftScratch(draft.keys[place], draft.deltas[place], draft.log_decays[place])

    def want_snapshot(self, position: int) -> None:
        """Let the pass to come keep a snapshot where its chunk at `position` begins, unless there is one."""
        kept = (0, *(snapshot.position for snapshot in self._snapshots))
        self._wanted = None if position in kept else position
        self._sort_snapshots()

    def keep_snapshot(self) -> None:
        """Keep a snapshot of the committed state."""
        self._sort_snapshots()
        snapshot = self._snapshots[0]
        snapshot.position = None
        snapshot.moment.copy_from(self._now)
        snapshot.position = self.committed

    def _sort_snapshots(self) -> None:
        """Order snapshots so that the first one is replaced next: an empty one, or the oldest."""
        self._snapshots.sort(key=lambda snapshot: -1 if snapshot.position is None else snapshot.position)

    def commit(self, nodes: Sequence[int]) -> None:
        """Commit a prompt's rows, or the path of a tree's `nodes`; an interrupt leaves the state as it was."""
        end = self.committed + len(nodes)
        if self._chain_end is None:
            for layer in self.layers:
                self._replay(layer, nodes)
            draft = self._scratch.draft.log_decays
            draft -= draft[:, nodes[-1], None].clone()
        elif self._wanted is not None:
            self._snapshots[0].position = self._wanted
        self._next.position = end
        self._moments = self._next, self._now
        self._chain_end = self._wanted = None
        self._shift += len(nodes)

    def move_scratch(self, rows: Tensor) -> None:
        """Move scratch rows `committed + row`, in this order, to the beginning of the scratch rows."""
        for memory in self._scratch.tensors:
            # The right side is gathered before anything is written, so the rows may overlap.
            memory[:, : len(rows)] = memory[:, rows + self._shift]
        self._shift = 0

    def nearest(self, position: int) -> int:
        """The largest number of tokens, at most `position`, behind which the state can be had."""
        kept = (snapshot.position for snapshot in self._snapshots if snapshot.position is not None)
        return max((at for at in (0, self.committed, *kept) if at <= position), default=0)

    def rewind(self, position: int) -> None:
        """Go back to a position that `nearest` gave, and forget snapshots behind it."""
        self._chain_end = self._wanted = None
        for snapshot in self._snapshots:
            if snapshot.position is not None and snapshot.position > position:
                snapshot.position = None
        if position == self.committed:
            return
        if position == 0:
            self._next.zero()
        else:
            kept = next(snapshot for snapshot in self._snapshots if snapshot.position == position)
            self._next.copy_from(kept.moment)
        self._next.position = position
        self._moments = self._next, self._now

    def _replay(self, layer: int, nodes: Sequence[int]) -> None:
        """Compute the state behind a path from what its nodes put in."""
        own, place, scratch = self.layers[layer], self._places[layer], self._scratch
        path = torch.tensor(nodes, device=scratch.inputs.device)
        before = own.shape.kernel - 1
        inputs = torch.cat((self._now.tails[place], scratch.inputs[place, path]))
        seen = torch.arange(len(nodes), device=path.device)[:, None] + torch.arange(
            own.shape.kernel, device=path.device
        )
        gates = Gates(scratch.log_decays[place, path], scratch.betas[place, path])
        rows = own.rows(own.mixed(inputs, seen), gates)
        run_rule(
            rows, chain_visits(len(nodes)), self._now.states[place], self._next.states[place][None], None
        )
        self._next.tails[place].copy_(inputs[len(inputs) - before :])
