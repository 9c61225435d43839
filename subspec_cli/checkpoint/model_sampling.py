"""How a model's own files say that its tokens are chosen, as the library's `generate` reads them.

| the file says | the token |
|---|---|
| `do_sample` false, null or missing | the most likely, whatever temperature, top_p, top_k and min_p say |
| `do_sample` true | sampled; what is missing or null is temperature 1, top_k 50, top_p 1, no min_p |
| `repetition_penalty` | applied in both cases; missing or null is 1 |

The file is generation_config.json, or config.json if the former is not there. Values are checked only when somebody
uses them: many models run by a user's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import shown
from subspec_cli.config import SamplingConfig, flag_of, settings_of
from subspec_cli.errors import UnsupportedModelError

_FILLED: Final = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""The library's values of what a sampling model leaves open."""
NOT_COMPUTED: Final[Mapping[str, object]] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Fields that change tokens and that only the library computes, with the value that changes nothing."""
NOT_COMPUTED_IN_SAMPLING: Final[Mapping[str, object]] = {
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "typical_p": 1,
}
"""The same of fields that only a sampling model heeds."""


@dataclass(frozen=True, slots=True)
class ModelSampling:
    """What a model's files say about sampling. The values are as they stand there, unchecked."""

    file_name: str
    do_sample: object
    values: Mapping[str, object]
    """By field of `SamplingConfig`; the library's own where the file says nothing."""
    not_computed: tuple[str, ...]
    """Fields with their values that would change tokens, and that are not computed here."""

    def fill(self, sampling: SamplingConfig) -> dict[str, Any]:
        """Return the values for the fields of `sampling` that the user did not give, by field.

        Raises UnsupportedModelError if one of them is out of its range.
        """
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise UnsupportedModelError(
                f"do_sample in {self.file_name} is {shown(self.do_sample)}, not true or false",
                "correct the file, or leave its values aside: --sampling greedy",
            )
        filled, settings = {}, settings_of(SamplingConfig)
        for name, value in self.values.items():
            if name in sampling.given:
                continue
            rule = settings[name].rule
            if not rule.accepts(value):
                raise UnsupportedModelError(
                    f"{name} in {self.file_name} is {shown(value)}, not {rule.expected}",
                    f"{flag_of(name)} replaces it, --sampling greedy leaves the file's values aside",
                )
            filled[name] = rule.convert(value)
        return filled


def read_model_sampling(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelSampling:
    """Return what config.json and generation_config.json say; `generation` is None without the latter."""
    file_name, source = (
        ("config.json", config) if generation is None else ("generation_config.json", generation)
    )
    samples = source.get("do_sample")
    values: dict[str, object] = {"temperature": 0.0}
    if samples is True:
        values = {name: _or(source.get(name), usual) for name, usual in _FILLED.items()}
    values["repetition_penalty"] = _or(source.get("repetition_penalty"), 1.0)
    heeded = {**NOT_COMPUTED, **NOT_COMPUTED_IN_SAMPLING} if samples is True else NOT_COMPUTED
    not_computed = tuple(
        f"{name} {shown(value)}"
        for name, neutral in heeded.items()
        if (value := source.get(name)) not in (None, False, [], {}, neutral)
    )
    return ModelSampling(file_name, samples, MappingProxyType(values), not_computed)


def _or(value: object, usual: object) -> object:
    return usual if value is None else value
