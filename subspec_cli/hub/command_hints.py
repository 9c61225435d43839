"""Command lines that error hints tell the user to run."""

from __future__ import annotations

import shlex

from subspec_cli.units import printable


def prepare_command(
    model_id: str,
    *,
    revision: str | None = None,
    bits: int | None = None,
    optimizer: str | None = None,
    force: bool = False,
) -> str:
    """The command line that prepares a model, quoted for a shell."""
    words = ["subspec", "prepare", shlex.quote(printable(model_id))]
    if force:
        words.append("--force")
    if revision is not None:
        words += ["--revision", revision]
    if bits is not None:
        words += ["--bits", str(bits)]
    if optimizer is not None:
        words += ["--optimizer", optimizer]
    return " ".join(words)


def repair_command(model_id: str | None) -> str:
    """The command line that makes damaged files of a prepared model, or of all, again, quoted for a shell."""
    words = [] if model_id is None else [shlex.quote(printable(model_id))]
    return " ".join(["subspec models verify", *words, "--repair"])
