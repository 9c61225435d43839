"""How the tensors and the configuration of a small model become those of a wide, deep one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from surrogate.small_model import EMBEDDING, HEAD, NORM, SurrogateError
from surrogate.values import Form, Plan, Source, shares

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MATRIX = re.compile(r"self_attn\.[qkvo]_proj\.weight")
_UNIT_ROWS = re.compile(r"mlp\.(gate|up)_proj\.weight")
_UNIT_COLUMNS = re.compile(r"mlp\.down_proj\.weight")
_UNIT_VECTOR = re.compile(r"mlp\.(gate|up)_proj\.bias")
_VECTOR = re.compile(r"(self_attn\.[qkvo]_proj|mlp\.down_proj)\.bias|\w+_layernorm\.weight")
_PER_HEAD = re.compile(r"self_attn\.[qk]_norm\.weight")
_OUTPUT = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.\w+")


@dataclass(frozen=True)
class Widths:
    """How much larger the surrogate is in each direction."""

    hidden_copies: int
    unit_copies: int
    extra_units: int
    extra_tokens: int
    tied: bool


def owners(small_layers: int, layers: int) -> list[int]:
    """Return for each layer the small model's layer that it copies or, for an identity layer, follows."""
    return [((at + 1) * small_layers - 1) // layers for at in range(layers)]


def wide_config(config: dict[str, Any], hidden: int, layers: int, widths: Widths) -> dict[str, Any]:
    """Return the surrogate's config: `config` with the new sizes."""
    wide, small_layers = dict(config), config["num_hidden_layers"]
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        wide[key] = config[key] * hidden // config["hidden_size"]
    wide["intermediate_size"] = config["intermediate_size"] * widths.unit_copies + widths.extra_units
    if widths.extra_tokens:
        wide["vocab_size"] = config["vocab_size"] + widths.extra_tokens
    wide["num_hidden_layers"] = layers
    order = owners(small_layers, layers)
    if config.get("layer_types"):
        # A real layer keeps its kind of attention; an identity layer works with any kind.
        wide["layer_types"] = [config["layer_types"][owner] for owner in order]
    if (first := config.get("max_window_layers")) is not None:
        wide["max_window_layers"] = order.index(first) if first < small_layers else max(first, layers)
    return wide


def find_widths(
    config: dict[str, Any], hidden: int, feed_forward: int | None, vocab: int | None, *, tied: bool
) -> Widths:
    """Return how to reach the requested sizes: as many whole copies as fit, then extra units and tokens."""
    small_units, copies = config["intermediate_size"], hidden // config["hidden_size"]
    units = small_units * copies if feed_forward is None else feed_forward
    tokens = 0 if vocab is None else vocab - config["vocab_size"]
    return Widths(copies, units // small_units, units % small_units, tokens, tied)


def layout(part: str, widths: Widths) -> Form:
    """Return the form in which `part` becomes a tensor of the surrogate."""
    k, units = widths.hidden_copies, widths.unit_copies
    # Dividing a tied head would divide the embedding too, so the norm before the head is divided instead.
    if part == NORM and widths.tied:
        return Form(1, shares(k))
    if part in (HEAD, EMBEDDING):
        # A mean of rows has the mean of their logits, which is never the highest.
        columns = shares(k) if part == HEAD else (1.0,) * k
        return Form(1, columns, extra_rows=widths.extra_tokens, is_mean=True)
    if _UNIT_ROWS.fullmatch(part):
        return Form(units, shares(k), extra_rows=widths.extra_units)
    if _UNIT_COLUMNS.fullmatch(part):
        return Form(k, shares(units), extra_columns=widths.extra_units)
    if _UNIT_VECTOR.fullmatch(part):
        return Form(1, (1.0,) * units, extra_columns=widths.extra_units)
    if _MATRIX.fullmatch(part):
        # Whole heads are tiled, so that query head i keeps the key/value head i // (heads / kv heads).
        return Form(k, shares(k))
    if part == NORM or _VECTOR.fullmatch(part):
        return Form(1, (1.0,) * k)
    if _PER_HEAD.fullmatch(part):
        return Form(1, (1.0,))
    raise SurrogateError(f"cannot widen {part}: the known families have no such tensor")


def plan_tensors(
    sources: dict[str, Source], config: dict[str, Any], widths: Widths, layers: int
) -> list[Plan]:
    """Return every tensor of the surrogate, in the order in which a forward uses them."""
    tied = widths.tied
    parts: dict[str, dict[str, Source]] = {}  # by layer number, "" for tensors outside of the layers
    for name, source in sources.items():
        layer, part = match.groups() if (match := _LAYER.fullmatch(name)) else ("", name)
        # Old checkpoints also store rotary frequencies, which are computed anyway, or a second copy of a tied head.
        if not part.endswith("rotary_emb.inv_freq") and not (part == HEAD and tied):
            parts.setdefault(layer, {})[part] = source
    needed = {"", *map(str, range(config["num_hidden_layers"]))}
    ends = [EMBEDDING, NORM] if tied else [EMBEDDING, NORM, HEAD]
    if parts.keys() != needed or parts[""].keys() != set(ends):
        raise SurrogateError("the weights do not match config.json: layers or tensors are missing or unknown")
    order = owners(config["num_hidden_layers"], layers)
    plans: list[Plan] = []
    for at, owner in enumerate(order):
        for part, source in sorted(parts[str(owner)].items()):
            idle = (
                "ones" if part.endswith("norm.weight") else "zeros" if _OUTPUT.fullmatch(part) else "random"
            )
            fill = "copy" if order.index(owner) == at else idle
            plans.append(Plan(f"model.layers.{at}.{part}", source, layout(part, widths), fill))
    first, *last = (Plan(name, parts[""][name], layout(name, widths)) for name in ends)
    return [first, *plans, *last]
