"""Bringing a planned model into memory, in this order: substitutes, tables, resident layers, stream, self-check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subspec_cli.checkpoint.checkpoint import check_files_unchanged, check_unchanged
from subspec_cli.checkpoint.geometry import EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, HEAD
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, layer_prefix, scale_name
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.checkpoint.widening import widened_tensors
from subspec_cli.decoding.drafter import Drafter
from subspec_cli.decoding.engine import Engine
from subspec_cli.drafting.captured_steps import make_draft_steps
from subspec_cli.drafting.draft_steps import DraftSteps
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.modeling.decoder import DraftDecoder, DraftHead, Embedding, Head, TargetDecoder
from subspec_cli.modeling.embedding import DiskEmbedding, scaled_embedding, table_embedding
from subspec_cli.modeling.exact_attention import FIRST_RULES, AttentionRules, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache, cache_for
from subspec_cli.modeling.layers import LayerMath, OutputMath
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.modeling.residuals import CodedLayers, compile_rebuilding
from subspec_cli.modeling.rope import RopeTables, build_rope_tables
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.self_check import SelfCheck, check_batch_invariance
from subspec_cli.modeling.substitute import (
    LowBitHead,
    SubstituteLayer,
    load_substitute,
    load_table,
    low_bit_table,
    resident_layer,
)
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.session.blocks import open_blocks
from subspec_cli.session.oom import oom_as_error
from subspec_cli.session.opening import Opening, cap_allocator
from subspec_cli.streaming.mapped_memory import gpu_view
from subspec_cli.streaming.memory_meter import MemoryMeter, return_freed_memory_now
from subspec_cli.streaming.pinned_memory import PinRefusedError, pin
from subspec_cli.streaming.streamer import StreamCounters
from subspec_cli.substitutes.head_file import read_head
from subspec_cli.substitutes.in_use import in_use
from subspec_cli.substitutes.last_use import mark_used
from subspec_cli.substitutes.prepared_model import load_layer
from subspec_cli.units import printable


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Tokenizer, target, draft and KV cache in memory."""

    tokenizer: ModelTokenizer
    eos_ids: frozenset[int]
    """Tokens that end an answer."""
    math: LayerMath
    rope_table: Callable[[torch.dtype], RopeTables]
    """Makes the rotary tables of the session in another type, for replays in float32."""
    attention: ExactAttention
    embedding_rows: Embedding
    """Rows of the table, without the model's factor."""
    embed: Embedding
    head: Head
    blocks: TargetBlocks
    self_check: SelfCheck
    """Row rules of the target, and how far they make it exact."""
    caches: tuple[KVCache, ...]
    """One for each answer in flight."""
    prompt_rows: int
    """Most rows of prompts in a pass without trees."""
    company_rows: int
    """Most rows of prompts in a pass with trees."""
    draft: DraftSteps | None
    """None for plain decoding."""
    meter: MemoryMeter
    """Memory of the process beyond its size before loading."""
    close: Callable[[], None]
    """Stops the stream and releases the memory that the garbage collector does not."""
    check_source: Callable[[], None]
    """Raises IntegrityError if weights that are still read from files changed since the files were opened."""

    @property
    def kv(self) -> KVCache:
        """The cache of a session's only answer in flight, and work space while there is none."""
        return self.caches[0]

    def target(self, blocks: TargetBlocks) -> TargetDecoder:
        """Return the target under the rules of the self-check, with weights from `blocks`."""
        return TargetDecoder(self.math, self.attention, self.embed, self.head, blocks, self.self_check.rules)

    def engine(self, drafter: Drafter[Any], blocks: TargetBlocks | None = None) -> Engine:
        """Return an engine over this model's cache that drafts with `drafter`.

        `blocks` replaces the source of the target's weights.
        """
        blocks = blocks or self.blocks
        return Engine(
            self.target(blocks),
            drafter,
            counters=_counters(blocks),
            prompt_rows=self.prompt_rows,
            company_rows=self.company_rows,
        )

    def counters(self) -> StreamCounters:
        """Return the totals of the stream so far; zeros if everything is resident."""
        return _counters(self.blocks)()


def _counters(blocks: TargetBlocks) -> Callable[[], StreamCounters]:
    return StreamCounters if blocks.streamer is None else blocks.streamer.counters


class Loader:
    """Loads what an opening has planned."""

    def __init__(self, opening: Opening, tokenizer: ModelTokenizer, meter: MemoryMeter) -> None:
        self._opening = opening
        self._tokenizer = tokenizer
        self._meter = meter

    def load(self) -> LoadedModel:
        """Load what the plan says, the draft only if the plan drafts, and check the rows.

        If a part fails, what was opened is closed. Raises ResourceError if memory runs out.
        """
        device, budget_bytes = self._opening.device, self._opening.plan.budget_bytes
        cap_allocator(budget_bytes, device)
        with oom_as_error("loading the model", budget_bytes=budget_bytes, meter=self._meter):
            return self._load()

    def _load(self) -> LoadedModel:
        found, plan = self._opening.found, self._opening.plan
        if self._opening.residuals is not None:
            self._meter.leave_out(lambda: compile_rebuilding(self._opening.device))
        small = self._small_tensors()
        math = LayerMath(found.geometry, small, self._rope(self._opening.dtype))
        with ExitStack() as opened:
            opened.enter_context(in_use(found.prepared.directory))
            substitutes = self._substitutes(math) if plan.drafts else {}
            embedding_rows, head = self._tables(opened)
            embed = scaled_embedding(embedding_rows, found.geometry.arithmetic)
            coded = CodedLayers(math, self._opening.device)
            blocks = open_blocks(
                self._opening, opened, lambda layer: coded.of_layer(layer, substitutes[layer])
            )
            caches = tuple(self._kv_cache(math) for _ in range(plan.sequences))
            draft = None
            if plan.drafts:
                shared = {
                    layer: resident_layer(math, layer, blocks.resident_matrices(layer))
                    for layer in plan.shared
                }
                layers = [(substitutes | shared)[layer] for layer in range(found.geometry.layers)]
                draft = self._draft_steps(DraftDecoder(math, embed, self._draft_head(head), layers), caches)
            self_check = self._check(
                partial(TargetDecoder, math, self._attention(FIRST_RULES), embed, head, blocks),
                head,
                blocks,
                caches[0],
            )
            if not mark_used(found.prepared.directory):
                place = printable(str(found.prepared.directory))
                self._opening.reporter.note(f"this use is not recorded, because {place} cannot be written")
            return LoadedModel(
                tokenizer=self._tokenizer,
                eos_ids=frozenset(found.repository.end_ids),
                math=math,
                rope_table=self._rope,
                attention=self._attention(self_check.attention),
                embedding_rows=embedding_rows,
                embed=embed,
                head=head,
                blocks=blocks,
                self_check=self_check,
                caches=caches,
                prompt_rows=plan.prompt_rows,
                company_rows=plan.company_rows,
                draft=draft,
                meter=self._meter,
                close=opened.pop_all().close,
                check_source=source_check(self._opening, blocks),
            )

    def _attention(self, rules: AttentionRules) -> ExactAttention:
        opening = self._opening
        return ExactAttention(opening.found.geometry, rules, dtype=opening.dtype, device=opening.device)

    def _check(
        self, target: Callable[[RowRules], TargetDecoder], head: Head, blocks: TargetBlocks, kv: KVCache
    ) -> SelfCheck:
        # Refuse to answer with bytes that were read from other files than those that were opened.
        check_unchanged(self._opening.found.checkpoint)
        self._opening.reporter.progress("checking that rows keep their bits")
        return check_batch_invariance(
            target,
            self._attention,
            head,
            blocks,
            kv,
            most_nodes=self._opening.plan.pass_nodes,
            prefill_rows=PREFILL_CHUNK,
        )

    def _kv_cache(self, math: LayerMath) -> KVCache:
        plan = self._opening.plan
        return cache_for(
            math,
            context=plan.context,
            scratch=plan.scratch_rows,
            dtype=self._opening.dtype,
            device=self._opening.device,
        )

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors, dtype = self._opening.found.checkpoint.tensors, self._opening.dtype
        stored = [tensors[each] for name in names for each in (name, scale_name(name)) if each in tensors]
        found = widened_tensors(read_tensors(stored), dtype)
        return {name: tensor.to(self._opening.device, dtype) for name, tensor in found.items()}

    def _small_tensors(self) -> tuple[dict[str, Tensor], ...]:
        """Return norms and biases of each layer, by their names inside it."""
        geometry = self._opening.found.geometry
        layers = []
        for layer in range(geometry.layers):
            prefix = layer_prefix(layer)
            names = [name for name in geometry.layer_shapes(layer) if name not in LAYER_MATRICES]
            found = self._read([prefix + name for name in names])
            layers.append({name: found[prefix + name] for name in names})
        return tuple(layers)

    def _rope(self, dtype: torch.dtype) -> RopeTables:
        return build_rope_tables(
            self._opening.found.repository.ropes,
            self._opening.found.geometry.arithmetic,
            positions=self._opening.plan.context + self._opening.plan.scratch_rows,
            dtype=dtype,
            device=self._opening.device,
        )

    def _substitutes(self, math: LayerMath) -> dict[int, SubstituteLayer]:
        found, shared = self._opening.found, self._opening.plan.shared
        # A layer that is resident for the target alone has its substitute too: it drafts faster than 16 bits.
        wanted = [layer for layer in range(found.geometry.layers) if layer not in shared]
        loaded = {}
        for number, layer in enumerate(wanted, start=1):
            self._opening.reporter.progress(f"loading substitutes {number}/{len(wanted)}")
            stored = load_layer(found.prepared, layer)
            loaded[layer] = load_substitute(
                math, layer, stored, found.prepared.manifest.settings, self._opening.device
            )
        return_freed_memory_now()
        return loaded

    def _tables(self, opened: ExitStack) -> tuple[Embedding, Head]:
        self._opening.reporter.progress("loading embedding and head")
        place, geometry = self._opening.plan.embedding, self._opening.found.geometry
        head_name = EMBEDDING if place == "tied" else HEAD
        outer = [name for name in geometry.outer_shapes() if name not in (EMBEDDING, HEAD)]
        loaded = self._read([head_name, *outer, *([EMBEDDING] if place == "device" else [])])
        output = OutputMath(geometry.arithmetic, loaded[FINAL_NORM], loaded.get(FINAL_NORM_BIAS))
        embed = self._embedding(loaded.get(EMBEDDING), opened)
        return embed, Head(output, loaded[head_name])

    def _embedding(self, table: Tensor | None, opened: ExitStack) -> Embedding:
        """The embedding from a table on the device, else from the host's memory or from disk."""
        if table is not None:
            return table_embedding(table)
        entry = self._opening.found.checkpoint.tensors[EMBEDDING]
        if self._opening.plan.embedding == "host":
            return self._host_embedding(read_tensors([entry])[EMBEDDING].to(self._opening.dtype), opened)
        rows = DiskEmbedding(entry, self._opening.dtype)
        opened.callback(rows.close)
        return rows

    def _host_embedding(self, table: Tensor, opened: ExitStack) -> Embedding:
        """Pin a table whose rows the GPU reads in host memory: its place is worth two or three layers."""
        device = self._opening.device
        try:
            opened.callback(pin(table, device))
        except PinRefusedError as error:
            self._opening.reporter.note(
                f"the embedding could not be pinned, so draft steps wait for the host: {error}"
            )
            gather = table_embedding(table)
            return lambda token_ids: gather(token_ids).to(device)
        return table_embedding(gpu_view(table, device))

    def _draft_head(self, head: Head) -> DraftHead:
        """Return the target's head, or the 4-bit head of the set if the plan has one: older sets have none."""
        prepared, reporter = self._opening.found.prepared, self._opening.reporter
        if self._opening.plan.draft_head_bits == 16:
            return head
        if prepared.manifest.head is None:
            reporter.progress("making the draft's head")
            table = low_bit_table(head.weight)
            return head if table is None else LowBitHead(head, table)
        reporter.progress("loading the draft's head")
        vocab, hidden = head.weight.shape
        shape = (vocab, hidden)
        return LowBitHead(head, load_table(read_head(prepared, shape), shape, self._opening.device))

    def _draft_steps(self, decoder: DraftDecoder, caches: Sequence[KVCache]) -> DraftSteps:
        return make_draft_steps(
            decoder,
            caches[0],
            most_rows=self._opening.plan.draft_rows,
            vocab=self._opening.found.geometry.vocab,
            device=self._opening.device,
            reporter=self._opening.reporter,
        )


def source_check(opening: Opening, blocks: TargetBlocks) -> Callable[[], None]:
    """Return the check of files that are still read after loading; it does nothing if none are."""
    reads_blocks = blocks.streamer is not None and blocks.streamer.reads_files
    if not reads_blocks and opening.plan.embedding != "disk":
        return lambda: None
    checkpoint, residuals = opening.found.checkpoint, opening.residuals

    def check() -> None:
        check_unchanged(checkpoint)
        if residuals is not None:
            check_files_unchanged(residuals.directory, residuals.opened)

    return check
