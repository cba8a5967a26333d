# SPDX-License-Identifier: Apache-2.0
"""What this library tells the application's log from its own threads. A handler of that log may wait for a lock of the
application, and who holds it may be waiting for a session: no session's thread ever calls one."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import time
from collections import deque
from typing import Any

from .errors import is_foreign

_words: deque[tuple[int, str, tuple[Any, ...]]] = deque()
_turn = _thread.allocate_lock()
_speaker = 0
_SLICE_SECONDS = 0.005


def say(logger: logging.Logger, level: int, message: str, *values: object) -> None:
    """Logs it on a thread of its own, which ends when all is said; in order."""
    _words.append((level, message, (logger, *values)))
    try:
        _thread.start_new_thread(_speak, ())
    except RuntimeError as error:
        if is_foreign(error):
            raise
        # At the end of the interpreter no thread can be started.
        _speak()


def _speak() -> None:
    global _speaker
    # Another one is at it, and looks once more after it has let go of its turn.
    while _words and _turn.acquire(False):
        try:
            _speaker = _thread.get_ident()
            while _words:
                level, message, (logger, *values) = _words.popleft()
                # A handler may raise anything: the next words are said all the same.
                with contextlib.suppress(BaseException):
                    logger.log(level, message, *values)
        finally:
            _speaker = 0
            _turn.release()


def hear(until: float) -> None:
    """Returns when all is said, or at `until` (time.monotonic()). A handler that is being called hears nothing more."""
    while (_words or _turn.locked()) and _speaker != _thread.get_ident() and time.monotonic() < until:
        time.sleep(_SLICE_SECONDS)


def _forget() -> None:
    # The thread that spoke is the parent's, and so is what it had to say.
    global _turn, _speaker
    _turn = _thread.allocate_lock()
    _speaker = 0
    _words.clear()


os.register_at_fork(after_in_child=_forget)
