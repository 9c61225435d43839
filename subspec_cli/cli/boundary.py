"""Turn exceptions and signals into messages and exit statuses. Nothing else in the package does."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

from subspec_cli.cli.interrupts import (
    ignore_signals,
    interrupt_status,
    interrupt_text,
    is_terminating,
    signals_as_interrupts,
)
from subspec_cli.cli.wrapping import terminal_width, wrapped_text
from subspec_cli.errors import ExitCode, ResourceError, SubspecError, UsageError
from subspec_cli.files.io_errors import TOO_MANY_FILES
from subspec_cli.files.open_files import open_files_hint, raise_open_files_limit
from subspec_cli.units import printable

BROKEN_PIPE_STATUS = 141
_ENVIRONMENT_ERRNOS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOMEM,
        *TOO_MANY_FILES,
    )
)
_UNMAPPED_LIBRARY = ("failed to map segment", "annot allocate memory")


def guarded(argv: Sequence[str], leave: Callable[[int], object] = lambda _status: None) -> int:
    """Run the command line. Every way out is an exit status, with at most a message and a hint on stderr.

    `leave` is called with the status while no signal can interrupt any more; signals are as before afterwards.
    """
    _tolerate_streams()
    raise_open_files_limit()
    with signals_as_interrupts():
        try:
            status = _invoke(argv)
            sys.stdout.flush()
            ignore_signals()
        except BaseException as error:
            ignore_signals()
            status = _report(error, debug="--debug" in argv, as_json=_wants_document(argv))
        for stream in (sys.stdout, sys.stderr):
            _flush_or_discard(stream)
        leave(status)
    return status


def _invoke(argv: Sequence[str]) -> int:
    # Imported here, so that Ctrl-C during the import is also reported in one line.
    import typer

    from subspec_cli.cli.app import app
    from subspec_cli.cli.completion import COMPLETE_VARIABLE

    command = typer.main.get_command(app)
    if os.environ.get(COMPLETE_VARIABLE):
        try:
            command.main(list(argv), prog_name="subspec", complete_var=COMPLETE_VARIABLE)
        except SystemExit as stop:
            return int(stop.code or ExitCode.OK)
    try:
        # Not `command.main`, which handles Ctrl-C, closed pipes and usage errors in its own way.
        with command.make_context("subspec", list(argv)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Typer has no public name for the parser's exceptions; `format_message` identifies them.
        if not hasattr(error, "format_message"):
            raise
        used = getattr(getattr(error, "ctx", None), "command_path", "subspec")
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        hint = f"{used} --help lists what it takes"
        if used == "subspec run" and "unexpected extra argument" in message:
            hint = f'quote the prompt, and name the model by --model: {used} --model MODEL "…"; {hint}'
        raise UsageError(message, hint) from error
    return ExitCode.OK


def _wants_document(argv: Sequence[str]) -> bool:
    """Whether stdout is to carry one JSON document. The arguments may be such that no parser takes them."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    return "--json" in words


def _report(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Print what happened, also as a JSON document if the result was to be one, and return the exit status."""
    if is_terminating() or _is_interrupt(error):
        _say(interrupt_text())
        return interrupt_status()
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # how Rich reports a closed pipe
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE_STATUS
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip(), one_line=False)
    known = _as_known(error)
    if known is None:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        known = SubspecError(f"internal error: {reason}; run again with --debug for the traceback")
    # An error without a file may be that of stdout itself, which then holds a part of a document.
    if as_json and not known.follows_document and not (isinstance(error, OSError) and not error.filename):
        _write_document(known)
    _say(f"subspec: error: {known.message}")
    if known.hint:
        _say(f" hint: {known.hint}")
    return known.exit_code


def _write_document(error: SubspecError) -> None:
    """Write an error to stdout, as the one document of a `--json` run."""
    found = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps({"error": found}) + "\n")


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an exception is Ctrl-C, or what a library has made of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _as_known(error: BaseException) -> SubspecError | None:
    """The error as a SubspecError; None if it is a bug and not the fault of the user or the machine."""
    if isinstance(error, SubspecError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", "give a smaller --vram-gb or --context")
    if isinstance(error, ImportError) and any(sign in str(error) for sign in _UNMAPPED_LIBRARY):
        return ResourceError(f"not enough memory to load a library: {error}", "raise ulimit -v and ulimit -d")
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS:
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        return ResourceError(
            f"{error.strerror}{place}", open_files_hint() if error.errno in TOO_MANY_FILES else ""
        )
    return None


def _say(text: str, *, one_line: bool = True) -> None:
    """Write to stderr, on a terminal by words. If stderr is closed, the exit status still reports the error."""
    safe = printable(text)
    if one_line:
        safe = safe.replace("\n", " ")
    with contextlib.suppress(OSError, ValueError):
        if one_line and sys.stderr.isatty():
            safe = wrapped_text(safe, terminal_width(sys.stderr))
        sys.stderr.write(safe + "\n")


def _tolerate_streams() -> None:
    """Open missing streams and escape characters, so that a write fails only without space or reader."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_discard(stream: TextIO) -> None:
    """Flush. If that fails, drop the rest, or the interpreter would report it at exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
