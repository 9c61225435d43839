"""Bringing a planned model into memory: substitutes first, then resident layers, then the stream's slots."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from subspec_cli.checkpoint.checkpoint import Checkpoint, check_unchanged
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, block_entries, layer_prefix
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.drafting.captured_steps import draft_steps
from subspec_cli.drafting.draft_steps import DraftSteps
from subspec_cli.limits import LEAST_RING_SLOTS
from subspec_cli.modeling.attention import exact_attention, fast_attention
from subspec_cli.modeling.decoder import DraftDecoder, DraftHead, Embedding, Head, TargetDecoder
from subspec_cli.modeling.embedding import DiskEmbedding, table_embedding
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import LayerMath, RowRules
from subspec_cli.modeling.rope import RopeTable, build_rope_table
from subspec_cli.modeling.substitute import (
    LowBitHead,
    SubstituteLayer,
    load_substitute,
    low_bit_table,
    resident_layer,
)
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.disk_streamer import DiskStreamer, read_resident
from subspec_cli.streaming.gpu_layers import LayerLayout, layout_layer, read_resident_layer
from subspec_cli.streaming.gpu_streamer import open_gpu_streamer
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.streaming.mapped_memory import gpu_view
from subspec_cli.streaming.memory_meter import available_bytes
from subspec_cli.streaming.pinned_memory import PinRefusedError, pin
from subspec_cli.streaming.streamer import StreamCounters, Streamer
from subspec_cli.substitutes.prepared_model import PreparedModel, load_layer

_PINNED_SHARE: Final = 0.9
"""Most of the free host memory to pin: what is pinned is lost to everybody else."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Target, draft and cache in memory."""

    target: Callable[[RowRules], TargetDecoder]
    draft: DraftSteps | None
    head: Head
    blocks: TargetBlocks
    kv: KVCache
    close: Callable[[], None]
    check_source: Callable[[], None]
    """Raises IntegrityError if weights that are still read from files changed since they were opened."""

    def counters(self) -> StreamCounters:
        """What the stream has done so far; nothing if everything is resident."""
        return StreamCounters() if self.blocks.streamer is None else self.blocks.streamer.counters()

    def reads_directly(self) -> bool:
        """Whether what has been streamed so far came past the page cache."""
        return self.blocks.streamer is None or self.blocks.streamer.is_direct


class Loader:
    """Loads what a plan says; one use."""

    def __init__(
        self,
        prepared: PreparedModel,
        checkpoint: Checkpoint,
        geometry: ModelGeometry,
        plan: OffloadPlan,
        config: PreTrainedConfig,
        device: torch.device,
        scratch_rows: int,
        draft_rows: int,
        reporter: Reporter,
    ) -> None:
        self._prepared = prepared
        self._checkpoint = checkpoint
        self._geometry = geometry
        self._plan = plan
        self._config = config
        self._device = device
        self._scratch_rows = scratch_rows
        self._draft_rows = draft_rows
        self._reporter = reporter
        self._dtype = torch_dtype(geometry.dtype)

    def load(self, *, with_draft: bool) -> LoadedModel:
        """Read and place everything, the draft only if asked for; if a part fails, what was opened is closed."""
        geometry, plan = self._geometry, self._plan
        small = self._small_tensors()
        rope = self._rope()
        math = LayerMath(geometry, small, rope, exact_attention)
        draft_math = LayerMath(geometry, small, rope, fast_attention)
        substitutes = self._substitutes(draft_math) if with_draft else {}
        with ExitStack() as opened:
            embed, head = self._tables(opened)
            blocks = self._blocks(opened)
            kv = KVCache(
                layers=geometry.layers,
                kv_heads=geometry.kv_heads,
                head_dim=geometry.head_dim,
                context=plan.context,
                scratch=self._scratch_rows,
                dtype=self._dtype,
                device=self._device,
            )
            draft = None
            if with_draft:
                held = {
                    layer: resident_layer(draft_math, layer, blocks.resident_matrices(layer))
                    for layer in plan.shared
                }
                layers = [(held | substitutes)[layer] for layer in range(geometry.layers)]
                draft = draft_steps(
                    DraftDecoder(draft_math, embed, self._draft_head(head), layers),
                    kv,
                    most_rows=self._draft_rows,
                    vocab=geometry.vocab,
                    device=self._device,
                    notify=self._reporter.note,
                )
            return LoadedModel(
                target=lambda rules: TargetDecoder(math, embed, head, blocks, rules),
                draft=draft,
                head=head,
                blocks=blocks,
                kv=kv,
                close=opened.pop_all().close,
                check_source=self._check_source if self._reads_on(blocks) else lambda: None,
            )

    def _draft_head(self, head: Head) -> DraftHead:
        """The target's head, or a 4-bit copy where the plan has one and a kernel takes its shape."""
        if self._plan.draft_head_bits == 16:
            return head
        self._reporter.progress("making the draft's head")
        table = low_bit_table(head.weight)
        return head if table is None else LowBitHead(head.norm_weight, table, head.weight, head.eps)

    def _reads_on(self, blocks: TargetBlocks) -> bool:
        """Whether files are read after loading: for a GPU, all that could be pinned has been copied by then."""
        if self._device.type == "cpu":
            return bool(self._plan.streamed) or not self._geometry.tied_head
        return blocks.streamer is not None and blocks.streamer.reads_files

    def _check_source(self) -> None:
        check_unchanged(self._checkpoint)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        found = read_tensors([self._checkpoint.tensors[name] for name in names])
        return {name: tensor.to(self._device) for name, tensor in found.items()}

    def _small_tensors(self) -> tuple[dict[str, Tensor], ...]:
        names = [name for name in self._geometry.layer_shapes() if name not in LAYER_MATRICES]
        layers = []
        for layer in range(self._geometry.layers):
            prefix = layer_prefix(layer)
            found = self._read([prefix + name for name in names])
            layers.append({name: found[prefix + name] for name in names})
        return tuple(layers)

    def _rope(self) -> RopeTable:
        return build_rope_table(
            self._config,
            context=self._plan.context,
            positions=self._plan.context + self._scratch_rows,
            dtype=self._dtype,
            device=self._device,
        )

    def _substitutes(self, math: LayerMath) -> dict[int, SubstituteLayer]:
        settings = self._prepared.manifest.settings
        loaded = {}
        # A layer that is resident for the target alone has its substitute too: it drafts faster than 16 bits.
        wanted = [layer for layer in range(self._geometry.layers) if layer not in self._plan.shared]
        for number, layer in enumerate(wanted, start=1):
            self._reporter.progress(f"loading substitutes {number}/{len(wanted)}")
            loaded[layer] = load_substitute(
                math, layer, load_layer(self._prepared, layer), settings, self._device
            )
        return loaded

    def _tables(self, opened: ExitStack) -> tuple[Embedding, Head]:
        self._reporter.progress("loading embedding and head")
        place = self._plan.embedding
        table, norm = "model.embed_tokens.weight", "model.norm.weight"
        head_name = table if place == "tied" else "lm_head.weight"
        loaded = self._read([head_name, norm, *([table] if place == "device" else [])])
        head = Head(loaded[norm], loaded[head_name], self._geometry.rms_norm_eps)
        if table in loaded:
            return table_embedding(loaded[table]), head
        if place == "host":
            return self._host_embedding(table, opened), head
        rows = DiskEmbedding(self._checkpoint.tensors[table])
        opened.callback(rows.close)
        return rows, head

    def _host_embedding(self, name: str, opened: ExitStack) -> Embedding:
        """A table in host memory, whose rows the GPU reads there: its place is worth two or three layers."""
        table = read_tensors([self._checkpoint.tensors[name]])[name]
        try:
            opened.callback(pin(table, self._device))
        except PinRefusedError as error:
            self._reporter.note(
                f"the embedding could not be pinned, so draft steps wait for the host: {error}"
            )
            gather = table_embedding(table)
            return lambda token_ids: gather(token_ids).to(self._device)
        return table_embedding(gpu_view(table, self._device))

    def _blocks(self, opened: ExitStack) -> TargetBlocks:
        held = {}
        for number, layer in enumerate(self._plan.resident, start=1):
            self._reporter.progress(f"loading resident layers {number}/{len(self._plan.resident)}")
            held[layer] = self._resident_blocks(layer)
        streamer = self._streamer()
        if streamer is not None:
            opened.callback(streamer.close)
        return TargetBlocks(self._geometry.layers, held, streamer)

    def _resident_blocks(self, layer: int) -> list[dict[str, Tensor]]:
        if self._device.type == "cpu":
            return read_resident(self._layouts(layer))
        return read_resident_layer(self._layer_layout(layer), self._device)

    def _streamer(self) -> Streamer | None:
        streamed = self._plan.streamed
        if not streamed:
            return None
        if self._device.type == "cpu":
            layouts = [layout for layer in streamed for layout in self._layouts(layer)]
            return DiskStreamer(layouts, self._plan.slots)
        return open_gpu_streamer(
            [self._layer_layout(layer) for layer in streamed],
            pinned_layers=len(self._plan.pinned_layers),
            ring_slots=max(self._plan.ring_slots, LEAST_RING_SLOTS),
            slots=self._plan.slots,
            most_bytes=int(available_bytes(torch.device("cpu")) * _PINNED_SHARE),
            device=self._device,
            reporter=self._reporter,
        )

    def _layer_layout(self, layer: int) -> LayerLayout:
        return layout_layer(block_entries(self._checkpoint.tensors, layer))

    def _layouts(self, layer: int) -> list[BlockLayout]:
        return [layout_block(entries) for entries in block_entries(self._checkpoint.tensors, layer)]
