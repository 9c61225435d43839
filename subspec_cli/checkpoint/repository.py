"""What a repository is, decided once from its small files and headers, before any weight is read.

`plan`, `prepare` and `run` share this value, so they refuse the same repositories with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.configured_model import configured_model
from subspec_cli.checkpoint.eight_bit import read_eight_bit
from subspec_cli.checkpoint.end_tokens import read_end_ids
from subspec_cli.checkpoint.geometry import ModelGeometry, geometry_of
from subspec_cli.checkpoint.model_sampling import ModelSampling, read_model_sampling
from subspec_cli.checkpoint.rope_settings import RopeSettings, read_ropes
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.source_directory import (
    INDEX_NAME,
    SINGLE_NAME,
    WeightIndex,
    check_config,
    read_if_present,
)
from subspec_cli.checkpoint.tensor_table import read_tensor_table
from subspec_cli.checkpoint.tokenizer_files import TOKENIZER_FILES, ReadFile, TokenizerFacts, check_tokenizer
from subspec_cli.errors import IntegrityError
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.units import printable

_GENERATION_NAME: Final = "generation_config.json"
_MOST_GENERATION_BYTES: Final = 1 << 20
DECIDING_FILES: Final = (*TOKENIZER_FILES, _GENERATION_NAME)
"""The small files besides config.json that decide what a repository is."""
_ANY_DTYPE: Final = "BF16"


@dataclass(frozen=True, slots=True)
class Repository:
    """A model that can run: what it computes, where its tensors are, how its answers are sampled and end."""

    geometry: ModelGeometry
    ropes: tuple[RopeSettings, ...]
    """Tables of rotary positions, by the numbers in the geometry."""
    tokenizer: TokenizerFacts
    end_ids: tuple[int, ...]
    """Tokens that end an answer; empty if no file names one."""
    sampling: ModelSampling
    tensors: Mapping[str, TensorEntry]
    """Exactly those that the model needs."""
    notes: tuple[str, ...]
    """What is read otherwise than it stands there."""

    @property
    def switch(self) -> int | None:
        """Positions after which longrope takes its long factors; None for other types."""
        return next((rope.switch for rope in self.ropes if rope.switch is not None), None)


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse a model by its config.json alone, before anything else is fetched. Raises UnsupportedModelError."""
    check_config(config)
    model = configured_model(config)
    read_ropes(model, geometry_of(model, _ANY_DTYPE))
    read_eight_bit(config)


def decide_repository(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    index: WeightIndex | None,
    read: ReadFile,
    where: str,
) -> Repository:
    """Decide what a repository is.

    Args:
        config: content of config.json.
        tensors: what `indexed_tensors` gives.
        index: of the weight files, None for a single one.
        read: gives the small files.
        where: the repository, as errors name it.

    Raises:
        UnsupportedModelError: what is not supported, by its name.
        IntegrityError: a damaged file, or tensors that do not fit the config.
    """
    check_fields(config)
    model = configured_model(config)
    table = read_tensor_table(config, tensors, index)
    generation = _read_generation(read, where)
    end_ids = read_end_ids({**model.config, **config}, generation)
    notes = () if end_ids else ("no file of the model names a token that ends an answer: --stop TEXT can",)
    return Repository(
        geometry=table.geometry,
        ropes=read_ropes(model, table.geometry),
        tokenizer=TokenizerFacts(
            config["model_type"],
            named if isinstance(named := config.get("tokenizer_class"), str) else "",
            table.geometry.vocab,
        ),
        end_ids=end_ids,
        sampling=read_model_sampling(config, generation),
        tensors=table.entries,
        notes=(*table.notes, *notes),
    )


def _read_generation(read: ReadFile, where: str) -> dict[str, Any] | None:
    raw = read(_GENERATION_NAME, _MOST_GENERATION_BYTES)
    if raw is None:
        return None
    return parse_json_object(raw, f"{_GENERATION_NAME} in {where}", IntegrityError, "correct the file")


def read_repository(checkpoint: Checkpoint) -> Repository:
    """Decide what the repository in a directory is. Raises as `decide_repository`."""
    where = printable(str(checkpoint.directory))
    read = partial(read_if_present, checkpoint.directory)
    repository = decide_repository(checkpoint.config, checkpoint.tensors, checkpoint.index, read, where)
    if checkpoint.index is None and (checkpoint.directory / INDEX_NAME).exists():
        note = f"{SINGLE_NAME} is read and not the files that {INDEX_NAME} names; remove the one that is left over"
        return replace(repository, notes=(*repository.notes, note))
    return repository


def check_tokenizer_in(directory: Path, repository: Repository) -> None:
    """Check the tokenizer of a repository in a directory. Raises as `check_tokenizer`."""
    where = printable(str(directory))
    check_tokenizer(partial(read_if_present, directory), where, repository.geometry.vocab)
