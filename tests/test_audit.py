"""The audit over tiny models: it passes for every family and type, and finds faults that 16 bits would hide."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from tiny_models import FAMILIES

from subspec_cli.__main__ import main
from subspec_cli.bench import audit
from subspec_cli.bench.audit import run_audit
from subspec_cli.bench.audit_report import AuditedAnswer, AuditReport, Difference
from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.cli.audit_text import audit_lines
from subspec_cli.config_file import resolve_config
from subspec_cli.modeling import rope
from subspec_cli.modeling.reference import AskedRows, LibraryModel
from subspec_cli.modeling.row_comparison import ComparedRow, RowErrors, RowLogits, compare_rows
from subspec_cli.session import load as session_load
from subspec_cli.session import open as session_open
from subspec_cli.session.found_model import find_model
from subspec_cli.streaming.memory_limit import MemoryLimit

one_thread = tiny_models.one_thread

pytestmark = pytest.mark.usefixtures("attention_checked_once")

WINDOW = 24
EXTRA = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def quiet(state):
    """No progress."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    turns = [
        "Why is the sky blue, and the sea, and what else is blue?",
        "Rivers",
        "All work and no play. " * 15,
    ]
    path.write_text("".join(json.dumps({"turns": [turn]}) + "\n" for turn in turns))
    return path


def settings(model, questions, **memory):
    return resolve_config(
        {
            "model": {"model": str(model)},
            "memory": {"vram_gb": 1.0, "device": "cpu", "resident_layers": 1} | memory,
            "audit": {"questions": str(questions), "tokens": 40},
        }
    )


def audited(model, questions, **memory):
    return run_audit(settings(model, questions, **memory), progress=quiet)


def model_of(shelf, family, **how):
    return shelf.model(family, **(EXTRA[family] | how))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_at_a_time_gives_the_bits_of_the_whole_model(tiny_model, family, tied):
    model = LibraryModel(open_checkpoint(tiny_model(family, tied=tied, sharded=not tied)), "BF16")
    sequences = [AskedRows(tuple(range(5, 100)), 80), AskedRows(tuple(range(40, 75)), 3)]
    for in_float32 in (True, False):
        whole, parts = (
            model.run(sequences, in_float32=in_float32, whole=way, progress=lambda done, total: None)
            for way in (True, False)
        )
        for number, asked in enumerate(sequences):
            found = parts.logits(number, slice(None))
            assert len(found) == len(asked.token_ids) - asked.first
            assert torch.equal(found, whole.logits(number, slice(None)))


@pytest.fixture
def tiny_model(tmp_path):
    return lambda family, **how: tiny_models.make_tiny_model(tmp_path, family, **(EXTRA[family] | how))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if (row + column) % len(DTYPES) == 0 else pytest.mark.slow)
        for row, family in enumerate(FAMILIES)
        for column, dtype in enumerate(DTYPES)
    ],
)
def test_tokens_and_logits_are_the_librarys_within_rounding(shelf, questions, family, dtype):
    """Every token is the library's choice or a near tie, and the errors are of the library's size."""
    report = audited(model_of(shelf, family, dtype=DTYPES[dtype]), questions)
    assert report.problems == ()
    assert report.is_exact
    assert len(report.rows) > 60
    assert len(report.rows) - len(report.differences) > 0.8 * len(report.rows)
    assert report.library_dtype == ("bf16" if dtype == "f32" else dtype)
    assert 0 < report.own_float32.median < report.library.median / 100
    if dtype == "f32":
        assert all(row.own == row.own_float32 for row in report.rows)


@pytest.mark.parametrize("switch", [60, 130, 200])
def test_answers_are_compared_up_to_where_longrope_changes_its_factors(shelf, questions, switch):
    """A forward over all rows would turn the rows before that place by the other factors."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    table = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch}
    model = shelf.model("llama", rope_parameters=table | factors)
    report = audited(model, questions)
    assert report.problems == ()
    lengths = [(answer.prompt_tokens, len(answer.rows)) for answer in report.answers]
    assert all(prompt > switch or prompt + rows <= switch + 1 for prompt, rows in lengths)
    assert any(prompt > switch and rows > 20 for prompt, rows in lengths)


def test_both_ways_of_the_library_give_the_same_figures(shelf, questions, monkeypatch):
    """Without host memory to spare the library's layers are loaded one at a time."""
    model = model_of(shelf, "mistral")
    whole = audited(model, questions)
    monkeypatch.setattr(audit, "host_memory", lambda: MemoryLimit(1000, 1000, "this machine has"))
    parts = audited(model, questions)
    assert (whole.way, parts.way) == ("whole", "layer by layer")
    assert parts.rows == whole.rows


# --- planted faults ----------------------------------------------------------------------------------------------


def wrong_rope(monkeypatch):
    """One factor of the rotation off by one percent."""
    right = rope._inverse_frequencies

    def wrong(*arguments):
        frequencies, scaling = right(*arguments)
        frequencies = frequencies.clone()
        frequencies[4] *= 1.01
        return frequencies, scaling

    monkeypatch.setattr(rope, "_inverse_frequencies", wrong)


def swapped_norms(monkeypatch):
    """The norms of queries and keys take each other's weights."""
    read = session_load.Loader._small_tensors

    def swap(self):
        names = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        return tuple(
            layer | dict(zip(names, (layer[names[1]], layer[names[0]]), strict=True)) for layer in read(self)
        )

    monkeypatch.setattr(session_load.Loader, "_small_tensors", swap)


def wider_window(monkeypatch):
    """Windows see one key too many."""

    def wider(config):
        found = find_model(config)
        shapes = found.geometry.attention
        wide = tuple(replace(shape, window=shape.window and shape.window + 1) for shape in shapes)
        geometry = replace(found.geometry, mixers=wide)
        return replace(found, repository=replace(found.repository, geometry=geometry))

    monkeypatch.setattr(session_open, "find_model", wider)


@pytest.mark.parametrize(
    ("family", "fault"), [("llama", wrong_rope), ("qwen3", swapped_norms), ("mistral", wider_window)]
)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_planted_fault_is_found(shelf, questions, family, fault, dtype, monkeypatch):
    """Also where most tokens stay the same."""
    fault(monkeypatch)
    report = audited(model_of(shelf, family, dtype=DTYPES[dtype]), questions)
    assert any(
        problem.startswith("in float32 the logits' error is more than rounding")
        for problem in report.problems
    )
    assert audit_lines(report)[-1].startswith("differences beyond rounding")


def test_tokens_that_their_logits_do_not_give_are_found(shelf, questions, monkeypatch):
    given = audit._answers

    def changed(*arguments):
        for answer in given(*arguments):
            yield replace(answer, token_ids=(*answer.token_ids[:-1], (answer.token_ids[-1] + 1) % 256))

    monkeypatch.setattr(audit, "_answers", changed)
    report = audited(model_of(shelf, "llama"), questions)
    assert report.problems[0].startswith("3 of ")
    assert "are not those that their own logits give" in report.problems[0]
    assert any("are no near ties" in problem for problem in report.problems)


# --- the judgement -----------------------------------------------------------------------------------------------


def row(*, gap=0.0, own=0.3, own_float32=1e-6, library=0.3):
    ids = {"token_id": 1, "own_id": 1, "reference_id": 2 if gap else 1, "library_id": 1}
    errors = {"own": own, "own_float32": own_float32, "library": library}
    return ComparedRow(
        **ids, gap=gap, **{side: RowErrors(error, error / 5) for side, error in errors.items()}
    )


def report_of(*rows, **how):
    differences = tuple(Difference(n, n, "a", "b", item) for n, item in enumerate(rows) if item.gap)
    answer = AuditedAnswer("1", "all", 5, "text", rows, differences)
    fields = {
        "library_dtype": "bf16",
        "is_float32": False,
        "rounding_ratio": 2.0**-16,
        "is_exact": True,
        "way": "whole",
        "context": {"model": "m"},
    }
    return AuditReport((answer,), **(fields | how))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), row(gap=0.6)], ""),
        ([row(), row(gap=0.61)], "1 of 1 differing tokens are no near ties"),
        ([row(own=0.6)] * 3, ""),
        ([row(own=0.61)] * 3, "not of the library's size"),
        ([row()] * 9 + [row(own=1.2)], ""),
        ([row()] * 9 + [row(own=1.21)], "not of the library's size"),
        ([row()] * 9 + [row(own=float("nan"))], "not of the library's size"),
        ([row(own_float32=1.4e-4)] * 3, ""),
        ([row(own_float32=1.5e-4)] * 3, "more than rounding"),
        ([row()] * 9 + [row(own_float32=6e-4)], "more than rounding"),
    ],
)
def test_what_passes(rows, words):
    problems = report_of(*rows).problems
    assert [words in problem for problem in problems] == ([True] if words else [])


def test_a_float32_model_is_not_measured_by_16_bits():
    assert report_of(*[row(own=0.7)] * 3, is_float32=True).problems == ()
    assert report_of(*[row(own_float32=1e-3)] * 3, is_float32=True).problems


def test_a_session_without_a_promise_of_bits_may_choose_otherwise():
    changed = replace(row(), own_id=7)
    assert report_of(changed, is_exact=False).problems == ()
    assert "1 of 1 tokens are not those" in report_of(changed).problems[0]


def test_rows_are_compared_with_the_reference():
    reference = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    sides = RowLogits(reference + torch.tensor([0.5, -0.25, 0.0]), reference, reference.flip(-1), reference)
    first, second = compare_rows([1, 0], sides)
    assert (first.token_id, first.own_id, first.reference_id, first.library_id) == (1, 2, 2, 0)
    assert (first.gap, second.gap) == (2.0, 0.0)
    assert first.own == RowErrors(0.5, 0.25)
    assert first.own_float32 == RowErrors(0.0, 0.0)
    assert second.library == RowErrors(5.0, 5.0)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(shelf, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    model = str(model_of(shelf, "llama"))
    how = [
        "--questions",
        str(questions),
        "--tokens",
        "8",
        "--limit",
        "2",
        "--memory-gb",
        "1",
        "--device",
        "cpu",
    ]
    return ["audit", model, *how]


def test_the_command_prints_answers_and_figures(command, capsys):
    assert main(command) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip(" ─")]
    assert lines[0].startswith("question tokens as float32 as 16-bit first difference")
    assert lines[3].startswith("all 16 ")
    assert lines[4].startswith("as transformers in float32: ")
    assert lines[-1] == "every difference is rounding (transformers ran on the CPU, whole)"
    assert "answering 2/2" in err
    assert "library in float32 (whole) 2/2" in err
    assert "comparing 2/2" in err


def test_a_fault_ends_the_command_with_its_own_status(command, capsys, monkeypatch):
    wrong_rope(monkeypatch)
    assert main([*command, "--json"]) == 9
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert not document["passed"]
    assert document["tokens"] == sum(len(answer["rows"]) for answer in document["answers"]) == 16
    assert document["own_float32_error"]["median"] > 32 * document["float32_unit"]["median"]
    assert document["answers"][0]["rows"][0].keys() >= {"token_id", "reference_id", "gap", "own", "library"}
    assert f"subspec: error: {document['problems'][0]}" in err


def test_questions_that_are_not_there(command, capsys):
    assert main([*command, "--questions", "nothing.jsonl"]) == 2
    assert "--questions nothing.jsonl: no such file" in capsys.readouterr().err
