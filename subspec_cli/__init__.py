"""subspec: exact 16-bit language models beyond the device's memory, at speculative speed.

    from subspec_cli import load

    with load("demo", memory_gib=1) as model:
        for piece in model.generate("What does os.path.join do?", seed=7):
            print(piece.text, end="")

Every name below is loaded at first use: importing the package loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from subspec_cli.versions import __version__ as __version__

if TYPE_CHECKING:
    from subspec_cli.errors import SubspecError
    from subspec_cli.metrics import GenerationStats, PrefillProgress
    from subspec_cli.planning.plan import OffloadPlan
    from subspec_cli.reporter import Reporter
    from subspec_cli.session.answer import TextDelta
    from subspec_cli.session.chat import Chat
    from subspec_cli.session.open import load
    from subspec_cli.session.session import Session

__all__ = [
    "Chat",
    "GenerationStats",
    "OffloadPlan",
    "PrefillProgress",
    "Reporter",
    "Session",
    "SubspecError",
    "TextDelta",
    "load",
]

_MODULES = {
    "Chat": "session.chat",
    "GenerationStats": "metrics",
    "OffloadPlan": "planning.plan",
    "PrefillProgress": "metrics",
    "Reporter": "reporter",
    "Session": "session.session",
    "SubspecError": "errors",
    "TextDelta": "session.session",
    "load": "session.open",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
