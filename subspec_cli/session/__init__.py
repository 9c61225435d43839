"""Composition root: from settings to a ready engine, and from a model to its substitutes.

Importing it loads no heavy library; opening and preparing do, once they know that there is something to load.
"""

from typing import TYPE_CHECKING

from subspec_cli.session.forecasting import Forecast, forecast
from subspec_cli.session.opening import open_session
from subspec_cli.session.preparing import PrepareReport, prepare
from subspec_cli.session.repairing import repair

if TYPE_CHECKING:
    from subspec_cli.session.session import Chat as Chat
    from subspec_cli.session.session import Session as Session
    from subspec_cli.session.session import TextDelta as TextDelta

__all__ = ["Forecast", "PrepareReport", "forecast", "open_session", "prepare", "repair"]
