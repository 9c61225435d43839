"""Where prepared models are kept."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from subspec_cli.errors import ResourceError
from subspec_cli.files.io_errors import write_error
from subspec_cli.units import printable


def subspec_home() -> Path:
    """SUBSPEC_HOME, or the platform's cache directory for subspec; it need not exist.

    Raises:
        ResourceError: no home directory is known and SUBSPEC_HOME is not set.
    """
    if chosen := os.environ.get("SUBSPEC_HOME"):
        return Path(os.path.expanduser(chosen)).absolute()
    if sys.platform == "win32":
        if local := os.environ.get("LOCALAPPDATA"):
            return Path(local) / "subspec"
        return _user_home() / "AppData" / "Local" / "subspec"
    if sys.platform == "darwin":
        return _user_home() / "Library" / "Caches" / "subspec"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that relative values are ignored.
    return (cache if cache.is_absolute() else _user_home() / ".cache") / "subspec"


def prepared_root() -> Path:
    """Directory that holds one directory per prepared model; it need not exist. Errors as `subspec_home`."""
    return subspec_home() / "prepared"


def keep_compiled_loops(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let numba, once it is imported, keep compiled loops under the home; the user's own place wins.

    If nothing can be written there, numba looks for another place, and compiles again if it finds none.
    """
    with contextlib.suppress(ResourceError):  # no home is known
        environment.setdefault("NUMBA_CACHE_DIR", str(subspec_home() / "numba"))


def make_home_directory(directory: Path) -> None:
    """Create a directory under the home, and check that files can be made in it.

    Raises:
        ResourceError: it cannot be created or written; names the path and SUBSPEC_HOME.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, directory) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ResourceError(
            f"cannot write {printable(str(directory))}: no permission",
            "set SUBSPEC_HOME to a directory that you can write",
        )


def _user_home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise ResourceError("no home directory is known", "set SUBSPEC_HOME to a directory") from error
