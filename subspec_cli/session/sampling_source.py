"""Where a session's sampling settings come from: the user, the model's own files, or the defaults."""

from __future__ import annotations

import dataclasses

from subspec_cli.checkpoint.model_sampling import ModelSampling
from subspec_cli.config import Config, SamplingConfig
from subspec_cli.errors import UnsupportedModelError


def with_model_sampling(config: Config, model: ModelSampling) -> Config:
    """Return settings whose sampling is complete: with `--sampling model` the model's values fill what is not given.

    Raises UnsupportedModelError for a value out of its range. It is also raised if the user asked for the model's
    sampling, and the model's files want what is not computed here. A chat takes it by default, and gets a note.
    """
    sampling = config.sampling
    if sampling.source != "model":
        return config
    filled = dataclasses.replace(sampling, **model.fill(sampling))
    if model.not_computed and "source" in sampling.given:
        raise UnsupportedModelError(
            f"{model.file_name} asks for {', '.join(model.not_computed)}, which subspec does not compute",
            f"the rest of it by hand: {' '.join(_flags(filled)) or '--sampling greedy'}",
        )
    return dataclasses.replace(config, sampling=filled)


def sampling_notes(sampling: SamplingConfig, model: ModelSampling) -> tuple[str, ...]:
    """Return what the user should know of the model's own sampling, if it is in use."""
    if sampling.source != "model" or not model.not_computed:
        return ()
    return (f"{model.file_name} also asks for {', '.join(model.not_computed)}, which is not computed here",)


def own_sampling(model: ModelSampling) -> SamplingConfig | None:
    """Return the sampling of the model's own files alone; None if a value of theirs cannot be used."""
    try:
        return SamplingConfig(source="model", **model.fill(SamplingConfig()))
    except UnsupportedModelError:
        return None


def _flags(sampling: SamplingConfig) -> list[str]:
    """Return the flags that give these settings, apart from those that change nothing."""
    usual = SamplingConfig()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return [
        f"--{name.replace('_', '-')} {getattr(sampling, name):g}"
        for name in names
        if getattr(sampling, name) != getattr(usual, name)
    ]
