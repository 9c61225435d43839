"""`subspec` and `python -m subspec_cli`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from subspec_cli.cli.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; only a bug under `--debug` shows a traceback."""
    return guarded(sys.argv[1:] if argv is None else argv)


def program() -> NoReturn:
    """Run the process's command line and end the process.

    The interpreter's own exit is left out: libraries' exit handlers take time, and a signal makes them print
    tracebacks. An interrupt that was caught may also make the interpreter end by SIGINT, whatever the status.
    """
    raise SystemExit(guarded(sys.argv[1:], os._exit))


if __name__ == "__main__":
    program()
