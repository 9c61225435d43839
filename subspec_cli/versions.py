"""Versions of this package and of the libraries that results depend on, read without importing them."""

from __future__ import annotations

import sys
from typing import Final

__version__: Final = "0.1.0"
_LIBRARIES: Final = (
    "torch",
    "transformers",
    "optimum-quanto",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
)


def library_versions() -> dict[str, str]:
    """Installed version of each library, by package name."""
    return {name: _installed(name) for name in _LIBRARIES}


def torch_has_gpu_code() -> bool:
    """Whether PyTorch is a build for GPUs, whose libraries take memory on the CPU too."""
    return "+cpu" not in _installed("torch") and sys.platform == "linux"


def _installed(name: str) -> str:
    # Takes most of the time until signals are handled; only a session and `--json` need it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
