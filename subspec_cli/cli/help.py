"""`subspec help`: the words that the program uses, and the examples under every `--help`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

_GLOSSARY: Final = Path(__file__).parent.parent / "ARCHITECTURE.md"
_WIDTH: Final = 88
EXAMPLES: Final = {
    "plan": (
        "subspec plan Qwen/Qwen2.5-7B-Instruct --vram-gb 7",
        "subspec plan demo --compare 500MB,1GiB,2",
    ),
    "prepare": ("subspec prepare demo", "subspec prepare Qwen/Qwen2.5-7B-Instruct --bits 8"),
    "run": (
        'subspec run -m demo "What does os.path.join do?"',
        'git diff | subspec run -t 0.7 -n 200 "Write a commit message."',
        'subspec run --json -s "Answer in one word." "Is 91 prime?"',
    ),
    "chat": ("subspec chat -m demo",),
    "bench": ("subspec bench sample -m demo --limit 4 -n 64",),
    "batch": (
        "subspec batch requests.jsonl answers.jsonl -m demo --parallel 4",
        "subspec batch requests.jsonl answers.jsonl -m demo --ray local --replicas 2",
    ),
    "serve": (
        "subspec serve demo",
        "subspec serve demo --host 0.0.0.0 --port 8080 --parallel 4",
        "subspec serve demo --ray local --replicas 2",
    ),
    "audit": ("subspec audit demo --limit 2",),
    "list": ("subspec models list", "subspec models list | cut -f 1,6"),
    "path": ('du -sh "$(subspec models path demo)"',),
    "verify": ("subspec models verify", "subspec models verify demo --repair"),
    "remove": ("subspec models remove demo", "subspec models remove demo --all-but-latest --yes"),
    "init": ("subspec config init", "subspec config init --preset laptop-cpu"),
    "show": ("subspec config show",),
    "completion": ('eval "$(subspec completion bash)"', "subspec completion fish | source"),
    "help": ("subspec help terms",),
}
"""Command lines by the name of the command; under --help as they stand."""

TopicArg = Annotated[
    Literal["terms"] | None,
    typer.Argument(
        metavar="[TOPIC]", help="terms explains tau, pass, shadow and the other words on the screen."
    ),
]


def show_help(context: typer.Context, topic: TopicArg = None) -> None:
    """Explain the words on the screen; without a topic, list the commands."""
    from subspec_cli.cli.output import Output

    output = Output()
    if topic is not None:
        output.result("\n".join(term_lines(min(_WIDTH, output.out.width))))
    elif context.parent is not None and (text := context.parent.get_help()):
        output.result(text)  # with Rich, `get_help` has written it and returns nothing


def term_lines(width: int) -> list[str]:
    """The glossary's part for users, wrapped to `width` columns."""
    text = _GLOSSARY.read_text(encoding="utf-8").partition("## Glossary")[2]
    terms = re.findall(r"^- (.*(?:\n  .*)*)", text.partition("What the code says")[0], re.MULTILINE)
    plain = [" ".join(term.replace("**", "").replace("`", "").split()) for term in terms]
    return [line for term in plain for line in textwrap.wrap(term, width, subsequent_indent="  ")]


def add_examples(*programs: typer.Typer) -> None:
    """Put its examples under the help of every command."""
    for program in programs:
        for command in program.registered_commands:
            name = str(command.name or getattr(command.callback, "__name__", ""))
            command.epilog = _shown(EXAMPLES.get(name, ()))


def _shown(examples: Iterable[str]) -> str | None:
    # Typer makes a line of each paragraph.
    return "\n\n".join(["Examples:", *(f"  {example}" for example in examples)]) if examples else None
