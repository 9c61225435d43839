"""What the plan decides is what is loaded, and no placement changes a token."""

from __future__ import annotations

import dataclasses

import pytest
from checkpoints import geometry_in
from fakes_session import answer_to, open_tiny, prepare_quietly
from tiny_models import make_tiny_model

from subspec_cli.config_file import resolve_config
from subspec_cli.errors import ResourceError
from subspec_cli.planning import request
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import RowTimes
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.library_memory import bare_process_bytes
from subspec_cli.planning.plan import fastest_plan
from subspec_cli.probe.timed_machine import TimedMachine
from subspec_cli.session import load, machine_costs, opening
from subspec_cli.streaming.pinned_memory import PinRefusedError
from subspec_cli.substitutes.prepared_model import find_prepared_sets
from subspec_cli.units import GIB

FREE, DEAR = RowTimes((1,), (1e-6,)), RowTimes((1,), (1.0,))


@pytest.fixture
def cost(monkeypatch):
    """Lets a test say what things take; the rest is as assumed."""

    def set_costs(**changes):
        def costs(directory, settings, device, *_rest):
            found = assumed_costs(geometry_in(directory), device, settings=settings)
            return TimedMachine(dataclasses.replace(found, **changes), None, 0.0)

        monkeypatch.setattr(machine_costs, "probe_in_subprocess", costs)
        monkeypatch.setattr(machine_costs, "known_costs", lambda subject: None)

    return set_costs


@pytest.fixture
def loaded(monkeypatch):
    """The layers whose substitutes are read."""
    layers = []
    original = load.load_layer

    def load_layer(prepared, layer):
        layers.append((prepared.manifest.settings.bits, layer))
        return original(prepared, layer)

    monkeypatch.setattr(load, "load_layer", load_layer)
    return layers


def plain_answer(model):
    with open_tiny(model, draft={"no_speculation": True}) as session:
        return answer_to(session, "Hello", 16).outcome


def test_a_layer_for_the_target_alone_keeps_its_substitute(shelf, cost, loaded):
    cost(shared_layer=DEAR, substitute_layer=FREE)
    model = shelf.model("qwen2")
    with open_tiny(model, memory={"resident_layers": 1}, draft={"depth": 4}) as session:
        plan, answer = session.description.plan, answer_to(session, "Hello", 16)
    assert (plan.resident, plan.shared) == ((1,), ())
    assert loaded == [(4, 0), (4, 1), (4, 2)]
    assert answer.stats.drafted_tokens
    assert answer.outcome == plain_answer(model)


def test_a_shared_layer_needs_no_substitute(shelf, cost, loaded):
    cost(shared_layer=FREE, substitute_layer=DEAR)
    model = shelf.model("qwen2")
    with open_tiny(model, memory={"resident_layers": 1}, draft={"depth": 4}) as session:
        plan, answer = session.description.plan, answer_to(session, "Hello", 16)
    assert plan.resident == plan.shared == (1,)
    assert loaded == [(4, 0), (4, 2)]
    assert answer.stats.drafted_tokens
    assert answer.outcome == plain_answer(model)


def test_a_model_that_fits_is_drafted_for_where_that_is_predicted_to_pay(shelf, cost, loaded):
    cost(target_layer=DEAR, substitute_layer=FREE, shared_layer=DEAR, step_overhead_s=1e-6)
    model = shelf.model("qwen2")
    with open_tiny(model, memory={"resident_layers": None}, draft={"depth": 4}) as session:
        about, answer = session.description, answer_to(session, "Hello", 16)
    assert about.fits
    assert about.speculation
    assert about.plan.streamed == ()
    assert [layer for _, layer in loaded] == [0, 1, 2]
    assert answer.stats.drafted_tokens
    assert answer.outcome == plain_answer(model)


def test_of_the_sets_that_stand_side_by_side_the_fastest_is_loaded(tmp_path, monkeypatch, loaded):
    model = make_tiny_model(tmp_path / "model", "qwen2")
    prepare_quietly(model, bits=8)
    prepare_quietly(model, bits=4)
    assert [item.manifest.settings.bits for item in find_prepared_sets(str(model))] == [4, 8]
    assert [item.manifest.settings.bits for item in find_prepared_sets(str(model), 8)] == [8]

    def fastest(bits):
        def costs(directory, settings, device, *_rest):
            found = assumed_costs(geometry_in(directory), device, settings=settings)
            layer = FREE if settings.bits == bits else DEAR
            return TimedMachine(dataclasses.replace(found, substitute_layer=layer), None, 0.0)

        monkeypatch.setattr(machine_costs, "probe_in_subprocess", costs)

    expected = plain_answer(model)
    for bits in (8, 4):
        fastest(bits)
        loaded.clear()
        with open_tiny(model, draft={"depth": 4}, memory={"vram_gb": 1.0, "reprobe": True}) as session:
            assert session.description.plan.substitute_bits == bits
            assert answer_to(session, "Hello", 16).outcome == expected
        assert {found for found, _ in loaded} == {bits}
    with open_tiny(model, model={"model": str(model), "bits": 8}) as session:
        assert session.description.plan.substitute_bits == 8


@pytest.mark.parametrize("refused", [False, True])
def test_an_embedding_in_host_memory_gives_the_same_rows(shelf, monkeypatch, refused):
    model = shelf.model("qwen2", tied=False)
    expected, unpinned = plain_answer(model), []

    def on_the_host(requests):
        number, plan = fastest_plan(requests)
        assert plan.embedding == "disk"
        return number, dataclasses.replace(plan, embedding="host")

    def pin(table, device):
        if refused:
            raise PinRefusedError("CUDA error 2")
        return lambda: unpinned.append(table.shape)

    monkeypatch.setattr(opening, "fastest_plan", on_the_host)
    monkeypatch.setattr(load, "pin", pin)
    with open_tiny(model, draft={"depth": 4}) as session:
        assert answer_to(session, "Hello", 16).outcome == expected
        notes = session.description.notes
    told = ["the embedding could not be pinned, so draft steps wait for the host: CUDA error 2"]
    assert [note for note in notes if "embedding" in note] == (told if refused else [])
    assert len(unpinned) == (0 if refused else 1)


def test_a_bound_on_host_memory_lowers_the_budget_on_the_cpu(shelf):
    ram_gb = 0.75
    model = shelf.model("qwen2")
    bare = bare_process_bytes(device_profile("cpu"), geometry_in(model))
    with open_tiny(model, memory={"vram_gb": 1.0, "ram_gb": ram_gb}) as session:
        assert session.description.plan.budget_bytes == int(ram_gb * GIB) - bare


def test_without_a_budget_a_share_of_what_is_free_is_planned_for():
    config = resolve_config({})
    assert request.budget_bytes(config, "cpu", 16 * GIB, 8 * GIB) == 6 * GIB
    assert request.ram_bytes(config, 8 * GIB) == 6 * GIB
    assert request.ram_bytes(config, None) is None
    with pytest.raises(ResourceError, match="memory of the cuda device is not known") as caught:
        request.budget_bytes(config, "cuda", None, None)
    assert "--vram-gb" in caught.value.hint


@pytest.mark.parametrize(
    ("total", "free", "reserve"),
    [(8 * GIB, 7 * GIB, GIB // 2), (80 * GIB, 60 * GIB, 5 * GIB), (None, 7 * GIB, GIB // 2)],
)
def test_on_a_gpu_what_others_use_and_a_reserve_are_left(total, free, reserve):
    automatic = request.automatic_budget(resolve_config({}), "cuda", total, free)
    assert (automatic.free_bytes, automatic.reserve_bytes) == (free, reserve)
    assert request.budget_bytes(resolve_config({}), "cuda", total, free) == free - reserve
    assert request.automatic_budget(resolve_config({"memory": {"vram_gb": 4}}), "cuda", total, free) is None
    assert request.AutomaticBudget(100, 200).size_bytes == 0


def test_auto_takes_the_place_of_a_files_budget(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[memory]\nvram_gb = 3\n")
    assert resolve_config({"memory": {"vram_gb": None}}, file).memory.memory_gib == 3.0
    assert resolve_config({"memory": {"vram_gb": "auto"}}, file).memory.memory_gib is None
    file.write_text("[memory]\nvram_gb = 'auto'\n")
    assert resolve_config({}, file).memory.memory_gib is None


@pytest.mark.parametrize(
    ("given", "max_new_tokens", "cached_rows"),
    [(None, 100, 256), (None, 200, 256), (400, 100, 200), (60, 20, 30)],
)
def test_times_are_predicted_for_half_of_the_context_that_is_wanted(
    shelf, given, max_new_tokens, cached_rows
):
    """The model has 512 positions. Without a context, the least that is wanted counts, not the room beyond it."""
    asked = {"vram_gb": 1.0, "context": given}
    with open_tiny(shelf.model("qwen2"), memory=asked, run={"max_new_tokens": max_new_tokens}) as session:
        assert session.description.plan.prediction.cached_rows == cached_rows
