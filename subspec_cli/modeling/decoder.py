"""Forwards over all layers: the target over resident and streamed blocks, the draft over substitutes.

Shapes: `N` rows (tree nodes or prompt tokens), `P` rows with padding, `V` vocab. Neither decoder knows about
speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import FEED_FORWARD, BlockKind
from subspec_cli.modeling.draft_delta import DraftPaths
from subspec_cli.modeling.draft_layers import StepView, draft_layer_math, normed
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.exact_attention import ChainRows, ExactAttention, TreeRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import HeadRows, LayerMath, OutputMath
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.row_rules import RowRules, serial
from subspec_cli.modeling.target_delta import DeltaInputs, run_delta, tree_links
from subspec_cli.modeling.target_flow import BatchFlow, Flow, SequencePart, SequenceRows, joined

Embedding = Callable[[Tensor], Tensor]
"""Maps `[P]` token ids to `[P, hidden]` rows."""


@dataclass(frozen=True, slots=True)
class Block:
    """A streamed or resident block: the matrices of `kind` in `layer`, by the name inside the layer."""

    layer: int
    kind: BlockKind
    matrices: Mapping[str, Tensor]


class BlockStream(Protocol):
    """Yields the target's blocks in the order of use."""

    @property
    def most_held(self) -> int:
        """Most blocks whose weights may be held at once while further blocks are read."""
        ...

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:
        """One pass over all layers; `parts` of a layer's blocks are valid together, as in `Streamer.blocks`."""
        ...


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """The draft's logits `[N, V]` for the next token; approximate if its head is low-bit."""

    logits: Tensor
    normed: Tensor | None = None
    """`[N, hidden]` inputs of a low-bit head; None if the logits come from the 16-bit head."""
    head: Head | None = None
    """The 16-bit head, if a low-bit head computed the logits."""

    def of(self, rows: slice) -> DraftLogits:
        """The logits of some of the rows."""
        return DraftLogits(self.logits[rows], None if self.normed is None else self.normed[rows], self.head)

    @property
    def is_rough(self) -> bool:
        """Whether a low-bit head computed the logits."""
        return self.head is not None

    def rescored(self, token_ids: Tensor) -> Tensor:
        """Logits of the 16-bit head, float32, for `[N, K]` candidate tokens that a low-bit head found."""
        assert self.head is not None
        assert self.normed is not None
        # Multiply and sum elementwise: for a GEMM, oneDNN would compile and keep a kernel for every row count.
        found = (F.embedding(token_ids, self.head.weight).float() * self.normed.float()[:, None]).sum(-1)
        return self.head.output.finished(found.to(self.logits.dtype)).float()


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and vocabulary head."""

    output: OutputMath
    weight: Tensor
    """`[V, hidden]`; the embedding itself if the head is tied."""

    def logits(self, hidden: Tensor, rules: RowRules) -> Tensor:
        """Logits `[P, V]` in the model's dtype from `[P, hidden]`; the rules make each row independent."""
        return self.output.finished(rules.linear(self.output.normed(hidden), self.weight, None))

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Logits for `[N, hidden]` rows of the draft, without row rules."""
        return DraftLogits(self.output.finished(F.linear(self.output.normed(hidden), self.weight)))


class TargetDecoder:
    """The exact model: every linear follows the row rules, blocks come from the stream in the order of use."""

    def __init__(
        self,
        math: LayerMath,
        attention: ExactAttention,
        embed: Embedding,
        head: Head,
        stream: BlockStream,
        rules: RowRules,
    ) -> None:
        self.math = math
        self.attention = attention
        self.rules = rules
        self._embed = embed
        self._head = head
        self._stream = stream

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return self.math.geometry.layers

    def forward(self, group: RowGroup, kv: KVCache, *, logits_from: int = 0) -> Tensor:
        """Run one group: logits `[rows - logits_from, V]`; its keys and values are written to the cache."""
        flow = self.begin([[SequenceRows(group, kv)]])
        with closing(self.layers(flow)) as layers:
            for _ in layers:
                pass
        return self.logits(flow, [(0, slice(logits_from, group.rows))])

    def begin_answer(self, kv: KVCache, prompt_tokens: int) -> bool:
        """Choose the rotary table for a prompt; return whether rows that are cached are turned by another one."""
        return self.math.ropes.differ(kv.begin_answer(prompt_tokens), prompt_tokens)

    @torch.inference_mode()
    def begin(self, batches: Sequence[Sequence[SequenceRows]]) -> Flow:
        """Begin a pass over batches of rows: embed their tokens, ready for `layers`.

        The rows of a batch go through a layer together. Only trees share a batch, each of another sequence.
        """
        return Flow(tuple(self.begin_rows(self._embed(self._padded_ids(batch)), batch) for batch in batches))

    @torch.inference_mode()
    def layers(self, flow: Flow) -> Generator[int, None, None]:
        """Run the layers one after another and yield the number of each layer that is done.

        All batches go through a block, or through a whole feed-forward, while its weights are there. When a number is
        yielded, no further block has been waited for. Close the generator when a block fails or the user interrupts:
        the next pass starts at the first block.
        """
        together = len(flow.batches) > 1 and self._stream.most_held >= len(FEED_FORWARD)
        with closing(self._stream.blocks((1, len(FEED_FORWARD)) if together else (1,))) as blocks:
            done = -1
            for block in blocks:
                if done >= 0 and block.layer != done:
                    yield done
                # Activations of a whole prompt would be large: a chunk goes through all of the feed-forward.
                if together and block.kind == FEED_FORWARD[0]:
                    parts = [block, *islice(blocks, len(FEED_FORWARD) - 1)]
                else:
                    parts = [block]
                for batch in flow.batches:
                    for part in parts:
                        self.run_block(part, batch)
                done = block.layer
        yield done

    @torch.inference_mode()
    def logits(self, flow: Flow, wanted: Sequence[tuple[int, slice]]) -> Tensor:
        """End a pass, once all layers are done: logits `[N, V]` of the wanted rows, by batch and rows in it."""
        rows = joined([flow.batches[number].hidden[place] for number, place in wanted])
        return self._head.logits(self._pad(rows), self.rules)[: len(rows)]

    def begin_rows(self, hidden: Tensor, batch: Sequence[SequenceRows]) -> BatchFlow:
        """Begin a batch with `[P, hidden]` rows in place of tokens."""
        parts, first = [], 0
        for rows in batch:
            place = slice(first, first + rows.group.rows)
            parts.append(self._part(place, rows.group, rows.kv, hidden.device))
            first = place.stop
        positions = joined([rows.group.positions for rows in batch]).to(hidden.device)
        lengths = [rows.kv.prompt_tokens for rows in batch]
        prompt_tokens = lengths[0]
        if len(batch) > 1:
            prompt_tokens = torch.cat([n.expand(r.group.rows) for n, r in zip(lengths, batch, strict=True)])
        return BatchFlow(tuple(parts), first, hidden, self.math.ropes.rows(positions, prompt_tokens))

    def run_block(self, block: Block, flow: BatchFlow) -> None:
        """Run one block of a layer for one batch; `flow` carries the results to the next block."""
        if block.kind == "attention":
            self._run_attention(block, flow)
        else:
            self.run_feed_forward(block, flow)

    def run_feed_forward(self, block: Block, flow: BatchFlow) -> None:
        """Run the gate, up or down block of a layer for one batch."""
        match block.kind:
            case "gate":
                if not self.math.is_parallel:
                    with serial(flow.hidden.numel()):
                        flow.normed = self.math.mlp_input(block.layer, flow.hidden)
                flow.inner = self._project(block, "mlp.gate_proj", flow.normed)
            case "up":
                up = self._project(block, "mlp.up_proj", flow.normed)
                with serial(up.numel()):
                    flow.inner = self.rules.gated(self.math.geometry.arithmetic.activation, flow.inner, up)
                del flow.normed
            case "down":
                output = self._project(block, "mlp.down_proj", flow.inner)
                with serial(output.numel()):
                    flow.hidden = self.math.with_mlp(block.layer, flow.hidden, output)
                del flow.inner

    def project_heads(self, block: Block, flow: BatchFlow) -> HeadRows:
        """Return the rotated queries, keys and values of a batch's rows, without padding."""
        elements = flow.hidden.numel()
        with serial(elements):
            normed = self.math.attention_input(block.layer, flow.hidden)
        names = "qk" if self.math.shape(block.layer).value_is_key else "qkv"
        projected = [self._project(block, f"self_attn.{name}_proj", normed) for name in names]
        if self.math.is_parallel:
            flow.normed = normed
        with serial(elements):
            rows = torch.cat(projected, -1)[: flow.rows]
            return self.math.heads(block.layer, rows, flow.rotations)

    def output_name(self, layer: int) -> str:
        """The matrix that projects what a layer's attention, or what is in its place, gives."""
        return "linear_attn.out_proj.weight" if layer in self.math.delta_layers else "self_attn.o_proj.weight"

    def finish_attention(self, block: Block, flow: BatchFlow, attended: Tensor) -> None:
        """Project `[N, H * D]` attended rows and add them to the hidden states."""
        attended = F.pad(attended, (0, 0, 0, len(flow.hidden) - flow.rows))
        output = self._project(block, self.output_name(block.layer).removesuffix(".weight"), attended)
        with serial(output.numel()):
            flow.hidden = self.math.with_attention(block.layer, flow.hidden, output)

    def project_delta(self, block: Block, flow: BatchFlow) -> DeltaInputs:
        """Return what a batch's rows put into a recurrent layer, without padding."""
        normed, rows = self.math.attention_input(block.layer, flow.hidden), slice(flow.rows)
        qkv, gate = (self._project(block, f"linear_attn.in_proj_{name}", normed) for name in ("qkv", "z"))
        gates = self.math.delta_layers[block.layer].gates(normed, self.rules)
        return DeltaInputs(qkv, gate, gates).of(rows)

    def _part(self, place: slice, group: RowGroup, kv: KVCache, device: torch.device) -> SequencePart:
        attended: ChainRows | TreeRows = ChainRows(group.start)
        links = None
        if group.path is not None:
            attended = self.attention.tree_rows(group.positions, group.path, group.start)
            if self.math.delta_layers:
                links = tree_links(group.path, self.math.geometry.delta[0].kernel, device)
        return SequencePart(place, group.start, kv, attended, links)

    def _padded_ids(self, batch: Sequence[SequenceRows]) -> Tensor:
        """Return ids `[P]`. Padding repeats the last token: its values are finite and nothing reads them."""
        ids = joined([rows.group.token_ids for rows in batch])
        return F.pad(ids, (0, self.rules.padded(len(ids)) - len(ids)), value=int(ids[-1]))

    def _run_delta(self, block: Block, flow: BatchFlow) -> None:
        inputs = self.project_delta(block, flow)
        outputs = [
            run_delta(
                self.math.delta_layers[block.layer],
                part.kv.recurrent,
                block.layer,
                inputs.of(part.place),
                part.start,
                part.links,
            )
            for part in flow.parts
            if part.kv.recurrent is not None
        ]
        self.finish_attention(block, flow, joined(outputs))

    def _run_attention(self, block: Block, flow: BatchFlow) -> None:
        if block.layer in self.math.delta_layers:
            self._run_delta(block, flow)
            return
        heads, shape = self.project_heads(block, flow), self.math.shape(block.layer)
        attended = []
        for part in flow.parts:
            part.kv.write(block.layer, part.start, heads.keys[:, part.place], heads.values[:, part.place])
            keys, values = part.kv.read(block.layer, part.kv.rows)
            query = heads.query[part.place]
            attended.append(self.attention.attend(query, keys, values, part.attended, shape))
        self.finish_attention(block, flow, heads.gated(joined(attended)))

    def _project(self, block: Block, name: str, inputs: Tensor) -> Tensor:
        return self.rules.linear(inputs, block.matrices[f"{name}.weight"], self.math.bias(block.layer, name))

    def _pad(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self.rules.padded(len(rows)) - len(rows)))


class DraftHead(Protocol):
    """The draft's head: the target's own, or a low-bit copy."""

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Logits `[N, V]` of `[N, hidden]` rows."""
        ...


class DraftLayer(Protocol):
    """The projections of one layer of the draft."""

    def qkv(self, inputs: Tensor) -> Tensor:
        """Query, key and value rows, concatenated; in a recurrent layer with the gate behind them."""
        ...

    def attention_output(self, inputs: Tensor) -> Tensor:
        """The output projection of attention."""
        ...

    def feed_forward(self, inputs: Tensor) -> Tensor:
        """The whole gated feed-forward."""
        ...


class DraftDecoder:
    """The draft model: substitutes and resident layers, with the target's cache, embedding, norms and head."""

    def __init__(
        self, math: LayerMath, embed: Embedding, head: DraftHead, layers: Sequence[DraftLayer]
    ) -> None:
        self.embed = embed
        self._math = math
        self._head = head
        self._layers = tuple((layer, draft_layer_math(math, number)) for number, layer in enumerate(layers))

    @torch.inference_mode()
    def forward(self, rows: Sequence[DraftRows]) -> DraftLogits:
        """Run one draft step over rows of some sequences: logits `[N, V]`, one sequence after another.

        Draft-made keys and values are written to scratch rows of each sequence's cache.
        """
        hidden = self.embed(joined([part.batch.token_ids for part in rows]))
        return self.run(hidden, [part.to(hidden.device) for part in rows])

    def run(self, hidden: Tensor, rows: Sequence[DraftRows]) -> DraftLogits:
        """Run one draft step from `[N, hidden]` embeddings, which are overwritten, with all inputs on one device."""
        deltas, is_parallel = self._math.delta_layers, self._math.is_parallel
        step = StepView(self._math, rows, hidden)
        paths = DraftPaths(rows) if deltas else None
        for number, (layer, math) in enumerate(self._layers):
            inputs = normed(math.attention_input, hidden)
            projected = layer.qkv(inputs)
            if math.heads is not None:
                attended = math.heads.attend(number, projected, step)
            else:
                assert paths is not None
                delta = deltas[number]
                attended = paths.attend(delta, number, projected, delta.gates(inputs, None))
            if is_parallel:
                output = layer.feed_forward(inputs)
                math.with_attention_(hidden, layer.attention_output(attended))
            else:
                math.with_attention_(hidden, layer.attention_output(attended))
                output = layer.feed_forward(normed(math.mlp_input, hidden))
            math.with_mlp_(hidden, output)
        return self._head.guess(hidden)
