"""One forward over a source of layers: the target over resident and streamed blocks, the draft over substitutes.

Shapes: `N` rows (tree nodes or prompt tokens), `V` vocab. Neither knows of trees or of speculation.
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
from subspec_cli.modeling.layers import LayerMath, RowRules, TokenBatch, rms_norm
from subspec_cli.modeling.rope import Rotation

Embedding = Callable[[Tensor], Tensor]
"""`[P]` token ids to `[P, hidden]` rows."""


@dataclass(frozen=True, slots=True)
class Block:
    """One streamed or resident block: the matrices of `kind` in `layer`, by the name inside the layer."""

    layer: int
    kind: BlockKind
    matrices: Mapping[str, Tensor]


class BlockStream(Protocol):
    """Where the target's blocks come from, in the order of use."""

    def blocks(self) -> Generator[Block, None, None]:
        """One pass over all layers."""
        ...


@dataclass(slots=True)
class Flow:
    """What passes from block to block in one forward."""

    hidden: Tensor
    batch: TokenBatch
    kv: KVCache
    rotation: Rotation
    normed: Tensor = field(init=False)
    inner: Tensor = field(init=False)


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """What the draft says of the next token: `[N, V]` logits, rough ones where its head has few bits."""

    logits: Tensor
    normed: Tensor | None = None
    """`[N, hidden]` inputs of a rough head; None where the logits are as good as they get."""
    weight: Tensor | None = None
    """`[V, hidden]` of the 16-bit head that a rough one stands in for."""

    @property
    def is_rough(self) -> bool:
        """Whether a head of few bits made them."""
        return self.weight is not None

    def rescored(self, token_ids: Tensor) -> Tensor:
        """Rough logits of `[N, K]` candidates as the 16-bit head gives them, float32."""
        assert self.weight is not None
        assert self.normed is not None
        # Products of few rows, by elements: a matrix kernel for every number of rows would cost its code.
        found = (self.weight[token_ids].float() * self.normed.float()[:, None]).sum(-1)
        return found.to(self.logits.dtype).float()


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and vocabulary head."""

    norm_weight: Tensor
    weight: Tensor
    """`[V, hidden]`; the embedding itself when tied."""
    eps: float

    def logits(self, hidden: Tensor, rules: RowRules) -> Tensor:
        """`[P, hidden]` to `[P, V]` in the model's dtype, row-independent by the rules."""
        return rules.linear(rms_norm(hidden, self.norm_weight, self.eps), self.weight, None)

    def guess(self, hidden: Tensor) -> DraftLogits:
        """The same for `[N, hidden]` rows of the draft, without rules."""
        return DraftLogits(F.linear(rms_norm(hidden, self.norm_weight, self.eps), self.weight))


class TargetDecoder:
    """The exact model: every linear under the row rules, every block as the source hands it over."""

    def __init__(
        self, math: LayerMath, embed: Embedding, head: Head, stream: BlockStream, rules: RowRules
    ) -> None:
        self.math = math
        self.rules = rules
        self._embed = embed
        self._head = head
        self._stream = stream

    def forward(self, batch: TokenBatch, kv: KVCache, *, logits_from: int = 0) -> Tensor:
        """Logits `[rows - logits_from, V]` of a padded batch; writes its keys and values to the cache."""
        flow = self.begin_tokens(batch, kv)
        with closing(self.layers(flow)) as layers:
            for _ in layers:
                pass
        return self.logits(flow, logits_from=logits_from)

    @torch.inference_mode()
    def begin_tokens(self, batch: TokenBatch, kv: KVCache) -> Flow:
        """The first half of a pass: the batch's embeddings, on their way to the layers."""
        return self.begin_rows(self._embed(batch.token_ids), batch, kv)

    @torch.inference_mode()
    def layers(self, flow: Flow) -> Generator[int, None, None]:
        """Run layer after layer as the source hands them over, each number given when it is done.

        By then its last slot is given back, and the next block is not waited for yet. To be closed when a block
        fails or the user interrupts: the next pass starts at the first block.
        """
        done = -1
        with closing(self._stream.blocks()) as blocks:
            for block in blocks:
                if block.layer != done >= 0:
                    yield done
                self.run_block(block, flow)
                done = block.layer
        yield done

    @torch.inference_mode()
    def logits(self, flow: Flow, *, logits_from: int = 0) -> Tensor:
        """The last half: `[rows - logits_from, V]` once all layers are done."""
        rows = flow.batch.rows
        wanted = self._pad(flow.hidden[logits_from:rows])
        return self._head.logits(wanted, self.rules)[: rows - logits_from]

    def begin_rows(self, hidden: Tensor, batch: TokenBatch, kv: KVCache) -> Flow:
        """A flow that begins with `[P, hidden]` rows."""
        batch = batch.to(hidden.device)
        return Flow(hidden, batch, kv, self.math.rope.rows(batch.positions[: batch.rows]))

    def run_block(self, block: Block, flow: Flow) -> None:
        """One block's share of its layer; `flow` carries what the next block needs."""
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
        mixed = self.math.mix(layer, projected, flow.rotation, flow.batch, flow.kv, allowed)
        flow.hidden = flow.hidden + self._project(block, "self_attn.o_proj", mixed)

    def _run_gate(self, block: Block, flow: Flow) -> None:
        flow.normed = self.math.mlp_input(block.layer, flow.hidden)
        flow.inner = self._project(block, "mlp.gate_proj", flow.normed)

    def _run_up(self, block: Block, flow: Flow) -> None:
        flow.inner = self.rules.gated(flow.inner, self._project(block, "mlp.up_proj", flow.normed))

    def _run_down(self, block: Block, flow: Flow) -> None:
        flow.hidden = flow.hidden + self._project(block, "mlp.down_proj", flow.inner)

    def _project(self, block: Block, name: str, inputs: Tensor) -> Tensor:
        return self.rules.linear(inputs, block.matrices[f"{name}.weight"], self.math.bias(block.layer, name))

    def _pad(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self.rules.padded(len(rows)) - len(rows)))


class DraftHead(Protocol):
    """The head as the draft runs it: the target's own, or a low-bit copy."""

    def guess(self, hidden: Tensor) -> DraftLogits:
        """`[N, hidden]` rows to logits `[N, V]`."""
        ...


class DraftLayer(Protocol):
    """The projections of one layer as the draft runs them."""

    def qkv(self, inputs: Tensor) -> Tensor:
        """Query, key and value rows side by side."""
        ...

    def attention_output(self, inputs: Tensor) -> Tensor:
        """Output projection of attention."""
        ...

    def feed_forward(self, inputs: Tensor) -> Tensor:
        """The whole gated feed-forward."""
        ...


class DraftDecoder:
    """The guess: substitutes and resident layers over the same cache, embedding, norms and head."""

    def __init__(
        self, math: LayerMath, embed: Embedding, head: DraftHead, layers: Sequence[DraftLayer]
    ) -> None:
        self.embed = embed
        self._math = math
        self._head = head
        self._layers = tuple(layers)

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """Logits `[N, V]`; writes draft-made keys and values to scratch rows."""
        hidden = self.embed(batch.token_ids)
        return self.run(hidden, batch.to(hidden.device), kv)

    def run(self, hidden: Tensor, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """The same from `[N, hidden]` embeddings, all on one device."""
        rotation = self._math.rope.rows(batch.positions)
        sizes = self._math.geometry
        # One mask serves all layers of a window: what a step needs once is made once.
        masks = {
            window: grouped_mask(self._math.allowed_in(window, batch), sizes.heads // sizes.kv_heads, hidden)
            for window in set(sizes.windows)
        }
        for number, layer in enumerate(self._layers):
            projected = layer.qkv(self._math.attention_input(number, hidden))
            mixed = self._math.mix(number, projected, rotation, batch, kv, masks[sizes.windows[number]])
            hidden = hidden + layer.attention_output(mixed)
            hidden = hidden + layer.feed_forward(self._math.mlp_input(number, hidden))
        return self._head.guess(hidden)
