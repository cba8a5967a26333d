# SPDX-License-Identifier: Apache-2.0
"""Takes guards of Tests/Guards/guards.toml out, one at a time, and demands that the simulator notices each within a
minute: what it can't notice is not simulated.

    python Tests/Simulator/finds.py [NAME ...]      those below, or some guards
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "Guards"))

import guards

SECONDS = 60
PRODUCT = "noether-writer-simulate"
FOUND = (
    "job-outlives-connection",
    "file-synced",
    "directory-synced",
    "new-directory-synced",
    "old-directory-synced",
    "durable-is-said-last",
    "finished-is-said-last",
    "acked-behind-journal",
    "journal-written",
    "journal-recovered",
    "journal-registered",
    "journal-found-at-opening",
    "journal-stays-for-later-rows",
    "older-log-is-kept",
    "left-log-becomes-a-file",
    "journal-stays-for-the-left-log",
    "journal-goes-with-its-work",
    "journal-synced",
    "durable-behind-sync",
    "renamed-last",
    "older-save",
    "repeated-update",
    "repeated-save",
    "repeated-save-on-its-way",
    "tried-again",
    "journal-made-again",
    "file-not-synced-twice",
    "journal-not-synced-twice",
    "added-while-the-journal-is-made",
)


def build(every: list[guards.Guard]) -> None:
    guards.make_copy(every)
    command = ["swift", "build", "-c", "release", "--static-swift-stdlib", "--product", PRODUCT]
    subprocess.run(
        [*command, "-Xlinker", f"-L{guards.ROOT}/.build/static"], cwd=guards.TREE, check=True, stdout=subprocess.DEVNULL
    )


# With these options nothing is found while every guard is in its place, which a find would otherwise say nothing of.
MODES: tuple[tuple[str, ...], ...] = (("--losses", "--worlds", "1900"), ())


def run(name: str) -> tuple[bool, str]:
    """
    Returns:
        whether something is found, and what.
    """
    words = ""
    for mode in MODES:
        options = ["--seconds", str(SECONDS), "--seed", "1", "--lines", "0", *mode]
        command = [guards.TREE / ".build/release" / PRODUCT, *options]
        result = subprocess.run(command, env=guards.environment(name), capture_output=True, text=True)
        found = re.search(r"^seeds? \d+.*$|it stopped in seed.*", result.stdout + result.stderr, re.M)
        words = found[0] if found else ""
        if result.returncode:
            return True, words
    return False, words


def main() -> int:
    _, every, _ = guards.load()
    names = sys.argv[1:] or FOUND
    if unknown := set(names) - {guard.name for guard in every}:
        print(f"no guards: {', '.join(sorted(unknown))}")
        return 1
    build(every)
    missed = []
    for name in names:
        start = time.monotonic()
        is_found, words = run(name)
        seconds = time.monotonic() - start
        print(f"{'found' if is_found else 'MISSED':7} {name:32} {seconds:5.1f} s  {words[:150]}", flush=True)
        if not is_found:
            missed.append(name)
    print(f"{len(names) - len(missed)} of {len(names)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
