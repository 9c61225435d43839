"""Measure what each part of the method gives: the same questions with one part more in each arm.

With `--depths`, fixed depths are compared with the policy instead. All arms run in one process over one loaded
model, in turn and several times, so that a disk that slows down slows all of them. Prints a Markdown table. The
tokens of every arm must be those of the others.

    python scripts/ablation.py MODEL --memory-gb 0.5775 --context 512
    python scripts/ablation.py MODEL --memory-gb 0.5775 --context 512 --depths 8,16,24,32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from subspec_cli.bench.suites import load_suite
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.config import Config, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.decoding.engine import common_prefix
from subspec_cli.drafting.draft_steps import SHARPENING, DirectSteps, DraftModel
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, TreeLimits
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.files.direct_io import DirectReader, allocate_buffer
from subspec_cli.limits import MOST_DEPTH, MOST_ROWS, SHADOW_ROWS
from subspec_cli.metrics import GenerationStats, rate_of_totals, tau_of_totals
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.token_batch import causal_batch
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.blocks import block_layouts
from subspec_cli.session.found_model import find_model
from subspec_cli.session.session import Session
from subspec_cli.streaming.disk_streamer import block_tensors
from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.streamer import StreamCounters

QUESTIONS: Final = 4
NEW_TOKENS: Final = 48
PLAIN_TOKENS: Final = 16
FIXED: Final = FixedShape(depth=16, width=3)
FREE: Final = FixedShape()
CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Arm:
    """One way of speculating; each flag is a part of the method."""

    name: str
    shared_cache: bool = True
    sharpening: float = SHARPENING
    overlap: bool = True
    fixed: FixedShape = FREE
    shadow: bool = True


PARTS: Final = (
    Arm("substitutes only", shared_cache=False, sharpening=1.0, overlap=False, fixed=FIXED, shadow=False),
    Arm("+ shared KV cache", sharpening=1.0, overlap=False, fixed=FIXED, shadow=False),
    Arm("+ sharpening", overlap=False, fixed=FIXED, shadow=False),
    Arm("+ overlap of reading and computing", fixed=FIXED, shadow=False),
    Arm("+ schedule by cost", shadow=False),
    Arm("+ shadow drafting"),
)


class UnsharedDraft:
    """The draft over a KV cache of its own: it computes prompt and accepted tokens again."""

    def __init__(self, draft: DraftModel, like: KVCache, geometry: ModelGeometry) -> None:
        self._draft = draft
        self._kv = KVCache(
            geometry.attention,
            context=like.context,
            scratch=like.capacity - like.context,
            dtype=torch.bfloat16,
            device=CPU,
        )

    def forward(self, rows: Sequence[DraftRows]) -> DraftLogits:
        """Run a draft step, after the own cache has caught up with the target's."""
        ((batch, wanted),) = [(part.batch, list(part.kv.token_ids)) for part in rows]
        own = self._kv
        own.rewind(common_prefix(wanted, own.token_ids))
        while own.committed < len(wanted):
            chunk = wanted[own.committed : own.committed + 64]
            self._draft.forward([DraftRows(causal_batch(chunk, own.committed), own)])
            own.commit(range(len(chunk)), chunk)
        return self._draft.forward([DraftRows(batch, own)])


class WaitingStreamer:
    """Reads a block only when it is asked for: link and computing do not overlap."""

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self._layouts = layouts
        self._reader = DirectReader()
        self._buffer = memoryview(allocate_buffer(max(layout.buffer_bytes for layout in layouts)))
        self._counters = StreamCounters()

    @property
    def reads_files(self) -> bool:
        """Whether files are read in every pass: always."""
        return True

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        return self._reader.is_direct

    @property
    def most_held(self) -> int:
        """There is one buffer."""
        return 1

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Mapping[str, Tensor], None, None]:  # noqa: ARG002
        """One pass."""
        for layout in self._layouts:
            started = time.perf_counter()
            self._reader.read_extents(layout.extents, self._buffer)
            took_s, old = time.perf_counter() - started, self._counters
            self._counters = StreamCounters(
                old.wait_time_s + took_s, old.streamed_bytes + layout.tensor_bytes, old.read_time_s + took_s
            )
            yield block_tensors(layout, self._buffer)

    def counters(self) -> StreamCounters:
        """Totals so far."""
        return self._counters

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


@dataclass
class Result:
    """Answers of an arm, round by round."""

    rounds: list[list[GenerationStats]]
    tokens: list[int]
    link_bytes_per_pass: int

    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [rate_of_totals(stats) for stats in self.rounds]

    def flat(self) -> list[GenerationStats]:
        """All answers."""
        return [stats for stats_of_round in self.rounds for stats in stats_of_round]

    def share_of_ceiling(self) -> float:
        """Share of tau x link rate / bytes per pass that was reached."""
        stats = self.flat()
        link_s, decode_s = (
            sum(getattr(item, name) for item in stats) for name in ("link_time_s", "decode_time_s")
        )
        moved, passes = sum(item.streamed_bytes for item in stats), sum(item.passes for item in stats)
        return passes * self.link_bytes_per_pass / (moved / link_s) / decode_s if link_s else 0.0


class Laboratory:
    """One loaded model, and sessions of every arm over it."""

    def __init__(self, session: Session, layouts: Sequence[BlockLayout], questions: int) -> None:
        self._session = session
        self._questions = questions
        self._waiting = WaitingStreamer(layouts)

    def session(self, arm: Arm) -> Session:
        """Return a session that speculates as the arm says."""
        loaded, about, steps = self._session.loaded, self._session.description, self._session.loaded.draft
        assert isinstance(steps, DirectSteps)
        draft, blocks, geometry = steps.draft, loaded.blocks, loaded.math.geometry
        if not arm.overlap:
            blocks = replace(blocks, streamer=self._waiting)
        if not arm.shared_cache:
            draft = UnsharedDraft(draft, loaded.kv, geometry)
        fixed = arm.fixed
        policy = DraftPolicy(
            max_tree=TreeLimits(fixed.depth or MOST_DEPTH, fixed.width or MOST_ROWS, about.plan.tree_nodes),
            costs=about.costs,
            layers=geometry.layers,
            fixed=fixed,
            shadow_rows=SHADOW_ROWS if arm.shadow else 0,
        )
        drafter = TreeDrafter(
            DirectSteps(draft),
            policy,
            eos_ids=loaded.eos_ids,
            sharpening=arm.sharpening,
        )
        return self._session.with_drafter(drafter, blocks=blocks)

    def run(self, arm: Arm, *, plain: bool, tokens: int) -> tuple[list[GenerationStats], list[int]]:
        """Answer the first turn of every question; return the figures and the tokens of every answer."""
        session, stats, found = self.session(arm), [], []
        for number, question in enumerate(load_suite("sample", None, self._questions)):
            session.reset()
            deltas = list(
                session.chat().ask(
                    question.turns[0], max_new_tokens=tokens, stop=(), plain=plain, request_number=2 * number
                )
            )
            found += [token for delta in deltas for token in delta.token_ids]
            stats.append(deltas[-1].stats)
        return stats, found


def main() -> int:
    """Measure and print; 1 if any arm's tokens differ from another's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--memory-gb", type=float, required=True)
    parser.add_argument("--context", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--depths", help="fixed depths to compare with the policy, such as 8,16,24,32")
    options = parser.parse_args()
    arms = list(PARTS)
    if options.depths:
        depths = [int(depth) for depth in options.depths.split(",")]
        arms = [*(Arm(f"depth {depth}", fixed=FixedShape(depth=depth)) for depth in depths), Arm("by cost")]
    config = Config(
        model=ModelConfig(model=options.model),
        memory=MemoryConfig(memory_gib=options.memory_gb, device="cpu", context=options.context),
        sampling=SamplingConfig(temperature=options.temperature, seed=7),
    )
    checkpoint = find_model(config).checkpoint
    with open_session(config, Reporter(lambda text: print(text, file=sys.stderr))) as session:
        if not session.plan.streamed or not session.plan.drafts:
            parser.error("this budget holds the whole model, so nothing is streamed: give a smaller one")
        layouts = [layout for layer in session.plan.streamed for layout in block_layouts(checkpoint, layer)]
        lab = Laboratory(session, layouts, options.questions)
        results = measure(lab, arms, session.plan.streamed_bytes_per_pass, options.rounds)
    return report(results)


def measure(lab: Laboratory, arms: Sequence[Arm], pass_bytes: int, rounds: int) -> dict[str, Result]:
    """Run every arm once in each round, plain decoding first, after a warm-up of one arm."""
    lab.run(arms[-1], plain=False, tokens=NEW_TOKENS)
    results: dict[str, Result] = {}

    def add(name: str, work: Callable[[], tuple[list[GenerationStats], list[int]]]) -> None:
        stats, tokens = work()
        result = results.setdefault(name, Result([], tokens, pass_bytes))
        result.rounds.append(stats)
        print(f"{name}: {rate_of_totals(stats):.2f} tok/s", file=sys.stderr)

    for _ in range(rounds):
        add("plain, same plan", lambda: lab.run(arms[-1], plain=True, tokens=PLAIN_TOKENS))
        for arm in arms:
            add(arm.name, lambda arm=arm: lab.run(arm, plain=False, tokens=NEW_TOKENS))
    return results


def report(results: Mapping[str, Result]) -> int:
    """Print the table and whether all arms gave the same tokens; return the exit status."""
    plain = results["plain, same plan"].rates()
    print(
        "| arm | tok/s, median (range) | over plain | tau | share of ceiling | link busy | serial steps a pass |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        rates, stats = result.rates(), result.flat()
        ratio = statistics.median(rate / own for rate, own in zip(rates, plain, strict=True))
        busy = sum(item.link_time_s for item in stats) / sum(item.decode_time_s for item in stats)
        steps = sum(item.draft_steps for item in stats) / sum(item.passes for item in stats)
        print(
            f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) | {ratio:.2f}x "
            f"| {tau_of_totals(stats):.2f} | {result.share_of_ceiling():.0%} | {busy:.0%} | {steps:.1f} |"
        )
    spoken = [result.tokens for name, result in results.items() if name != "plain, same plan"]
    same = all(tokens == spoken[0] for tokens in spoken)
    print("\nall arms gave the same tokens" if same else "\nTHE ARMS' TOKENS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
