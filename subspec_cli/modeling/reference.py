"""The reference of audits: the library's own forward of a checkpoint, whole in memory or one layer at a time.

Weights are loaded as the library loads them, into its own modules, on the CPU. Attention is its default: `sdpa`,
except where scores are capped. Both ways give the same bits: one layer at a time, every sequence goes through a layer
while its weights are there.
Shapes: `N` asked rows of a sequence, `V` vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as library_logging

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.configured_model import configured_model
from subspec_cli.checkpoint.dtypes import EIGHT_BIT_DTYPE, torch_dtype
from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.streaming.memory_meter import return_freed_memory_now
from subspec_cli.units import printable

_MODELS: Final[Any] = AutoModelForCausalLM  # its methods are not annotated

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
    model: nn.Module
    """The library's model with `_GivenStates` in place of its layers: factors and caps of logits are its own."""

    @torch.inference_mode()
    def logits(self, sequence: int, rows: slice) -> Tensor:
        """Logits `[rows, V]` of some of a sequence's asked rows, in float32."""
        given = self.states[sequence][None, rows]
        logits: Tensor = self.model(inputs_embeds=given, use_cache=False).logits
        return logits[0].float()


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """The library's own model of a checkpoint in float32 and in 16 bits."""

    checkpoint: Checkpoint
    """With all tensors that are stored, by the names that they have there."""
    stored: str
    """Type of the checkpoint's weights, such as `BF16`."""

    @property
    def own_name(self) -> str:
        """The 16-bit type: the checkpoint's own, `bf16` for a float32 checkpoint."""
        return "f16" if self.stored == "F16" else "bf16"

    @property
    def is_eight_bit(self) -> bool:
        """Whether matrices are stored in 8 bits."""
        return any(entry.dtype == EIGHT_BIT_DTYPE for entry in self.checkpoint.tensors.values())

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
        """Run all sequences, each by itself, with the whole model in memory or one layer at a time.

        One in 8 bits is widened layer by layer in any case: the library rounds to its type where it widens itself.
        """
        run = _run_whole if whole and not self.is_eight_bit else _run_by_layer
        return run(self.checkpoint, sequences, torch.float32 if in_float32 else self._dtype, progress)


@torch.inference_mode()
def _run_whole(
    checkpoint: Checkpoint, sequences: Sequence[AskedRows], dtype: torch.dtype, progress: OnDone
) -> ReferenceRows:
    """Run with all weights in memory."""
    with _quiet_library():
        model = _load(checkpoint, dtype)
    base, states = _text_model(model), []
    for number, asked in enumerate(sequences):
        progress(number, len(sequences))
        rows = base(torch.tensor([asked.token_ids]), use_cache=False).last_hidden_state
        states.append(rows[0, asked.first :].clone())
    progress(len(sequences), len(sequences))
    return ReferenceRows(tuple(states), _with_given_states(model))


@torch.inference_mode()
def _run_by_layer(
    checkpoint: Checkpoint, sequences: Sequence[AskedRows], dtype: torch.dtype, progress: OnDone
) -> ReferenceRows:
    """Run with one layer in memory at a time, all sequences through each.

    The library's forward runs once with placeholders, which note how it calls each layer: masks and rotations.
    """
    with _quiet_library():
        shell = _load(checkpoint, dtype, layers=0)
        config = _config(checkpoint)
        with torch.device("meta"):
            full = _class_for(config).from_config(config, dtype=dtype, trust_remote_code=False)
    base, whole = _text_model(shell), _text_model(full.eval())
    layers = whole.layers
    # What the library counts from the number of layers when it makes a model.
    vars(base).update({name: value for name, value in vars(whole).items() if isinstance(value, int)})
    places = [_Place() for _ in layers]
    base.layers = nn.ModuleList(places)
    base.config.num_hidden_layers = len(places)
    states, calls = [], []
    for asked in sequences:
        base(torch.tensor([asked.token_ids]), use_cache=False)
        states.append(places[0].hidden)
        calls.append([(place.given, place.named) for place in places])
    for number, layer in enumerate(layers):
        progress(number, len(layers))
        layer.load_state_dict(_layer_weights(checkpoint, number, layer, dtype), assign=True)
        for sequence, called in enumerate(calls):
            given, named = called[number]
            states[sequence] = layer(states[sequence], *given, **named)
        layer.to("meta")
        return_freed_memory_now()
    progress(len(layers), len(layers))
    wanted = [
        base.norm(rows)[0, asked.first :].clone() for rows, asked in zip(states, sequences, strict=True)
    ]
    return ReferenceRows(tuple(wanted), _with_given_states(shell))


class _Place(nn.Module):
    """Stands for a layer, and notes how the library calls it."""

    hidden: Tensor
    given: tuple[Any, ...]
    named: dict[str, Any]

    def forward(self, hidden: Tensor, *given: Any, **named: Any) -> Tensor:  # noqa: ANN401 - the library's
        self.hidden, self.given, self.named = hidden, given, named
        return hidden


class _GivenStates(nn.Module):
    """Stands for the layers of a model once their states are known."""

    def forward(self, inputs_embeds: Tensor, **_: object) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)


class _GivenOutput(tuple[Tensor]):
    """The output of a model's layers; it has none of what the parts for images add."""

    __slots__ = ()

    def __new__(cls, states: Tensor) -> Self:
        return super().__new__(cls, (states,))

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _text_model(model: Any) -> Any:  # noqa: ANN401 - the library's
    """The layers of a model, or of the text part of a larger one."""
    base = model.base_model
    return getattr(base, "language_model", base)


def _with_given_states(model: Any) -> nn.Module:  # noqa: ANN401 - the library's
    setattr(model, model.base_model_prefix, _GivenStates())
    given: nn.Module = model
    return given


def _class_for(config: Any) -> Any:  # noqa: ANN401 - the library's
    """The class that opens a model; for some, text alone has none."""
    return _MODELS if type(config) in _MODELS._model_mapping else AutoModelForImageTextToText


def _config(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - the library's
    found = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
    # Weights in 8 bits are widened here, so the library's own way, which needs further packages, is not asked for.
    vars(found).pop("quantization_config", None)
    return found


def _load(checkpoint: Checkpoint, dtype: torch.dtype, layers: int | None = None) -> Any:  # noqa: ANN401
    """Load the library's model, or only its first `layers`; raises UnsupportedModelError if it refuses."""
    try:
        config = _config(checkpoint)
        if layers is not None:
            config.get_text_config().num_hidden_layers = layers
        return (
            _class_for(config)
            .from_pretrained(
                checkpoint.directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
            .eval()
        )
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
    inside, stored = layer_prefix(number).removeprefix("model."), checkpoint.tensors
    towers = configured_model(checkpoint.config).names.towers
    names = {
        name: next(full for tower in towers if (full := f"{tower}{inside}{name}") in stored)
        for name in layer.state_dict()
    }
    return {name: _read_weight(stored, full).to(dtype) for name, full in names.items()}


def _read_weight(stored: Mapping[str, TensorEntry], name: str) -> Tensor:
    """Read a tensor; one in 8 bits is multiplied by its scales in float32 and rounded once, as the library does."""
    tensor = _read(stored[name])
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = next(_read(stored[full]) for end in ("_scale_inv", "_scale") if (full := name + end) in stored)
    grid = scale.float().reshape(scale.shape if scale.dim() == 2 else (1, 1))
    units = tensor.float().reshape(len(grid), len(tensor) // len(grid), grid.shape[1], -1)
    return (units * grid[:, None, :, None]).to(torch.bfloat16).reshape(tensor.shape)


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
