"""Compare answers: speculative with plain decoding on long prompts, and greedy ones with transformers in float32.

`identical` decodes prompts of 1,500 to 6,000 tokens both ways, greedy and at temperature 1. `library` runs greedy
answers of a float32 model through transformers, in float32 and bfloat16. Where a token is not transformers' choice,
the gap between the two logits in float32 must be at most twice the largest difference between transformers' own
bfloat16 and float32 logits in that row: a near tie.

    python scripts/agreement.py identical MODEL [--count 20] [--tokens 24]
    python scripts/agreement.py library MODEL --questions mt_bench.jsonl [--count 40] [--tokens 32]
"""

from __future__ import annotations

import argparse
import sys

from subspec_cli.session.openmp import set_openmp_defaults

set_openmp_defaults()

import torch  # noqa: E402 - OpenMP's settings are read when torch is imported
from long_prompts import prompt_of  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from subspec_cli import load  # noqa: E402
from subspec_cli.bench.suites import load_suite  # noqa: E402
from subspec_cli.session.session import Session  # noqa: E402

SHORTEST, LONGEST = 1500, 6000


def answer(session: Session, token_ids: list[int], tokens: int, seed: int, *, plain: bool) -> tuple[int, ...]:
    """Return the tokens of an answer."""
    pieces = session.generate(token_ids, max_new_tokens=tokens, stop=(), plain=plain, seed=seed)
    return tuple(token for piece in pieces for token in piece.token_ids)


def compare_arms(model: str, count: int, tokens: int, memory_gib: float) -> int:
    """Compare speculative with plain decoding; return how many pairs differ."""
    different = 0
    for temperature in (0.0, 1.0):
        same, drafted = 0, 0
        with load(model, memory_gib=memory_gib, context=LONGEST + 256, temperature=temperature) as session:
            text = prompt_of(session)
            for number in range(count):
                length = SHORTEST + number * (LONGEST - SHORTEST) // max(1, count - 1)
                token_ids = text(length)
                speculative = answer(session, token_ids, tokens, number, plain=False)
                # Every other prompt is read again, so that the second arm's cache is its own.
                if number % 2:
                    session.reset()
                plain = answer(session, token_ids, tokens, number, plain=True)
                same += speculative == plain
                drafted += len(speculative)
            exactness = session.description.exactness
        print(f"temperature {temperature}: {same} of {count} identical, {drafted} tokens, {exactness}")
        different += count - same
    return different


def compare_library(model: str, questions: str, count: int, tokens: int, memory_gib: float) -> int:
    """Compare greedy answers with transformers; return how many first differences are no near ties."""
    wide = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    narrow = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    wrong, whole, ties = 0, 0, 0
    with load(model, memory_gib=memory_gib, context=2048) as session, torch.inference_mode():
        print(f"{session.description.dtype}, {session.description.exactness}")
        for question in load_suite("mt-bench", questions, count):
            prompt = session.encode_prompt(question.turns[0], system=None, raw=False)
            given = answer(session, prompt, tokens, 0, plain=False)
            rows = torch.tensor([[*prompt, *given[:-1]]])
            logits = wide(rows).logits[0, len(prompt) - 1 :]
            differing = (logits.argmax(-1) != torch.tensor(given)).nonzero().flatten().tolist()
            if not differing:
                whole += 1
                continue
            at = differing[0]
            gap = float(logits[at].max() - logits[at, given[at]])
            own = float((narrow(rows).logits[0, len(prompt) - 1 + at].float() - logits[at]).abs().max())
            ties += gap <= 2 * own
            wrong += gap > 2 * own
            print(
                f"question {question.question_id}: token {at}, gap {gap:.2e}, transformers' own difference {own:.2e}"
            )
    print(f"{whole} of {count} answers equal, {ties} differ first in a near tie, {wrong} elsewhere")
    return wrong


def main() -> None:
    """Compare and print; exit with 1 if anything differs that must not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("identical", "library"))
    parser.add_argument("model")
    parser.add_argument("--questions")
    parser.add_argument("--count", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    options = parser.parse_args()
    if options.what == "identical":
        bad = compare_arms(options.model, options.count or 20, options.tokens or 24, options.memory_gb)
    else:
        if options.questions is None:
            parser.error("library needs --questions")
        bad = compare_library(
            options.model, options.questions, options.count or 40, options.tokens or 32, options.memory_gb
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
