"""Formats of a benchmark's table, and `subspec bench compare` over records on disk."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json

import pytest
from test_bench_voids import report

from subspec_cli.__main__ import main
from subspec_cli.bench.figures import Spread
from subspec_cli.bench.record_comparison import ComparedFigure, compare_records, differences
from subspec_cli.cli.bench import Outputs, show_report, write_report
from subspec_cli.cli.documents import bench_document
from subspec_cli.cli.output import Output
from subspec_cli.errors import UsageError

CONTEXT = {
    "record": {"kind": "subspec bench", "command": "subspec bench sample", "cpu": "A"},
    "versions": {"torch": "2"},
    "questions_sha256": "q",
    "config": {"bench": {"limit": None}},
}


def document(**rates):
    found = dataclasses.replace(report(**rates), context=copy.deepcopy(CONTEXT))
    return json.loads(json.dumps(bench_document(found)))


@pytest.fixture
def records(tmp_path):
    def write(*documents):
        paths = [tmp_path / f"{number}.json" for number, _ in enumerate(documents)]
        for path, content in zip(paths, documents, strict=True):
            path.write_text(json.dumps(content))
        return list(map(str, paths))

    return write


def shown(shape, **rates):
    out, err = io.StringIO(), io.StringIO()
    show_report(report(**rates), Output(stdout=out, stderr=err), Outputs(shape, None))
    return out.getvalue(), err.getvalue()


def test_markdown_is_a_table_and_a_list():
    out, _ = shown("markdown", fast=60.0)
    lines = out.splitlines()
    assert lines[0].startswith("| category | answers | identical | plain tok/s |")
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| writing | 1 | 1 | 1.00 | 60.00 | void | void | 5.00 | 0 |"
    assert lines[5].startswith("- void: speedup same plan")


def test_the_record_is_written_also_if_nobody_reads_the_table(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError("gone")

    target = tmp_path / "out.json"
    with pytest.raises(OSError, match="gone"):
        write_report(report(), Output(stdout=Closed(), stderr=io.StringIO()), Outputs("markdown", target))
    assert json.loads(target.read_text())["suite"] == "sample"


def test_csv_is_alone_on_stdout_with_numbers_and_reasons():
    out, err = shown("csv", fast=60.0)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["category"] for row in rows] == ["writing", "all"]
    assert float(rows[0]["speculative_tok_per_s_most"]) == pytest.approx(60.0)
    assert rows[0]["speedup"] == ""
    assert "above 1.05 tau" in rows[0]["speedup_void"]
    assert "token for token identical" in err


@pytest.mark.parametrize(
    ("second", "overlap"),
    [(Spread(2.0, 1.4, 2.1), True), (Spread(2.0, 1.6, 2.1), False), (Spread(2.0, 2.0, 2.0), None)],
)
def test_ranges_overlap_or_not(second, overlap):
    found = ComparedFigure("all", "speedup", Spread(1.0, 0.9, 1.5), second)
    assert (found.ratio, found.overlap) == (2.0, overlap)


def test_void_figures_are_not_compared():
    found = {item.figure: item for item in compare_records(document(), document(fast=60.0))}
    assert found["speculative_tok_per_s"].ratio == pytest.approx(15.0)
    assert found["speedup"].second == "void"
    assert found["speedup"].ratio is found["speedup"].overlap is None


def test_other_suites_and_questions_are_refused():
    with pytest.raises(UsageError, match="other suites: sample and mt-bench"):
        compare_records(document(), document() | {"suite": "mt-bench"})
    with pytest.raises(UsageError, match="other questions"):
        compare_records(document(), document() | {"questions_sha256": "r"})


def test_differences_are_named():
    other = document()
    other["config"]["bench"]["limit"] = 3
    other["record"] |= {"cpu": "B", "command": "another"}
    assert differences(document(), other) == ["bench.limit: None and 3", "cpu: A and B"]


def test_two_records_are_shown_beside_each_other(capsys, records):
    paths = records(document(), document(fast=3.0))
    assert main(["bench", "compare", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:3] == ["all", "subspec", "tok/s"]]
    assert line.split()[3:] == ["4.00", "3.00", "0.75", "-"]
    assert main(["bench", "compare", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["ranges_overlap"] for row in found["rows"]} == {None}
    assert main(["bench", "compare", *paths, "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("category,figure,first,second,ratio,ranges overlap\nwriting,")


def test_compare_takes_two_records_alone(capsys, records):
    paths = records(document(), {"suite": "sample"})
    for argv, message in [
        (paths[:1], "compare takes two records, not 1"),
        (paths, "is no record of a benchmark"),
        ([*paths, "--limit", "2"], "compare takes --format and --json alone"),
    ]:
        assert main(["bench", "compare", *argv]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "sample", "--json", "out.json"]) == 2
    assert "--output FILE writes the record" in capsys.readouterr().err
