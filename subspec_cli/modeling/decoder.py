"""Forwards over all layers: the target over resident and streamed blocks, the draft over substitutes.

Shapes: `N` rows (tree nodes or prompt tokens), `P` rows with padding, `V` vocab. Neither decoder knows about trees
or speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import BlockKind
from subspec_cli.modeling.attention import grouped_mask
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import LayerMath, rms_norm
from subspec_cli.modeling.rope import Rotation
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.token_batch import TokenBatch

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

    def blocks(self) -> Generator[Block, None, None]:
        """One pass over all layers."""
        ...


@dataclass(slots=True)
class Flow:
    """The state that one forward carries from block to block."""

    hidden: Tensor
    batch: TokenBatch
    kv: KVCache
    rotation: Rotation
    normed: Tensor = field(init=False)
    """Normed input of the feed-forward, from the gate block to the up block."""
    inner: Tensor = field(init=False)
    """Gate, then gated activations, from the gate block to the down block."""


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """The draft's logits `[N, V]` for the next token; approximate if its head is low-bit."""

    logits: Tensor
    normed: Tensor | None = None
    """`[N, hidden]` inputs of a low-bit head; None if the logits come from the 16-bit head."""
    weight: Tensor | None = None
    """`[V, hidden]` weights of the 16-bit head, if a low-bit head computed the logits."""

    @property
    def is_rough(self) -> bool:
        """Whether a low-bit head computed the logits."""
        return self.weight is not None

    def rescored(self, token_ids: Tensor) -> Tensor:
        """Logits of the 16-bit head, float32, for `[N, K]` candidate tokens that a low-bit head found."""
        assert self.weight is not None
        assert self.normed is not None
        # Multiply and sum elementwise: for a GEMM, oneDNN would compile and keep a kernel for every row count.
        found = (self.weight[token_ids].float() * self.normed.float()[:, None]).sum(-1)
        return found.to(self.logits.dtype).float()


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and vocabulary head."""

    norm_weight: Tensor
    weight: Tensor
    """`[V, hidden]`; the embedding itself if the head is tied."""
    eps: float

    def logits(self, hidden: Tensor, rules: RowRules) -> Tensor:
        """Logits `[P, V]` in the model's dtype from `[P, hidden]`; the rules make each row independent."""
        return rules.linear(rms_norm(hidden, self.norm_weight, self.eps), self.weight, None)

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Logits for `[N, hidden]` rows of the draft, without row rules."""
        return DraftLogits(F.linear(rms_norm(hidden, self.norm_weight, self.eps), self.weight))


class TargetDecoder:
    """The exact model: every linear follows the row rules, blocks come from the stream in the order of use."""

    def __init__(
        self, math: LayerMath, embed: Embedding, head: Head, stream: BlockStream, rules: RowRules
    ) -> None:
        self.math = math
        self.rules = rules
        self._embed = embed
        self._head = head
        self._stream = stream

    def forward(self, batch: TokenBatch, kv: KVCache, *, logits_from: int = 0) -> Tensor:
        """Run a padded batch: logits `[rows - logits_from, V]`; its keys and values are written to the cache."""
        flow = self.begin_tokens(batch, kv)
        with closing(self.layers(flow)) as layers:
            for _ in layers:
                pass
        return self.logits(flow, logits_from=logits_from)

    @torch.inference_mode()
    def begin_tokens(self, batch: TokenBatch, kv: KVCache) -> Flow:
        """Begin a pass: embed the batch's tokens, ready for `layers`."""
        return self.begin_rows(self._embed(batch.token_ids), batch, kv)

    @torch.inference_mode()
    def layers(self, flow: Flow) -> Generator[int, None, None]:
        """Run the layers one after another and yield the number of each layer that is done.

        When a number is yielded, the layer's last slot has been released and the next block has not been waited
        for. Close the generator when a block fails or the user interrupts: the next pass starts at the first
        block.
        """
        done = -1
        with closing(self._stream.blocks()) as blocks:
            for block in blocks:
                if done >= 0 and block.layer != done:
                    yield done
                self.run_block(block, flow)
                done = block.layer
        yield done

    @torch.inference_mode()
    def logits(self, flow: Flow, *, logits_from: int = 0) -> Tensor:
        """End a pass: logits `[rows - logits_from, V]`, once all layers are done."""
        rows = flow.batch.rows
        wanted = self._pad(flow.hidden[logits_from:rows])
        return self._head.logits(wanted, self.rules)[: rows - logits_from]

    def begin_rows(self, hidden: Tensor, batch: TokenBatch, kv: KVCache) -> Flow:
        """Begin a pass with `[P, hidden]` rows in place of tokens."""
        batch = batch.to(hidden.device)
        return Flow(hidden, batch, kv, self.math.rope.rows(batch.positions[: batch.rows]))

    def run_block(self, block: Block, flow: Flow) -> None:
        """Run one block of a layer; `flow` carries the results to the next block."""
        match block.kind:
            case "attention":
                self._run_attention(block, flow)
            case "gate":
                self._run_gate(block, flow)
            case "up":
                self._run_up(block, flow)
            case "down":
                self._run_down(block, flow)

    def _run_attention(self, block: Block, flow: Flow) -> None:
        layer = block.layer
        normed = self.math.attention_input(layer, flow.hidden)
        projected = torch.cat([self._project(block, f"self_attn.{name}_proj", normed) for name in "qkv"], -1)
        allowed = self.math.allowed_in(self.math.geometry.windows[layer], flow.batch)
        attended = self.math.rotate_and_attend(layer, projected, flow.rotation, flow.batch, flow.kv, allowed)
        flow.hidden = flow.hidden + self._project(block, "self_attn.o_proj", attended)

    def _run_gate(self, block: Block, flow: Flow) -> None:
        flow.normed = self.math.mlp_input(block.layer, flow.hidden)
        flow.inner = self._project(block, "mlp.gate_proj", flow.normed)

    def _run_up(self, block: Block, flow: Flow) -> None:
        flow.inner = self.rules.silu_mul(flow.inner, self._project(block, "mlp.up_proj", flow.normed))

    def _run_down(self, block: Block, flow: Flow) -> None:
        flow.hidden = flow.hidden + self._project(block, "mlp.down_proj", flow.inner)

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
        """Query, key and value rows, concatenated."""
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
        self._layers = tuple(layers)

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """Run one draft step: logits `[N, V]`; draft-made keys and values are written to scratch rows."""
        hidden = self.embed(batch.token_ids)
        return self.run(hidden, batch.to(hidden.device), kv)

    def run(self, hidden: Tensor, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """Run one draft step from `[N, hidden]` embeddings, with all inputs on one device."""
        rotation = self._math.rope.rows(batch.positions)
        sizes = self._math.geometry
        # Layers with the same window share one mask.
        masks = {
            window: grouped_mask(self._math.allowed_in(window, batch), sizes.heads // sizes.kv_heads, hidden)
            for window in set(sizes.windows)
        }
        for number, layer in enumerate(self._layers):
            projected = layer.qkv(self._math.attention_input(number, hidden))
            attended = self._math.rotate_and_attend(
                number, projected, rotation, batch, kv, masks[sizes.windows[number]]
            )
            hidden = hidden + layer.attention_output(attended)
            hidden = hidden + layer.feed_forward(self._math.mlp_input(number, hidden))
        return self._head.guess(hidden)
