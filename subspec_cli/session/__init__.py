"""Composition root: from settings to a session that answers, and from a model to its substitutes.

Importing this package loads no heavy library. Opening and preparing do, once there is something to load.
"""

from typing import TYPE_CHECKING

from subspec_cli.session.open import load, open_session

if TYPE_CHECKING:
    from subspec_cli.session.answer import TextDelta as TextDelta
    from subspec_cli.session.chat import Chat as Chat
    from subspec_cli.session.session import Session as Session

__all__ = ["load", "open_session"]
