"""The page at `/`: one file, and the headers under which a browser runs nothing but what the file itself holds."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """The page's text and the headers of its response."""

    html: str
    headers: dict[str, str]


def read_page() -> Page:
    """Read the page. Its policy names the one script and the one style by their hashes.

    Trusted types are required and none is defined, so that the script cannot turn text into markup either.
    """
    html = files("subspec_cli.serving").joinpath("page.html").read_text(encoding="utf-8")
    inline: dict[str, str] = dict(_INLINE.findall(html))
    policy = (
        "default-src 'none'",
        f"script-src {_source(inline['script'])}",
        f"style-src {_source(inline['style'])}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Page(html, headers)


def _source(text: str) -> str:
    """Return the source expression that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
