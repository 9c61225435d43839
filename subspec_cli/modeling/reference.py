"""The reference of audits: the library's own forward of a checkpoint, whole in memory or one layer at a time.

Weights are loaded as the library loads them, into its own modules, on the CPU. Attention is its default, `sdpa`. Both
ways give the same bits: one layer at a time, every sequence goes through a layer while its weights are there.
Shapes: `N` asked rows of a sequence, `V` vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.streaming.memory_meter import return_freed_memory_now
from subspec_cli.units import printable

_MODELS: Final[Any] = AutoModelForCausalLM  # its methods are not annotated
_ATTENTION: Final = "sdpa"

OnDone = Callable[[int, int], None]
"""Receives how many sequences or layers are done, and all."""


@dataclass(frozen=True, slots=True)
class AskedRows:
    """A sequence, and its rows whose logits are asked for: those from `first` on."""

    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """What the library computed in one dtype: the states before its head, and the head."""

    states: tuple[Tensor, ...]
    """`[N, hidden]` for each sequence."""
    head: nn.Module

    @torch.inference_mode()
    def logits(self, sequence: int, rows: slice) -> Tensor:
        """Logits `[rows, V]` of some of a sequence's asked rows, in float32."""
        logits: Tensor = self.head(self.states[sequence][rows])
        return logits.float()


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """The library's own model of a checkpoint in float32 and in 16 bits."""

    checkpoint: Checkpoint
    stored: str
    """Type of the checkpoint's weights, such as `BF16`."""

    @property
    def own_name(self) -> str:
        """The 16-bit type: the checkpoint's own, `bf16` for a float32 checkpoint."""
        return "f16" if self.stored == "F16" else "bf16"

    @property
    def float32_bytes(self) -> int:
        """Bytes of all weights in float32."""
        entries = self.checkpoint.tensors.values()
        return sum(entry.size_bytes // torch_dtype(entry.dtype).itemsize for entry in entries) * 4

    @property
    def rounding_ratio(self) -> float:
        """How much finer float32 rounds than the 16-bit type: below 1."""
        return torch.finfo(torch.float32).eps / torch.finfo(self._dtype).eps

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.own_name == "f16" else torch.bfloat16

    def run(
        self, sequences: Sequence[AskedRows], *, in_float32: bool, whole: bool, progress: OnDone
    ) -> ReferenceRows:
        """Run all sequences, each by itself, with the whole model in memory or one layer at a time."""
        run = _run_whole if whole else _run_by_layer
        return run(self.checkpoint, sequences, torch.float32 if in_float32 else self._dtype, progress)


@torch.inference_mode()
def _run_whole(
    checkpoint: Checkpoint, sequences: Sequence[AskedRows], dtype: torch.dtype, progress: OnDone
) -> ReferenceRows:
    """Run with all weights in memory."""
    with _quiet_library():
        model = _load(checkpoint, dtype)
    states = []
    for number, asked in enumerate(sequences):
        progress(number, len(sequences))
        rows = model.base_model(torch.tensor([asked.token_ids]), use_cache=False).last_hidden_state
        states.append(rows[0, asked.first :].clone())
    progress(len(sequences), len(sequences))
    return ReferenceRows(tuple(states), model.get_output_embeddings())


@torch.inference_mode()
def _run_by_layer(
    checkpoint: Checkpoint, sequences: Sequence[AskedRows], dtype: torch.dtype, progress: OnDone
) -> ReferenceRows:
    """Run with one layer in memory at a time, all sequences through each.

    The library's forward runs once with placeholders, which note how it calls each layer: masks and rotations.
    """
    with _quiet_library():
        shell = _load(checkpoint, dtype, layers=0)
        with torch.device("meta"):
            full = _MODELS.from_config(
                _config(checkpoint), dtype=dtype, attn_implementation=_ATTENTION, trust_remote_code=False
            )
    base, layers = shell.base_model, full.eval().base_model.layers
    places = [_Place() for _ in layers]
    base.layers = nn.ModuleList(places)
    base.config.num_hidden_layers = len(places)
    states, calls = [], []
    for asked in sequences:
        base(torch.tensor([asked.token_ids]), use_cache=False)
        states.append(places[0].hidden)
        calls.append([place.named for place in places])
    for number, layer in enumerate(layers):
        progress(number, len(layers))
        layer.load_state_dict(_layer_weights(checkpoint, number, layer, dtype), assign=True)
        for sequence, named in enumerate(calls):
            states[sequence] = layer(states[sequence], **named[number])
        layer.to("meta")
        return_freed_memory_now()
    progress(len(layers), len(layers))
    wanted = [
        base.norm(rows)[0, asked.first :].clone() for rows, asked in zip(states, sequences, strict=True)
    ]
    return ReferenceRows(tuple(wanted), shell.get_output_embeddings())


class _Place(nn.Module):
    """Stands for a layer, and notes how the library calls it."""

    hidden: Tensor
    named: dict[str, Any]

    def forward(self, hidden: Tensor, **named: Any) -> Tensor:  # noqa: ANN401 - what the library passes
        self.hidden, self.named = hidden, named
        return hidden


def _config(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - the library's
    return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)


def _load(checkpoint: Checkpoint, dtype: torch.dtype, layers: int | None = None) -> Any:  # noqa: ANN401
    """Load the library's model, or only its first `layers`; raises UnsupportedModelError if it refuses."""
    try:
        config = _config(checkpoint)
        if layers is not None:
            config.num_hidden_layers = layers
        return _MODELS.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        ).eval()
    except MemoryError:
        raise
    except Exception as error:  # the library raises any exception
        raise UnsupportedModelError(
            f"transformers cannot load the model to compare with: {printable(str(error))[:300]}",
            "subspec run answers without it",
        ) from error


def _layer_weights(
    checkpoint: Checkpoint, number: int, layer: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read the tensors of a layer, by their names inside it, with the format's own reader."""
    prefix, names = layer_prefix(number), layer.state_dict()
    return {name: _read(checkpoint.tensors[prefix + name]).to(dtype) for name in names}


def _read(entry: TensorEntry) -> Tensor:
    with safe_open(entry.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library's progress bars and its report of weights that are not loaded from the user's terminal."""
    logging: Any = library_logging  # not annotated
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
