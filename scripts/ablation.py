"""What each part of the method gives: the same questions, part by part, and fixed depths against the schedule.

All arms run in one process over one loaded model, in turn and several times over, so that a disk that slows down
slows all of them. Prints a Markdown table; every arm's tokens must be those of plain decoding.

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
from subspec_cli.config import Config, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.decoding.batches import prompt_batch
from subspec_cli.decoding.engine import Engine, common_prefix
from subspec_cli.drafting.draft_steps import SHARPENING, DirectSteps
from subspec_cli.drafting.drafter import Drafter
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, TreeLimits
from subspec_cli.files.direct_io import DirectReader, allocate_buffer
from subspec_cli.limits import MOST_ROWS, SHADOW_ROWS
from subspec_cli.metrics import GenerationStats, rate_of_totals, tau_of_totals
from subspec_cli.modeling.decoder import DraftDecoder, DraftLogits, TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import RowRules, TokenBatch
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
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
    """The draft over a cache of its own: it has to compute prompt and accepted tokens by itself."""

    def __init__(self, draft: DraftDecoder, like: KVCache, sizes: Sequence[int]) -> None:
        layers, kv_heads, head_dim = sizes
        self._draft = draft
        self._kv = KVCache(
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=like.context,
            scratch=like.capacity - like.context,
            dtype=torch.bfloat16,
            device=CPU,
        )

    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """As the draft's own, once its cache has caught up with the target's."""
        wanted, own = list(kv.token_ids), self._kv
        own.rewind(common_prefix(wanted, own.token_ids))
        while own.committed < len(wanted):
            chunk = wanted[own.committed : own.committed + 64]
            self._draft.forward(prompt_batch(chunk, own.committed, _Unpadded(1)), own)
            own.commit(range(len(chunk)), chunk)
        return self._draft.forward(batch, own)


class _Unpadded(RowRules):
    def padded(self, rows: int) -> int:
        return rows


class WaitingStreamer:
    """Reads a block when it is asked for, and not before: no overlap of link and computing."""

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self._layouts = layouts
        self._reader = DirectReader()
        self._buffer = memoryview(allocate_buffer(max(layout.buffer_bytes for layout in layouts)))
        self._counters = StreamCounters()

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        return self._reader.is_direct

    def blocks(self) -> Generator[Mapping[str, Tensor], None, None]:
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
    """What an arm gave, round by round."""

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
        """Of tau x link rate / bytes per pass."""
        stats = self.flat()
        link_s, decode_s = (
            sum(getattr(item, name) for item in stats) for name in ("link_time_s", "decode_time_s")
        )
        moved, passes = sum(item.streamed_bytes for item in stats), sum(item.passes for item in stats)
        return passes * self.link_bytes_per_pass / (moved / link_s) / decode_s if link_s else 0.0


class Laboratory:
    """One loaded model, and engines of every kind over it."""

    def __init__(self, session: Session, questions: int) -> None:
        self._session = session
        self._questions = questions
        self._engine = session._parts.speculative
        self._drafter = self._engine._drafter
        self._target = self._engine._target
        self._waiting = WaitingStreamer(self._target._stream.streamer._layouts)

    def use(self, arm: Arm) -> None:
        """Put the arm's engine into the session."""
        about, kv = self._session.description, self._engine._kv
        target, counters, draft = self._target, self._engine._counters, self._drafter._shared.steps.draft
        geometry = target.math.geometry
        if not arm.overlap:
            source = TargetBlocks(geometry.layers, target._stream.resident, self._waiting)
            target = TargetDecoder(target.math, target._embed, target._head, source, target.rules)
            counters = self._waiting.counters
        if not arm.shared_cache:
            draft = UnsharedDraft(draft, kv, (geometry.layers, geometry.kv_heads, geometry.head_dim))
        fixed = arm.fixed
        policy = DraftPolicy(
            max_tree=TreeLimits(fixed.depth or 48, fixed.width or MOST_ROWS, about.plan.tree_nodes),
            costs=about.costs,
            layers=geometry.layers,
            fixed=fixed,
            shadow_rows=SHADOW_ROWS if arm.shadow else 0,
        )
        drafter = Drafter(
            DirectSteps(draft, kv),
            kv,
            policy,
            eos_ids=self._drafter._shared.eos_ids,
            sharpening=arm.sharpening,
        )
        engine = Engine(target, kv, drafter, counters=counters)
        self._session._parts = replace(self._session._parts, speculative=engine)

    def run(self, *, plain: bool, tokens: int) -> tuple[list[GenerationStats], list[int]]:
        """The first turn of every question; the figures and the tokens of every answer."""
        stats, found = [], []
        for number, question in enumerate(load_suite("sample", None, self._questions)):
            self._session.reset()
            deltas = list(
                self._session.chat(None).ask(
                    question.turns[0], max_new_tokens=tokens, stop=(), plain=plain, noise_stream=2 * number
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
    parser.add_argument("--depths", help="fixed depths to set beside the schedule, such as 8,16,24,32")
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
    with open_session(config, Reporter(lambda text: print(text, file=sys.stderr))) as session:
        results = measure(
            Laboratory(session, options.questions),
            arms,
            session.description.plan.streamed_bytes_per_pass,
            options.rounds,
        )
    return report(results)


def measure(lab: Laboratory, arms: Sequence[Arm], pass_bytes: int, rounds: int) -> dict[str, Result]:
    """Every arm once in each round, plain decoding first; the first round of all is a warm-up of one arm."""
    lab.use(arms[-1])
    lab.run(plain=False, tokens=NEW_TOKENS)
    results: dict[str, Result] = {}

    def add(name: str, work: Callable[[], tuple[list[GenerationStats], list[int]]]) -> None:
        stats, tokens = work()
        result = results.setdefault(name, Result([], tokens, pass_bytes))
        result.rounds.append(stats)
        print(f"{name}: {rate_of_totals(stats):.2f} tok/s", file=sys.stderr)

    for _ in range(rounds):
        add("plain, same plan", lambda: lab.run(plain=True, tokens=PLAIN_TOKENS))
        for arm in arms:
            lab.use(arm)
            add(arm.name, lambda: lab.run(plain=False, tokens=NEW_TOKENS))
    return results


def report(results: Mapping[str, Result]) -> int:
    """The table, and whether all arms gave the same tokens."""
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
