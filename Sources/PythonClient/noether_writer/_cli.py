# SPDX-License-Identifier: Apache-2.0
"""Runs the programs `noether-writer` and `noether-writerd` that an installed wheel contains."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _exec(name: str) -> int:
    program = Path(__file__).parent / "bin" / name
    if not os.access(program, os.X_OK):
        print(
            f"{name}: this package contains no programs (it was built without them). Install a wheel for your "
            "platform, or the noether-writer package of your system",
            file=sys.stderr,
        )
        return 127
    os.execv(program, [name, *sys.argv[1:]])


def command_line() -> int:
    return _exec("noether-writer")


def daemon() -> int:
    return _exec("noether-writerd")
