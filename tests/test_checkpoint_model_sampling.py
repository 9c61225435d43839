"""A model's own sampling: what the library's `generate` makes of the same files, on the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from subspec_cli.checkpoint.model_sampling import (
    NOT_COMPUTED,
    NOT_COMPUTED_IN_SAMPLING,
    read_model_sampling,
)
from subspec_cli.config import SamplingConfig
from subspec_cli.config_file import resolve_config
from subspec_cli.decoding.penalties import begin_path, penalties_of
from subspec_cli.decoding.sampler import Filters, allowed_tokens
from subspec_cli.errors import UnsupportedModelError

VOCAB = 97
IDS = [3, 9, 3, 60, 0, 11]
FILES = {
    "nothing": {},
    "greedy": {"do_sample": False, "temperature": 0.6, "top_p": 0.5},
    "no word on sampling": {"temperature": 0.6, "top_k": 3},
    "greedy with a penalty": {"repetition_penalty": 1.3},
    "sampling alone": {"do_sample": True},
    "nulls": {"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "min_p": None},
    "no top-k": {"do_sample": True, "top_k": 0, "temperature": 1.4},
    "as a chat model ships": {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    },
    "min-p": {"do_sample": True, "min_p": 0.1, "top_k": 0, "temperature": 2.0},
    "one token": {"do_sample": True, "top_k": 1},
}
NO_EFFECT = {
    # lengths, which the user gives, and searches of the library that only an assistant model begins
    *("max_length", "max_new_tokens", "max_time", "early_stopping", "length_penalty", "diversity_penalty"),
    *("num_beam_groups", "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_early_exit"),
    *("assistant_ensemble_weight", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    # caches, compilers and what is given back
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    # token ids (`eos_token_id` ends answers), encoders, and what an argmax and a draw do not notice
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("renormalize_logits", "remove_invalid_values"),
    *("transformers_version", "continuous_batching_config", "low_memory"),
}


def own(generation, **flags):
    """The settings of a user who gave these flags, filled by the model's own."""
    sampling = resolve_config({"sampling": {"sampling": "model", **flags}}).sampling
    return SamplingConfig(
        **{name: getattr(sampling, name) for name in sampling.given}
        | read_model_sampling({}, generation).fill(sampling)
    )


@pytest.fixture(scope="module")
def library():
    """The library's processors for the content of a generation_config.json."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))

    def processed(generation, row):
        model.generation_config = GenerationConfig.from_dict(generation)
        config, _ = model._prepare_generation_config(None)
        processors = model._get_logits_processor(config, input_ids_seq_length=len(IDS))
        return config.do_sample, processors(torch.tensor([IDS]), torch.tensor(row)[None])[0].numpy()

    return processed


@pytest.mark.parametrize("generation", FILES.values(), ids=FILES)
def test_the_scores_are_those_of_the_librarys_processors(library, generation):
    sampling = own(generation)
    state = begin_path(penalties_of(sampling, ()), IDS, VOCAB)
    for seed in range(10):
        row = np.random.default_rng(seed).normal(0, 4, VOCAB)
        samples, wanted = library(generation, row)
        scores = row if state is None else state.adjust(row)
        assert samples is not sampling.is_greedy
        if samples:
            scores = scores / sampling.temperature
            keep = allowed_tokens(scores, Filters(sampling.top_k, sampling.top_p, sampling.min_p))
            scores = np.where(keep, scores, -np.inf)
        np.testing.assert_allclose(scores, wanted, rtol=1e-12)


def test_every_field_of_the_library_is_known():
    """A field that a new version adds may change tokens."""
    computed = {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    library = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    library |= set(GenerationConfig._get_default_generation_params())
    assert library - computed - set(NOT_COMPUTED) - set(NOT_COMPUTED_IN_SAMPLING) - NO_EFFECT == set()


def test_what_the_user_gave_wins():
    shipped = FILES["as a chat model ships"]
    assert own(shipped, temperature=0.2, top_k=0) == SamplingConfig(
        source="model", temperature=0.2, top_p=0.8, top_k=0, repetition_penalty=1.05
    )
    assert own(shipped, temperature=0.0).is_greedy
    # A model that does not sample has no filters that a user's temperature would wake up.
    asleep = {"temperature": 0.6, "top_p": 0.5, "top_k": 7}
    assert own(asleep, temperature=0.9) == SamplingConfig(source="model", temperature=0.9)


def test_without_a_generation_config_the_config_counts_as_in_the_library():
    config = {"do_sample": True, "temperature": 0.6}
    old, new = read_model_sampling(config, None), read_model_sampling(config, {})
    assert (old.file_name, old.values["temperature"]) == ("config.json", 0.6)
    assert (new.file_name, new.values["temperature"]) == ("generation_config.json", 0.0)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"temperature": -1}, "temperature in generation_config.json is -1, not a number of at least 0"),
        ({"temperature": "hot"}, "temperature in generation_config.json is 'hot', not a number"),
        ({"temperature": True}, "temperature in generation_config.json is True, not a number"),
        ({"top_p": 2}, "top_p in generation_config.json is 2, not a number above 0 and at most 1"),
        ({"top_k": -1}, "top_k in generation_config.json is -1, not a whole number of at least 0"),
        ({"top_k": 5.5}, "top_k in generation_config.json is 5.5, not a whole number"),
        ({"min_p": 1.5}, "min_p in generation_config.json is 1.5, not a number from 0 to 1"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty in generation_config.json is 0, not a number above 0",
        ),
        ({"repetition_penalty": [1.1]}, r"repetition_penalty in generation_config.json is \[1.1\]"),
        ({"do_sample": "yes"}, "do_sample in generation_config.json is 'yes', not true or false"),
    ],
)
def test_broken_values_are_named_unless_a_flag_replaces_them(broken, told):
    generation = {"do_sample": True, **broken}
    with pytest.raises(UnsupportedModelError, match=told) as raised:
        own(generation)
    assert "--sampling greedy" in raised.value.hint
    ((name, _),) = broken.items()
    if name != "do_sample":
        assert f"--{name.replace('_', '-')} replaces it" in raised.value.hint
        assert own(generation, **{name: 1}).source == "model"


def test_what_is_not_computed_is_named_with_its_value():
    asked = {"no_repeat_ngram_size": 3, "suppress_tokens": [1, 2], "num_beams": 4, "typical_p": 0.9}
    sampled = read_model_sampling({}, {"do_sample": True, **asked}).not_computed
    assert sampled == ("no_repeat_ngram_size 3", "num_beams 4", "suppress_tokens [1, 2]", "typical_p 0.9")
    # Greedy decoding heeds no typical_p.
    assert read_model_sampling({}, asked).not_computed == sampled[:3]
    neutral = {**NOT_COMPUTED, **NOT_COMPUTED_IN_SAMPLING}
    assert read_model_sampling({}, {"do_sample": True, **neutral}).not_computed == ()
    nothing = {"do_sample": True, "eta_cutoff": 0.0, "bad_words_ids": [], "forced_eos_token_id": None}
    assert read_model_sampling({}, nothing).not_computed == ()
