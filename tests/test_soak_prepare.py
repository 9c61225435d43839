"""A short form of the soak: a few kills of the real command, over a model that takes a second to serve."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from checkpoints import write_checkpoint

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak_prepare.py"
_spec = importlib.util.spec_from_file_location("soak_prepare", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
sys.modules["soak_prepare"] = script  # dataclasses look their module up there
_spec.loader.exec_module(script)


def test_a_few_kills_change_nothing(tmp_path):
    model = write_checkpoint(tmp_path / "model", hidden=256, shards=3)
    (tmp_path / "work").mkdir()
    result = script.soak(model, tmp_path / "work", kills=4, span_s=0.8, rate=0.1e6, seed=3, limit_s=30)
    assert result.kills == 4
    assert result.moments["with files half there"] >= 2
    assert result.is_identical
    assert result.is_clean
    assert result.sent_bytes <= result.model_bytes + 4 * 4 * (64 << 10), "what was on its way at a kill"
