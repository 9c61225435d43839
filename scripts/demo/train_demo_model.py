"""Train the small chat model that ships with the package, on the interpreter's own documentation.

The run is bounded by wall time, can be resumed, and publishes usable weights while it trains.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from demo_data import Conversations, Turn, collect_facts

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "subspec_cli" / "demo"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, EOS_ID = 0, 2
VOCABULARY = 4096
MAX_POSITIONS = 4096
ROW_TOKENS = 256
ROWS = 8
WAITING = 24
IGNORED = -100
PEAK_RATE = 2e-3
WARMUP_STEPS = 60
CHECKPOINT_SECONDS = 240.0
FIRST_PUBLISH_SECONDS = 600.0
MAX_ANSWER_TOKENS = 150
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each question is worded unlike every training template; all fragments must occur in a right answer.
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("I keep running into os.path.join, can you clarify its role?", ("pathname", "join")),
    ("Could you walk me through json.dumps for a second?", ("serialize", "json formatted")),
    ("Why would somebody reach for shutil.copytree?", ("directory tree", "recursively")),
    ("A colleague mentioned `len()`. Remind me of its job.", ("number of items",)),
    ("In plain words, sorted() hands me back what exactly?", ("new list", "ascending")),
    ("str.split: how would you sum it up for a beginner?", ("list of the substrings",)),
    ("In which situation is collections.Counter the right choice?", ("counting",)),
    ("bisect.insort slipped my mind, fill me in.", ("insert", "sorted")),
    ("Suppose I invoke os.makedirs, what changes on my disk?", ("create", "directory", "intermediate")),
    ("Break down random.shuffle for a student.", ("shuffle", "in place")),
)
OFF_TOPIC_PROBES = ("Write a poem about the sea", "What is 2+2?", "Which team is going to win on Sunday?")

Row = tuple[list[int], list[int]]


@dataclass
class Progress:
    """State of a run besides weights and optimizer, saved for a resumed run."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0


@dataclass
class Run:
    """Everything that changes while training, and the tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    model: Qwen2ForCausalLM
    optimizer: torch.optim.Optimizer
    progress: Progress


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    state = Path(tempfile.gettempdir()) / "subspec-demo-state"
    parser.add_argument("--minutes", type=float, default=33.0, help="wall time of the whole training run")
    parser.add_argument("--seed", type=int, default=1, help="seed of data order and initial weights")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the finished model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--state", type=Path, default=state, help="folder for saved states")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    parser.add_argument(
        "--evaluate", action="store_true", help="only ask the held-out questions of the model in --out"
    )
    return parser.parse_args()


def chat_pieces(system: str, turns: list[Turn]) -> list[tuple[str, bool]]:
    """The conversation as (text, is it trained on) pieces. Joined, they equal the output of the chat template."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    pieces: list[tuple[str, bool]] = []
    for question, answer in turns:
        pieces.append((f"{opening}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>", True))
        opening = "\n"
    pieces.append(("\n", False))
    return pieces


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the conversations; it works on bytes, so that any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    facts = collect_facts()
    corpus = [fact.answer for fact in facts] + [fact.name for fact in facts] * 2
    for system, turns in islice(Conversations(facts, seed), 12_000):
        corpus += [system, *(text for turn in turns for text in turn)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add the special tokens and the chat template that the Hugging Face files hold beside the vocabulary."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[EOS_ID],
        pad_token=SPECIALS[PAD_ID],
        model_max_length=MAX_POSITIONS,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encoded_conversations(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Conversations as tokens and targets; -100 marks tokens that are not trained on."""
    encode = tokenizer.backend_tokenizer.encode
    for system, turns in Conversations(collect_facts(), seed):
        tokens: list[int] = []
        targets: list[int] = []
        for text, trained in chat_pieces(system, turns):
            ids = encode(text, add_special_tokens=False).ids
            tokens += ids
            targets += ids if trained else [IGNORED] * len(ids)
        if len(tokens) <= ROW_TOKENS:
            yield tokens, targets


def packed_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Rows filled with whole conversations.

    Conversations in one row see each other, which teaches the model to answer late turns of a long chat.
    """
    stream = encoded_conversations(tokenizer, seed)
    pending: list[Row] = []
    while True:
        tokens: list[int] = []
        targets: list[int] = []
        while True:
            pending += islice(stream, WAITING - len(pending))
            fitting = next((row for row in pending if len(row[0]) <= ROW_TOKENS - len(tokens)), None)
            if fitting is None:
                break
            pending.remove(fitting)
            tokens += fitting[0]
            targets += fitting[1]
        padding = ROW_TOKENS - len(tokens)
        yield tokens + [PAD_ID] * padding, targets + [IGNORED] * padding


def build_model(seed: int) -> Qwen2ForCausalLM:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen2ForCausalLM(config)


def publish(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, progress: Progress
) -> None:
    """Write bf16 files beside the old ones, then rename each, so that a reader never sees half a file."""
    import torch
    from transformers import GenerationConfig, Qwen2ForCausalLM

    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False)
    out.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".writing-", dir=out))
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(model_card(progress), encoding="utf-8")
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    shutil.rmtree(fresh)


def model_card(progress: Progress) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    return f"""---
language: en
license: psf-2.0
pipeline_tag: text-generation
---

# subspec demo model

A 5-million-parameter Qwen2-architecture chat model that answers questions about functions, methods and
classes of Python's standard library, for trying speculative decoding on a machine without any download.
5 layers, hidden size 256, feed-forward 768, 4 attention heads, 2 key/value heads, tied embedding,
byte-level BPE vocabulary of {VOCABULARY}, bf16.

It was trained from scratch by `scripts/demo/train_demo_model.py` for {progress.seconds / 60:.0f} minutes on a CPU
({progress.tokens / 1e6:.1f} million tokens, final loss {progress.loss:.3f}) on question/answer pairs made from
the documentation strings of the standard library of Python {version}, which are under the Python
Software Foundation License. It knows nothing else: other requests get a polite refusal, and an unfamiliar
name may get a wrong answer.
"""


def save_state(run: Run, folder: Path) -> None:
    """Save everything a resumed run needs, including the tokenizer that the weights were trained with."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    run.tokenizer.save_pretrained(folder)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "progress": vars(run.progress),
    }
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def start_run(options: argparse.Namespace) -> Run:
    """A fresh run, or the saved run with `--resume`."""
    import torch
    from tokenizers import Tokenizer

    model = build_model(options.seed)
    optimizer = make_optimizer(model)
    if not options.resume:
        return Run(build_tokenizer(options.seed), model, optimizer, Progress())
    state = torch.load(options.state / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    tokenizer = wrap_tokenizer(Tokenizer.from_file(str(options.state / "tokenizer.json")))
    return Run(tokenizer, model, optimizer, Progress(**state["progress"]))


def learning_rate(step: int, fraction: float) -> float:
    """Warm up by steps, then follow a cosine over the wall time, so that training ends on time on any machine."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * fraction)) / 2)


def train_step(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, rows: list[Row]) -> float:
    import torch
    from torch.nn import functional

    tokens = torch.tensor([row[0] for row in rows])
    targets = torch.tensor([row[1] for row in rows])[:, 1:]
    wanted = targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[wanted])
    loss = functional.cross_entropy(logits.float(), targets[wanted])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def make_optimizer(model: Qwen2ForCausalLM) -> torch.optim.Optimizer:
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def train(options: argparse.Namespace) -> None:
    """Train until the time is used up; save states and publish the weights now and then."""
    import torch

    torch.set_num_threads(options.threads)
    run = start_run(options)
    progress = run.progress
    print(f"{run.model.num_parameters():,} parameters, starting at step {progress.step}", flush=True)
    rows = packed_rows(run.tokenizer, options.seed + progress.step)
    budget, started, saved = options.minutes * 60, time.monotonic() - progress.seconds, progress.seconds
    while progress.seconds < budget:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, progress.seconds / budget)
        loss = train_step(run.model, run.optimizer, list(islice(rows, ROWS)))
        progress.loss = loss if progress.step == 0 else 0.98 * progress.loss + 0.02 * loss
        progress.step, progress.tokens = progress.step + 1, progress.tokens + ROWS * ROW_TOKENS
        progress.seconds = time.monotonic() - started
        if progress.step % 50 == 0:
            print(json.dumps(vars(progress)), flush=True)
        if progress.seconds - saved > CHECKPOINT_SECONDS:
            saved = progress.seconds
            save_state(run, options.state)
            if saved > FIRST_PUBLISH_SECONDS:
                publish(run.model, run.tokenizer, options.out, progress)
    save_state(run, options.state)
    publish(run.model, run.tokenizer, options.out, progress)


def assert_held_out(seed: int) -> None:
    """Fail if an evaluation prompt occurs in a large sample of the training questions."""
    stream = islice(Conversations(collect_facts(), seed), 200_000)
    seen = {question.lower().strip("?.! ") for _, turns in stream for question, _ in turns}
    for prompt in [*OFF_TOPIC_PROBES, *(question for question, _ in QUESTIONS)]:
        assert prompt.lower().strip("?.! ") not in seen, prompt


def ask(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> tuple[str, int, bool]:
    """The greedy answer, its length in tokens, and whether it ended with the end token."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    produced = model.generate(**encoded, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    ids = produced[0, encoded["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids), ids[-1] == EOS_ID


def evaluate(options: argparse.Namespace) -> None:
    """Ask the held-out questions with greedy decoding; report how many answers are right and how many end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    assert_held_out(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.out)
    right = ended = 0
    prompts = [*QUESTIONS, *((probe, ()) for probe in OFF_TOPIC_PROBES)]
    for question, keywords in prompts:
        answer, length, complete = ask(model, tokenizer, question)
        good = bool(keywords) and all(keyword in answer.lower() for keyword in keywords)
        right, ended = right + good, ended + complete
        verdict = "right" if good else "wrong" if keywords else "off topic"
        print(f"Q: {question}\nA: {answer}\n   {verdict}, {length} tokens\n")
    print(f"right {right}/{len(QUESTIONS)}, ended {ended}/{len(prompts)}")


def main() -> None:
    options = parse_arguments()
    if options.evaluate:
        evaluate(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
