"""Opening a session: heavy libraries are imported only once the model is known to be there and sound."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from subspec_cli.config import Config
from subspec_cli.reporter import Reporter
from subspec_cli.session.found_model import find_model

if TYPE_CHECKING:
    from subspec_cli.session.session import Session


def open_session(config: Config, reporter: Reporter) -> Session:
    """Find the prepared model and make it ready to answer.

    Raises what the rooms below raise: UsageError (not prepared, bad sizes), UnsupportedModelError,
    IntegrityError (damaged or changed files), ResourceError (budget too small, or larger than the machine).
    """
    found = find_model(config)
    reporter.progress("loading libraries")
    # Read once, when torch loads OpenMP: threads that wait should spin for microseconds, not for milliseconds,
    # or a draft step takes ten times as long whenever another program wants a core. The user's own value wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from subspec_cli.session.build import build_session

    return build_session(config, found, reporter)
