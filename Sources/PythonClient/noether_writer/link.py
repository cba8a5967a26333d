"""A session with the daemon that outlives its connections: what is not acknowledged is kept, and sent again after a
reconnect. The daemon drops what it has taken already, by sequence number.

Neither logging nor saving waits here. Memory is bounded: when the daemon stays away and the kept updates reach their
limit, training goes on and further updates are not kept (or raise, as `NOETHER_WRITER_WHEN_AWAY` says), which is said
once, with numbers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from . import environment, frames
from .connection import ANSWER_SECONDS, Connection
from .errors import DaemonBusy, DaemonUnavailable, NoetherWriterError, ProtocolError, WaitTimeout, WrongSocket

logger = logging.getLogger("noether_writer")

FIRST_CONNECT_SECONDS = 20.0
AWAY_SECONDS = 60.0
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_KEYS_PER_FRAME = 256


class Kept(NamedTuple):
    """A frame that the daemon has not acknowledged; `fd` for a save, else -1."""

    sequence: int
    frame: bytes
    fd: int = -1


class Link:
    """One run's session.

    Args:
        open_message: of `open_run`, with its session.
        on_event: gets each frame that answers no request.
        kept_saves: the saves that are not released yet, to be sent again.
        lock: the run's, which guards everything here too: two locks would be taken in two orders.
    """

    def __init__(
        self,
        open_message: dict[str, Any],
        on_event: Callable[[frames.Frame], None],
        kept_saves: Callable[[], list[Kept]],
        lock: threading.RLock,
    ) -> None:
        self._pid = os.getpid()
        self._message = dict(open_message)
        self._on_event = on_event
        self._kept_saves = kept_saves
        self._limit = environment.count("NOETHER_WRITER_QUEUE_BYTES", 64 << 20)
        when_away = environment.choice("NOETHER_WRITER_WHEN_AWAY", "keep-training", ("keep-training", "raise"))
        self._raises = when_away == "raise"
        self._lock = lock
        self._changed = threading.Condition(self._lock)
        self._connection: Connection | None = None
        self._keys: list[str] = []
        self._logs: deque[Kept] = deque()
        self._log_bytes = 0
        self._not_kept = 0
        self._log_is_full = False
        self._closed = False
        self._away_since = 0.0
        self._connected_at = 0.0
        self._attempt = 0
        self.opened = self._first_connect()

    # What the trainer calls

    @property
    def away_seconds(self) -> float:
        """For how long there has been no connection; 0 with one."""
        with self._lock:
            return 0.0 if self._connection is not None else time.monotonic() - self._away_since

    def check_open(self) -> None:
        if self._closed:
            raise DaemonUnavailable("this run is closed, and nothing more is sent: open it again to go on with it")

    @property
    def unacknowledged(self) -> int:
        """Updates that the daemon has not taken."""
        return len(self._logs)

    def define(self, keys: list[str]) -> None:
        """New keys; their ids count on from the last."""
        with self._lock:
            first = len(self._keys)
            self._keys += keys
            self._send(_define(first, keys))

    def log(self, sequence: int, frame: bytes) -> bool:
        """Keeps an update's frame until it is acknowledged, and sends it.

        Returns:
            False where it could not be kept, since the daemon has been away for too long.

        Raises:
            DaemonUnavailable: the same, where NOETHER_WRITER_WHEN_AWAY is `raise`; or this run is closed.
        """
        with self._lock:
            self.check_open()
            if self._log_is_full:
                return False
            if self._log_bytes + len(frame) > self._limit:
                if self._raises:
                    raise DaemonUnavailable(self._full())
                if self._not_kept == 0:
                    logger.error(
                        "%s; training goes on, and the log has a gap until the daemon is back "
                        "(NOETHER_WRITER_WHEN_AWAY=raise stops instead)",
                        self._full(),
                    )
                self._not_kept += 1
                return False
            self._logs.append(Kept(sequence, frame))
            self._log_bytes += len(frame)
            self._send(frame)
            return True

    def log_is_full(self, sequence: int, message: str) -> bool:
        """The daemon takes no update from this one on. Training goes on without a log, which is said once.

        Returns:
            False where it has to be raised instead, as NOETHER_WRITER_WHEN_AWAY says.
        """
        with self._changed:
            while self._logs and self._logs[-1].sequence >= sequence:
                self._log_bytes -= len(self._logs.pop().frame)
            self._changed.notify_all()
            if self._log_is_full:
                return True
            self._log_is_full = True
            if not self._raises:
                logger.error("%s; training goes on, and nothing more is logged", message)
            return not self._raises

    def save(self, kept: Kept) -> None:
        """Sends a save's frame; who calls has it among `kept_saves` already."""
        with self._lock:
            self._send(kept.frame, kept.fd)

    def acknowledge(self, sequence: int) -> None:
        with self._changed:
            while self._logs and self._logs[0].sequence <= sequence:
                self._log_bytes -= len(self._logs.popleft().frame)
            self._changed.notify_all()

    def request(
        self,
        type_: int,
        message: dict[str, Any],
        timeout: float | None = ANSWER_SECONDS,
        look: Callable[[], None] | None = None,
    ) -> frames.Frame:
        """Asks, again after a reconnect where the first answer was lost: for questions that may be asked twice."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            connection = self._connected(deadline)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                return connection.request(type_, message, left, look)
            except DaemonUnavailable:
                # Refused, not lost: said by the daemon itself.
                if connection.lost is None:
                    raise

    def wait_acknowledged(self, timeout: float) -> None:
        """Returns when every update is taken, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._logs, timeout)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is not None:
            connection.close()

    # Connections

    def _full(self) -> str:
        return (
            f"the daemon has not taken {len(self._logs)} updates ({self._log_bytes} bytes, limit "
            f"NOETHER_WRITER_QUEUE_BYTES={self._limit}); no more are kept"
        )

    def _send(self, frame: bytes, fd: int = -1) -> None:
        """Hands over where there is a connection. A lost one is found out by its reader, which reconnects."""
        if self._connection is None:
            return
        try:
            self._connection.send(frame, fd)
        except DaemonUnavailable:
            self._drop(self._connection)

    def _connected(self, deadline: float | None) -> Connection:
        with self._changed:
            bound = AWAY_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._connection is not None or self._closed, bound):
                if deadline is None:
                    raise DaemonUnavailable(
                        f"the daemon has been away for {self.away_seconds:.0f} s; what it has not taken is kept in "
                        "this process and sent when it is back"
                    )
                raise WaitTimeout(
                    f"the daemon has been away for {self.away_seconds:.0f} s, and the time is over; what it has not "
                    "taken is kept in this process and sent when it is back"
                )
            self.check_open()
            assert self._connection is not None
            return self._connection

    def _first_connect(self) -> dict[str, Any]:
        deadline = time.monotonic() + FIRST_CONNECT_SECONDS
        self._away_since = time.monotonic()
        attempt = 0
        while True:
            try:
                return self._connect()
            except WrongSocket:
                raise
            except (DaemonUnavailable, DaemonBusy):
                # A daemon that is leaving: the next one is a moment away.
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1

    def _connect(self) -> dict[str, Any]:
        connection = Connection(self._take, self._lost)
        try:
            opened: dict[str, Any] = connection.request(frames.OPEN_RUN, self._message).json()
        except NoetherWriterError as error:
            connection.close()
            if connection.ended_by is not None and isinstance(error, DaemonUnavailable):
                raise connection.ended_by from None
            raise
        with self._changed:
            if connection.lost:
                raise connection.lost
            # What was said at the first opening is not said again.
            self._message["config_yaml"] = None
            self.acknowledge(int(opened["last_sequence"]))
            for first in range(0, len(self._keys), _KEYS_PER_FRAME):
                connection.send(_define(first, self._keys[first : first + _KEYS_PER_FRAME]))
            for kept in sorted([*self._logs, *self._kept_saves()], key=lambda kept: kept.sequence):
                connection.send(kept.frame, kept.fd)
            self._connection = connection
            self._connected_at = time.monotonic()
            self._changed.notify_all()
        return opened

    def _take(self, frame: frames.Frame) -> None:
        """Any event, also one that comes before this object is made."""
        if frame.type == frames.LOG_ACK:
            self.acknowledge(frames.unpack_log_ack(frame.payload)[0])
        self._on_event(frame)

    def _lost(self, connection: Connection) -> None:
        """On the connection's thread, at its end."""
        with self._lock:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connection is not connection or self._closed:
            return
        self._connection = None
        self._away_since = time.monotonic()
        threading.Thread(target=self._reconnect, daemon=True, name="noether-writer-reconnect").start()

    def _reconnect(self) -> None:
        # A connection that ends as soon as it is made is no way back: the pauses go on from where they were.
        if self._away_since - self._connected_at > _PAUSES[-1]:
            self._attempt = 0
        else:
            time.sleep(_PAUSES[min(self._attempt, len(_PAUSES) - 1)])
            self._attempt += 1
        attempt = self._attempt
        warned = False
        said = ""
        while not self._closed:
            try:
                self._connect()
                break
            except (NoetherWriterError, OSError) as error:
                if attempt >= len(_PAUSES) and not warned:
                    warned = True
                    logger.warning(
                        "the daemon is away (%s); training goes on, %s and %s are kept and sent when it is back",
                        error,
                        _count(len(self._logs), "update"),
                        _count(len(self._kept_saves()), "save"),
                    )
                if isinstance(error, ProtocolError) and said != str(error):
                    said = str(error)
                    logger.error("no way back to the daemon: %s", error)
            time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1
        if self._not_kept:
            logger.error("the daemon is back; %d updates were not kept and are missing in the log", self._not_kept)
            self._not_kept = 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _define(first: int, keys: list[str]) -> bytes:
    return frames.pack(frames.DEFINE_KEYS, frames.pack_keys(first, keys))
