# SPDX-License-Identifier: Apache-2.0
"""The table of limits in docs/PROTOCOL.md is that of Sources/Wire/Limits.swift: `--write` makes it so, and without it
a difference is an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "Sources/Wire/Limits.swift"
DOCUMENT = ROOT / "docs/PROTOCOL.md"
BEGIN, END = "<!-- limits: made by Tests/Docs/limits.py -->\n", "<!-- limits: end -->\n"
LIMIT = re.compile(r"public static let (\w+)(?:: \w+)? = (.+)")


def snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda letter: "_" + letter[0].lower(), name)


def value(expression: str) -> str:
    if shift := re.fullmatch(r"(\d+) << (\d+)", expression):
        number = int(shift[1]) << int(shift[2])
    else:
        number = int(expression.replace("_", ""))
    for unit, size in (("TiB", 40), ("MiB", 20), ("KiB", 10)):
        if shift and number % (1 << size) == 0:
            return f"{number:,} ({number >> size} {unit})"
    return f"{number:,}"


def table(source: str) -> str:
    announced = set(re.findall(r'"(\w+)":', source[source.index("announced") :]))
    rows = ["| limit | value | in `welcome` | what it bounds |", "|---|---|---|---|"]
    comment: list[str] = []
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("///"):
            comment.append(text[3:].strip())
            continue
        limit = LIMIT.fullmatch(text)
        if limit and limit[1] != "announced":
            if not comment:
                sys.exit(f"{SOURCE.name}: {limit[1]} needs a comment, which the protocol's table quotes")
            name = snake(limit[1])
            mark = "yes" if name in announced else ""
            announced.discard(name)
            rows.append(f"| {name} | {value(limit[2])} | {mark} | {' '.join(comment)} |")
        comment = []
    if announced:
        sys.exit(f"{SOURCE.name}: `welcome` says limits that there are not, or under other names: {sorted(announced)}")
    return "\n".join(rows) + "\n"


def main() -> None:
    document = DOCUMENT.read_text()
    before, rest = document.split(BEGIN)
    found, after = rest.split(END)
    wanted = table(SOURCE.read_text())
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(before + BEGIN + wanted + END + after)
    elif found != wanted:
        sys.exit(f"{DOCUMENT.name}: the table of limits is not that of {SOURCE.name}: run Tests/Docs/limits.py --write")


if __name__ == "__main__":
    main()
