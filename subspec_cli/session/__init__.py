"""Composition root: from settings to a ready engine, and from a model to its substitutes."""

from subspec_cli.session.opening import open_session
from subspec_cli.session.preparing import PrepareReport, prepare
from subspec_cli.session.session import Chat, Session, SessionDescription, TextDelta

__all__ = ["Chat", "PrepareReport", "Session", "SessionDescription", "TextDelta", "open_session", "prepare"]
