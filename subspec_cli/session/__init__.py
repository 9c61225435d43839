"""Composition root: from settings to a ready engine, and from a model to its substitutes.

Importing it loads no heavy library; opening and preparing do, once they know that there is something to load.
"""

from typing import TYPE_CHECKING

from subspec_cli.session.open import open_session

if TYPE_CHECKING:
    from subspec_cli.session.session import Chat as Chat
    from subspec_cli.session.session import Session as Session
    from subspec_cli.session.session import TextDelta as TextDelta

__all__ = ["open_session"]
