# SPDX-License-Identifier: Apache-2.0
"""The end of a process. From its beginning on, every call that waits does so until one moment at most:
`NOETHER_WRITER_EXIT_TIMEOUT` seconds after the end began. Only a timeout that the caller gives is kept as it is."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from . import environment

EXIT_SECONDS = 30.0
# That moment, as time.monotonic() counts; None as long as the process does not end.
_deadline: float | None = None
#: This library's own function of `atexit` has run. What comes after it starts no thread.
is_last = False
# For calls to which 0 would mean "without end".
_LEAST_SECONDS = 0.001


def seconds() -> float:
    """
    Raises:
        ValueError: the variable is not a number.
    """
    return environment.seconds("NOETHER_WRITER_EXIT_TIMEOUT", EXIT_SECONDS)


def begin() -> float:
    """Notes that this process ends. Returns the moment until which it may wait, as time.monotonic() counts."""
    global _deadline
    if (found := _deadline) is None:
        try:
            found = time.monotonic() + seconds()  # guard: bounded-exit (= 1e6 for seconds())
        except ValueError:
            # This was said when a run was opened.
            found = time.monotonic() + EXIT_SECONDS
        _deadline = found
    return found


def has_begun() -> bool:
    """Whether this process ends: also where a function of `atexit` runs before ours. A thread that continues when the
    main thread is over is no end yet."""
    if _deadline is None:
        if not _is_main_thread_over() or any(
            thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()
        ):
            return False
        begin()
    return True


def _is_main_thread_over() -> bool:
    main: Any = threading.main_thread()
    if sys.version_info >= (3, 13):
        return not main.is_alive()
    # There is_alive() takes a living thread for a dead one, for good, when a signal's handler raises in the middle of
    # it (what was done about bpo-45274 does not ask who holds the thread's lock).
    return bool(main._is_stopped)


def bounded(timeout: float | None) -> tuple[float | None, float | None]:
    """The caller's timeout and its deadline, as time.monotonic() counts. If there is no timeout and this process ends,
    it is the time that is left."""
    if timeout is None and has_begun():
        timeout = max(0.0, begin() - time.monotonic())
    return timeout, None if timeout is None else time.monotonic() + timeout


def within(limit: float) -> float:
    """How many seconds may be waited: at most `limit`, and less while this process ends."""
    return limit if not has_begun() else max(_LEAST_SECONDS, min(limit, begin() - time.monotonic()))


def of_kept() -> str:
    """In words: what happens to what the daemon has not taken."""
    if has_begun():
        return "this process ends, and what the daemon has not taken by then is lost"
    return "what it has not taken is kept in this process and sent when it is back"
