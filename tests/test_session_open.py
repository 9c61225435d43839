"""Opening and preparing: what is planned, promised, refused and given back."""

import json
import math
import os
import re
import shutil
import threading
import time

import pytest
import torch
from checkpoints import as_hub_snapshot
from fakes_session import answer_to, open_tiny, prepare_quietly, wanted
from tiny_models import EOS_ID, make_tiny_model

from subspec_cli.cli.documents import plan_document
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import ExitCode, IntegrityError, ResourceError, UnsupportedModelError, UsageError
from subspec_cli.files import direct_io
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.found_model import find_model
from subspec_cli.session.prepare import prepare
from subspec_cli.substitutes.in_use import users_of
from subspec_cli.substitutes.prepared_model import find_prepared
from subspec_cli.substitutes.settings import SubstituteSettings

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def own(shelf, tmp_path):
    """A prepared model that a test may damage."""
    directory = shutil.copytree(shelf.model("qwen2"), tmp_path / "model")
    prepare_quietly(directory)
    return directory


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "weight-reader"]


# --- what a session says ----------------------------------------------------------------------------------------


def test_a_session_says_what_it_is(shelf):
    model = shelf.model("qwen2")
    with open_tiny(model, memory={"resident_layers": 1, "context": 128}, sampling={"seed": 8}) as session:
        about = session.description
    assert about.model_id == str(model)
    assert about.revision == find_prepared(str(model)).manifest.commit
    assert (about.device, about.dtype, about.seed) == ("cpu", "bf16", 8)
    assert (about.exactness, about.threads) == ("exact", torch.get_num_threads())
    assert about.exactness_reason
    assert (about.plan.resident_layers, about.plan.streamed_layers) == (1, 2)
    assert (about.context_tokens, about.budget_bytes) == (128, 1 << 30)
    assert torch.__version__.startswith(about.versions["torch"].partition("+")[0])
    assert about.has_chat_template
    json.dumps(plan_document(about.plan))


def test_a_model_that_fits_needs_no_speculation(shelf):
    with open_tiny(shelf.model("qwen2"), memory={"resident_layers": None}) as session:
        assert session.description.fits
        assert not session.description.speculation
        assert not readers()
        answer = answer_to(session, "Hello", 8)
    assert answer.stats.drafted_tokens == answer.stats.streamed_bytes == 0


def test_without_speculation_nothing_is_drafted_and_no_substitute_is_read(shelf, monkeypatch):
    monkeypatch.setattr("subspec_cli.session.load.load_layer", None)
    with open_tiny(shelf.model("qwen2"), draft={"no_speculation": True}) as session:
        assert not session.description.speculation
        answer = answer_to(session, "Hello", 8)
    assert (answer.stats.drafted_tokens, answer.stats.tau) == (0, 1)
    assert answer.stats.streamed_bytes > 0


def test_the_plan_counts_the_substitutes_of_a_session_that_has_them(shelf):
    """F73: what speculation takes beside the target is in the plan."""
    model, totals = shelf.model("qwen2"), []
    for draft in ({}, {"no_speculation": True}):
        with open_tiny(model, draft=draft) as session:
            totals.append(session.description.plan.total_bytes)
    stored = sum(file.size_bytes for file in find_prepared(str(model)).manifest.layers)
    assert totals[0] - totals[1] > stored / 2


def test_memory_stays_within_the_budget(shelf):
    with open_tiny(shelf.model("qwen2")) as session:
        answer_to(session, "Hello " * 40, 20)
        assert 0 <= session.memory_bytes() <= session.peak_memory_bytes()
        assert session.peak_memory_bytes() <= session.description.budget_bytes


def test_the_link_counts_what_it_moves(shelf):
    with open_tiny(shelf.model("qwen2")) as session:
        before = session.link_counters()
        answer = answer_to(session, "Hello", 8)
        moved = session.link_counters().since(before).streamed_bytes
        per_pass = session.description.plan.streamed_bytes_per_pass
    assert moved == per_pass * (answer.stats.passes + 1)
    assert answer.stats.streamed_bytes == per_pass * answer.stats.passes


def test_buffered_reads_are_told(shelf, monkeypatch):
    """Some file systems refuse direct reads; the reader notices that when it opens the file, a little late."""
    original = direct_io._open_direct

    def buffered(path):
        time.sleep(0.05)
        descriptor, _ = original(path)
        return descriptor, False

    monkeypatch.setattr(direct_io, "_open_direct", buffered)
    with open_tiny(shelf.model("qwen2")) as session:
        assert not session.description.direct_io


def test_progress_is_told(shelf):
    told = []
    flags = {"model": {"model": str(shelf.model("qwen2"))}, "memory": {"vram_gb": 1.0, "resident_layers": 1}}
    open_session(resolve_config(flags), Reporter(told.append)).close()
    assert any("substitutes 2/2" in text for text in told)
    assert any("rows keep their bits" in text for text in told)


def test_a_session_marks_its_substitutes_as_in_use(shelf):
    model = shelf.model("qwen2")
    directory = find_prepared(str(model)).directory
    with open_tiny(model):
        assert users_of(directory) == [os.getpid()]
    assert users_of(directory) == []


def test_closing_stops_the_reader(shelf):
    session = open_tiny(shelf.model("qwen2"))
    assert len(readers()) == 1
    steps = session.generate(
        session.encode_prompt("Hello", system=None, raw=False), max_new_tokens=9, stop=()
    )
    next(steps)
    steps.close()
    session.close()
    assert not readers()
    session.close()


def test_leaving_the_context_closes_also_after_an_error(shelf):
    with pytest.raises(ZeroDivisionError), open_tiny(shelf.model("llama", tied=False)):
        _ = len(readers()) / 0
    assert not readers()


@pytest.mark.parametrize("step", ["load.check_batch_invariance", "load.mark_used", "build.library_versions"])
def test_an_opening_that_fails_late_stops_the_reader(shelf, monkeypatch, step):
    def fails(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"subspec_cli.session.{step}", fails)
    with pytest.raises(KeyboardInterrupt):
        open_tiny(shelf.model("qwen2"))
    assert not readers()


@pytest.mark.parametrize("part", ["cache_for", "DraftDecoder", "resident_layer"])
def test_a_loading_that_fails_midway_stops_the_reader(shelf, monkeypatch, part):
    def fails(*args, **how):
        raise MemoryError

    monkeypatch.setattr(f"subspec_cli.session.load.{part}", fails)
    with pytest.raises(ResourceError, match="out of host memory while loading"):
        open_tiny(shelf.model("qwen2", tied=False), memory={"resident_layers": 1})
    assert not readers()


# --- end tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [65, 66]}, (65, 66)),
        ({"eos_token_id": 65}, (65,)),
        ({"eos_token_id": None}, ()),
        ({}, ()),
        (None, (EOS_ID,)),
    ],
)
def test_end_tokens_are_those_of_the_librarys_generate(own, generation, expected):
    path = own / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    with open_tiny(own) as session:
        assert session.description.end_ids == expected
        assert session.loaded.eos_ids == set(expected)
        assert any("ends an answer" in note for note in session.description.notes) is (not expected)


@pytest.mark.parametrize("plain", [False, True])
def test_any_of_several_end_tokens_ends_an_answer(own, plain):
    with open_tiny(own, sampling={"temperature": 1.5, "seed": 1}) as session:
        whole = answer_to(session, "Hello", 30)
    end = whole.token_ids[17]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    with open_tiny(own, sampling={"temperature": 1.5, "seed": 1}) as session:
        answer = answer_to(session, "Hello", 30, plain=plain)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]


# --- budgets ----------------------------------------------------------------------------------------------------


def test_a_budget_too_small_names_one_that_works(shelf):
    model = shelf.model("qwen2")
    with pytest.raises(ResourceError, match="too small") as caught:
        open_tiny(model, memory={"vram_gb": 0.001})
    assert caught.value.exit_code == ExitCode.RESOURCE
    enough = float(re.search(r"--memory-gb ([0-9.]+)", caught.value.hint)[1])
    with open_tiny(model, memory={"vram_gb": enough}) as session:
        assert len(answer_to(session, "Hello", 5).token_ids) == 5
        assert session.description.plan.total_bytes <= session.description.budget_bytes
    with pytest.raises(ResourceError, match="too small"):
        open_tiny(model, memory={"vram_gb": enough - 0.02})


def test_a_budget_beyond_the_machine_is_refused(shelf):
    with pytest.raises(ResourceError, match="more than this machine has") as caught:
        open_tiny(shelf.model("qwen2"), memory={"vram_gb": 900_000.0})
    assert float(re.search(r"--memory-gb ([0-9.]+)", caught.value.hint)[1]) > 0
    assert not readers()


def test_without_a_budget_a_part_of_what_is_free_is_taken(shelf):
    with open_tiny(shelf.model("qwen2"), memory={"vram_gb": None}) as session:
        free = session.description.budget_bytes
        assert answer_to(session, "Hello", 3).token_ids
    assert free > 0


@pytest.mark.parametrize(
    ("memory", "told"),
    [({"resident_layers": 4}, "the model has 3 layers"), ({"context": 513}, "512 positions")],
)
def test_more_than_the_model_has_is_refused(shelf, memory, told):
    with pytest.raises(UsageError, match=told):
        open_tiny(shelf.model("qwen2"), memory=memory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_not_replaced_silently(shelf):
    with pytest.raises(UnsupportedModelError, match="CUDA"):
        open_tiny(shelf.model("qwen2"), memory={"device": "cuda"})


# --- which model ------------------------------------------------------------------------------------------------


def test_without_a_name_the_model_used_last_is_taken(shelf, own):
    used = shelf.model("qwen2")
    open_tiny(used).close()
    prepare_quietly(own)
    with open_tiny(None) as session:
        assert session.description.model_id == str(used)


def test_a_model_that_is_not_prepared_is_named_with_the_command(shelf, tmp_path):
    directory = make_tiny_model(tmp_path / "new", "llama", layers=1)
    with pytest.raises(UsageError, match="is not prepared") as caught:
        open_tiny(directory)
    assert caught.value.hint == f"subspec prepare {directory}"


def test_other_bits_than_prepared_are_refused(shelf):
    with pytest.raises(UsageError, match="not with 8 bits"):
        open_tiny(shelf.model("qwen2"), model={"bits": 8})


def test_a_damaged_substitute_is_refused(own):
    """F57."""
    prepared = find_prepared(str(own))
    path = prepared.directory / prepared.manifest.layers[1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=path.name) as caught:
        open_tiny(own)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert caught.value.hint == f"subspec models verify {own} --repair"
    assert not readers()
    prepare_quietly(own, force=True)
    open_tiny(own).close()


def test_weights_written_again_are_not_paired_with_old_substitutes(own):
    """F60."""
    make_tiny_model(own, "qwen2", seed=1)
    with pytest.raises(UnsupportedModelError) as caught:
        open_tiny(own)
    assert caught.value.hint.endswith(f"make only the layers that differ: subspec prepare {own} --bits 4")
    assert not readers()


def test_another_shape_is_not_paired_with_old_substitutes(own):
    shutil.rmtree(own)
    make_tiny_model(own, "qwen2", layers=2)
    with pytest.raises(UnsupportedModelError, match="another version"):
        open_tiny(own)


@pytest.fixture
def from_hub(shelf, tmp_path, monkeypatch):
    """A prepared model of the hub, in the cache with `main` at COMMIT and the tag v2 at OTHER."""
    from huggingface_hub import constants

    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, commit in (("v2", OTHER), ("main", COMMIT)):
        made = make_tiny_model(tmp_path / "made", "llama", layers=1, seed=len(name))
        snapshot = as_hub_snapshot(made, tmp_path / name, commit)
        repo = tmp_path / "cache" / "models--org--tiny"
        shutil.copytree(snapshot.parent.parent, repo, symlinks=True, dirs_exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        shutil.rmtree(made)
    prepare("org/tiny", wanted({}), revision=COMMIT, progress=lambda state: None)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_prepared_revision_is_opened_by_any_of_its_names(from_hub, revision):
    source = find_model(resolve_config({"model": {"model": "org/tiny", "revision": revision}}))
    assert source.prepared.manifest.commit == COMMIT


@pytest.mark.parametrize("revision", ["v2", OTHER, "never-heard-of"])
def test_another_revision_is_never_replaced_by_the_prepared_one(from_hub, revision):
    with pytest.raises(UsageError, match=f"prepared at commit {COMMIT}, not at {revision}") as caught:
        find_model(resolve_config({"model": {"model": "org/tiny", "revision": revision}}))
    assert caught.value.hint == f"subspec prepare org/tiny --revision {revision} --bits 4"


def test_a_directory_has_no_revisions(shelf):
    with pytest.raises(UsageError, match="has no revisions"):
        open_tiny(shelf.model("qwen2"), model={"revision": "v1"})


# --- preparing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"), [({"architectures": ["GPT2LMHeadModel"]}, "GPT2"), ({"hidden_act": "gelu"}, "gelu")]
)
def test_a_model_of_another_kind_is_refused_before_anything_is_written(
    own, tmp_path, monkeypatch, change, told
):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "empty"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        prepare_quietly(own)
    assert caught.value.exit_code == ExitCode.UNSUPPORTED
    assert not (tmp_path / "empty").exists()


def report_of(directory, **how):
    states = []
    return prepare(str(directory), wanted(how), **how, progress=states.append), states


def test_preparing_reports_what_it_made(own):
    report, states = report_of(own, force=True)
    assert (report.model_id, report.layers, report.bits, report.optimizer) == (str(own), 3, 4, "minmax")
    assert not report.already_prepared
    assert 4 < report.bits_per_weight < 6
    assert 10 < report.sqnr_db < 40
    assert 0 < report.source_bytes <= states[-1].total_bytes
    assert [state.done_layers for state in states] == [1, 2, 3, 3]
    assert report.substitute_bytes == sum(
        path.stat().st_size for path in report.directory.glob("*.safetensors")
    )
    assert (report.head.kind, report.head.bits) == ("head", 4)
    assert 10 < report.head.sqnr_db < 40
    json.dumps(report.as_dict())


def test_preparing_again_makes_nothing_and_reports_the_same(own):
    first, _ = report_of(own, force=True)
    before = (first.directory / "manifest.json").read_bytes()
    report, states = report_of(own)
    assert report.already_prepared
    assert (states[-1].reused_layers, states[-1].reused_bytes) == (3, states[-1].total_bytes)
    assert (report.sqnr_db, report.bits_per_weight, report.kinds) == (
        first.sqnr_db,
        first.bits_per_weight,
        first.kinds,
    )
    report_of(own, force=True)
    assert (first.directory / "manifest.json").read_bytes() == before


def test_quality_is_reported_by_kind(own):
    report, _ = report_of(own, force=True)
    assert [item.kind for item in report.kinds] == ["q", "k", "v", "o", "gate", "up", "down"]
    for item in report.kinds:
        assert item.bits == 4
        # 4 bits, and a scale and a shift of 16 bits for each group of 128.
        assert item.bits_per_weight == 4.25
        assert 10 < item.sqnr_db < 40
    assert report.bits_per_weight == 4.25
    decibels = [item.sqnr_db for item in report.kinds]
    assert min(decibels) < report.sqnr_db < max(decibels)


def test_bits_by_name_pattern_are_another_set_that_is_loaded_and_planned(own):
    plain = find_prepared(str(own))
    with open_tiny(own, draft={"depth": 4}) as session:
        expected, planned = answer_to(session, "Hello", 12), session.description.plan
    report, _ = report_of(own, overrides=(("*.v_proj", 8), ("*.[vd]*", 2), ("mlp.up_proj", 4)))
    mixed = find_prepared(str(own), 4)
    assert mixed.directory != plain.directory
    assert mixed.manifest.settings.overrides == (("mlp.down_proj", 2), ("self_attn.v_proj", 8))
    assert mixed.manifest.settings.label == "qint4-minmax-down2-v8"
    assert {item.kind: item.bits for item in report.kinds if item.bits != 4} == {"v": 8, "down": 2}
    assert [item.sqnr_db > 30 for item in report.kinds] == [False, False, True, False, False, False, False]
    with open_tiny(own, draft={"depth": 4}) as session:
        answer, held = answer_to(session, "Hello", 12), session.description.plan
    assert answer.outcome == expected.outcome
    assert answer.stats.drafted_tokens > 0
    taken = [{line.label: line.size_bytes for line in plan.lines}["substitutes"] for plan in (planned, held)]
    widened = find_model(resolve_config({"model": {"model": str(own)}})).geometry.layer_shapes()
    kv_weights, rows = math.prod(widened["self_attn.v_proj.weight"]), widened["self_attn.v_proj.weight"][0]
    assert taken[1] - taken[0] == 3 * (kv_weights + 2 * rows - kv_weights // 2 - kv_weights // 128 * 4)


def test_a_pattern_that_matches_nothing_is_refused(own):
    with pytest.raises(UsageError, match=r"'\*.side_proj' matches no matrix of a layer") as caught:
        report_of(own, overrides=(("*.side_proj", 8),))
    assert "mlp.down_proj" in caught.value.hint


@pytest.mark.parametrize(("bits", "low", "high"), [(2, 2.0, 12.0), (4, 14.0, 28.0), (8, 30.0, 60.0)])
def test_more_bits_stand_better_for_the_original(own, bits, low, high):
    report, _ = report_of(own, bits=bits, force=True)
    assert low < report.sqnr_db < high
    assert find_prepared(str(own), bits).manifest.settings == SubstituteSettings(bits, "minmax")
    with open_tiny(own, model={"bits": bits}) as session:
        assert answer_to(session, "Hello", 12).stats.drafted_tokens > 0
