"""The file map of ARCHITECTURE.md, made from the first sentence of every module's docstring.

python scripts/file_map.py            # exit status 1 if the document's map is not current
python scripts/file_map.py --write    # update it
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

from check_structure import PACKAGE, ROOMS

DOCUMENT = PACKAGE / "ARCHITECTURE.md"
SCRIPTS = PACKAGE.parent / "scripts"
BEGIN, END = "<!-- file map: begin -->\n", "<!-- file map: end -->\n"


def main() -> int:
    """Check the map, or write it; 1 if it is not current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update the document")
    write = parser.parse_args().write
    text = DOCUMENT.read_text(encoding="utf-8")
    if text == (current := updated(text)):
        return 0
    if write:
        DOCUMENT.write_text(current, encoding="utf-8")
        return 0
    print(
        f"{DOCUMENT}: the file map is not current; run: python scripts/file_map.py --write", file=sys.stderr
    )
    return 1


def updated(text: str) -> str:
    """The document with the map of the files that exist now between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{file_map()}\n{END}{after}"


def file_map() -> str:
    """One Markdown list for every folder of the package and of the scripts, rooms lowest first."""
    rooms = sorted({path.parent for path in PACKAGE.rglob("*.py")}, key=_order)
    folders = [*rooms, *sorted({path.parent for path in SCRIPTS.rglob("*.py")})]
    return (
        "\n\n".join(f"**`{_shown(folder)}/`**\n\n" + "\n".join(_lines(folder)) for folder in folders) + "\n"
    )


def first_sentence(path: Path) -> str:
    """First sentence of a module's docstring, without line breaks; empty if there is no docstring."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    joined = " ".join(paragraph.split())
    # A sentence ends where the next one begins with a capital letter, a digit or a quoted name.
    return re.split(r"(?<=[.!?]) (?=[A-Z0-9`*])", joined, maxsplit=1)[0]


def _lines(folder: Path) -> list[str]:
    found = [(path.name, first_sentence(path)) for path in sorted(folder.glob("*.py"))]
    # A package file without a docstring is empty, and says nothing.
    shown = [(name, text) for name, text in found if text or name != "__init__.py"]
    return [f"- `{name}`: {text}" for name, text in shown]


def _shown(folder: Path) -> str:
    return folder.relative_to(PACKAGE.parent).as_posix()


def _order(folder: Path) -> tuple[int, str]:
    """The ground, then the rooms, then folders that are not rooms."""
    room = "ground" if folder == PACKAGE else folder.relative_to(PACKAGE).parts[0]
    return (ROOMS.index(room) if room in ROOMS else len(ROOMS), folder.as_posix())


if __name__ == "__main__":
    sys.exit(main())
