"""`subspec` and `python -m subspec_cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from subspec_cli.cli.boundary import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; only a bug under `--debug` shows a traceback."""
    return guarded(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
