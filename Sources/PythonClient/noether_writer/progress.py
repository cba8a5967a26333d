# SPDX-License-Identifier: Apache-2.0
"""A progress bar for whoever waits for checkpoints: one line on standard error that is drawn again and again, after the
first second of the wait.

There is no bar if standard error is not a terminal, or with NOETHER_WRITER_PROGRESS=0. A thread of its own draws it,
because the thread that waits sleeps. The line is empty again when the wait ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .saves import Ticket

FIRST_SECONDS = 1.0
_EACH_SECONDS = 0.2
_JOIN_SECONDS = 1.0
_CLEAR = "\r\x1b[K"
# A process shows one bar: a wait within a wait, or on another thread, has none. The bar ends with the wait that shows
# it, however that ends.
_shown: weakref.ref[threading.Event] | None = None


@contextlib.contextmanager
def shown(tickets: Sequence[Ticket]) -> Iterator[None]:
    """Shows how far the tickets are, as long as the block runs."""
    stream = sys.stderr
    if not tickets or not _is_terminal(stream) or os.environ.get("NOETHER_WRITER_PROGRESS") == "0":
        yield
        return
    global _shown
    if _shown is not None and (other := _shown()) is not None and not other.is_set():
        yield
        return
    over = threading.Event()
    _shown = weakref.ref(over)
    thread = threading.Thread(target=_draw, args=(tickets, stream, over), daemon=True, name="noether-writer-progress")
    try:
        # If no thread can be started (the interpreter ends), there is no bar.
        with contextlib.suppress(RuntimeError):
            thread.start()
        yield
    finally:
        over.set()
        if thread.ident is not None:
            # A terminal that is stopped (Ctrl-S) blocks the thread; the wait itself does not wait for that.
            thread.join(_JOIN_SECONDS)


def _is_terminal(stream: Any) -> bool:
    # Programs put objects of their own in the place of standard error, with no more than `write`.
    asks = getattr(stream, "isatty", None)
    try:
        return asks is not None and bool(asks())
    except (OSError, ValueError):
        return False


def _draw(tickets: Sequence[Ticket], stream: TextIO, over: threading.Event) -> None:
    start, first = time.monotonic(), sum(ticket.bytes_done for ticket in tickets)
    if over.wait(FIRST_SECONDS):
        return
    # If the terminal goes away, there is no bar; nor if what stands for it can do less than a file.
    with contextlib.suppress(Exception):
        while not over.is_set():
            elapsed = time.monotonic() - start
            stream.write(_CLEAR + line(tickets, elapsed, first, _width(stream), _can_show(stream, "█")))
            stream.flush()
            over.wait(_EACH_SECONDS)
        stream.write(_CLEAR)
        stream.flush()


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _can_show(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeError:
        return False
    return True


def line(tickets: Sequence[Ticket], elapsed: float, first: int, width: int, blocks: bool) -> str:
    """The bar as text of at most `width - 1` characters, so that no terminal wraps it.

    Args:
        elapsed: seconds since the wait began.
        first: how many bytes were done then.
    """
    done, total = (sum(getattr(ticket, name) for ticket in tickets) for name in ("bytes_done", "bytes_total"))
    waiting = [ticket for ticket in tickets if not ticket.done]
    # While a `finish` still writes the log, all are done: then the bar names all of them, and is full.
    named = waiting or tickets
    name = f"{len(named)} checkpoints" if len(named) != 1 else named[0].names[0]
    stalled = next((ticket.stalled for ticket in waiting if ticket.stalled), None)
    share = min(1.0, done / total) if total else 0.0
    rate = (done - first) / elapsed if elapsed > 0 else 0.0
    left = _clock((total - done) / rate) if rate > 0 else "?"
    numbers = f" {_bytes(done)}/{_bytes(total)} [{_clock(elapsed)}<{left}, {_bytes(rate)}/s]"
    if stalled:
        numbers += f" storage refuses: {stalled}"
    head = f"{name}: {int(share * 100):3}%"
    room = width - 1 - len(head) - len(numbers) - 2
    if room < 5:
        return (head + numbers)[: max(0, width - 1)]
    full = min(40, room)
    count = int(share * full)
    bar = ("█" if blocks else "#") * count + " " * (full - count)
    return f"{head}|{bar}|{numbers}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}TB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(min(seconds, 359_999)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
