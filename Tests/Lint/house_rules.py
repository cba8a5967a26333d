# SPDX-License-Identifier: Apache-2.0
"""Checks what no formatter checks: every source file names its licence.

Prints a line for each violation and exits with status 1 if there is one. A part of `make lint`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LICENCE = "SPDX-License-Identifier: Apache-2.0"
COMMENTS = {".swift": "//", ".c": "//", ".h": "//", ".modulemap": "//", ".py": "#", ".pyi": "#"}


def files() -> list[Path]:
    """What git tracks, and what it would track after `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def comment_mark(path: Path) -> str | None:
    """How a comment begins in this file, or None if the file is not source code."""
    if path.suffix in COMMENTS:
        return COMMENTS[path.suffix]
    with path.open("rb") as file:
        return "#" if path.name == "Makefile" or file.read(2) == b"#!" else None


def without_licence() -> Iterator[str]:
    """The licence is on the first line, or on the second one if a tool wants the first for itself."""
    for path in files():
        if mark := comment_mark(path):
            first = path.read_text().splitlines()[:2]
            is_taken = bool(first) and first[0].startswith(("#!", "// swift-tools-version"))
            if f"{mark} {LICENCE}" not in first[is_taken : is_taken + 1]:
                yield f"{path.relative_to(ROOT)}: line {1 + is_taken} must be `{mark} {LICENCE}`"


def main() -> int:
    problems = list(without_licence())
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
