"""Substitutes: quanto's numbers on disk, torch's kernels in memory, and nothing that needs a compiler."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import CPU, Tiny
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, layer_prefix
from subspec_cli.modeling import quantization as quantize_module
from subspec_cli.modeling import substitute
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.quantization import QuantizedLayer, quantize_layer
from subspec_cli.modeling.substitute import (
    Int4Linear,
    Int8Linear,
    PlainLinear,
    SubstituteLayer,
    load_substitute,
    resident_layer,
    unpack_codes,
)
from subspec_cli.modeling.token_batch import causal_batch
from subspec_cli.substitutes.quality import matrix_kind, summed
from subspec_cli.substitutes.settings import SubstituteSettings, group_size_for, substitute_layer_bytes

MATRICES = tuple(name for name in LAYER_MATRICES if not name.startswith("linear_attn."))
"""Those of a layer with attention."""

MakeTiny = Callable[..., Tiny]

SETTINGS = [(8, "minmax"), (4, "minmax"), (4, "hqq"), (2, "minmax"), (2, "hqq")]
QUANTIZED_DB = {8: 35.0, 4: 17.0, 2: 2.0}
"""Least signal-to-noise ratio of quantized normal weights."""
KERNEL_DB = 35.0
"""Least ratio of a kernel's result to the same product in float32: bfloat16 rounding, nothing more."""


def sqnr_db(signal: Tensor, found: Tensor) -> float:
    noise = (signal.double() - found.double()).square().sum()
    return float(10 * torch.log10(signal.double().square().sum() / noise)) if noise else math.inf


def layer_tensors(model: Tiny, layer: int = 1) -> dict[str, Tensor]:
    """A layer's tensors by the name inside the layer."""
    prefix = layer_prefix(layer)
    return {
        name.removeprefix(prefix): tensor for name, tensor in model.weights.items() if name.startswith(prefix)
    }


def dequantized(stored: dict[str, Tensor], name: str, shape: tuple[int, ...], bits: int) -> Tensor:
    """A stored matrix in float32, by the formula of the format."""
    if name in stored:
        return stored[name].float()
    codes, scale = stored[f"{name}.codes"], stored[f"{name}.scale"].float()
    if bits == 8:
        return codes.float() * scale
    grouped = by_hand_unpacked(codes, bits)[: len(scale)].float()
    return (grouped * scale - stored[f"{name}.shift"].float()).view(shape)


def by_hand_unpacked(packed: Tensor, bits: int) -> Tensor:
    """Byte row i holds rows i, i + n, ... from its lowest bits up."""
    rows = []
    for shift in range(0, 8, bits):
        rows += [(row // 2**shift) % 2**bits for row in packed.int()]
    return torch.stack(rows).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def no_compiler() -> Iterator[None]:
    """Quanto's C++ extension takes a minute and a compiler: nothing here may ask for it."""
    from optimum.quanto.library.extensions import extension

    def refuse(**_: Any) -> None:
        raise AssertionError("a C++ extension is being compiled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", refuse)
        patch.setattr(torch.utils.cpp_extension, "load", refuse)
        yield


@dataclass
class Quantized:
    """A layer of a model and its substitute."""

    model: Tiny
    bits: int
    optimizer: str
    made: QuantizedLayer

    def stored(self, name: str) -> Tensor:
        """A matrix as it is stored, in float32."""
        return dequantized(self.made.tensors, name, self.model.geometry.layer_shapes()[name], self.bits)

    def product(self, name: str, inputs: Tensor) -> Tensor:
        """What the projection should give, in float32, bias included."""
        found = inputs.float() @ self.stored(f"{name}.weight").T
        bias = self.model.small[1].get(f"{name}.bias")
        return found if bias is None else found + bias.float()

    def load(self) -> SubstituteLayer:
        return load(self.model, self.bits, self.made.tensors)


def quantize(model: Tiny, bits: int, optimizer: str = "minmax") -> Quantized:
    return Quantized(
        model, bits, optimizer, quantize_layer(layer_tensors(model), SubstituteSettings(bits, optimizer))
    )


@pytest.fixture(params=SETTINGS, ids=lambda setting: f"{setting[1]} {setting[0]}")
def quantized(request: pytest.FixtureRequest, tiny: MakeTiny) -> Quantized:
    return quantize(tiny("qwen2"), *request.param)


def load(model: Tiny, bits: int, stored: dict[str, Tensor], layer: int = 1) -> SubstituteLayer:
    return load_substitute(model.math(), layer, stored, SubstituteSettings(bits, "minmax"), CPU)


def qkv(layer: SubstituteLayer, inputs: Tensor) -> tuple[Tensor, ...]:
    """Separate query, key and value: four heads and two pairs of key and value heads."""
    together = layer.qkv(inputs)
    head_dim = together.shape[1] // 8
    return together.split((4 * head_dim, 2 * head_dim, 2 * head_dim), dim=-1)


def rows(model: Tiny, count: int, width: int) -> Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(1)).to(model.dtype)


# --- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "optimizer"), SETTINGS)
def test_stored_tensors_are_what_quanto_makes(tiny: MakeTiny, bits: int, optimizer: str) -> None:
    from optimum.quanto import (
        AbsmaxOptimizer,
        HqqOptimizer,
        MaxOptimizer,
        qint2,
        qint4,
        qint8,
        quantize_weight,
    )

    tensors = layer_tensors(tiny("qwen2"))
    stored = quantize_layer(tensors, SubstituteSettings(bits, optimizer)).tensors
    for name in MATRICES:
        weight = tensors[name]
        # Its way to unpack is replaced: the original compiles an extension first.
        with quantize_module._unpacking_without_compiler():
            if bits == 8:
                scale = AbsmaxOptimizer()(weight, qint8, axis=0)
                made = quantize_weight(weight, qint8, 0, scale, optimized=False)
            else:
                search = HqqOptimizer() if optimizer == "hqq" else MaxOptimizer()
                qtype = qint4 if bits == 4 else qint2
                scale, shift = search(weight, qtype, axis=0, group_size=128)
                made = quantize_weight(weight, qtype, 0, scale, shift, 128, optimized=False)
                assert torch.equal(stored[f"{name}.shift"], made._shift)
            expected = made.dequantize()
        assert torch.equal(stored[f"{name}.scale"], made._scale)
        assert sqnr_db(expected, dequantized(stored, name, weight.shape, bits)) > KERNEL_DB


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [16, 20, 17])
def test_codes_are_unpacked_as_quanto_packs_them(bits: int, count: int) -> None:
    from optimum.quanto.tensor.packed import PackedTensor

    codes = torch.randint(2**bits, (count, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = PackedTensor.pack(codes, bits)._data
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(packed, bits)[:count], codes)
    assert torch.equal(by_hand_unpacked(packed, bits)[:count], codes)


def test_quality_is_that_of_the_width(quantized: Quantized) -> None:
    tensors = layer_tensors(quantized.model)
    for name in MATRICES:
        assert sqnr_db(tensors[name], quantized.stored(name)) > QUANTIZED_DB[quantized.bits], name


def test_signal_and_noise_are_those_of_the_stored_tensors(quantized: Quantized) -> None:
    tensors = layer_tensors(quantized.model)
    assert list(quantized.made.quality) == ["q", "k", "v", "o", "gate", "up", "down"]
    for name in MATRICES:
        found, original = quantized.made.quality[matrix_kind(name)], tensors[name].double()
        assert found.signal == pytest.approx(float(original.square().sum()), rel=1e-8)
        noise = (original - quantized.stored(name).double()).square().sum()
        assert found.noise == pytest.approx(float(noise), rel=1e-8)
        assert found.sqnr_db == pytest.approx(sqnr_db(original, quantized.stored(name)), abs=1e-6)
        stored = [tensor for key, tensor in quantized.made.tensors.items() if key.startswith(name)]
        assert found.stored_bytes == sum(tensor.nbytes for tensor in stored)
        assert found.weights == original.numel()


def test_quality_does_not_depend_on_how_the_sums_are_cut(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = layer_tensors(tiny("qwen2"))
    whole = quantize_layer(tensors, SubstituteSettings(4, "minmax")).quality
    monkeypatch.setattr(quantize_module, "_POWER_ELEMENTS", 1000)
    assert quantize_layer(tensors, SubstituteSettings(4, "minmax")).quality == whole


def noise_of(tensors: dict[str, Tensor], optimizer: str) -> float:
    total = summed(quantize_layer(tensors, SubstituteSettings(4, optimizer)).quality.values())
    assert total is not None
    return total.noise


def test_hqq_is_no_worse_than_minmax(tiny: MakeTiny) -> None:
    """On weights with outliers, which are what it is for."""
    tensors = {n: t.clone() for n, t in layer_tensors(tiny("qwen2")).items()}
    for name in MATRICES:
        tensors[name][::7, 3] *= 6
    assert noise_of(tensors, "hqq") < noise_of(tensors, "minmax")


def test_the_same_weights_give_the_same_bytes(quantized: Quantized) -> None:
    again = quantize(quantized.model, quantized.bits, quantized.optimizer).made.tensors
    assert again.keys() == quantized.made.tensors.keys()
    for name, tensor in quantized.made.tensors.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name


def test_only_matrices_are_stored_and_the_originals_stay(tiny: MakeTiny) -> None:
    """The target's own norms and biases serve the draft too."""
    tensors = layer_tensors(tiny("qwen2"))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    stored = quantize_layer(tensors, SubstituteSettings(4, "minmax")).tensors
    assert {name.rsplit(".", 1)[0] for name in stored} == set(MATRICES)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_stored_with_bfloat16_scales(tiny: MakeTiny, dtype: torch.dtype) -> None:
    stored = quantize_layer(
        layer_tensors(tiny("llama", dtype=dtype)), SubstituteSettings(4, "minmax")
    ).tensors
    assert {t.dtype for t in stored.values()} == {torch.uint8, torch.bfloat16}


# --- in memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_kernels_compute_the_dequantized_product(quantized: Quantized, count: int) -> None:
    layer, product = quantized.load(), quantized.product
    inputs = rows(quantized.model, count, 128)
    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert sqnr_db(product(f"self_attn.{name}_proj", inputs), found) > KERNEL_DB, name
    assert sqnr_db(product("self_attn.o_proj", inputs), layer.attention_output(inputs)) > KERNEL_DB
    inner = torch.nn.functional.silu(product("mlp.gate_proj", inputs)) * product("mlp.up_proj", inputs)
    # Three roundings in a row, not one.
    assert sqnr_db(product("mlp.down_proj", inner), layer.feed_forward(inputs)) > KERNEL_DB - 6


def test_fused_projections_equal_separate_ones(quantized: Quantized) -> None:
    model, layer = quantized.model, quantized.load()
    assert len(layer.qkv_proj) == len(layer.gate_up_proj) == 1

    def alone(name: str) -> Any:
        shape = model.geometry.layer_shapes()[f"{name}.weight"]
        part = substitute._read_matrix(quantized.made.tensors, f"{name}.weight", shape, quantized.bits)
        return substitute._linear([part], [model.small[1].get(f"{name}.bias")], CPU)

    inputs = rows(model, 5, 128)
    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert torch.equal(found, alone(f"self_attn.{name}_proj")(inputs)), name
    gate, up = alone("mlp.gate_proj")(inputs), alone("mlp.up_proj")(inputs)
    inner = torch.nn.functional.silu(gate) * up
    assert torch.equal(layer.feed_forward(inputs), alone("mlp.down_proj")(inner))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_biases_of_every_projection_are_applied(tiny: MakeTiny, family: str) -> None:
    """Against the same layer with zero biases: exactly the biases are missing."""
    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny(family, **extra)
    stored = quantize_layer(layer_tensors(model), SubstituteSettings(8, "minmax")).tensors
    inputs = torch.zeros(2, 128, dtype=torch.bfloat16)
    layer = load(model, 8, stored)
    small = model.small[1]
    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert torch.equal(found[0], small.get(f"self_attn.{name}_proj.bias", torch.zeros_like(found[0])))
    found = layer.attention_output(inputs)[0]
    assert torch.equal(found, small.get("self_attn.o_proj.bias", torch.zeros_like(found)))
    if family == "llama":
        gate, up = small["mlp.gate_proj.bias"], small["mlp.up_proj.bias"]
        assert torch.equal(layer.gate_up_proj[0](inputs)[0], torch.cat((gate, up)))
        down = layer.down_proj(torch.zeros(1, 256, dtype=torch.bfloat16))[0]
        assert torch.equal(down, small["mlp.down_proj.bias"])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_activations_of_other_dtypes_are_cast_at_the_boundary(
    tiny: MakeTiny, dtype: torch.dtype, bits: int
) -> None:
    quantized = quantize(tiny("qwen2", dtype=dtype), bits)
    layer, inputs = quantized.load(), rows(quantized.model, 3, 128)
    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert found.dtype == dtype
        assert sqnr_db(quantized.product(f"self_attn.{name}_proj", inputs), found) > KERNEL_DB
    assert layer.attention_output(inputs).dtype == layer.feed_forward(inputs).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_odd_shapes_stay_plain(tiny: MakeTiny, dtype: torch.dtype, bits: int) -> None:
    """Heads of 20: query rows divide by 16, key and value rows do not, nor the output's columns by 32."""
    quantized = quantize(tiny("llama", head_dim=20, dtype=dtype, attention_bias=True), bits)
    shapes = quantized.model.geometry.layer_shapes()
    plain = [name for name in MATRICES if group_size_for(shapes[name]) is None]
    assert plain == [f"self_attn.{name}_proj.weight" for name in "kvo"]
    layer = quantized.load()
    kinds = [type(linear) for linear in (*layer.qkv_proj, layer.o_proj, *layer.gate_up_proj)]
    packed = Int8Linear if bits == 8 else Int4Linear
    assert kinds == [packed, PlainLinear, PlainLinear, PlainLinear, packed]
    inputs = rows(quantized.model, 3, 128)
    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert found.dtype == dtype
        assert sqnr_db(quantized.product(f"self_attn.{name}_proj", inputs), found) > KERNEL_DB
    mixed = rows(quantized.model, 3, 80)
    found = layer.attention_output(mixed)
    assert found.dtype == dtype
    assert sqnr_db(quantized.product("self_attn.o_proj", mixed), found) > KERNEL_DB


@pytest.mark.parametrize(("hidden", "group_size"), [(96, 32), (192, 64)])
def test_smaller_groups_are_used_where_128_does_not_divide(
    tiny: MakeTiny, hidden: int, group_size: int
) -> None:
    quantized = quantize(tiny("llama", hidden=hidden, layers=2), 4)
    layer, inputs = quantized.load(), rows(quantized.model, 3, hidden)
    assert layer.o_proj.group_size == group_size
    assert sqnr_db(quantized.product("self_attn.o_proj", inputs), layer.attention_output(inputs)) > KERNEL_DB


def held_bytes(layer: SubstituteLayer) -> int:
    total = 0
    for linear in (*layer.qkv_proj, layer.o_proj, *layer.gate_up_proj, layer.down_proj):
        held = [getattr(linear, name) for name in linear.__slots__ if name != "bias"]
        total += sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    return total


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"head_dim": 20}, {"hidden": 192}], ids=str)
def test_the_plan_counts_the_bytes_that_are_held(tiny: MakeTiny, bits: int, settings: dict[str, Any]) -> None:
    quantized = quantize(tiny("llama", **settings), bits)
    planned = substitute_layer_bytes(quantized.model.geometry, SubstituteSettings(bits, "minmax"))
    assert set(planned) == {held_bytes(quantized.load())}


@pytest.mark.parametrize(
    "overrides",
    [
        (("self_attn.v_proj", 8),),
        (("mlp.gate_proj", 2), ("self_attn.k_proj", 2)),
        (("mlp.down_proj", 8), ("self_attn.o_proj", 2)),
        (("mlp.gate_proj", 8), ("mlp.up_proj", 8)),
    ],
)
def test_mixed_widths_are_computed_each_by_its_own_kernel(
    tiny: MakeTiny, overrides: tuple[tuple[str, int], ...]
) -> None:
    model, settings = tiny("qwen2"), SubstituteSettings(4, "minmax", overrides)
    made = quantize_layer(layer_tensors(model), settings)
    layer = load_substitute(model.math(), 1, made.tensors, settings, CPU)
    widths = {name: settings.bits_of(name) for name in MATRICES}
    assert len(layer.qkv_proj) == (
        1 if len({widths[f"self_attn.{n}_proj.weight"] for n in "qkv"}) == 1 else 3
    )
    assert len(layer.gate_up_proj) == (
        1 if widths["mlp.gate_proj.weight"] == widths["mlp.up_proj.weight"] else 2
    )
    assert set(substitute_layer_bytes(model.geometry, settings)) == {held_bytes(layer)}
    each = {name: Quantized(model, bits, "minmax", made) for name, bits in widths.items()}
    inputs = rows(model, 3, 128)

    def product(name: str, states: Tensor) -> Tensor:
        return each[f"{name}.weight"].product(name, states)

    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert sqnr_db(product(f"self_attn.{name}_proj", inputs), found) > KERNEL_DB, name
    assert sqnr_db(product("self_attn.o_proj", inputs), layer.attention_output(inputs)) > KERNEL_DB
    inner = torch.nn.functional.silu(product("mlp.gate_proj", inputs)) * product("mlp.up_proj", inputs)
    assert sqnr_db(product("mlp.down_proj", inner), layer.feed_forward(inputs)) > KERNEL_DB - 6


@pytest.mark.parametrize("out_features", [16, 512, 528, 1088])
def test_packing_a_few_rows_at_a_time_equals_packing_the_whole(
    monkeypatch: pytest.MonkeyPatch, out_features: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (out_features, 128), generator=generator).to(torch.uint8)
    in_parts = substitute.pack_codes(codes)
    monkeypatch.setattr(substitute, "_PACK_ROWS", out_features)
    assert torch.equal(in_parts, substitute.pack_codes(codes))


def test_loading_needs_no_quanto(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` never imports it: seconds at every start."""
    model = tiny("qwen2")
    stored = quantize_layer(layer_tensors(model), SubstituteSettings(4, "minmax")).tensors
    for name in [name for name in sys.modules if name.split(".")[0] == "optimum"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert load(model, 4, stored).qkv(rows(model, 2, 128)).shape[0] == 2


def test_a_resident_layer_is_the_layer_itself(tiny: MakeTiny) -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    tensors = layer_tensors(model)
    layer = resident_layer(model.math(), 1, tensors)
    inputs = rows(model, 3, 128)

    def plain(name: str, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    for name, found in zip("qkv", qkv(layer, inputs), strict=True):
        assert torch.equal(found, plain(f"self_attn.{name}_proj", inputs))
    assert torch.equal(layer.attention_output(inputs), plain("self_attn.o_proj", inputs))
    inner = torch.nn.functional.silu(plain("mlp.gate_proj", inputs)) * plain("mlp.up_proj", inputs)
    assert torch.equal(layer.feed_forward(inputs), plain("mlp.down_proj", inner))


# --- the draft -----------------------------------------------------------------------------------

DRAFT_DB = {8: 24.0, 4: 5.0}
"""Least ratio of the draft's logits to the target's on these random models."""


@pytest.mark.parametrize("bits", DRAFT_DB)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_draft_of_substitutes_guesses_what_the_target_says(tiny: MakeTiny, family: str, bits: int) -> None:
    model = tiny(family)
    math_: LayerMath = model.math()
    layers = [
        load(
            model,
            bits,
            quantize_layer(layer_tensors(model, n), SubstituteSettings(bits, "minmax")).tensors,
            n,
        )
        for n in range(3)
    ]
    prompt = [(7 * n) % 256 for n in range(32)]
    target = model.target()
    expected = model.prefill(target, model.kv(), prompt)
    draft = DraftDecoder(math_, model.embed, model.head, layers)
    found = draft.forward([DraftRows(causal_batch(prompt, 0), model.kv())]).logits
    assert sqnr_db(expected, found) > DRAFT_DB[bits]
