"""Imports go to a room below or within, form no cycle, and heavy libraries enter through a few listed files."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from check_structure import GROUND, PACKAGE, ROOMS

DOORS = {
    "transformers": (
        "modeling/pretrained.py",
        "modeling/reference.py",
        "modeling/rope.py",
        "bench/peer_child.py",
    ),
    "optimum": ("modeling/quantization.py",),
    "huggingface_hub": ("hub/*", "substitutes/*"),
    "safetensors": ("checkpoint/*", "substitutes/*", "modeling/reference.py"),
    "typer": ("cli/*",),
    "rich": ("cli/output*.py", "cli/live.py"),
    "prompt_toolkit": ("cli/line_editor.py",),
    "torch": (
        "checkpoint/*",
        "substitutes/*",
        "streaming/*",
        "modeling/*",
        "decoding/*",
        "drafting/*",
        "probe/*",
        "session/*",
        "bench/peer_child.py",
    ),
    "numpy": (
        "checkpoint/compiled_residual.py",
        "checkpoint/compiled_widening.py",
        "decoding/*",
        "drafting/*",
        "modeling/*",
    ),
    "numba": ("compiled.py", "checkpoint/residual_code.py", "modeling/int4_code.py"),
    "llvmlite": ("compiled.py", "checkpoint/residual_code.py", "modeling/int4_code.py"),
    "jinja2": ("modeling/chat_template_child.py",),
    "click": (),
    "tokenizers": ("checkpoint/tokenizer_files.py",),
    "sentencepiece": ("checkpoint/tokenizer_files.py",),
    "accelerate": (),
    "matplotlib": ("cli/bench_plot.py",),
    "pyarrow": ("bench/question_rows.py",),
    "llguidance": ("modeling/grammar.py",),
    "pydantic": ("serving/request_body.py", "serving/job.py"),
    "fastapi": ("serving/app.py",),
    "starlette": ("serving/app.py", "serving/gate.py", "serving/http_answers.py"),
    "uvicorn": ("serving/server.py",),
    "ray": ("serving/ray_*.py",),
    "prometheus_client": ("serving/metrics_text.py",),
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files():
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_typing_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree, package, known, *, typing_too=True):
    """Dotted names that a tree imports, also inside functions; `from package import module` is that module."""
    names, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if is_typing_only(node) and not typing_too:
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
        waiting += ast.iter_child_nodes(node)
    return names


def import_graph(sources, **how):
    """Imported names of each module, from {dotted name: source text}."""
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)}
    return {
        name: imported(
            ast.parse(text), name if name in packages else name.rpartition(".")[0], set(sources), **how
        )
        for name, text in sources.items()
    }


def room(name):
    parts = name.split(".")
    if len(parts) > 2 or (len(parts) == 2 and parts[1] in ROOMS):
        return parts[1]
    return "ground" if parts[-1] in GROUND else "cli"


def upward(graph):
    """Imports that go to a room above."""
    return [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets & graph.keys()
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]


def cycle(graph):
    """One cycle of modules, if there is any."""
    done, trail = set(), []

    def visit(name):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        trail.append(name)
        found = next(filter(None, (visit(target) for target in sorted(graph[name] & graph.keys()))), None)
        trail.pop()
        done.add(name)
        return found

    return next(filter(None, (visit(name) for name in sorted(graph))), None)


def sources():
    return {name: path.read_text() for name, path in source_files().items()}


def test_every_file_is_in_a_room():
    assert {room(name) for name in source_files()} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND | {"__init__", "__main__"}


def test_imports_go_to_a_room_below_or_within():
    assert upward(import_graph(sources())) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(import_graph(sources(), typing_too=False)) is None


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_enter_by_their_doors_only(library):
    files = source_files()
    users = {
        files[name].relative_to(PACKAGE).as_posix()
        for name, targets in import_graph(sources()).items()
        if any(target.partition(".")[0] == library for target in targets)
    }
    assert {user for user in users if not any(fnmatch(user, door) for door in DOORS[library])} == set()


def test_no_other_libraries_are_used():
    top_level = {
        target.partition(".")[0] for targets in import_graph(sources()).values() for target in targets
    }
    assert top_level - set(sys.stdlib_module_names) - DOORS.keys() == {"subspec_cli", "tomli"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("subspec_cli.units", "from subspec_cli.files import home"),
        ("subspec_cli.files.home", "def f():\n    from subspec_cli.decoding.tree import TokenTree"),
        ("subspec_cli.modeling.rope", "import subspec_cli.session.open"),
        ("subspec_cli.modeling.rope", "from ..session.open import x"),
        ("subspec_cli.modeling.rope", "if TYPE_CHECKING:\n    import subspec_cli.bench"),
        ("subspec_cli.session.load", "from subspec_cli import cli"),
    ],
)
def test_the_walk_sees_an_import_that_goes_up(module, text):
    planted = dict.fromkeys(source_files(), "") | {module: text}
    assert len(upward(import_graph(planted))) == 1


def test_the_walk_sees_a_circle():
    planted = dict.fromkeys(source_files(), "") | {
        "subspec_cli.files.home": "from subspec_cli.files import lock",
        "subspec_cli.files.lock": "def f():\n    from .atomic_write import x",
        "subspec_cli.files.atomic_write": "import subspec_cli.files.home",
    }
    assert cycle(import_graph(planted)) is not None
    planted["subspec_cli.files.atomic_write"] = "if TYPE_CHECKING:\n    import subspec_cli.files.home"
    assert cycle(import_graph(planted, typing_too=False)) is None
