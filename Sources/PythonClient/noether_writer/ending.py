# SPDX-License-Identifier: Apache-2.0
"""The end of a process: what waits from then on waits until one moment, `NOETHER_WRITER_EXIT_TIMEOUT` after the end
began, whichever call it is. Only a timeout that the caller has named is the caller's."""

from __future__ import annotations

import threading
import time

from . import environment

EXIT_SECONDS = 30.0
# time.monotonic() of that moment; None while nothing ends.
_deadline: float | None = None
# Where 0 would mean "without end".
_LEAST_SECONDS = 0.001


def seconds() -> float:
    """
    Raises:
        ValueError: the variable is no number.
    """
    return environment.seconds("NOETHER_WRITER_EXIT_TIMEOUT", EXIT_SECONDS)


def begin() -> float:
    """Notes that this process ends; the moment until which it may wait, as time.monotonic() counts."""
    global _deadline
    if (found := _deadline) is None:
        try:
            found = time.monotonic() + seconds()
        except ValueError:
            # Said when a run was to be opened.
            found = time.monotonic() + EXIT_SECONDS
        _deadline = found
    return found


def has_begun() -> bool:
    """Whether this process ends: also where a function of `atexit` runs before ours. A thread that goes on when the
    main thread is over is no end yet."""
    if _deadline is None:
        if threading.main_thread().is_alive() or any(
            thread.is_alive() and not thread.daemon for thread in threading.enumerate()
        ):
            return False
        begin()
    return True


def bounded(timeout: float | None) -> float | None:
    """A caller's timeout; where none was named, what is left while this process ends."""
    if timeout is not None or not has_begun():
        return timeout
    return max(0.0, begin() - time.monotonic())


def within(limit: float) -> float:
    """Seconds that may be waited: at most `limit`, and less while this process ends."""
    return limit if not has_begun() else max(_LEAST_SECONDS, min(limit, begin() - time.monotonic()))


def of_kept() -> str:
    """In words: what becomes of what the daemon has not taken."""
    if has_begun():
        return "this process ends, and what the daemon has not taken by then is lost"
    return "what it has not taken is kept in this process and sent when it is back"
