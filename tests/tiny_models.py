"""Tiny random models of every supported family, saved by the library itself, and the parts to run them.

`make_tiny_model` writes one; `Tiny` opens one and builds our own parts over it. A test module takes the fixtures
it wants by assignment: `one_thread = tiny_models.one_thread`, `tiny = tiny_models.tiny`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_tokenizer
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from subspec_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, block_entries, layer_prefix
from subspec_cli.checkpoint.repository import Repository, read_repository
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.checkpoint.tokenizer_files import TokenizerFacts
from subspec_cli.modeling.block_kernels import BlockKernel
from subspec_cli.modeling.decoder import Head, TargetDecoder
from subspec_cli.modeling.embedding import scaled_embedding, table_embedding
from subspec_cli.modeling.exact_attention import FIRST_RULES, AttentionRules, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache, cache_for
from subspec_cli.modeling.layers import LayerMath, OutputMath
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.modeling.rope import build_rope_tables
from subspec_cli.modeling.row_group import chunk_group
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.self_check import check_batch_invariance
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.streaming.disk_streamer import DiskStreamer, read_resident
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.streaming.streamer import Streamer

CPU = torch.device("cpu")
AUTO: Any = AutoModelForCausalLM  # its methods are not annotated
WRAPPED: Any = AutoModelForImageTextToText  # neither are these
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
"""The configuration classes of the families that most tests go through; `make_tiny_model` knows all of them."""
_VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 16,
}
VISION: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "pixtral", "image_size": 32},
    "gemma3": {"model_type": "siglip_vision_model", "image_size": 32},
    "gemma4": {"model_type": "gemma4_vision"},
    "gemma4_unified": {
        "model_type": "gemma4_unified_vision",
        "mm_embed_dim": 32,
        "mm_posemb_size": 8,
        "output_proj_dims": 32,
    },
    "qwen3_5": {"model_type": "qwen3_5_vision", "depth": 1, "num_heads": 2},
}
"""Wrappers by model_type, and what the vision part of a tiny one is."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 256, 257, 258; the last ends an answer."""
EOS_ID = 258
VOCAB = 288
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they gain from them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_MADE: dict[str, Tiny] = {}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Opened tiny models by family and the settings of `make_tiny_model`, made once for all test modules."""

    def make(family: str, **settings: Any) -> Tiny:
        key = repr((family, sorted(settings.items())))
        if key not in _MADE:
            _MADE[key] = Tiny(make_tiny_model(tmp_path_factory.mktemp(family), family, **settings))
        return _MADE[key]

    return make


def tiny_settings(family: str, *, layers: int = 3, hidden: int = 128, **config: Any) -> dict[str, Any]:
    """Keyword arguments of the family's config class; `config` overrides any."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": EOS_ID,
    }
    if family == "qwen3":
        sizes["head_dim"] = hidden // 4
    return sizes | config


def library_config(family: str, *, tied: bool, **settings: Any) -> Any:
    """The library's configuration object of a model, or of a wrapper with a tiny vision part.

    `text` names the family inside a wrapper.
    """
    if family not in VISION:
        return CONFIG_MAPPING[family](**settings, tie_word_embeddings=tied)
    text = settings.pop("text")
    return CONFIG_MAPPING[family](
        text_config=CONFIG_MAPPING[text](**settings, tie_word_embeddings=tied).to_dict(),
        vision_config=VISION[family] | _VISION_SIZES,
        tie_word_embeddings=tied,
        **({"mm_tokens_per_image": 4} if family == "gemma3" else {}),
    )


def make_tiny_model(
    directory: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = True,
    layers: int = 3,
    hidden: int = 128,
    sharded: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a random model with a byte-level tokenizer and a chat template; shards cut through layers.

    `config` overrides fields of the library's config class; for a wrapper these are fields of its text part, and
    `text` names that. Norms and biases are random too, so that leaving one out shows, and the weights are large
    enough for a peaked distribution over the next token.
    """
    settings = tiny_settings(family, layers=layers, hidden=hidden, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = WRAPPED if family in VISION else AUTO
        model = auto.from_config(library_config(family, tied=tied, **settings), dtype=dtype)
        _randomize(model)
    shard_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) // 3
    more = {"max_shard_size": shard_bytes} if sharded else {}
    model.save_pretrained(directory, **more)
    write_tiny_tokenizer(directory)
    return directory


def open_tokenizer(directory: Path, rows: int = VOCAB, family: str = "qwen2") -> ModelTokenizer:
    """The tokenizer of a model with so many rows in its tables."""
    return ModelTokenizer(directory, TokenizerFacts(family, "", rows))


def write_tiny_tokenizer(directory: Path) -> None:
    """256 bytes and the special tokens, with a chat template."""
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] = [
        {"id": number, "content": text} | flags for number, text in enumerate(SPECIAL_TOKENS, start=256)
    ]
    path.write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[-1],
        "bos_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _randomize(model: Any) -> None:
    """Some families' norms multiply by 1 + weight, so that theirs are around 0."""
    model_type = model.config.model_type
    from_one = model_type.startswith(("gemma2", "gemma3", "qwen3_5"))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.data.copy_(1 + 0.2 * torch.randn(buffer.shape))
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape)
        if parameter.dim() == 1 and name.endswith("weight"):
            values = (not from_one or "linear_attn" in name) + 0.2 * values
        elif parameter.dim() == 1:
            values = 0.2 * values
        elif "embed_tokens" in name or "lm_head" in name:
            values = 0.3 * values
        else:
            values = 1.3 * values / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)


@dataclass
class Tiny:
    """A saved model opened by our own code: every part from its files, none from the library."""

    directory: Path
    context: int = 256
    scratch: int = 96

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    @cached_property
    def repository(self) -> Repository:
        return read_repository(self.checkpoint)

    @cached_property
    def geometry(self) -> ModelGeometry:
        return self.repository.geometry

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.geometry.dtype)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by full name, in the type of the matrices."""
        stored = read_tensors(self.repository.tensors.values())
        return {name: tensor.to(self.dtype) for name, tensor in stored.items()}

    @cached_property
    def small(self) -> tuple[dict[str, Tensor], ...]:
        """Norms and biases of each layer by the name inside the layer."""
        return tuple(
            {
                name: self.weights[layer_prefix(layer) + name]
                for name in self.geometry.layer_shapes(layer)
                if name not in LAYER_MATRICES
            }
            for layer in range(self.geometry.layers)
        )

    @cached_property
    def head(self) -> Head:
        table = "model.embed_tokens.weight" if self.geometry.tied_head else "lm_head.weight"
        bias = self.weights.get("model.norm.bias")
        output = OutputMath(self.geometry.arithmetic, self.weights["model.norm.weight"], bias)
        return Head(output, self.weights[table])

    def math(self) -> LayerMath:
        """One shell over the small tensors."""
        ropes = build_rope_tables(
            self.repository.ropes,
            self.geometry.arithmetic,
            positions=self.context + self.scratch,
            dtype=self.dtype,
            device=CPU,
        )
        return LayerMath(self.geometry, self.small, ropes)

    def layouts(self, layer: int) -> list[BlockLayout]:
        """Where the blocks of a layer lie."""
        return [layout_block(entries) for entries in block_entries(self.repository.tensors, layer)]

    def streamer(self, layers: Iterable[int], slots: int = 3) -> DiskStreamer:
        """A stream of these layers; the caller closes it."""
        return DiskStreamer([layout for layer in layers for layout in self.layouts(layer)], slots)

    def source(self, resident: Iterable[int] | None = None, streamer: Streamer | None = None) -> TargetBlocks:
        """Every layer in memory, or these only and the others from the streamer."""
        chosen = range(self.geometry.layers) if resident is None else resident
        held = {layer: read_resident(self.layouts(layer)) for layer in chosen}
        return TargetBlocks(self.geometry.layers, held, streamer)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the table in memory."""
        rows = table_embedding(self.weights["model.embed_tokens.weight"])
        return scaled_embedding(rows, self.geometry.arithmetic)(token_ids)

    def attention(
        self, rules: AttentionRules = FIRST_RULES, kernel: BlockKernel | None = None
    ) -> ExactAttention:
        """The target's attention."""
        return ExactAttention(self.geometry, rules, dtype=self.dtype, device=CPU, kernel=kernel)

    def target(
        self,
        source: TargetBlocks | None = None,
        rules: RowRules | None = None,
        attention: ExactAttention | None = None,
    ) -> TargetDecoder:
        """The exact model, everything resident unless a source is given."""
        source, attention = source or self.source(), attention or self.attention()
        return TargetDecoder(self.math(), attention, self.embed, self.head, source, rules or RowRules(4))

    @cached_property
    def exact_rules(self) -> RowRules:
        """The row rules that the self-check finds on this machine; skips the test where there are none."""
        source = self.source()
        found = check_batch_invariance(
            lambda rules: self.target(source, rules),
            self.attention,
            self.head,
            source,
            self.kv(),
            most_nodes=self.scratch,
            prefill_rows=self.scratch,
        )
        if found.exactness != "exact":
            pytest.skip(f"no exact rows on this machine: {found.reason}")
        return found.rules

    def prefill(self, decoder: TargetDecoder, kv: KVCache, token_ids: list[int], chunk: int = 64) -> Tensor:
        """Commit tokens in chunks of absolute multiples; logits of every row, `[len(token_ids), V]`."""
        logits, position, end = [], kv.committed, kv.committed + len(token_ids)
        waiting = list(token_ids)
        while position < end:
            n = min(end, (position // chunk + 1) * chunk) - position
            logits.append(decoder.forward(chunk_group(waiting[:n], position), kv))
            kv.commit(range(n), waiting[:n])
            waiting, position = waiting[n:], position + n
        return torch.cat(logits)

    def kv(self) -> KVCache:
        """An empty cache."""
        return cache_for(
            self.math(),
            context=self.context,
            scratch=self.scratch,
            dtype=self.dtype,
            device=CPU,
        )

    def reference(self) -> Any:
        """The library's own model, with plain attention."""
        return self._library

    @cached_property
    def _library(self) -> Any:
        return self.library_in(self.dtype)

    def library_in(self, dtype: torch.dtype, attention: str = "eager") -> Any:
        """The library's own model in any type."""
        kind = json.loads((self.directory / "config.json").read_text())["model_type"]
        auto = WRAPPED if kind in VISION else AUTO
        return auto.from_pretrained(self.directory, dtype=dtype, attn_implementation=attention).eval()
