"""The documents are current: the file map, names of files, links, exit codes, widths of tables."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from subspec_cli.cli.boundary import BROKEN_PIPE_STATUS
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import ExitCode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import file_map

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "subspec_cli"
README = ROOT / "README.md"
NAMES = ("README.md", "subspec_cli/ARCHITECTURE.md", "scripts/RESULTS.md", "tests/FAILURES.md")
DOCUMENTS = {name: ROOT / name for name in (*NAMES, "subspec_cli/CHANGELOG.md", "scripts/LOG.md")}
MOST_COLUMNS = 7
FOLDERS = {path.name for place in (ROOT, PACKAGE) for path in place.iterdir() if path.is_dir()}


def quoted(text):
    """Text in backticks and in code blocks."""
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) + blocks


def named_files(text):
    """Paths that a document names as files of the repository."""
    words = [word.strip(",;:\"'()") for part in quoted(text) for word in part.split()]
    return [word for word in words if re.fullmatch(r"[a-z_.]+/[\w./]*\w", word)]


def prose_only(text):
    """The document without its generated map, whose names have no folder."""
    return text.partition(file_map.BEGIN)[0]


def test_the_file_map_is_current():
    text = file_map.DOCUMENT.read_text()
    assert file_map.updated(text) == text, "run: python scripts/file_map.py --write"


def test_the_file_map_is_made_from_any_state():
    text = f"intro\n{file_map.BEGIN}\nan earlier map\n{file_map.END}after\n"
    current = file_map.updated(text)
    assert current.startswith("intro\n")
    assert current.endswith(f"{file_map.END}after\n")
    assert "an earlier map" not in current
    assert file_map.updated(current) == current
    assert "- `errors.py`: Errors" in current


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ('"""One line. Another one."""', "One line."),
        ('"""Over\ntwo lines\n\nMore."""', "Over two lines"),
        ('"""Files, e.g. of a model. `x` follows."""', "Files, e.g. of a model."),
        ("x = 1", ""),
    ],
)
def test_first_sentence(tmp_path, docstring, sentence):
    path = tmp_path / "module.py"
    path.write_text(docstring)
    assert file_map.first_sentence(path) == sentence


def test_every_module_says_what_it_is():
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in modules if not file_map.first_sentence(path)] == []


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name):
    found = named_files(prose_only(DOCUMENTS[name].read_text()))
    known = [word for word in found if word.partition("/")[0] in FOLDERS]
    assert known
    assert [word for word in known if not any((place / word).exists() for place in (ROOT, PACKAGE))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = DOCUMENTS[name]
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_can_be_read(name):
    rows = [line for line in DOCUMENTS[name].read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if row.strip().strip("|").count("|") >= MOST_COLUMNS] == []


def test_the_readme_names_every_exit_code():
    text = re.search(r"Exit codes: (.*?)\n\n", README.read_text(), re.DOTALL)[1]
    named = {int(number) for number in re.findall(r"\b\d+\b", text)}
    assert named == {*map(int, ExitCode), BROKEN_PIPE_STATUS}


def test_the_readme_shows_settings_that_are_taken():
    (block,) = re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    shown = tomllib.loads(block)
    config = resolve_config(shown)
    assert config.sampling.source == shown["sampling"]["sampling"]


def test_documents_stand_alone():
    """No text refers to a design or to a task that is not in the repository."""
    texts = [
        path
        for folder in ("subspec_cli", "tests", "scripts", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".toml", ".sh", ".yml") and path != Path(__file__)
    ]
    pattern = re.compile(r"\bDESIGN\b|§|\btraps? \d+|\bissues? #?\d+")
    assert [path.name for path in [README, *texts] if pattern.search(path.read_text())] == []
