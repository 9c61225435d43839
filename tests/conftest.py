"""Fixtures of several test files: tiny models, an empty hub cache, and a hub of our own that fills it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from checkpoints import geometry_in, write_checkpoint
from fake_hub import FakeHub, running
from fakes_session import attention_rules_found_once
from fakes_session import shelf as shelf
from tiny_models import one_thread as one_thread
from tiny_models import tiny as tiny

# Compiled loops outlive the homes of single tests.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / "__pycache__" / "numba"))


@pytest.fixture(autouse=True, scope="session")
def signals_arrive():
    """A run in the background may ignore these signals, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def nothing_learned(request, monkeypatch):
    """Plans do not depend on which tests ran before; those of `learned` ones go by what their sessions keep."""
    if "learned" not in request.keywords:
        monkeypatch.setattr("subspec_cli.session.learning.keep_acceptance", lambda about, found: None)
        monkeypatch.setattr("subspec_cli.session.learning.keep_rate", lambda name, done_bytes, seconds: None)


@pytest.fixture(autouse=True)
def assumed_machine(request, monkeypatch):
    """Sessions in the tests' own process take assumed costs, the same on every machine; `probed` ones do not."""
    if "probed" in request.keywords:
        return
    from subspec_cli.planning.assumed_costs import assumed_costs
    from subspec_cli.probe.timed_machine import TimedMachine

    def assume(directory, settings, device, *_rest):
        # So slow a link that drafting pays even for models of a few kilobytes.
        costs = assumed_costs(geometry_in(directory), device, link_gb_per_s=0.001, settings=settings)
        return TimedMachine(costs, others_share=None, spread=0.0)

    monkeypatch.setattr("subspec_cli.session.machine_costs.probe_in_subprocess", assume)


@pytest.fixture
def attention_checked_once(monkeypatch):
    """Sessions share what the check of attention finds, as those of `open_tiny` do."""
    monkeypatch.setattr("subspec_cli.modeling.self_check.find_attention_rules", attention_rules_found_once)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, no token, no progress bars."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture
def server(cache, tmp_path, monkeypatch):
    from huggingface_hub import close_session, constants

    fake = FakeHub()
    source = write_checkpoint(tmp_path / "source", shards=2)
    fake.files = {path.name: path.read_bytes() for path in source.iterdir()}
    fake.files |= {
        "README.md": b"# tiny",
        "consolidated.safetensors": b"not wanted",
        "pytorch_model.bin": b"no",
    }
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    with running(fake):
        yield fake
        close_session()


@pytest.fixture
def checked_trees(monkeypatch):
    """Every tree is checked as a whole after each reading of draft steps, and after each subtree and compaction."""
    from subspec_cli.drafting.frontier import Frontier
    from subspec_cli.drafting.growing_tree import GrowingTree

    def checking(owner, name, tree_of):
        original = getattr(owner, name)

        def checked(self, *args, **kwargs):
            found = original(self, *args, **kwargs)
            tree_of(self, found).check_integrity()
            return found

        monkeypatch.setattr(owner, name, checked)

    checking(Frontier, "take", lambda frontier, _: frontier.tree)
    checking(GrowingTree, "compact", lambda tree, _: tree)
    checking(GrowingTree, "subtree", lambda _, found: found[0])
