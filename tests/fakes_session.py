"""Prepared tiny models and sessions over them, for the tests of sessions and of losslessness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import make_tiny_model

from subspec_cli.bench.audit import GivenAnswer, audit_answers
from subspec_cli.bench.audit_report import AuditReport
from subspec_cli.bench.suites import Question
from subspec_cli.config_file import resolve_config
from subspec_cli.metrics import GenerationStats
from subspec_cli.modeling.attention_check import find_attention_rules
from subspec_cli.modeling.exact_attention import FIRST_RULES, AttentionRules, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.answer import TextDelta
from subspec_cli.session.prepare import prepare
from subspec_cli.session.session import Session
from subspec_cli.substitutes.settings import SubstituteSettings


class Shelf:
    """Tiny models made and prepared at first use, under one SUBSPEC_HOME."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def model(self, family: str, *, bits: int = 4, **how: Any) -> Path:
        """Directory of a prepared model; the same settings give the same one."""
        key = repr((family, bits, sorted(how.items())))
        if key not in self._made:
            directory = make_tiny_model(self._root / str(len(self._made)), family, **how)
            prepare_quietly(directory, bits=bits)
            self._made[key] = directory
        return self._made[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """One shelf and one home for a test module."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPEC_HOME", str(root / "home"))
        yield Shelf(root)


def prepare_quietly(directory: Path, **how: Any) -> None:
    """`subspec prepare` with its defaults."""
    prepare(str(directory), wanted(how), **how, progress=lambda state: None)


def wanted(how: dict[str, Any]) -> SubstituteSettings:
    """Take the settings of substitutes out of keywords."""
    defaults = {"bits": 4, "optimizer": "minmax", "overrides": ()}
    return SubstituteSettings(**{name: how.pop(name, value) for name, value in defaults.items()})


def open_tiny(directory: Path | None, **flags: Any) -> Session:
    """A session on the CPU with a budget of 1 GiB, so that layers are streamed only where a test says so."""
    memory = {"vram_gb": 1.0, "device": "cpu", "resident_layers": 0} | flags.pop("memory", {})
    name = None if directory is None else str(directory)
    model = {"model": name} | flags.pop("model", {})
    reporter, count = flags.pop("reporter", Reporter()), flags.pop("count", None)
    parallel, sharers = flags.pop("parallel", None), flags.pop("sharers", 1)
    config = resolve_config({"model": model, "memory": memory, **flags})
    with mock.patch("subspec_cli.modeling.self_check.find_attention_rules", attention_rules_found_once):
        return open_session(config, reporter, count=count, parallel=parallel, sharers=sharers)


_FOUND: dict[tuple[Any, ...], tuple[AttentionRules, str]] = {}


def attention_rules_found_once(
    attention_for: Callable[[AttentionRules], ExactAttention], kv: KVCache, *, most_nodes: int
) -> tuple[AttentionRules, str]:
    """The rules that the check finds; the same code over caches of the same shapes is checked once in a process."""
    attention = attention_for(FIRST_RULES)
    shapes = [(shape, kv.read(layer, 1)[0].dtype) for shape, layer in attention.checked.items()]
    code = (ExactAttention.attend, ExactAttention.tree_rows, attention._kernel)
    key = (repr(shapes), repr(code), kv.rows, most_nodes, torch.get_num_threads())
    if key not in _FOUND:
        _FOUND[key] = find_attention_rules(attention_for, kv, most_nodes=most_nodes)
    return _FOUND[key]


class Answer:
    """Everything a generation gave."""

    def __init__(self, deltas: Iterable[TextDelta]) -> None:
        self.deltas = list(deltas)
        self.token_ids = [token for delta in self.deltas for token in delta.token_ids]
        self.text = "".join(delta.text for delta in self.deltas)
        self.finish_reason = self.deltas[-1].finish_reason
        self.stats: GenerationStats = self.deltas[-1].stats

    @property
    def outcome(self) -> tuple[list[int], str, str | None]:
        """What must not depend on speculation."""
        return self.token_ids, self.text, self.finish_reason


def answer_to(session: Session, prompt: str, limit: int = 40, *, raw: bool = False, **how: Any) -> Answer:
    """The answer to one prompt, from an empty cache unless told otherwise."""
    if not how.pop("keep_cache", False):
        session.reset()
    ids = session.encode_prompt(prompt, system=None, raw=raw)
    with closing(session.generate(ids, max_new_tokens=limit, stop=how.pop("stop", ()), **how)) as deltas:
        return Answer(deltas)


def audit_of(session: Session, prompt: str, answer: Answer) -> AuditReport:
    """A greedy answer beside the library's own forward."""
    ids = session.encode_prompt(prompt, system=None, raw=False)
    given = GivenAnswer(Question("1", "all", (prompt,)), tuple(ids), tuple(answer.token_ids), answer.text)
    return audit_answers(session, [given], progress=lambda state: None)
