"""Timing the parts of a model's passes and draft steps on dummy weights of its shapes.

A few layers of dummy weights, more than the CPU's caches hold, run through the decoders that a session uses. Of the
model's files only some blocks are read, to time the link. A probe takes seconds, and its result is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import (
    LAYER_MATRICES,
    block_entries,
    matrices_of,
    spread,
)
from subspec_cli.drafting.draft_steps import rank
from subspec_cli.drafting.graph_capture import CudaGraphs, Run
from subspec_cli.limits import MOST_ROWS, ROW_SIZES
from subspec_cli.modeling.decoder import BlockStream, DraftDecoder, DraftHead, Head, TargetDecoder
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.exact_attention import FIRST_RULES, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache, cache_for
from subspec_cli.modeling.layers import LayerMath, OutputMath
from subspec_cli.modeling.rope import RopeTable, RopeTables, Rotation
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.row_rules import likely_rules
from subspec_cli.modeling.substitute import (
    LowBitHead,
    SubstituteLayer,
    dummy_substitute,
    load_substitute,
    low_bit_table,
    resident_layer,
)
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.modeling.token_batch import TokenBatch, causal_batch
from subspec_cli.planning.costs import BASE_CACHED_ROWS, MachineCosts, RowTimes, attention_times, snapped
from subspec_cli.probe.dummy_blocks import DummyBlocks, DummyResiduals, NoHead
from subspec_cli.probe.machine_use import read_use
from subspec_cli.probe.timed_machine import Spread, TimedMachine
from subspec_cli.probe.timers import copy_rate, disk_rate, reading, time_rows
from subspec_cli.probe.widening import widen_rate
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.substitutes.settings import SubstituteSettings

_BEYOND_CACHES_BYTES: Final = 160 << 20
_LONG_PREFIX: Final = 4096
"""Cached rows at which attention is timed again, unless the model's positions end before."""
_ATTENTION_BYTES: Final = 64 << 20
"""Keys and values of the layers in which the draft's attention is timed."""
_ATTENTION_TARGET_LAYERS: Final = 2
"""Layers in which the target's attention is timed; it computes more than it reads."""
_NARROW: Final = 64
"""Width of those layers beside attention, so that their time is attention's."""
_TIMED_PASS_ROWS: Final = (1, *ROW_SIZES, 2 * ROW_SIZES[-1])
_TIMED_STEP_ROWS: Final = (1, 2, 3, 4, 6, 8)
_LOW_BIT_STEP_ROWS: Final = tuple(range(1, MOST_ROWS + 1))
"""Low-bit kernels take rows a few at a time, so their times jump, and lines between the counts would hide where."""
_REBUILT_ROWS: Final = (32, 64)
"""Rows of the passes in which rebuilding is timed."""
_LEAST_S: Final = 1e-6
_ATTENTION_PASS_ROWS: Final = (1, 16, 64)
_ATTENTION_STEP_ROWS: Final = (1, 4, 8)
_TREE_DEPTH: Final = 24
"""Depth of the trees whose verification is timed."""
_DISK_LAYERS: Final = 4
"""Layers whose blocks are read to time the disk, spread over the model."""
_TREE_S: Final = MappingProxyType({"cpu": 0.5e-3, "cuda": 0.1e-3})
"""Time of a draft step for batch and tree. It differs too little between machines to matter. With a GPU the host does
this work while the previous step is in flight."""


def probe_machine(
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    checkpoint: Checkpoint,
    device: torch.device,
    reporter: Reporter,
    rebuilds: bool = False,
) -> TimedMachine:
    """Time the link, layers and heads, and the rebuilding of residuals if wanted. Times snap to the grid."""
    before, spread = read_use(), Spread()
    layouts = _disk_layouts(geometry, checkpoint)
    on_cpu = device.type == "cpu"
    workbench = _Workbench(geometry, settings, device, typical=spread.median)
    attention = _AttentionWorkbench(geometry, settings, device)
    reporter.progress("link and target")
    if on_cpu:
        # A pass and the reader share cores and memory, so each is timed while the other runs.
        with reading(layouts) as beside:
            target, target_attention = workbench.target_layer(), attention.of_target()
            widening = widen_rate(geometry, device)
            rebuilding = workbench.rebuild_rate() if rebuilds else 0.0
        link = pageable = disk = beside.bytes_per_s
    else:
        target, target_attention = workbench.target_layer(), attention.of_target()
        widening = widen_rate(geometry, device)
        rebuilding = workbench.rebuild_rate() if rebuilds else 0.0
        disk = disk_rate(layouts)
        link, pageable = copy_rate(device, pinned=True), copy_rate(device, pinned=False)
    reporter.progress("the draft's layers")
    costs = MachineCosts(
        link_bytes_per_s=link,
        pageable_bytes_per_s=pageable,
        disk_bytes_per_s=disk,
        target_layer=target.snapped(),
        target_head=workbench.target_head().snapped(),
        substitute_layer=workbench.substitute_layer().snapped(),
        shared_layer=workbench.shared_layer().snapped(),
        draft_head=workbench.draft_head(16).snapped(),
        low_bit_head=workbench.draft_head(4).snapped(),
        target_attention=target_attention.snapped(),
        draft_attention=attention.of_draft().snapped(),
        step_overhead_s=snapped(_TREE_S[device.type]),
        origin="measured",
        widen_bytes_per_s=snapped(widening),
        rebuild_bytes_per_s=snapped(rebuilding),
    )
    return TimedMachine(costs, read_use().since(before).others_share, spread.usual)


def _disk_layouts(geometry: ModelGeometry, checkpoint: Checkpoint) -> list[BlockLayout]:
    step = max(1, geometry.layers // _DISK_LAYERS)
    return [
        layout_block(entries)
        for layer in range(0, geometry.layers, step)
        for entries in block_entries(checkpoint.tensors, layer)
    ]


def _tree_of(rows: int, prefix: int) -> RowGroup:
    """Return a tree behind `prefix` cached rows: one long path, and leaves beside its end."""
    number = torch.arange(rows)
    depths = number.clamp_max(_TREE_DEPTH)
    path = (number[None] < depths[:, None]) | torch.eye(rows, dtype=torch.bool)
    return RowGroup(torch.zeros(rows, dtype=torch.long), prefix + depths, prefix, path)


def _product_shapes(geometry: ModelGeometry) -> list[tuple[int, ...]]:
    """Return the shapes of the first layer's matrices."""
    shapes = geometry.layer_shapes(0)
    return [shapes[name] for name in matrices_of(shapes)]


class _Workbench:
    """Times a few layers of dummy weights in the decoders of a session."""

    def __init__(
        self,
        geometry: ModelGeometry,
        settings: SubstituteSettings,
        device: torch.device,
        *,
        typical: Callable[[Sequence[float]], float],
    ) -> None:
        self._sizes, self._settings, self._device = geometry, settings, device
        self._typical = typical
        self._dtype = torch_dtype(geometry.dtype)
        self.rules = likely_rules(_product_shapes(geometry), self._dtype, device)

    @torch.inference_mode()
    def target_layer(
        self, prefix: int = BASE_CACHED_ROWS, row_counts: Sequence[int] = _TIMED_PASS_ROWS
    ) -> RowTimes:
        """Time one layer of the target by rows, with `prefix` cached rows."""
        sizes = self._chosen(self._sizes.layer_matrix_bytes)
        run = self._target_pass(sizes, prefix, DummyBlocks(self._matrices(sizes)))
        return self._per_layer(run, row_counts, sizes.layers)

    @torch.inference_mode()
    def rebuild_rate(self) -> float:
        """Bytes of 16-bit weights a second that a pass rebuilds: by what passes take longer that do.

        Rebuilding by itself would seem faster, since it and the products take each other's place in the caches.
        """
        sizes = self._chosen(self._sizes.layer_matrix_bytes)
        rebuilt = DummyResiduals([sizes.layer_shapes(layer) for layer in range(sizes.layers)], self._device)
        raw, longer = (
            time_rows(
                self._target_pass(sizes, BASE_CACHED_ROWS, blocks),
                _REBUILT_ROWS,
                finish=self._finish,
                typical=self._typical,
            ).seconds
            for blocks in (DummyBlocks(self._matrices(sizes)), rebuilt)
        )
        return rebuilt.rebuilt_bytes / max(fmean(longer) - fmean(raw), _LEAST_S)

    def _target_pass(self, sizes: ModelGeometry, prefix: int, blocks: BlockStream) -> Callable[[int], None]:
        math = self._math(sizes, prefix)
        attention = ExactAttention(math.geometry, FIRST_RULES, dtype=self._dtype, device=self._device)
        head = Head(self._output(), self._ones(1, self._sizes.hidden))
        decoder = TargetDecoder(math, attention, self._states, head, blocks, self.rules)
        kv = self._cache(math, prefix)

        def run(rows: int) -> None:
            flow = decoder.begin([[SequenceRows(_tree_of(rows, prefix), kv)]])
            for _ in decoder.layers(flow):
                pass

        return run

    @torch.inference_mode()
    def shared_layer(
        self, prefix: int = BASE_CACHED_ROWS, row_counts: Sequence[int] = _TIMED_STEP_ROWS
    ) -> RowTimes:
        """Time one layer of the draft that is a resident layer of the target, by rows, with `prefix` cached rows."""
        sizes = self._chosen(self._sizes.layer_matrix_bytes)
        matrices = self._matrices(sizes)
        math = self._math(sizes, prefix)
        layers = [resident_layer(math, number, held) for number, held in enumerate(matrices)]
        return self._draft(math, layers, prefix, row_counts)

    @torch.inference_mode()
    def substitute_layer(self) -> RowTimes:
        """Time one layer of the draft made of its substitute, by rows."""
        sizes = self._chosen(self._sizes.layer_matrix_bytes // 4)
        math = self._math(sizes, BASE_CACHED_ROWS)
        layers = []
        for layer in range(sizes.layers):
            shapes = sizes.layer_shapes(layer)
            stored = {
                name: value
                for matrix in matrices_of(shapes)
                for name, value in dummy_substitute(
                    matrix, shapes[matrix], self._settings.bits_of(matrix), self._dtype
                ).items()
            }
            layers.append(load_substitute(math, layer, stored, self._settings, self._device))
        return self._draft(math, layers, BASE_CACHED_ROWS, _LOW_BIT_STEP_ROWS)

    @torch.inference_mode()
    def target_head(self) -> RowTimes:
        """Time the target's head by rows."""
        head = self._head()
        return time_rows(
            lambda rows: head.logits(self._ones(self.rules.padded(rows), self._sizes.hidden), self.rules),
            _TIMED_PASS_ROWS,
            finish=self._finish,
            typical=self._typical,
        )

    @torch.inference_mode()
    def draft_head(self, bits: int) -> RowTimes:
        """Time the draft's head of 16 or 4 bits and the ranking of its logits, by rows.

        If no 4-bit kernel takes the table's shape, the 16-bit head is timed.
        """
        whole = self._head()
        table = low_bit_table(whole.weight) if bits == 4 else None
        head: DraftHead = whole
        if table is not None:
            head = LowBitHead(whole, table)

        def run(states: Tensor) -> None:
            rank(head.guess(states), None)

        counts = _LOW_BIT_STEP_ROWS if bits == 4 else _TIMED_STEP_ROWS
        steps = self._launched(lambda rows: partial(run, self._ones(rows, self._sizes.hidden)), counts)
        return time_rows(steps, counts, finish=self._finish, typical=self._typical)

    def _head(self) -> Head:
        return Head(self._output(), self._ones(self._sizes.vocab, self._sizes.hidden))

    def _output(self) -> OutputMath:
        return OutputMath(self._sizes.arithmetic, self._ones(self._sizes.hidden))

    def _draft(
        self, math: LayerMath, layers: list[SubstituteLayer], prefix: int, row_counts: Sequence[int]
    ) -> RowTimes:
        kv = self._cache(math, prefix)
        draft = DraftDecoder(math, self._states, NoHead(), layers)

        def run(batch: TokenBatch) -> None:
            draft.run(self._states(batch.positions), [DraftRows(batch, kv)])

        steps = self._launched(
            lambda rows: partial(run, causal_batch([0] * rows, prefix).to(self._device)), row_counts
        )
        return self._per_layer(steps, row_counts, len(layers))

    def _launched(self, step_of: Callable[[int], Run], row_counts: Sequence[int]) -> Callable[[int], object]:
        """Return draft steps by rows, launched as in a session: captured as graphs on a GPU, if possible."""
        steps = {rows: step_of(rows) for rows in row_counts}
        if self._device.type == "cuda":
            steps = self._captured(steps)
        return lambda rows: steps[rows]()

    def _captured(self, steps: dict[int, Run]) -> dict[int, Run]:
        graphs = CudaGraphs(self._device)
        try:
            return {rows: graphs.capture(torch.inference_mode()(run)) for rows, run in steps.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return steps  # the session tries again and reports why capturing failed

    def _per_layer(self, run: Callable[[int], object], row_counts: Sequence[int], layers: int) -> RowTimes:
        times = time_rows(run, row_counts, finish=self._finish, typical=self._typical)
        return RowTimes(times.rows, tuple(seconds / layers for seconds in times.seconds))

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _chosen(self, layer_bytes: int) -> ModelGeometry:
        """Return the model with as many of its layers as the CPU's caches cannot hold, evenly spread."""
        sizes = self._sizes
        count = min(sizes.layers, max(-(-_BEYOND_CACHES_BYTES // layer_bytes), len(sizes.representatives)))
        return replace(sizes, mixers=tuple(sizes.mixers[layer] for layer in spread(count, sizes.layers)))

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self._dtype, device=self._device)

    def _states(self, token_ids: Tensor) -> Tensor:
        return self._ones(len(token_ids), self._sizes.hidden)

    def _matrices(self, sizes: ModelGeometry) -> tuple[dict[str, Tensor], ...]:
        found = []
        for layer in range(sizes.layers):
            shapes = sizes.layer_shapes(layer)
            found.append({name: self._ones(*shapes[name]) for name in matrices_of(shapes)})
        return tuple(found)

    def _math(self, sizes: ModelGeometry, prefix: int) -> LayerMath:
        small = tuple(
            {n: self._ones(*s) for n, s in sizes.layer_shapes(layer).items() if n not in LAYER_MATRICES}
            for layer in range(sizes.layers)
        )
        heads: dict[int, int] = {s.rope: s.head_dim for s in sizes.attention if s.rope is not None}
        tables = []
        for number in range(max(heads, default=-1) + 1):
            table = self._ones(prefix + max(_TIMED_PASS_ROWS), 1, heads.get(number, 2))
            tables.append(RopeTable(Rotation(table, table)))
        return LayerMath(sizes, small, RopeTables(tuple(tables)))

    def _cache(self, math: LayerMath, prefix: int) -> KVCache:
        kv = cache_for(
            math,
            context=prefix,
            scratch=max(_TIMED_PASS_ROWS),
            dtype=self._dtype,
            device=self._device,
        )
        if kv.recurrent is not None:  # as if a prompt's pass had left its state
            for layer in math.delta_layers:
                kv.recurrent.end_chunk(layer, prefix, kv.recurrent.before(layer, 0)[1])
        kv.commit(range(prefix), [0] * prefix)
        return kv


class _AttentionWorkbench:
    """Times what further cached rows add, in layers so narrow that their weights take no time."""

    def __init__(self, geometry: ModelGeometry, settings: SubstituteSettings, device: torch.device) -> None:
        # At least twice the base, or the difference would be noise.
        self._prefix = max(2 * BASE_CACHED_ROWS, min(_LONG_PREFIX, geometry.max_positions))
        self._geometry, self._settings, self._device = geometry, settings, device

    def of_target(self) -> RowTimes:
        """Return what 1,024 more cached rows add to one layer of the target, by rows."""
        layers = self._layers(_ATTENTION_TARGET_LAYERS)
        return self._added(lambda prefix: layers.target_layer(prefix, _ATTENTION_PASS_ROWS))

    def of_draft(self) -> RowTimes:
        """Return what 1,024 more cached rows add to one layer of the draft, by rows."""
        # A step mostly reads keys and values, so the CPU's caches must not hold those of all layers.
        geometry = self._geometry
        layer_bytes = self._prefix * geometry.kv_row_bytes // len(geometry.attention)
        layers = self._layers(-(-_ATTENTION_BYTES // layer_bytes))
        return self._added(lambda prefix: layers.shared_layer(prefix, _ATTENTION_STEP_ROWS))

    def _layers(self, most: int) -> _Workbench:
        attention = self._geometry.attention
        count = min(len(attention), most)
        narrow = replace(
            self._geometry,
            mixers=tuple(attention[layer] for layer in spread(count, len(attention))),
            hidden=_NARROW,
            feed_forward=_NARROW,
        )
        # The least of a few times, because the difference of two medians is mostly noise on a busy machine.
        return _Workbench(narrow, self._settings, self._device, typical=min)

    def _added(self, timed: Callable[[int], RowTimes]) -> RowTimes:
        short, long = timed(BASE_CACHED_ROWS), timed(self._prefix)
        return attention_times(short, long, self._prefix - BASE_CACHED_ROWS)
