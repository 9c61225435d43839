"""Recurrent layers of the draft: linear attention over a row's path, above the target's committed state.

A row reads the committed state and the deltas of its ancestors, decayed, so no state is kept for a row:
u = beta (v - exp(G) S k - sum of exp(G - G_j) (k_j . k) u_j over ancestors j), and the output is exp(G) S q + sum of
exp(G - G_j) (k_j . q) u_j over ancestors and the row itself, where G is the sum of log decays along the path. This is
the recurrence unrolled (arXiv 2406.06484). Shapes: `N` rows of a step, `R` scratch rows in view, `H` value heads, `K`
key features, `V` value features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subspec_cli.modeling.delta import DeltaLayer, Gates
from subspec_cli.modeling.draft_rows import DraftRows, places_of
from subspec_cli.modeling.recurrent_state import RecurrentState
from subspec_cli.modeling.token_batch import TokenBatch


class DraftPaths:
    """The paths of one draft step's rows, of each sequence by itself."""

    def __init__(self, rows: Sequence[DraftRows]) -> None:
        self._paths = [
            (place, _SequencePaths(part.batch, part.kv.recurrent))
            for place, part in zip(places_of(rows), rows, strict=True)
            if part.kv.recurrent is not None
        ]

    def attend(self, delta: DeltaLayer, layer: int, projected: Tensor, gates: Gates) -> Tensor:
        """Run the rows of a step `[N, C + H * V]` through a layer; returns `[N, H * V]`."""
        return torch.cat(
            [
                paths.attend(delta, layer, projected[place], Gates(gates.log_decay[place], gates.beta[place]))
                for place, paths in self._paths
            ]
        )


class _SequencePaths:
    """The paths of one sequence's rows."""

    def __init__(self, batch: TokenBatch, state: RecurrentState) -> None:
        self._state = state
        assert isinstance(batch.start, int), "steps of recurrent layers are not captured"
        committed = state.committed
        self._first = batch.start - committed
        self._allowed = batch.allowed[:, committed:]
        """`[N, R]`, the row itself included."""
        self._depths = batch.key_positions[committed:] - committed
        """`[R]`."""
        self._own_depths = batch.positions - committed
        """`[N]`."""

    def attend(self, delta: DeltaLayer, layer: int, projected: Tensor, gates: Gates) -> Tensor:
        """Run the rows of a step `[N, C + H * V]` through a layer; returns `[N, H * V]`."""
        state, shape = self._state, delta.shape
        qkv, gate = projected.split((shape.conv_width, shape.value_width), -1)
        scratch, base = state.draft_scratch(layer), state.before(layer, state.committed)
        own, view = slice(self._first, self._first + len(qkv)), slice(len(self._depths))
        inputs = state.scratch_inputs(layer)
        inputs[own] = qkv
        known = torch.cat((base[1], inputs[view]))
        rows = delta.rows(delta.mixed(known, self._seen(shape.kernel)), gates)
        share = shape.value_heads // shape.key_heads
        key, query = (part.repeat_interleave(share, 1).transpose(0, 1) for part in (rows.key, rows.query))
        sums = self._path_sums(scratch.log_decays, gates.log_decay)
        scratch.log_decays[own], scratch.keys[own] = sums, rows.key.to(scratch.keys.dtype)
        keys = scratch.keys[view].float().repeat_interleave(share, 1).transpose(0, 1)
        weights = (sums.T[:, :, None] - scratch.log_decays[view].T[:, None]).exp_()
        weights = weights.masked_fill_(~self._allowed, 0.0)
        from_base = torch.bmm(torch.cat((key, query), 1), base[0]) * sums.exp().T.repeat(1, 2)[..., None]
        read, answered = from_base.chunk(2, 1)
        scratch.deltas[own] = 0.0  # those of this step are solved for
        earlier = torch.bmm(weights * torch.bmm(key, keys.mT), scratch.deltas[view].float().transpose(0, 1))
        beta = gates.beta.T[..., None]
        found = (rows.value.transpose(0, 1) - read - earlier) * beta
        within = torch.bmm(key, keys[:, own].mT) * weights[:, :, own] * beta
        found = torch.linalg.solve_triangular(within.tril(-1), found, upper=False, unitriangular=True)
        scratch.deltas[own] = found.transpose(0, 1).to(scratch.deltas.dtype)
        deltas = scratch.deltas[view].float().transpose(0, 1)
        output = answered + torch.bmm(weights * torch.bmm(query, keys.mT), deltas)
        return delta.gated(output.transpose(0, 1).contiguous(), gate)

    def _seen(self, kernel: int) -> Tensor:
        """The inputs `[N, T]` that each row's convolution sees: the committed ones, then those of scratch rows."""
        before = kernel - 1
        found = []
        for back in range(before, -1, -1):
            depth = self._own_depths - back
            hits = self._allowed & (self._depths == depth[:, None])
            found.append(torch.where(depth < 0, before + depth, before + hits.int().argmax(-1)).clamp_min(0))
        return torch.stack(found, -1)

    def _path_sums(self, known: Tensor, log_decay: Tensor) -> Tensor:
        """Sums of log decays along the paths of the step's rows `[N, H]`."""
        rows = len(log_decay)
        above = self._allowed[:, : self._first]
        within = self._allowed[:, self._first : self._first + rows]
        sums = within.float() @ log_decay
        if not self._first:
            return sums
        nearest = torch.where(above, self._depths[: self._first], -1).argmax(-1)
        return sums + known[nearest] * above.any(-1, keepdim=True)
