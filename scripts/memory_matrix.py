"""Check that runs stay within their memory budgets, in cells that cover every pair of settings.

Each cell is a run in its own process. It is compared with its budget by the peak of the resident set beyond the bare
process, which is what imports take before a model is loaded. Exit status 1 means that a cell exceeded its budget.

    python scripts/memory_matrix.py --workdir /tmp/matrix --model demo=demo --model SmolLM2=DIRECTORY

A random model with a vocabulary of 151,936 is made in the work directory. Models are prepared there too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from subspec_cli.checkpoint.source_directory import tokenizer_bytes_in
from subspec_cli.config import Config, MemoryConfig, ModelConfig, RunConfig, SamplingConfig
from subspec_cli.errors import SubspecError
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.plan import bounds_of, make_plan
from subspec_cli.planning.request import MemoryLimits, PlanRequest, plan_request
from subspec_cli.session import load
from subspec_cli.session.found_model import FoundModel, find_model
from subspec_cli.units import GIB, MIB

if TYPE_CHECKING:
    from subspec_cli.session import Session

ROOT: Final = Path(__file__).resolve().parent.parent
NEW_TOKENS: Final = 64
TURN_TOKENS: Final = 128
"""Context kept for a turn: a short message, its template and the answer."""
RANDOM: Final = "random"
SENTENCE: Final = "The json module encodes and decodes the JSON format. "
COLUMNS: Final = ("run", "budget", "planned", "peak", "share", "process (bare)", "largest line")


@dataclass(frozen=True)
class Cell:
    """The settings of one run."""

    model: str
    prompt_tokens: int
    temperature: float
    bits: int
    budget: str
    """`tight` is little more than the least that is planned, `loose` holds every layer and no more."""
    turns: int
    reprobe: bool


@dataclass(frozen=True)
class Usage:
    """What one run took, in bytes."""

    budget_bytes: int
    planned_bytes: int
    peak_bytes: int
    bare_bytes: int
    process_bytes: int
    largest_line: str

    @property
    def holds(self) -> bool:
        """Whether the run stayed within its budget."""
        return self.peak_bytes <= self.budget_bytes


def main() -> int:
    """Run all cells and print a table, or run the one cell of a subprocess."""
    options = read_options()
    if options.cell:
        print(json.dumps(asdict(measure(Cell(**json.loads(options.cell)), options.directory))))
        return 0
    os.environ["SUBSPEC_HOME"] = str(options.workdir / "home")
    models = prepared_models(options)
    cells = covering_cells(tuple(models), options.cells)
    return show(
        cells, [run_cell(number, cell, models) for number, cell in enumerate(cells, start=1)], options
    )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="repeat for more")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "memory-matrix")
    parser.add_argument("--cells", type=int, default=30, help="least number of cells")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    return parser.parse_args()


def covering_cells(models: Sequence[str], least: int) -> list[Cell]:
    """Choose cells, always the one that covers most: each pair of values first, then as many triples as fit."""
    values = (models, (16, 500, 2000, 4000), (0.0, 1.0), (4, 8), ("tight", "loose"), (1, 5), (False, True))
    every = [tuple(enumerate(chosen)) for chosen in product(*values)]
    chosen: list[Any] = []
    for size in (2, 3):
        open_groups = {group for item in every for group in combinations(item, size)}
        open_groups -= {group for item in chosen for group in combinations(item, size)}
        while open_groups and (size == 2 or len(chosen) < least):
            best = max(every, key=lambda item: len(open_groups.intersection(combinations(item, size))))
            open_groups -= set(combinations(best, size))
            chosen.append(best)
    return [Cell(*(value for _, value in item)) for item in chosen]


def prepared_models(options: argparse.Namespace) -> dict[str, str]:
    """Return the models by name, each prepared in both widths."""
    from random_model import make_random_model

    models = dict(item.split("=", 1) for item in options.model)
    models[RANDOM] = str(make_random_model(options.workdir / RANDOM))
    for directory, bits in product(models.values(), ("4", "8")):
        command = [sys.executable, "-m", "subspec_cli", "prepare", directory, "--bits", bits]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr, stderr=sys.stderr)
    return models


def run_cell(number: int, cell: Cell, models: Mapping[str, str]) -> Usage | str:
    """Measure a cell in a process of its own; a text says why it failed."""
    order = ["--cell", json.dumps(asdict(cell)), "--directory", models[cell.model]]
    found = subprocess.run([sys.executable, __file__, *order], check=False, capture_output=True, text=True)
    print(f"{number} {cell}: {found.stdout.strip()}", file=sys.stderr)
    if found.returncode:
        return (found.stderr.strip().splitlines() or ["it ended"])[-1]
    return Usage(**json.loads(found.stdout.splitlines()[-1]))


def measure(cell: Cell, directory: str) -> Usage:
    """Run one cell in this process."""
    try:
        return _measure(cell, directory)
    except SubspecError as error:
        sys.exit(f"{error.message}: {error.hint}")


def _measure(cell: Cell, directory: str) -> Usage:
    found = find_model(Config(model=ModelConfig(model=directory, bits=cell.bits)))
    room = cell.turns * TURN_TOKENS + TURN_TOKENS
    prompt_tokens = min(cell.prompt_tokens, found.geometry.max_positions - room)
    context = prompt_tokens + room
    budget_bytes = budget_of(cell, found, directory, context)
    settings = asdict(sampling_of(cell))
    with load(
        directory,
        memory_gib=budget_bytes / GIB,
        device="cpu",
        bits=cell.bits,
        context=context,
        reprobe=cell.reprobe,
        max_new_tokens=NEW_TOKENS,
        temperature=settings["temperature"],
        top_p=settings["top_p"],
    ) as session:
        converse(session, prompt_tokens, cell.turns)
        lines = session.plan.lines
        largest = max(lines, key=lambda line: line.size_bytes)
        return Usage(
            budget_bytes,
            session.plan.total_bytes,
            session.peak_memory_bytes(),
            session.bare_process_bytes(),
            session.process_peak_bytes(),
            f"{largest.label} {largest.size_bytes / MIB:.0f}",
        )


def sampling_of(cell: Cell) -> SamplingConfig:
    """Greedy, or a temperature with top-p."""
    return SamplingConfig(temperature=cell.temperature, top_p=0.95 if cell.temperature else 1.0)


def budget_of(cell: Cell, found: FoundModel, directory: str, context: int) -> int:
    """Return the cell's budget, a whole number of MiB."""
    config = Config(
        model=ModelConfig(model=directory, bits=cell.bits),
        memory=MemoryConfig(context=context, device="cpu"),
        run=RunConfig(max_new_tokens=NEW_TOKENS),
        sampling=sampling_of(cell),
    )

    def request(budget_bytes: int) -> PlanRequest:
        settings = found.prepared.manifest.settings
        return plan_request(
            config,
            found.geometry,
            settings,
            assumed_costs(found.geometry, "cpu", settings=settings),
            limits=MemoryLimits("cpu", budget_bytes, None),
            tokenizer_bytes=tokenizer_bytes_in(found.checkpoint.directory),
        )

    if cell.budget == "loose":
        needed_bytes = make_plan(request(64 * GIB)).total_bytes
    else:
        needed_bytes = int(bounds_of(request(64 * GIB)).least_budget_bytes * 1.01)
    return math.ceil(needed_bytes / MIB) * MIB


def converse(session: Session, prompt_tokens: int, turns: int) -> None:
    """Ask once with a long prompt, then with short ones after each answer, whose tokens are kept as they are."""
    words = SENTENCE * (prompt_tokens // 4 + 8)
    ids = session.encode_prompt(words, system=None, raw=True)[:prompt_tokens]
    for _ in range(turns):
        for delta in session.generate(ids, stop=()):
            ids.extend(delta.token_ids)
        ids += session.encode_prompt("And then?", system=None, raw=False)


def show(cells: Sequence[Cell], found: Sequence[Usage | str], options: argparse.Namespace) -> int:
    """Print the table or the document; return the exit status."""
    if options.json:
        rows = [
            asdict(cell) | (asdict(usage) if isinstance(usage, Usage) else {"problem": usage})
            for cell, usage in zip(cells, found, strict=True)
        ]
        print(json.dumps(rows))
    else:
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for cell, usage in zip(cells, found, strict=True):
            print(f"| {' | '.join([described(cell), *columns(usage)])} |")
    held = [isinstance(usage, Usage) and usage.holds for usage in found]
    print(f"{sum(held)} of {len(held)} cells within their budget", file=sys.stderr)
    return 0 if all(held) else 1


def described(cell: Cell) -> str:
    """The settings of a cell in a few words."""
    parts = [cell.model, f"{cell.prompt_tokens} tokens", f"T {cell.temperature:g}", f"{cell.bits} bit"]
    parts += [cell.budget, *(["chat"] if cell.turns > 1 else []), *(["reprobe"] if cell.reprobe else [])]
    return ", ".join(parts)


def columns(usage: Usage | str) -> list[str]:
    """The measured columns of one row, in MiB."""
    if isinstance(usage, str):
        return [usage, *[""] * (len(COLUMNS) - 2)]
    sizes = (usage.budget_bytes, usage.planned_bytes, usage.peak_bytes)
    return [
        *(f"{size / MIB:.0f}" for size in sizes),
        f"{usage.peak_bytes / usage.budget_bytes:.0%}",
        f"{usage.process_bytes / MIB:.0f} ({usage.bare_bytes / MIB:.0f})",
        usage.largest_line,
    ]


if __name__ == "__main__":
    sys.exit(main())
