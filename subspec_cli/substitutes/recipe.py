"""What decides the bytes of substitutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from subspec_cli.substitutes.head_file import HeadQuantizer
from subspec_cli.substitutes.layer_file import Quantizer
from subspec_cli.substitutes.settings import SubstituteSettings


@dataclass(frozen=True, slots=True)
class SubstituteRecipe:
    """What decides the bytes of substitutes, besides the 16-bit weights and this program."""

    settings: SubstituteSettings
    quantizer: Quantizer
    head_quantizer: HeadQuantizer
    library_versions: Mapping[str, str]
    """Versions of the libraries that the quantizers use."""
    find_text: Callable[[str | None], str] | None = None
    """Finds the text that layers are tuned with, given its SHA-256 if known, and returns that; may take long."""
