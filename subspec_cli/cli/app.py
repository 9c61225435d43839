"""The command line. Each command imports what it needs only when it runs."""

from __future__ import annotations

import os
import shutil
from typing import Annotated, Final

import typer

from subspec_cli.cli.audit import audit
from subspec_cli.cli.batch import batch
from subspec_cli.cli.bench import bench
from subspec_cli.cli.chat import chat
from subspec_cli.cli.completion import COMPLETE_VARIABLE, completion
from subspec_cli.cli.configuration import configuration
from subspec_cli.cli.help import add_examples, show_help
from subspec_cli.cli.models import models
from subspec_cli.cli.plan import plan
from subspec_cli.cli.prepare import prepare
from subspec_cli.cli.run import run
from subspec_cli.cli.serve import serve
from subspec_cli.errors import ExitCode
from subspec_cli.versions import __version__

NARROW: Final = 60
"""Columns below which boxes leave one word a line; help is then plain lines."""

app = typer.Typer(
    name="subspec",
    # Typer's own --install-completion and --show-completion stay out of --help: `completion` writes the script.
    add_completion=bool(os.environ.get(COMPLETE_VARIABLE)),
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= NARROW else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan)
app.command()(prepare)
app.command()(run)
app.command()(chat)
app.command()(serve)
app.command()(batch)
app.command()(bench)
app.command()(audit)
app.command()(completion)
app.command("help")(show_help)
app.add_typer(models)
app.add_typer(configuration)
add_examples(app, models, configuration)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    """Run a 16-bit language model too large for the device, fast, with exactly its own tokens."""
    if not version and context.invoked_subcommand is not None:
        return
    from subspec_cli.cli.output import Output

    # With Rich, `get_help` has already written the help and returns nothing.
    text = f"subspec {__version__}" if version else context.get_help()
    if text:
        Output().result(text)
    raise typer.Exit(ExitCode.OK if version else ExitCode.USAGE)
