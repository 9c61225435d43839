"""Check the structure of the repository: file and function sizes, annotations, room order, documents."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "subspec_cli"
README = PACKAGE.parent / "README.md"
ROOMS = (
    "ground",
    "files",
    "checkpoint",
    "hub",
    "substitutes",
    "planning",
    "streaming",
    "modeling",
    "decoding",
    "drafting",
    "probe",
    "session",
    "serving",
    "bench",
    "cli",
)
"""Packages, lowest first. `ground` is the modules of the top level; the tests read both from here."""
GROUND = {
    "errors",
    "units",
    "metrics",
    "config",
    "config_file",
    "versions",
    "limits",
    "reporter",
    "compiled",
    "setting_rules",
}
TOP_LEVEL = {"pyproject.toml", "subspec_cli", "configs", "tests", "scripts", "README.md", "LICENSE"}
MOST_README_LINES = 170
MOST_MEDIAN_LINES = 150
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 50
FUNCTION_SHARE = 0.95
MOST_PARAMETERS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Print every problem and a summary; 1 if there is a problem."""
    files = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    problems = [*top_level_problems(), *readme_problems(), *size_problems(files)]
    for path, tree in files.items():
        problems += [f"{path.relative_to(PACKAGE.parent)}:{text}" for text in file_problems(path, tree)]
    problems += cycle_problems(files)
    for problem in problems:
        print(problem)
    lengths = [line_count(path) for path in files]
    print(
        f"{len(files)} files, median {statistics.median(lengths):.0f} lines, longest {max(lengths)}, "
        f"{sum(lengths)} in all; {len(problems)} problems"
    )
    return 1 if problems else 0


def top_level_problems() -> list[str]:
    """Names at the top level that do not belong there; dot-files and ignored builds are allowed."""
    found = {path.name for path in PACKAGE.parent.iterdir() if not path.name.startswith(".")}
    extra = {name for name in found - TOP_LEVEL if not name.endswith(".egg-info") and name != "build"}
    return [f"top level: {name} does not belong there" for name in sorted(extra)]


def readme_problems() -> list[str]:
    """A README that is too long: what is only for readers of the code belongs beside the code."""
    lines = line_count(README)
    return [f"README.md: {lines} lines, at most {MOST_README_LINES}"] if lines > MOST_README_LINES else []


def size_problems(files: dict[Path, ast.Module]) -> list[str]:
    """Problems with sizes over all files."""
    problems = []
    median = statistics.median(line_count(path) for path in files)
    if median > MOST_MEDIAN_LINES:
        problems.append(f"median file has {median} lines, at most {MOST_MEDIAN_LINES}")
    problems += [
        f"{path.relative_to(PACKAGE.parent)}: {line_count(path)} lines, at most {MOST_FILE_LINES}"
        for path in files
        if line_count(path) > MOST_FILE_LINES
    ]
    lengths = [function_lines(node) for tree in files.values() for node in functions(tree)]
    short = sum(length <= MOST_FUNCTION_LINES for length in lengths) / len(lengths)
    if short < FUNCTION_SHARE:
        problems.append(f"only {short:.1%} of functions have at most {MOST_FUNCTION_LINES} lines")
    return problems


def file_problems(path: Path, tree: ast.Module) -> Iterator[str]:
    """Problems within one file."""
    for node in functions(tree):
        if node.returns is None or any(a.annotation is None for a in arguments(node)):
            yield f"{node.lineno}: {node.name} is not annotated"
        if (count := len(arguments(node))) > MOST_PARAMETERS:
            yield f"{node.lineno}: {node.name} has {count} parameters, at most {MOST_PARAMETERS}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: a bare except"
        if isinstance(node, ast.ExceptHandler) and swallows(node):
            yield f"{node.lineno}: an exception is swallowed without a reason"
    room = room_of(path)
    for line, target in imports(tree, path):
        if ROOMS.index(room_of(target)) > ROOMS.index(room):
            yield f"{line}: {room} imports {room_of(target)}, a room above"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything and does nothing."""
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    )
    return names & {"Exception", "BaseException"} != set() and all(
        isinstance(n, ast.Pass) for n in handler.body
    )


def cycle_problems(files: dict[Path, ast.Module]) -> list[str]:
    """Import cycles between modules. Imports for type checking only do not count."""
    graph = {path: [target for _, target in imports(tree, path)] for path, tree in files.items()}
    done: set[Path] = set()
    problems: list[str] = []

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        if path in trail:
            names = [item.stem for item in (*trail[trail.index(path) :], path)]
            problems.append("import cycle: " + " -> ".join(names))
            return
        if path not in done:
            for target in graph.get(path, []):
                visit(target, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())
    return problems


def imports(tree: ast.Module, path: Path) -> list[tuple[int, Path]]:
    """(line, file) of every module of the package that is imported at run time, also inside functions."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subspec_cli")
        if ours and id(node) not in typing_only:
            own = module_file(node.module or "")
            targets = [module_file(f"{node.module}.{alias.name}") for alias in node.names]
            found += [(node.lineno, target or own) for target in targets]
    return [(line, target) for line, target in found if target is not None and target != path]


def module_file(name: str) -> Path | None:
    """The file of a dotted module name; None if there is no such file."""
    base = PACKAGE.parent.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def room_of(path: Path) -> str:
    """The room of a file; the entry point and the public names of the package belong to `cli`."""
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "ground" if relative.stem in GROUND else "cli"


def functions(tree: ast.Module) -> Iterator[Function]:
    """All functions, including methods and nested functions."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def arguments(node: Function) -> list[ast.arg]:
    """Parameters of a function but `self` and `cls`; each needs an annotation."""
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [arg for arg in named if arg.arg not in ("self", "cls")]


def function_lines(node: Function) -> int:
    """Lines of a function, without its decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def line_count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
