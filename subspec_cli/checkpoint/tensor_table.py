"""Which stored tensors a model runs with: where each is, which may be left aside, and what does not fit.

The rules are the library's where it gives an answer that the weights determine: the index decides where a tensor is,
a head that is stored is used, tables that are tied need to be stored once, norms and tables are cast.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from subspec_cli.checkpoint.configured_model import configured_model
from subspec_cli.checkpoint.dtypes import EIGHT_BIT_DTYPE, FLOAT_DTYPES, WEIGHT_DTYPES
from subspec_cli.checkpoint.eight_bit import EIGHT_BIT_RESULT, read_eight_bit, take_scales
from subspec_cli.checkpoint.geometry import EMBEDDING, HEAD, ModelGeometry, StoredBytes, geometry_of
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, block_entries
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.source_directory import INDEX_NAME, WeightIndex
from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.units import printable

_UNUSED: Final = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.self_attn\.(masked_)?bias|.*_extra_state"
)
"""Buffers that trainers and older versions store, and that no model reads."""
_WRAPPERS: Final = (
    ("_orig_mod.", "a compiled model"),
    ("module.", "a model inside a data-parallel wrapper"),
    ("base_model.model.", "an adapter or a model with adapters inside"),
    ("model.language_model.", "the text part of a larger model"),
    ("language_model.", "the text part of a larger model"),
)
_QUANTIZES_AT_LOAD: Final = "bitsandbytes"
"""The method whose settings stand in config.json although the weights are whole."""
_ANY_DTYPE: Final = WEIGHT_DTYPES[0]


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The tensors of a model, checked against its config."""

    geometry: ModelGeometry
    entries: Mapping[str, TensorEntry]
    """Exactly those that the model needs, by its own names."""
    notes: tuple[str, ...]
    """What is cast or set aside."""


def indexed_tensors(
    held: Mapping[str, Iterable[TensorEntry]], index: WeightIndex | None
) -> dict[str, TensorEntry]:
    """The tensors in the weight files, by name; where two files hold one, the index decides.

    A tensor that the index does not name is taken if one file alone holds it.
    """
    if index is None:
        return {entry.name: entry for entries in held.values() for entry in entries}
    everywhere = [(file, entry) for file, entries in held.items() for entry in entries]
    copies = Counter(entry.name for _, entry in everywhere)
    return {
        entry.name: entry
        for file, entry in everywhere
        if index.file_of.get(entry.name, file if copies[entry.name] == 1 else None) == file
    }


def read_tensor_table(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], index: WeightIndex | None = None
) -> TensorTable:
    """Check a model's tensors against its config.

    Raises:
        UnsupportedModelError: the config is not supported, weights of another type, or saved in another form.
        IntegrityError: tensors that are missing, unexpected or of another shape.
    """
    model = configured_model(config)
    geometry = replace(geometry_of(model, _ANY_DTYPE), tied_head=model.is_tied)
    own = model.names.own_entries(tensors, geometry.tensor_shapes())
    found, geometry = _with_tables(geometry, own)
    _check_form(geometry, found)
    source = read_eight_bit(config)
    if source is not None and any(entry.dtype == EIGHT_BIT_DTYPE for entry in found.values()):
        taken = take_scales(source, found)
        entries = _needed(replace(geometry, dtype=EIGHT_BIT_RESULT), taken.weights, index)
        geometry = _with_stored_bytes(replace(geometry, dtype=EIGHT_BIT_RESULT), entries | taken.scales)
        return TensorTable(geometry, entries | taken.scales, (taken.note, *_cast_note(geometry, entries)))
    geometry = replace(geometry, dtype=_matrix_dtype(config, found))
    entries = _needed(geometry, found, index)
    return TensorTable(geometry, entries, (*_cast_note(geometry, entries), *_quantization_note(config)))


def _needed(
    geometry: ModelGeometry, found: Mapping[str, TensorEntry], index: WeightIndex | None
) -> dict[str, TensorEntry]:
    """The tensors that the model needs, each checked."""
    expected = geometry.tensor_shapes()
    _check_names(geometry, expected.keys(), found, index)
    entries = {name: found[name] for name in expected}
    for name, shape in expected.items():
        _check_entry(name, entries[name], shape)
    return entries


def _with_stored_bytes(geometry: ModelGeometry, entries: Mapping[str, TensorEntry]) -> ModelGeometry:
    layers = [
        [sum(entry.size_bytes for entry in block) for block in block_entries(entries, layer)]
        for layer in range(geometry.layers)
    ]
    return replace(
        geometry,
        stored=StoredBytes(tuple(map(sum, layers)), max(size for blocks in layers for size in blocks)),
    )


def _with_tables(
    geometry: ModelGeometry, found: dict[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], ModelGeometry]:
    """Decide between tied and separate tables by what is stored."""
    if HEAD in found and EMBEDDING in found:
        # The library ties only equal tables, so running the stored head is right in both cases.
        return found, replace(geometry, tied_head=False)
    if geometry.tied_head and HEAD in found:
        # Half of a tied pair is the whole pair, whichever half it is.
        found[EMBEDDING] = replace(found.pop(HEAD), name=EMBEDDING)
    return found, geometry


def _check_form(geometry: ModelGeometry, found: Mapping[str, TensorEntry]) -> None:
    """Name what training tools and converters leave in place of a model."""
    if any(name in found for name in geometry.tensor_shapes()):
        empty = [name for name, entry in found.items() if 0 in entry.shape]
        if empty:
            raise UnsupportedModelError(
                f"{len(empty)} tensors are empty, such as {printable(empty[0])}: the state of a sharded training",
                "gather the weights, with DeepSpeed by zero_to_fp32.py, and save the model again",
            )
        return
    for prefix, origin in _WRAPPERS:
        if any(name.startswith(prefix) for name in found):
            raise UnsupportedModelError(
                f"tensor names begin with `{prefix}`: the weights of {origin}",
                "save the model inside with save_pretrained, which writes names such as model.norm.weight",
            )
    if any(re.match(r"layers\.\d+\.", name) for name in found):
        form = (
            "Mistral's own format"
            if any(".attention.w" in name for name in found)
            else "a model without its head"
        )
        raise UnsupportedModelError(
            f"tensor names begin with `layers.`: {form}",
            f"take the files of the Hugging Face layout, or save the whole {geometry.architecture}",
        )


def _matrix_dtype(config: Mapping[str, Any], found: Mapping[str, TensorEntry]) -> str:
    types = sorted({e.dtype for name, e in found.items() if name.endswith(LAYER_MATRICES)})
    if len(types) == 1 and types[0] in WEIGHT_DTYPES:
        return types[0]
    method = _quantization_method(config)
    if method:
        raise UnsupportedModelError(f"the model is already quantized ({method})", "give the 16-bit original")
    if len(types) > 1 and all(name in FLOAT_DTYPES for name in types):
        raise UnsupportedModelError(
            f"weights of types {' and '.join(types)} are mixed in the matrices",
            "save the model in one type: torch_dtype=bfloat16, then save_pretrained",
        )
    raise UnsupportedModelError(
        f"weights of type {', '.join(types) or '(none)'} are not supported",
        "give the 16-bit original: matrices in one of " + ", ".join(WEIGHT_DTYPES),
    )


def _quantization_method(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if quantization is None:
        return ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return ascii(method or "unknown method").strip("'")[:40]


def _quantization_note(config: Mapping[str, Any]) -> tuple[str, ...]:
    method = _quantization_method(config)
    if not method:
        return ()
    if method != _QUANTIZES_AT_LOAD:
        raise UnsupportedModelError(
            f"config.json says that the model is already quantized ({method}), but its weights are whole",
            "remove quantization_config from config.json, or give the 16-bit original",
        )
    return (f"config.json speaks of {method} quantization, but the weights are whole: it is not used",)


def _check_names(
    geometry: ModelGeometry,
    expected: Iterable[str],
    found: Mapping[str, TensorEntry],
    index: WeightIndex | None,
) -> None:
    missing = sorted(set(expected) - found.keys())
    if missing == [HEAD]:
        raise UnsupportedModelError(
            f"{HEAD} is not stored, and config.json does not tie it to the embedding",
            'if the model was trained with tied tables, set "tie_word_embeddings": true in config.json',
        )
    placed = [name for name in missing if index is not None and name in index.file_of]
    if placed and index is not None:
        raise IntegrityError(
            f"{printable(index.file_of[placed[0]])} lacks the tensor {ascii(placed[0])[:120]}, "
            f"which {INDEX_NAME} puts there",
            "download the file again",
        )
    if missing:
        raise IntegrityError(
            f"{len(missing)} tensors are missing: {_some(missing)}",
            "download the model again; config.json and weights must be of one model",
        )
    more = sorted(name for name in found.keys() - set(expected) if not _UNUSED.fullmatch(name))
    if more:
        raise IntegrityError(
            f"{len(more)} tensors are not expected: {_some(more)}",
            f"config.json describes a {geometry.architecture} of {geometry.layers} layers without them",
        )


def _check_entry(name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise IntegrityError(
            f"tensor {printable(name)} has shape {list(entry.shape)}, expected {list(shape)}",
            "config.json and weights must be of one model: compare the sizes in config.json",
        )
    if entry.dtype not in (*FLOAT_DTYPES, EIGHT_BIT_DTYPE):
        raise UnsupportedModelError(
            f"tensor {printable(name)} is of type {entry.dtype}, which is not supported",
            "give the 16-bit original",
        )


def _cast_note(geometry: ModelGeometry, entries: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    others = Counter(
        entry.dtype for entry in entries.values() if entry.dtype not in (geometry.dtype, EIGHT_BIT_DTYPE)
    )
    return tuple(
        f"{count} tensors stored as {dtype} are used as {geometry.dtype}, the type of the matrices"
        for dtype, count in sorted(others.items())
    )


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
