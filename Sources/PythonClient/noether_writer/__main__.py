# SPDX-License-Identifier: Apache-2.0
"""`python -m noether_writer run -- CMD ...` runs CMD with Noether's writers replaced, in CMD and in its children."""

from __future__ import annotations

import os
import sys
from pathlib import Path

USAGE = "usage: python -m noether_writer run -- CMD [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    asked = arguments[1:2] if arguments[:1] == ["run"] else arguments[:1]
    if asked in (["-h"], ["--help"]):
        print(f"{USAGE}\n\nRuns CMD with Noether's checkpoint and log writers replaced, in CMD and in its children.")
        return 0
    if arguments[:1] != ["run"] or len(arguments) < 2:
        print(USAGE, file=sys.stderr)
        return 2
    command = arguments[2:] if arguments[1] == "--" else arguments[1:]
    if not command:
        print(USAGE, file=sys.stderr)
        return 2
    package = Path(__file__).parent
    paths = [str(package / "_bootstrap"), str(package.parent)]
    if inherited := os.environ.get("PYTHONPATH"):
        paths.append(inherited)
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"noether_writer: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
