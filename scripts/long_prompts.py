"""Measure what long prompts cost: prefill beside transformers, and passes and decoding by cached tokens.

Everything is resident. Both sides of the prefill run in turn, and the first round of each is not counted. A pass is
one over the same tree of 40 nodes behind 50, 2,000 and 6,000 cached tokens; decoding is speculative.

    python scripts/long_prompts.py MODEL [--lengths 2000,6000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from subspec_cli.session.openmp import set_openmp_defaults

set_openmp_defaults()

import torch  # noqa: E402 - OpenMP's settings are read when torch is imported
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from subspec_cli import load  # noqa: E402
from subspec_cli.decoding.row_groups import prompt_groups  # noqa: E402
from subspec_cli.modeling.row_group import RowGroup  # noqa: E402
from subspec_cli.modeling.target_flow import SequenceRows  # noqa: E402
from subspec_cli.session.session import Session  # noqa: E402

NODES, DEPTH = 40, 16
SHORT = 50
QUESTION = "Write a short story about a lighthouse keeper."
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def prefill(session: Session, token_ids: Sequence[int]) -> None:
    """Read a prompt into the session's empty cache."""
    kv, target = session.loaded.kv, session.loaded.target(session.loaded.blocks)
    kv.rewind(0)
    flow = target.begin([[SequenceRows(group, kv)] for group in prompt_groups(token_ids, 0)])
    with closing(target.layers(flow)) as layers:
        for _ in layers:
            pass
    last = flow.batches[-1].rows
    target.logits(flow, [(len(flow.batches) - 1, slice(last - 1, last))])
    kv.commit(range(len(token_ids)), token_ids)


def prompt_of(session: Session) -> Callable[[int], list[int]]:
    """Return a function from a number of tokens to a prompt of that length: text, then always the same question."""
    tokenizer = session.loaded.tokenizer
    documents = sorted(Path(__file__).parent.glob("*.md")) + sorted(
        Path(__file__).parents[1].glob("subspec_cli/*.md")
    )
    filler = tokenizer.encode_prompt("\n".join(path.read_text() for path in documents), system=None, raw=True)
    question = tokenizer.encode_prompt(QUESTION, system=None, raw=False)
    return lambda length: [*filler[: length - len(question)], *question[-length:]]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(seconds: Sequence[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def tree_pass(session: Session) -> float:
    """Return the seconds of a pass over a tree of `NODES` nodes behind what is committed: the least of five."""
    target, kv = session.loaded.target(session.loaded.blocks), session.loaded.kv
    number = torch.arange(NODES)
    depths = number.clamp_max(DEPTH)
    path = (number[None] < depths[:, None]) | torch.eye(NODES, dtype=torch.bool)
    group = RowGroup(torch.full((NODES,), 7), kv.committed + depths, kv.committed, path)
    return min(timed(lambda: target.forward(group, kv)) for _ in range(5))


def compare_prefill(session: Session, model: str, lengths: Sequence[int], rounds: int) -> None:
    """Print the prefill of each length beside that of transformers, in turn."""
    reference, text = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(), prompt_of(session)
    for length in lengths:
        token_ids = text(length)
        rows = torch.tensor([token_ids])
        ours, theirs = [], []
        for _ in range(rounds + 1):
            with torch.inference_mode():
                theirs.append(timed(partial(reference, rows, logits_to_keep=1)))
            ours.append(timed(partial(prefill, session, token_ids)))
        ratio = statistics.median(ours[1:]) / statistics.median(theirs[1:])
        print(
            f"prefill of {length}: {spread(ours[1:])}, transformers {spread(theirs[1:])}, ratio {ratio:.2f}"
        )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        prefill(session, text(max(lengths)))
    times = {item.key: item.self_cpu_time_total for item in profiled.key_averages()}
    share = times[ATTENTION] / sum(times.values())
    print(f"share of the attention kernel in a prefill of {max(lengths)}: {share:.0%}")


def compare_lengths(session: Session, lengths: Sequence[int], rounds: int) -> None:
    """Print a pass and the decoding behind each number of cached tokens."""
    text, base = prompt_of(session), (0.0, 0.0)
    for length in (SHORT, *lengths):
        prefill(session, text(length))
        pass_s = tree_pass(session)
        answers = [
            list(session.generate(text(length), max_new_tokens=96, stop=()))[-1] for _ in range(rounds)
        ]
        rate, tau = max(answer.stats.decode_tok_per_s for answer in answers), answers[0].stats.tau
        base = base if base[0] else (pass_s, rate)
        print(
            f"{length} cached: pass of {NODES} nodes {pass_s * 1e3:.0f} ms, {pass_s / base[0]:.2f} times that at "
            f"{SHORT}; {rate:.1f} tok/s, {rate / base[1]:.0%} (tau {tau:.2f}, {rate / tau:.2f} rounds/s)"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", default="2000,6000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    with load(options.model, memory_gib=options.memory_gb, context=max(lengths) + 256) as session:
        about = session.description
        print(f"{about.model_id} · {about.dtype} · {about.exactness} ({about.exactness_reason})")
        print(f"{about.threads} threads · prompts in passes of up to {about.plan.prompt_rows} rows")
        compare_prefill(session, options.model, lengths, options.rounds)
        compare_lengths(session, lengths, options.rounds)


if __name__ == "__main__":
    main()
