"""Compare speculative with plain decoding on prompts of 1,500 to 6,000 tokens, greedy and at temperature 1.

    python scripts/agreement.py MODEL [--count 20] [--tokens 24]

`subspec audit` compares answers with transformers.
"""

from __future__ import annotations

import argparse
import sys

from subspec_cli.session.openmp import set_openmp_defaults

set_openmp_defaults()

from long_prompts import prompt_of  # noqa: E402 - OpenMP's settings are read when torch is imported

from subspec_cli import load  # noqa: E402
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


def main() -> None:
    """Compare and print; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    options = parser.parse_args()
    different = compare_arms(options.model, options.count, options.tokens, options.memory_gb)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
