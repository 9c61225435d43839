"""Queries, keys and trees for tests of the target's attention, and attention written out in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tiny_models import CPU
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry, geometry_from_config
from subspec_cli.modeling.block_kernels import BlockKernel
from subspec_cli.modeling.exact_attention import FIRST_RULES, AttentionRules, ExactAttention


def sizes_of(
    heads: int = 4, kv_heads: int = 2, dim: int = 16, windows: tuple[int | None, ...] = (None,)
) -> ModelGeometry:
    """A geometry of which only the heads and windows matter."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": heads * dim,
        "intermediate_size": 32, "num_hidden_layers": len(windows), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "vocab_size": 64, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "sliding_window": None,
    }  # fmt: skip
    sizes = geometry_from_config(config, "BF16")
    return replace(sizes, mixers=tuple(replace(sizes.attention[0], window=window) for window in windows))


def attention_of(
    sizes: ModelGeometry,
    dtype: torch.dtype = torch.bfloat16,
    rules: AttentionRules = FIRST_RULES,
    kernel: BlockKernel | None = None,
) -> ExactAttention:
    """The target's attention for these sizes."""
    return ExactAttention(sizes, rules, dtype=dtype, device=CPU, kernel=kernel)


@dataclass(frozen=True)
class Case:
    """Queries of all positions, and a cache whose rows are the positions."""

    query: Tensor
    """`[T, H, D]`."""
    keys: Tensor
    values: Tensor

    def plain(self, position: int, window: int | None) -> Tensor:
        """The row at a position in float64, `[H * D]`, over the keys in the window."""
        first = 0 if window is None else max(0, position - window + 1)
        group = self.query.shape[1] // len(self.keys)
        keys = self.keys[:, first : position + 1].double().repeat_interleave(group, 0)
        values = self.values[:, first : position + 1].double().repeat_interleave(group, 0)
        query = self.query[position].double()
        scores = torch.einsum("hcd,hd->hc", keys, query) * query.shape[-1] ** -0.5
        return torch.einsum("hc,hcd->hd", scores.softmax(-1), values).flatten()


def random_case(sizes: ModelGeometry, rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    """A case of `rows` positions, with room for a tree behind them."""
    generator = torch.Generator().manual_seed(seed)
    capacity = -(-(rows + 64) // 64) * 64
    shape = sizes.attention[0]
    query = torch.randn((rows, shape.heads, shape.head_dim), generator=generator).to(dtype)
    keys, values = (
        torch.randn((shape.kv_heads, capacity, shape.head_dim), generator=generator).to(dtype)
        for _ in range(2)
    )
    return Case(query, keys, values)


@dataclass(frozen=True)
class Placed:
    """A tree in the cache, one of whose paths is a piece of the chain."""

    case: Case
    """The cache with the tree's rows in it, and the queries of its nodes."""
    depths: Tensor
    path: Tensor
    on_path: Tensor
    """Nodes of the path, root first."""


def random_tree_in(case: Case, committed: int, nodes: int, depth: int, seed: int = 0) -> Placed:
    """Place a tree behind `committed` rows: its path holds what the chain has there, all other nodes are noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(nodes, generator=generator)
    on_path = order[:depth].sort().values
    depths, path = torch.zeros(nodes, dtype=torch.long), torch.eye(nodes, dtype=torch.bool)
    for level, node in enumerate(on_path.tolist()):
        depths[node] = level
        path[node, on_path[: level + 1]] = True
    for node in order[depth:].tolist():
        depths[node] = int(torch.randint(1, depth + 1, (1,), generator=generator)) if depth > 1 else 1
        path[node, on_path[: int(depths[node])]] = True
    rows = slice(committed, committed + nodes)
    placed = []
    for cached in (case.keys, case.values):
        changed = cached.clone()
        changed[:, rows] = torch.randn(changed[:, rows].shape, generator=generator).to(changed.dtype)
        changed[:, committed + on_path] = cached[:, committed : committed + depth]
        placed.append(changed)
    query = torch.randn((nodes, *case.query.shape[1:]), generator=generator).to(case.query.dtype)
    query[on_path] = case.query[committed : committed + depth]
    return Placed(Case(query, *placed), depths, path, on_path)
