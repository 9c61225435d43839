"""Print tokens, tau, draft steps and price of a suite at fixed costs. No clock is read: equal code, equal figures.

A small model answers, and its trees are grown and priced at the costs of a large one: the surrogate's in
`scripts/price_costs.json`, or those of any record that `subspec run --json` or `subspec bench --json` printed.
A pass of n nodes costs max(link, compute(n)), a serial draft step of r rows costs step(r), and a draft step in the
shadow of a pass costs nothing, because it is planned into time that the link leaves idle.

    python scripts/price.py MODEL --questions mt_bench.jsonl
    python scripts/price.py MODEL --questions mt_bench.jsonl --temperature 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from subspec_cli.bench.suites import load_suite
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.config import Config, DraftConfig, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.drafting.policy import DraftPolicy, TreeLimits
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.errors import SubspecError
from subspec_cli.limits import MOST_DEPTH, MOST_ROWS, SHADOW_ROWS
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts, PlanCosts, RowTimes
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.answer import TextDelta
from subspec_cli.session.session import Session
from subspec_cli.substitutes.settings import SubstituteSettings

COSTS: Final = Path(__file__).with_name("price_costs.json")
TREE_NODES: Final = 64


@dataclass
class Bill:
    """Totals over all answers."""

    answers: int = 0
    tokens: int = 0
    """All new tokens, including the first of each answer, which costs no pass of the decode loop."""
    passes: int = 0
    draft_steps: int = 0
    shadow_steps: int = 0
    shadow_hits: int = 0
    drafted: int = 0
    price_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the ratios."""
        decoded = self.tokens - self.answers
        return {
            **vars(self),
            "tau": decoded / self.passes,
            "draft_steps_per_pass": self.draft_steps / self.passes,
            "tok_per_s": decoded / self.price_s,
        }


def main() -> int:
    """Answer, price and print; figures as a table or as one JSON document."""
    options = read_options()
    config = Config(
        model=ModelConfig(model=options.model),
        memory=MemoryConfig(memory_gib=options.memory_gb, device="cpu", resident_layers=0),
        # A fixed width makes room for the largest tree, whatever the small model's own costs say.
        draft=DraftConfig(width=1),
        sampling=SamplingConfig(temperature=options.temperature, top_p=options.top_p, seed=options.seed),
    )
    costs = read_costs(options.costs)
    reporter = Reporter(lambda text: print(text, file=sys.stderr))
    try:
        # The small model's plan must not depend on a clock either.
        with open_session(config, reporter, costs=cpu_costs) as session:
            figures = price(with_costs(session, costs, shadow=not options.no_shadow), costs, options)
    except SubspecError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")
    return 0


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a prepared model that fits memory")
    parser.add_argument("--costs", type=Path, default=COSTS, help="JSON record that holds a plan's costs")
    parser.add_argument("--questions", help="questions as JSON lines; default: the shipped sample")
    parser.add_argument("--limit", type=int, help="most questions")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--no-shadow", action="store_true", help="no draft steps while a pass runs")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser.parse_args()


def cpu_costs(geometry: ModelGeometry, settings: SubstituteSettings) -> MachineCosts:
    """Return costs of the small model that do not depend on this machine."""
    return assumed_costs(geometry, "cpu", settings=settings)


def read_costs(path: Path) -> PlanCosts:
    """Return the costs of a record, or of a file that holds only costs."""
    record = json.loads(path.read_text())
    values: Mapping[str, Any] = record.get("costs", record)

    def times(name: str) -> RowTimes:
        return RowTimes(tuple(values[name]["rows"]), tuple(values[name]["seconds"]))

    parts = {name: times(name) for name in ("compute", "step", "pass_attention", "step_attention")}
    return PlanCosts(link_s=values["link_s"], prefetch_s=values.get("prefetch_s", 0.0), **parts)


def with_costs(session: Session, costs: PlanCosts, *, shadow: bool) -> Session:
    """Return the session with a drafter whose policy goes by these costs."""
    loaded = session.loaded
    assert loaded.draft is not None
    policy = DraftPolicy(
        max_tree=TreeLimits(MOST_DEPTH, MOST_ROWS, TREE_NODES),
        costs=costs,
        layers=session.plan.streamed_layers,
        shadow_rows=SHADOW_ROWS if shadow else 0,
    )
    return session.with_drafter(TreeDrafter(loaded.draft, policy, eos_ids=loaded.eos_ids))


def price(session: Session, costs: PlanCosts, options: argparse.Namespace) -> dict[str, Any]:
    """Answer both turns of every question, each question from an empty cache."""
    bill, digest = Bill(), hashlib.sha256()
    questions = load_suite("sample", options.questions, options.limit)
    for number, question in enumerate(questions):
        session.reset()
        chat = session.chat(None)
        for turn, text in enumerate(question.turns):
            deltas = chat.ask(
                text, max_new_tokens=options.max_new_tokens, stop=(), request_number=2 * number + turn
            )
            before = GenerationStats()
            for delta in deltas:
                # Token by token: passes that accept more give the same tokens in fewer pieces.
                digest.update("".join(f"{token} " for token in delta.token_ids).encode())
                bill.price_s += pass_price_s(before, delta, costs)
                before = delta.stats
            add(bill, before)
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(questions)} questions", end="", file=sys.stderr)
    plan = session.plan
    return {**bill.as_dict(), "draft_head_bits": plan.draft_head_bits, "token_ids_sha256": digest.hexdigest()}


def pass_price_s(before: GenerationStats, delta: TextDelta, costs: PlanCosts) -> float:
    """Return the cost of one pass and of the serial draft steps before it; the prefill is free."""
    now = delta.stats
    if now.passes == before.passes:
        return 0.0
    nodes = now.drafted_tokens - before.drafted_tokens + 1
    cached_rows = now.cached_rows - before.cached_rows
    drafted_s = now.draft_cost_s - before.draft_cost_s
    return costs.pass_s(nodes, cached_rows, drafted_s) + drafted_s


def add(bill: Bill, stats: GenerationStats) -> None:
    """Add the totals of one answer."""
    bill.answers += 1
    bill.tokens += stats.new_tokens
    bill.passes += stats.passes
    bill.draft_steps += stats.draft_steps
    bill.shadow_steps += stats.shadow_steps
    bill.shadow_hits += stats.shadow_hits
    bill.drafted += stats.drafted_tokens


if __name__ == "__main__":
    sys.exit(main())
