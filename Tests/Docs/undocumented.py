# SPDX-License-Identifier: Apache-2.0
"""Names the public symbols of a Swift library that have no doc comment: python undocumented.py SYMBOL_GRAPH...

A symbol graph is what `swift symbolgraph-extract` writes. Exits with 1 where there are any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def undocumented(graph: dict[str, Any]) -> list[str]:
    # What the compiler makes (`init(rawValue:)`) has no place in the source, and the words of its protocol.
    symbols = [symbol for symbol in graph["symbols"] if "location" in symbol]
    assert symbols, "an empty symbol graph"
    return [
        f"{place(symbol)}: {'.'.join(symbol['pathComponents'])} has no doc comment"
        for symbol in symbols
        if not any(line["text"].strip() for line in symbol.get("docComment", {}).get("lines", []))
    ]


def place(symbol: dict[str, Any]) -> str:
    location = symbol["location"]
    return f"{location['uri'].removeprefix('file://')}:{location['position']['line'] + 1}"


if __name__ == "__main__":
    found = [line for path in sys.argv[1:] for line in undocumented(json.loads(Path(path).read_text()))]
    # sys.exit prints it, and exits with 1.
    sys.exit("\n".join(found) or 0)
