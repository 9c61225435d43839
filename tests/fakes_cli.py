"""Fakes that the command line tests stand on: a session, a preparation and a benchmark without any model."""

import io
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from subspec_cli.bench.answers import AnswerPair, ArmAnswer
from subspec_cli.bench.report import BenchReport
from subspec_cli.config import Config, SamplingConfig
from subspec_cli.metrics import GenerationStats, PassStats, PrefillProgress
from subspec_cli.planning.costs import PlanCosts, RowTimes, overlapped_s
from subspec_cli.planning.prediction import Basis, Prediction
from subspec_cli.planning.reason import LayersThatPay, PlanReason
from subspec_cli.planning.timing import DepthOption, RoundTiming


@dataclass(frozen=True)
class FakeDelta:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stats: GenerationStats


@dataclass(frozen=True)
class FakeLine:
    label: str
    size_bytes: int
    note: str = ""


PASS_S, PLAIN_PASS_S = overlapped_s(0.4, 0.2), overlapped_s(0.5, 0.2)
PREDICTION = Prediction(
    plain_pass_s=PLAIN_PASS_S,
    pass_s=PASS_S,
    step_s=0.025,
    depth=4,
    tau=3.5,
    plain_tok_per_s=2.0,
    tok_per_s=7.0,
    survival=0.974,
    origin="assumed",
    cached_rows=256,
    basis=Basis(
        1.4e9,
        1.4e9,
        RoundTiming(
            link_s=0.5,
            prefetch_s=0.1,
            step_s=0.025,
            shadow_step_s=0.025,
            slot_s=0.1,
            shadow_slots=0,
            most_shadow_slots=6,
        ),
        DepthOption(depth=0, rows=1, tau=1.0, survival=0.8, compute_s=0.2),
        DepthOption(depth=4, rows=9, tau=3.5, survival=0.8, compute_s=0.2),
    ),
)


REASON = PlanReason(LayersThatPay(1, 5 << 20, 9 << 20))
ATTENTION = RowTimes((1,), (0.0,))
COSTS = PlanCosts(0.4, RowTimes((1,), (0.2,)), RowTimes((1,), (0.025,)), ATTENTION, ATTENTION)


@dataclass(frozen=True)
class FakePlan:
    resident_layers: int = 1
    streamed_layers: int = 3
    lines: tuple[FakeLine, ...] = (FakeLine("substitutes", 3 << 20), FakeLine("spare", 0))
    reason: PlanReason = REASON
    automatic: None = None
    prediction: Prediction = PREDICTION

    def as_dict(self, *, reason, assumptions):
        return {
            "resident_layers": self.resident_layers,
            "streamed_layers": self.streamed_layers,
            "reason": reason,
        }


@dataclass(frozen=True)
class FakeDescription:
    model_id: str = "demo"
    revision: str = "0123abc"
    device: str = "cpu"
    dtype: str = "bfloat16"
    exactness: str = "exact"
    exactness_reason: str = "rows checked in blocks of 2"
    speculation: bool = True
    fits: bool = False
    seed: int = 77
    threads: int = 1
    context_tokens: int = 256
    budget_bytes: int = 1 << 30
    plan: FakePlan = FakePlan()
    versions: dict = field(default_factory=lambda: {"torch": "2"})
    config: Config = field(default_factory=Config)
    model_sampling: SamplingConfig | None = field(default_factory=SamplingConfig)
    end_ids: tuple[int, ...] = (2, 7)
    has_chat_template: bool = True
    fresh_seed: bool = True
    costs: PlanCosts = COSTS
    notes: tuple[str, ...] = ()


class FakeSession:
    """Answers with `pieces`; an exception among them is raised where it stands, progress of the prompt is told."""

    def __init__(self, pieces=("Hello ", "world\n", "bye"), description=None):
        self.pieces = pieces
        self.description = description or FakeDescription()
        self.calls = []
        self.closed = self.stopped = False
        self.messages = ()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def memory_bytes(self):
        return 300 << 20

    def peak_memory_bytes(self):
        return 400 << 20

    def process_peak_bytes(self):
        return 700 << 20

    def bare_process_bytes(self):
        return 300 << 20

    def encode_prompt(self, text, *, system, raw):
        self.calls.append(("encode", text, system, raw))
        return list(range(5))

    def generate(self, prompt_ids, *, max_new_tokens, stop, on_prefill):
        self.calls.append(("generate", len(prompt_ids), max_new_tokens, stop))
        stats = GenerationStats().after_prefill(
            prompt_tokens=5, prefilled_tokens=4, prefill_passes=1, ttft_s=0.25
        )
        step = PassStats(
            cached_rows=200,
            drafted=4,
            accepted=2,
            emitted=3,
            draft_time_s=0.2,
            verify_time_s=0.3,
            wait_time_s=0.1,
            streamed_bytes=500_000_000,
        )
        try:
            told = [piece for piece in self.pieces if isinstance(piece, PrefillProgress)]
            for piece in told:
                on_prefill(piece)
            for number, piece in enumerate(self.pieces[len(told) :]):
                if isinstance(piece, BaseException):
                    raise piece
                if number:
                    stats = stats.after_pass(replace(step, decode_time_s=1.0 if number == 1 else 0.5))
                reason = "stop" if number == len(self.pieces) - len(told) - 1 else None
                yield FakeDelta(piece, (number, number + 10), reason, stats)
        finally:
            self.stopped = True

    def chat(self, system):
        self.calls.append(("chat", system))
        return self

    def ask(self, text, **how):
        self.calls.append(("ask", text))
        for delta in self.generate([1], **how):
            yield delta
            said = "".join(piece for piece in self.pieces if isinstance(piece, str))
        self.messages += ({"role": "user", "content": text}, {"role": "assistant", "content": said})

    unfinished = "Hi th"

    def resume(self, **how):
        self.calls.append(("resume",))
        yield from self.generate([1], stop=(), **how)

    def reset(self):
        self.calls.append(("reset",))
        self.messages = ()

    def replace_messages(self, messages):
        self.messages = tuple(messages)

    def set_system(self, system):
        self.calls.append(("system", system))

    def set_sampling(self, sampling):
        self.calls.append(("sampling", sampling))

    def encode_messages(self, messages, *, system):
        return [0] * sum(len(message["content"]) for message in messages)


@dataclass(frozen=True)
class FakeDownload:
    done_files: int = 2
    total_files: int = 5
    done_bytes: int = 6 << 30
    total_bytes: int = 14 << 30
    received_bytes: int = 5 << 30
    elapsed_s: float = 250.0


@dataclass(frozen=True)
class FakePrepareProgress:
    done_layers: int
    total_layers: int
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    download: FakeDownload | None = None


@dataclass(frozen=True)
class FakeKind:
    kind: str
    bits: int
    bits_per_weight: float
    sqnr_db: float | None
    outputs: object = None


@dataclass(frozen=True)
class FakePrepareReport:
    model_id: str = "demo"
    commit: str = "0123abc"
    directory: Path = Path("/cache/demo-int4")
    layers: int = 4
    source_bytes: int = 3 << 30
    substitute_bytes: int = 800 << 20
    bits: int = 4
    kinds: tuple[FakeKind, ...] = (FakeKind("q", 4, 4.25, 21.25), FakeKind("down", 8, 8.01, None))
    head: FakeKind = FakeKind("head", 4, 4.5, 20.5)
    bits_per_weight: float = 4.25
    sqnr_db: float | None = 21.5
    elapsed_s: float = 61.0
    already_prepared: bool = False

    def as_dict(self):
        return {"model_id": self.model_id, "directory": self.directory, "sqnr_db": float("inf")}


@dataclass(frozen=True)
class FakeBenchProgress:
    done: int
    total: int
    elapsed_s: float
    status: str
    report: object = None


def bench_report(*, identical=4, exactness="exact", interrupted=False):
    """A report of four answers: plain 1.5 tokens/s, speculative 9.15 tokens/s and 7.25 tokens a pass."""
    plain = GenerationStats(new_tokens=4, decode_time_s=2.0, passes=3)
    fast = GenerationStats(new_tokens=30, decode_time_s=29 / 9.15, passes=4, prefilled_tokens=23)
    pairs = [
        AnswerPair(
            str(number),
            "writing",
            1,
            plain=ArmAnswer((1,), "a", "stop", plain),
            speculative=ArmAnswer((1 if number < identical else 2,), "a", "stop", fast),
        )
        for number in range(4)
    ]
    return BenchReport(
        suite="sample",
        pairs=tuple(pairs),
        best_plain=(),
        link=None,
        exactness=exactness,
        speculation=True,
        interrupted=interrupted,
        context={"model": "demo"},
    )


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def module(name, **contents):
    """A module that an import statement finds in place of the real one."""
    made = types.ModuleType(name)
    for key, value in contents.items():
        setattr(made, key, value)
    return made


def use_session(monkeypatch, session):
    """Let `run` open `session`; gives the list that the resolved configs are put into."""
    configs = []

    def open_session(config, reporter, *, count):
        configs.append(config)
        session.description = replace(session.description, config=config)
        session.count = count
        reporter.progress("loading substitutes 1/4")
        return session

    fake = module("subspec_cli.session", open_session=open_session)
    monkeypatch.setitem(sys.modules, "subspec_cli.session", fake)
    return configs


def pipe_in(monkeypatch, content):
    """Let standard input be a pipe holding these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@contextmanager
def opened_in(monkeypatch, file):
    """Let standard input be this path or descriptor."""
    with open(file, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield


def on_terminal(monkeypatch):
    """Let stdin, stdout and stderr be terminals; gives stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    return sys.stdout, sys.stderr
