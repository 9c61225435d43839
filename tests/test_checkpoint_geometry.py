"""Geometry from config and tensor table: what the library would build, and refusals by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import AUTO, FAMILIES, make_tiny_model, tiny_settings
from transformers import CONFIG_MAPPING, PreTrainedConfig

from subspec_cli.checkpoint import families
from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.config_fields import COMMON_FIELDS, FAMILY_FIELDS
from subspec_cli.checkpoint.geometry import ModelGeometry, geometry_from_config
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES
from subspec_cli.checkpoint.repository import check_fields
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.tensor_table import read_tensor_table
from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.substitutes.settings import SubstituteSettings, group_size_for, substitute_layer_bytes

MATRICES = tuple(name for name in LAYER_MATRICES if not name.startswith("linear_attn."))
"""Those of a layer with attention."""

ARCHITECTURES = {family: families.FAMILIES[family].architecture for family in FAMILIES}
VARIANTS = [
    (family, tied, extra)
    for family in FAMILIES
    for tied in (True, False)
    for extra in ({}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 48})
    # Qwen2's library code reads a head_dim that its config class does not have.
    if not (family == "qwen2" and "head_dim" in extra)
]


def config_of(family: str, **settings: Any) -> dict[str, Any]:
    """config.json as the library would write it."""
    config = FAMILIES[family](**tiny_settings(family, **settings))
    return json.loads(config.to_json_string()) | {"architectures": [ARCHITECTURES[family]]}


def raw_config(**fields: Any) -> dict[str, Any]:
    """A config.json with few fields. A field given as None is left out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 288,
    } | fields
    return {key: value for key, value in config.items() if value is not None}


def library_shapes(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the library's own meta model, by our names; a tied head is counted once."""
    with torch.device("meta"):
        model = AUTO.from_config(FAMILIES[family].from_dict(config))
    stored = {name: entry(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del stored["lm_head.weight"]
    own = families.FAMILIES[family].names.own_entries(stored, {})
    return {name: value.shape for name, value in own.items()}


def read_geometry(config: dict[str, Any], tensors: dict[str, TensorEntry]) -> ModelGeometry:
    return read_tensor_table(config, tensors).geometry


def entries(geometry: ModelGeometry, **changed: TensorEntry | None) -> dict[str, TensorEntry]:
    """A tensor table that fits the geometry except for `changed` (None: left out)."""
    found = {}
    for name, shape in geometry.tensor_shapes().items():
        found[name] = entry(name, shape, geometry.dtype)
    return {name: value for name, value in (found | changed).items() if value is not None}


def entry(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorEntry:
    return TensorEntry(name, dtype, shape, Path("model.safetensors"), 0, 2 * math.prod(shape))


@pytest.mark.parametrize(("family", "tied", "extra"), VARIANTS)
def test_tensor_shapes_are_those_of_the_library(family: str, tied: bool, extra: dict[str, Any]) -> None:
    config = config_of(family, tie_word_embeddings=tied, **extra)
    geometry = geometry_from_config(config, "BF16")
    assert geometry.tensor_shapes() == library_shapes(family, config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_checkpoint_is_read_and_its_bytes_add_up(tiny: Any, family: str, tied: bool) -> None:
    model = tiny(family, tied=tied)
    assert model.geometry.architecture == ARCHITECTURES[family]
    assert model.geometry.model_bytes == sum(e.size_bytes for e in model.checkpoint.tensors.values())
    assert model.geometry.tied_head is tied


def test_layer_bytes_split_into_blocks_and_small_tensors() -> None:
    geometry = geometry_from_config(config_of("llama", attention_bias=True, mlp_bias=True), "F32")
    shapes = geometry.layer_shapes()
    assert geometry.layer_matrix_bytes == 4 * sum(math.prod(shapes[name]) for name in MATRICES)
    assert geometry.matrix_bytes == 3 * geometry.layer_matrix_bytes
    final_norm = 128
    assert geometry.matrix_bytes + geometry.small_bytes == 4 * (
        3 * sum(map(math.prod, shapes.values())) + final_norm
    )
    assert geometry.block_bytes["attention"] == 4 * 128 * (128 + 64 + 64 + 128)


def test_kv_row_bytes_count_keys_and_values_of_all_layers() -> None:
    assert geometry_from_config(config_of("qwen3", head_dim=48), "BF16").kv_row_bytes == 2 * 3 * 2 * 48 * 2


def test_sizes_missing_from_old_configs_have_the_family_defaults() -> None:
    geometry = geometry_from_config(raw_config(num_key_value_heads=None), "BF16")
    shape = geometry.attention[0]
    assert (shape.kv_heads, shape.head_dim, geometry.tied_head) == (4, 32, False)


@pytest.mark.parametrize(
    ("name", "field"), [("Qwen2MoeForCausalLM", "num_experts"), ("MixtralForCausalLM", "num_local_experts")]
)
def test_mixtures_of_experts_are_refused_as_such(name: str, field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"mixture-of-experts model {name}") as caught:
        geometry_from_config(raw_config(architectures=[name], model_type="mixtral", **{field: 8}), "BF16")
    assert "Qwen2ForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        (["GPT2LMHeadModel"], "GPT2LMHeadModel is not supported"),
        ("T5Model", "T5Model is not supported"),
        (["\x1b[31mRed"], r"31mRed is not supported"),
    ],
)
def test_other_architectures_are_refused_by_name(named: Any, shown: str) -> None:
    with pytest.raises(UnsupportedModelError, match=shown) as caught:
        geometry_from_config(raw_config(model_type="other") | {"architectures": named}, "BF16")
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("kind", ["dynamic", "proportional", "su", "no-such-type"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rope_types_that_are_not_run_are_refused_by_name(kind: str, field: str) -> None:
    """Trap 10: `dynamic` looks at the largest position of a call; an unknown type must not run as the default."""
    with pytest.raises(UnsupportedModelError, match=f"type {kind} ") as caught:
        check_fields(raw_config(**{field: {"type": kind, "factor": 2.0}}))
    assert "yarn" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps"),
    ],
)
def test_settings_that_are_not_run_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        check_fields(raw_config() | fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.norm.weight": None}, "1 tensors are missing: model.norm.weight"),
        ({"model.layers.9.mlp.up_proj.weight": entry("x", (1, 1))}, "not expected: model.layers.9.mlp"),
        ({"model.norm.weight": entry("x", (64,))}, r"model.norm.weight has shape \[64\], expected \[128\]"),
        ({"model.norm.weight": entry("x", (128,), "U8")}, "model.norm.weight is of type U8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changed: dict[str, TensorEntry | None], message: str) -> None:
    config = raw_config()
    tensors = entries(geometry_from_config(config, "BF16"), **changed)
    with pytest.raises((IntegrityError, UnsupportedModelError), match=message):
        read_geometry(config, tensors)


@pytest.mark.parametrize(
    ("dtypes", "named"),
    [
        (("BF16", "F16"), "types BF16 and F16 are mixed"),
        (("I8", "I8"), "type I8 are"),
        (("F64", "F64"), "type F64 are"),
    ],
)
def test_mixed_and_integer_weights_are_refused_by_type(dtypes: tuple[str, str], named: str) -> None:
    config = raw_config()
    tensors = entries(geometry_from_config(config, dtypes[0]))
    odd = "model.layers.0.mlp.up_proj.weight"
    tensors[odd] = entry(odd, (256, 128), dtypes[1])
    with pytest.raises(UnsupportedModelError, match=named):
        read_geometry(config, tensors)


def test_a_checkpoint_without_projections_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(none\)"):
        read_geometry(raw_config(), {})


def test_long_lists_of_tensors_are_cut() -> None:
    config = raw_config()
    tensors = entries(geometry_from_config(config, "BF16"))
    kept = {name: value for name, value in tensors.items() if ".3." not in name}
    with pytest.raises(IntegrityError, match=r"9 tensors are missing.*, …$"):
        read_geometry(config, kept)


def test_stored_rope_buffers_of_old_checkpoints_are_ignored() -> None:
    config = raw_config()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = entries(geometry_from_config(config, "BF16"), **{name: entry(name, (16,), "F32")})
    assert read_geometry(config, tensors).layers == 4


def test_a_tied_checkpoint_that_stores_a_head_of_its_own_is_run_with_it() -> None:
    """The library ties only equal tables. A stored head may differ, so it is the one to use."""
    config = raw_config(tie_word_embeddings=True)
    tensors = entries(geometry_from_config(config, "BF16"))
    assert read_geometry(config, tensors).tied_head
    tensors["lm_head.weight"] = entry("lm_head.weight", (288, 128))
    assert not read_geometry(config, tensors).tied_head


def test_the_tokenless_names_of_a_hostile_table_are_printed_safely(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1)
    checkpoint = open_checkpoint(directory)
    hostile = {**checkpoint.tensors, "\x1b[2Jname": entry("x", (1,))}
    with pytest.raises(IntegrityError) as caught:
        read_geometry(checkpoint.config, hostile)
    assert "\x1b" not in caught.value.message
    assert "name" in caught.value.message


def windows(family: str, **fields: Any) -> tuple[int | None, ...]:
    config = raw_config(architectures=[ARCHITECTURES[family]], model_type=family) | fields
    return tuple(shape.window for shape in geometry_from_config(config, "BF16").attention)


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {"sliding_window": None}, (None,) * 4),
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("qwen2", {"sliding_window": 8}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8, 8)),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None,) * 4),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        (
            "qwen2",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_sliding_windows_follow_the_family(
    family: str, fields: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    """Trap 11; the expected values are those of the library's config classes."""
    assert windows(family, **fields) == expected


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_the_fields_of_each_family_are_those_of_the_library(family: str) -> None:
    """Types and defaults; a field that a later version adds must be looked at before it is left aside."""
    library = {field.name: field for field in dataclasses.fields(CONFIG_MAPPING[family])}
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert base == COMMON_FIELDS
    ours = FAMILY_FIELDS[family]
    assert library.keys() - base == ours.keys()
    for name, field in ours.items():
        default = library[name].default
        assert field.default == (None if default is dataclasses.MISSING else default), name
        assert type(field.default) is type(default) or field.default is None, name


def library_takes(family: str, name: str, value: Any) -> bool:
    """Whether the library's class takes a value by its type; what it thinks of the whole is another matter."""
    try:
        CONFIG_MAPPING[family](**{"hidden_size": 64, "num_attention_heads": 4, name: value})
    except Exception as error:  # any exception but that of a field's type comes later
        return type(error).__name__ != "StrictDataclassFieldValidationError"
    return True


CHOICES = {(family, "use_bidirectional_attention") for family in ("gemma4_text", "gemma4_unified_text")}
"""Texts of which the library takes only some."""


@pytest.mark.parametrize(("family", "name"), sorted(CHOICES))
def test_a_choice_that_the_library_does_not_have_is_refused(family: str, name: str) -> None:
    config = {"model_type": family, "hidden_size_per_layer_input": 0}
    assert not library_takes(family, name, "silu")
    with pytest.raises(UnsupportedModelError, match=name):
        check_fields(config | {name: "silu"})


@pytest.mark.parametrize(
    "value", [1, 0.5, True, "silu", [1], ["full_attention"], {"rope_type": "default"}, None], ids=repr
)
@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_fields_take_the_types_that_the_library_takes(family: str, value: Any) -> None:
    fields = {name: field for name, field in FAMILY_FIELDS[family].items() if (family, name) not in CHOICES}
    assert {name: field.takes(value) for name, field in fields.items()} == {
        name: library_takes(family, name, value) for name in fields
    }


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_default_windows_are_those_of_the_library(family: str) -> None:
    """A window that config.json does not name has the library's own default."""
    config = FAMILIES[family](use_sliding_window=True)
    assert windows(family, use_sliding_window=True, max_window_layers=0)[0] == config.sliding_window


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"sliding_window": 8}, "a llama has no sliding_window, config.json sets 8"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8'"),
        ("qwen2", {"sliding_window": -1, "use_sliding_window": True}, "sliding_window is -1"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "layer_types": [[]] * 4}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "layer_types": 4}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers is 'all'"),
    ],
)
def test_windows_that_are_not_run_are_refused_by_name(
    family: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        windows(family, **fields)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 128), 128),
        ((16, 384), 128),
        ((16, 64), 64),
        ((16, 96), 32),
        ((16, 48), None),
        ((24, 128), None),
        ((1, 128), None),
    ],
)
def test_group_size_is_the_largest_that_the_kernels_take(
    shape: tuple[int, int], expected: int | None
) -> None:
    assert group_size_for(shape) == expected


def of_width(bits: int, *overrides: tuple[str, int]) -> SubstituteSettings:
    return SubstituteSettings(bits, "minmax", overrides)


def largest(geometry: ModelGeometry, settings: SubstituteSettings) -> int:
    """Bytes of the substitute of any layer: all are alike."""
    (size,) = set(substitute_layer_bytes(geometry, settings))
    return size


def test_substitute_bytes_by_width() -> None:
    geometry = geometry_from_config(config_of("llama"), "BF16")
    matrices = [geometry.layer_shapes()[name] for name in MATRICES]
    weights, rows = sum(map(math.prod, matrices)), sum(shape[0] for shape in matrices)
    assert largest(geometry, of_width(4)) == weights // 2 + weights // 128 * 4
    assert largest(geometry, of_width(2)) == largest(geometry, of_width(4))
    assert largest(geometry, of_width(8)) == weights + 2 * rows
    down = geometry.layer_shapes()["mlp.down_proj.weight"]
    more = math.prod(down) + down[0] * 2 - (math.prod(down) // 2 + math.prod(down) // 128 * 4)
    mixed = largest(geometry, of_width(4, ("mlp.down_proj", 8)))
    assert mixed == largest(geometry, of_width(4)) + more


def test_substitute_bytes_of_odd_shapes_are_those_of_the_plain_matrix() -> None:
    odd = geometry_from_config(raw_config(hidden_size=48, intermediate_size=72, head_dim=16), "BF16")
    # Neither 48 nor 72 columns divide into groups: only the output projection, 64 wide, is packed.
    plain = 48 * (64 + 32 + 32) + 3 * 48 * 72
    assert largest(odd, of_width(4)) == 2 * plain + 48 * 64 // 2 + 48 * 64 // 64 * 4
