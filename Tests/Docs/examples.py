# SPDX-License-Identifier: Apache-2.0
"""A Swift program of the examples in pages, for the compiler to check: python examples.py PAGE... > examples.swift"""

from __future__ import annotations

import re
import sys
from pathlib import Path

IMPORT = "import NoetherWriterClient\n"
# What the pages leave to their reader.
READERS = """func step() -> Double { 0.5 }
let weights = [Float](repeating: 0, count: 128 * 64)
"""

if __name__ == "__main__":
    examples = [
        example for page in sys.argv[1:] for example in re.findall(r"```swift\n(.*?)```", Path(page).read_text(), re.S)
    ]
    assert examples, "no example in these pages"
    print(IMPORT + READERS)
    for number, example in enumerate(examples):
        print(f"func example{number}() async throws {{\n{example.replace(IMPORT, '')}}}\n")
