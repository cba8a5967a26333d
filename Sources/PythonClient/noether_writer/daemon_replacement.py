# SPDX-License-Identifier: Apache-2.0
"""An update finds the daemon of the release before it, which serves until somebody ends it. The first run of a process
has such a daemon finish and leave, and starts the next one."""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import daemon_launcher, ending, frames, speaker
from .errors import DaemonUnavailable, NoetherWriterError, WaitTimeout

logger = logging.getLogger("noether_writer")

#: For so long a daemon may write what it has accepted before it is asked to leave: others save to it meanwhile.
PATIENCE_SECONDS = 5.0
_VERSION_SECONDS = 10.0
#: How often a process asks a daemon to leave. If older trainers start their own daemon again each time, the two sides
#: stop replacing each other after a few tries.
MOST_TIMES = 3
_times_left = MOST_TIMES

#: Sends a question of a type with a message, and returns the answer's message.
Ask = Callable[[int, dict[str, Any]], dict[str, Any]]


class DaemonReplaced(DaemonUnavailable):
    """An older daemon has left for the next one, which is to be started."""


def is_older(version: str, other: str) -> bool:
    """Whether a release came before another one, as Release.swift compares them: by the numbers that the names begin
    with (1.2.3). What comes after those, or is no number, makes none older."""
    first, second = _numbers(version), _numbers(other)
    return bool(first and second and first < second)


def _numbers(version: str) -> list[int]:
    numbers: list[int] = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            return []
        numbers.append(int(digits))
    return numbers if len(numbers) == 3 else []


def hand_over(welcome: dict[str, Any], ask: Ask) -> None:
    """Has the daemon finish and leave if it is older than the one that this process would start in its place.

    Raises:
        DaemonReplaced: it has left.
    """
    global _times_left
    version = str(welcome.get("daemon")).partition("/")[2]
    if _times_left <= 0 or (own := _newer_version(version)) is None:
        return
    _times_left -= 1
    socket_path = daemon_launcher.socket_path()
    found = f"the daemon at {socket_path} (process {welcome.get('pid')}) is version {version}, older than {own}"
    if "leave" not in welcome.get("capabilities", ()):
        command = (welcome.get("service") or {}).get("restart")
        way = f"run `{command}`" if command else "end it in the way it was started"
        _say("%s. It is left as it is, since a service manager keeps it: to update it, %s", found, way)
        return
    if not ask(frames.WAIT, {"timeout_s": ending.within(PATIENCE_SECONDS)}).get("done"):
        _say("%s. It still writes, and serves this run too: to update it, run `noether-writer restart`", found)
        return
    _say("%s: it finishes what it has and leaves, and this process starts the next one", found)
    # Without an answer it is leaving all the same, or has gone.
    with contextlib.suppress(DaemonUnavailable, WaitTimeout):
        ask(frames.LEAVE, {"reason": f"a trainer brings version {own}"})
        # Not answered: the connection ends with the daemon's process.
        ask(frames.STATUS, {})
    raise DaemonReplaced(f"{found}; it has been asked to leave, and the next one is not there yet")


def _newer_version(version: str) -> str | None:
    """The version of the program that would be started here, if it is newer than this one, as this library is."""
    from . import __version__

    if not is_older(version, __version__):
        return None
    try:
        program = daemon_launcher.daemon_executable()
        if Path(program).parent == Path(__file__).parent / "bin":
            return __version__
        result = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_SECONDS
        )
    except (NoetherWriterError, OSError, subprocess.TimeoutExpired):
        return None
    own = result.stdout.decode(errors="replace").strip()
    return own if result.returncode == 0 and is_older(version, own) else None


def _say(words: str, *arguments: str) -> None:
    speaker.say(logger, logging.WARNING, words, *arguments)
