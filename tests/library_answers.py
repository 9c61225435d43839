"""What the library does with a repository, and what we do with it, by the same prompt. Both in one process.

`library_answer` uses transformers alone. `our_answer` decides the repository as the commands do and decodes greedily
with our target, without substitutes: speculation changes no token, which other tests hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import AUTO, Tiny
from transformers import AutoTokenizer

from subspec_cli.checkpoint.repository import Repository, check_tokenizer_in
from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.engine import Engine, Request
from subspec_cli.decoding.sampler import make_sampler
from subspec_cli.decoding.text import AnswerText
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.streaming.streamer import StreamCounters

CONTEXT, SCRATCH = 192, 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer to a text: the tokens that were asked with, those that came, and their text."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str


def library_answer(directory: Path, text: str, limit: int, dtype: torch.dtype) -> tuple[Outcome, Any]:
    """The greedy answer of `AutoModelForCausalLM.generate`, and the model. Raises whatever the library raises."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model, info = AUTO.from_pretrained(
        directory, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"filled with random numbers: {sorted(info['missing_keys'])}")
    prompt = list(tokenizer.encode(text))
    ids = torch.tensor([prompt])
    out = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, use_cache=True
    )
    tokens = out[0, len(prompt) :].tolist()
    ends = model.generation_config.eos_token_id
    ended = tokens and tokens[-1] in (ends if isinstance(ends, list) else [ends])
    shown = tokenizer.decode(
        tokens[:-1] if ended else tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Outcome(prompt, tokens, shown), model


def our_answer(directory: Path, text: str, limit: int) -> tuple[Outcome, Repository]:
    """The greedy answer of our target. Raises SubspecError for a repository that is refused."""
    opened = Tiny(directory, context=CONTEXT, scratch=SCRATCH)
    repository = opened.repository
    check_tokenizer_in(directory, repository)
    tokenizer = ModelTokenizer(directory, repository.tokenizer)
    prompt = tokenizer.encode(text)
    target = opened.target(rules=RowRules(2))
    engine = Engine(target, PlainDrafter(), counters=StreamCounters, prompt_rows=CONTEXT)
    answer = AnswerText(tokenizer, eos_ids=repository.end_ids, stop=(), max_new_tokens=limit)
    sampler = make_sampler(SamplingConfig(temperature=0.0), 0, 0)
    outputs = engine.generate(Request(tuple(prompt), sampler, limit, answer), opened.kv())
    tokens = [token for output in outputs for token in output.token_ids]
    return Outcome(prompt, tokens, answer.take()), repository


def first_gap(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How much lower the library's logit of our token is than its best, at the first token that differs."""
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return 0.0 if len(ours) == len(theirs) else float("inf")
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *theirs[:at]]])).logits[0, -1].float()
    return float(logits.max() - logits[ours[at]])
