"""`subspec completion`: the script by which a shell completes commands, flags, choices and model names."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import typer

COMPLETE_VARIABLE: Final = "_SUBSPEC_COMPLETE"
"""A shell that asks for completions sets it."""

ShellArg = Annotated[
    Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")
]


def completion(shell: ShellArg) -> None:
    """Write the script that lets a shell complete commands, flags and names of prepared models."""
    from typer._completion_shared import get_completion_script

    from subspec_cli.cli.output import Output

    script = get_completion_script(prog_name="subspec", complete_var=COMPLETE_VARIABLE, shell=shell)
    Output().result(str(script).strip())


def complete_model(incomplete: str) -> list[str]:
    """Names of prepared models that begin so; a local one by its last name, unless its path was begun."""
    from subspec_cli.errors import SubspecError
    from subspec_cli.substitutes.prepared_names import last_name, prepared_ids

    try:
        ids = prepared_ids()
    except SubspecError:  # a shell that completes shows no errors
        ids = []
    names = ["demo", *ids]
    if "/" not in incomplete:
        names = [last_name(name) if name.startswith("/") else name for name in names]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
