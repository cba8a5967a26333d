# SPDX-License-Identifier: Apache-2.0
"""Checks what no formatter checks: every source file names its licence, no line is too long, and every place that
states the version of the project states the same one.

Prints a line for each violation and exits with status 1 if there is one. A part of `make lint`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LICENCE = "SPDX-License-Identifier: Apache-2.0"
# The one line length: .swift-format, pyproject.toml and .editorconfig have it too.
COLUMNS = 120
NOT_YET_WRAPPED = ("Sources/Writer/",)
WRAPPED_DOCUMENTS = ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md")
COMMENTS = {".swift": "//", ".c": "//", ".h": "//", ".modulemap": "//", ".py": "#", ".pyi": "#"}
COMMENTS |= {".js": "//", ".css": "/*"}


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
            end = " */" if mark == "/*" else ""
            if f"{mark} {LICENCE}{end}" not in first[is_taken : is_taken + 1]:
                yield f"{path.relative_to(ROOT)}: line {1 + is_taken} must be `{mark} {LICENCE}`"


def too_long() -> Iterator[str]:
    """In what no formatter wraps: C, shell, the Makefile, the comments of Swift, and the documents that a reader meets
    first."""
    for path in files():
        name = str(path.relative_to(ROOT))
        is_wrapped = name in WRAPPED_DOCUMENTS or (comment_mark(path) and path.suffix not in (".py", ".pyi"))
        if not is_wrapped or name.startswith(NOT_YET_WRAPPED):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > COLUMNS and (path.suffix != ".swift" or line.lstrip().startswith("//")):
                yield f"{name}:{number}: {len(line)} characters, {COLUMNS} at most"


def other_versions() -> Iterator[str]:
    """The version's source is `__version__` of the Python package. What can't read it must be equal to it: the Swift
    sources, the newest release in the changelog, and what documents show of the programs' output. The test vectors are
    recorded: they keep the version of their day."""

    def find(name: str, pattern: str) -> list[str]:
        return re.findall(pattern, (ROOT / name).read_text(), re.M)

    [version] = find("Sources/PythonClient/noether_writer/__init__.py", r'^__version__ = "(.+)"$')
    found = {
        "Sources/Wire/Release.swift": find("Sources/Wire/Release.swift", r'static let version = "(.+)"$'),
        "CHANGELOG.md": find("CHANGELOG.md", r"^## \[(\d.*)\]")[:1],
    }
    for path in files():
        if path.suffix == ".md" and path.name != "CHANGELOG.md":
            name = str(path.relative_to(ROOT))
            found[name] = find(name, r"\bnoether-writer(?:d|-python|-swift)?[ /](\d+\.\d+\.\d+)")
    for name in ("Sources/Wire/Release.swift", "CHANGELOG.md"):
        if not found[name]:
            yield f"{name} states no version"
    for name, versions in found.items():
        yield from (f"{name} states version {other}, not {version}" for other in versions if other != version)


def main() -> int:
    problems = [*without_licence(), *too_long(), *other_versions()]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
