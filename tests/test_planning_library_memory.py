"""What libraries take beside tensors: tokenizers and compiled kernels."""

from __future__ import annotations

import importlib.metadata

import pytest
from test_planning_plan import line_bytes, make_geometry, make_request

from subspec_cli import versions
from subspec_cli.limits import MOST_ROWS
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.library_memory import (
    bare_process_bytes,
    shared_layer_kernels,
    target_kernels,
    tokenizer_bytes,
)
from subspec_cli.planning.plan import make_plan
from subspec_cli.units import GIB, MIB

MEASURED = {
    # Bytes of tokenizer.json, loaded and used, at the peak of loading: the larger of the two classes measured.
    "6,144 tokens": (0.38, 12, 12),
    "49,152 tokens, random merges": (2.5, 23, 51),
    "49,152 tokens, SmolLM2": (3.36, 19, 57),
    "151,646 tokens, merges as pairs": (8.73, 56, 188),
    "151,646 tokens, merges as texts": (9.7, 53, 156),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_a_tokenizer_takes_no_more_than_is_planned(kind: str) -> None:
    file_mib, loaded_mib, loading_mib = MEASURED[kind]
    file_bytes = int(file_mib * MIB)
    assert loaded_mib * MIB <= tokenizer_bytes(file_bytes, GIB) <= 1.4 * loaded_mib * MIB + 8 * MIB
    assert loading_mib * MIB <= tokenizer_bytes(file_bytes, 0)


def test_what_a_tokenizer_needs_while_it_loads_counts_beyond_what_is_taken_later() -> None:
    alone, beside = tokenizer_bytes(8 * MIB, 0), tokenizer_bytes(8 * MIB, 40 * MIB)
    assert alone - beside == 40 * MIB
    assert tokenizer_bytes(8 * MIB, GIB) < beside


@pytest.mark.parametrize(("prefill_rows", "tree_nodes"), [(256, 64), (256, 20), (512, 65), (64, 130)])
def test_every_row_count_of_a_pass_has_its_kernels(prefill_rows: int, tree_nodes: int) -> None:
    """Of the row block that is tried first; where it does not hold, the margin takes those of the others."""

    def sizes(most: int) -> int:
        return len({RowRules(2).padded(n) for n in range(1, most + 1)})

    # q has a bias and the shape of o, which has none; k and v, gate and up have the same kernels.
    geometry = make_geometry()
    assert target_kernels(geometry, prefill_rows, tree_nodes) == 5 * sizes(max(prefill_rows, 64)) + sizes(
        max(tree_nodes, 64)
    )
    assert shared_layer_kernels(geometry) == 5 * MOST_ROWS


def test_kernels_are_planned_where_they_are_compiled() -> None:
    one = device_profile("cpu").kernel_bytes
    plain = make_plan(make_request(substitute_bytes=None))
    target_bytes = target_kernels(make_geometry(), 256, 64) * one
    assert line_bytes(plain, "kernels") == target_bytes
    shared = make_plan(make_request(resident_layers=4))
    extra = shared_layer_kernels(make_geometry()) * bool(shared.shared)
    extra += MOST_ROWS * (shared.draft_head_bits == 16)
    assert line_bytes(shared, "kernels") == target_bytes + extra * one
    assert line_bytes(make_plan(make_request(device="cuda", budget_bytes=4 * GIB)), "kernels") == 0


def test_the_whole_process_is_the_plan_and_the_bare_process() -> None:
    on_cpu = make_plan(make_request())
    bare = bare_process_bytes(device_profile("cpu"), make_geometry())
    assert on_cpu.process_bytes == on_cpu.total_bytes + bare
    on_gpu = make_plan(make_request(device="cuda", budget_bytes=4 * GIB))
    assert on_gpu.process_bytes == on_gpu.host_bytes


@pytest.mark.parametrize(
    ("torch_version", "has_gpu_code"), [("2.13.0+cpu", False), ("2.13.0", True), ("2.13.0+cu130", True)]
)
def test_a_build_for_gpus_is_known_by_its_version(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, has_gpu_code: bool
) -> None:
    """Its libraries take 300 MiB more of the process, also on the CPU."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch_version)
    monkeypatch.setattr(versions.sys, "platform", "linux")
    assert versions.torch_has_gpu_code() is has_gpu_code
