"""Measure total tokens per second of 1, 2, 4 and 8 answers at a time, and that each has the tokens it has alone.

All runs keep the layers resident that one answer's plan keeps, and have the same budget but for the memory of further
answers. The first number of answers is measured again at the end, as the machine may have changed. A rate counts the
rounds in which all places are taken. The ceiling is answers x tau x link rate / streamed bytes of a pass.

    python scripts/parallel_rates.py MODEL --memory-gb 1.1 --questions mt_bench.jsonl [--parallel 1,2,4,8] [--limit 8]

    python scripts/parallel_rates.py MODEL --memory-gb 1.1 --questions mt_bench.jsonl --identity --parallel 4

`--identity` measures no rate: it answers both turns of all questions in company and alone, and compares the tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from subspec_cli.bench.suites import Question, load_suite
from subspec_cli.config import Config, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.decoding.sampler import named_seed
from subspec_cli.metrics import tau_of_totals
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.forecast import forecast
from subspec_cli.session.session import Session
from subspec_cli.units import GIB

QUIET = Reporter()
_OWN = ("KV cache", "sampling noise", "recurrent state", "workspace", "kernels")


class Asked(NamedTuple):
    """A prompt of one turn."""

    name: str
    prompt_ids: tuple[int, ...]


@dataclass
class Measured:
    """What one number of answers gave."""

    sequences: int
    budget_gib: float
    resident: int
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    full_s: float = 0.0
    full_tokens: int = 0
    full_rounds: int = 0
    tau: float = 0.0
    predicted: float = 0.0
    ceiling: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of all answers, while all places were taken."""
        return self.full_tokens / self.full_s if self.full_s else 0.0


def main() -> None:
    """Measure and print."""
    options = read_options()
    numbers = [int(part) for part in options.parallel.split(",")]
    most = options.limit if options.identity or not options.limit else max(options.limit, *numbers)
    questions = load_suite("sample", options.questions, most)
    config = Config(
        model=ModelConfig(model=options.model),
        memory=MemoryConfig(
            memory_gib=options.memory_gb,
            device="cpu",
            context=options.context,
            no_residual=options.no_residual,
            resident_layers=options.resident_layers,
        ),
        sampling=SamplingConfig(temperature=options.temperature, seed=options.seed),
    )
    if options.identity:
        check_identity(config, questions, numbers[0], options)
        return
    plan = planned(config, 1)
    resident, least_bytes = plan.resident_layers, own_bytes(plan)
    found: list[Measured] = []
    print("answers  budget GiB  tok/s  over 1   tau  pass s  predicted  ceiling  share  same tokens")
    for number in [*numbers, numbers[0]]:
        memory = replace(config.memory, resident_layers=resident, memory_gib=options.memory_gb + 8)
        more_bytes = own_bytes(planned(replace(config, memory=memory), number)) - least_bytes
        memory = replace(memory, memory_gib=options.memory_gb + max(0, more_bytes) / GIB)
        with open_session(replace(config, memory=memory), QUIET, parallel=number) as session:
            some = questions[: max(options.limit or 0, number)] or questions
            found.append(measure(session, some, options.max_new_tokens))
        show(found[-1], found[0])


def planned(config: Config, number: int) -> OffloadPlan:
    """Return the plan for a number of answers."""
    model = config.model.model
    assert model is not None
    found = forecast(model, config, link_gb_per_s=None, compare_gib=(), parallel=number, reporter=QUIET)
    assert found.plan is not None
    return found.plan


def own_bytes(plan: OffloadPlan) -> int:
    """Return the bytes of a plan that grow with the number of answers."""
    return sum(line.size_bytes for line in plan.lines if line.label in _OWN)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memory-gb", type=float, required=True)
    parser.add_argument("--parallel", default="1,2,4,8")
    parser.add_argument("--questions")
    parser.add_argument("--limit", type=int, help="questions, at least one for each place")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--resident-layers", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--no-residual", action="store_true")
    parser.add_argument("--identity", action="store_true")
    return parser.parse_args()


def measure(session: Session, questions: Sequence[Question], limit: int) -> Measured:
    """Answer the first turns, as many at a time as the session has places."""
    plan = session.plan
    found = Measured(plan.sequences, plan.budget_bytes / GIB, plan.resident_layers)
    found.predicted = plan.prediction.tok_per_s
    waiting = [
        Asked(item.question_id, tuple(session.encode_prompt(item.turns[0], system=None, raw=False)))
        for item in questions
    ]
    rounds, names, stats = session.rounds(), {}, []
    waiting.reverse()
    before = session.link_counters()
    while waiting or rounds.in_flight:
        while waiting and rounds.free:
            asked = waiting.pop()
            names[rounds.join(begin(session, asked), limit)] = asked.name
        reading = any(answer.answer.is_reading for answer in rounds.in_flight)
        is_full, began, tokens = not rounds.free and not reading, time.perf_counter(), 0
        for answer, delta in rounds.round():
            tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                found.tokens[names[answer]] = tuple(answer.begun.token_ids)
                stats.append(delta.stats)
        if is_full:
            found.full_s += time.perf_counter() - began
            found.full_tokens += tokens
            found.full_rounds += 1
    link = session.link_counters().since(before)
    found.tau = tau_of_totals(stats)
    rate = link.streamed_bytes / link.read_time_s if link.read_time_s else 0.0
    per_pass = plan.streamed_bytes_per_pass
    found.ceiling = found.sequences * found.tau * rate / per_pass if per_pass else float("inf")
    return found


def begin(session: Session, asked: Asked):  # noqa: ANN201
    """Begin the answer to one prompt, by a seed of its own."""
    config = session.description.config.sampling
    return session.begin_by(asked.prompt_ids, config, seed=named_seed(config.seed or 0, asked.name))


def show(found: Measured, first: Measured) -> None:
    """Print a row."""
    both = found.tokens.keys() & first.tokens.keys()
    same = sum(found.tokens[name] == first.tokens[name] for name in both)
    print(
        f"{found.sequences:7} {found.budget_gib:11.2f} {found.rate:6.2f} {found.rate / first.rate:6.2f}x"
        f" {found.tau:5.1f} {found.full_s / max(1, found.full_rounds):7.2f} {found.predicted:10.2f}"
        f" {found.ceiling:8.2f} {found.rate / found.ceiling:6.0%} {same} of {len(both)}",
        flush=True,
    )


def check_identity(
    config: Config, questions: Sequence[Question], sequences: int, options: argparse.Namespace
) -> None:
    """Answer both turns of all questions in random company and alone; the second turn follows the first's answer."""
    chance = random.Random(options.seed)
    with open_session(config, QUIET, parallel=sequences) as session:
        together, differ = answers_together(session, questions, options.max_new_tokens, chance), 0
        for name, (prompt, tokens) in together.items():
            session.reset()
            begun = begin(session, Asked(name, prompt))
            for _ in session.go_on(begun, max_new_tokens=options.max_new_tokens):
                pass
            differ += tuple(begun.token_ids) != tokens
        kind = session.description.exactness
    print(f"{len(together) - differ} of {len(together)} answers as alone, {sequences} at a time ({kind})")


def answers_together(
    session: Session, questions: Sequence[Question], limit: int, chance: random.Random
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return prompt and tokens of both turns of every question, which join and leave at random."""
    todo = [(item, ()) for item in questions]
    chance.shuffle(todo)
    rounds, open_turns, done = session.rounds(), {}, {}
    while todo or rounds.in_flight:
        while todo and rounds.free and (chance.random() < 0.7 or not rounds.in_flight):
            item, said = todo.pop()
            messages = [{"role": "user", "content": item.turns[0]}]
            if said:
                messages += [
                    {"role": "assistant", "content": said[0]},
                    {"role": "user", "content": item.turns[1]},
                ]
            prompt = tuple(session.encode_messages(messages))
            asked = Asked(f"{item.question_id}.{len(said)}", prompt)
            open_turns[rounds.join(begin(session, asked), limit)] = (item, said, asked, [])
        for answer, delta in rounds.round():
            item, said, asked, pieces = open_turns[answer]
            pieces.append(delta.text)
            if delta.finish_reason is not None:
                done[asked.name] = (asked.prompt_ids, tuple(answer.begun.token_ids))
                if not said and len(item.turns) > 1:
                    todo.insert(chance.randrange(len(todo) + 1), (item, ("".join(pieces),)))
    return done


if __name__ == "__main__":
    main()
