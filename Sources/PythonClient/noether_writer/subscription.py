# SPDX-License-Identifier: Apache-2.0
"""Follows a run from any process: its rows as they come in, what happens to its checkpoints, and its end.

A subscription pulls: it reads nothing that was not asked for, so a slow reader needs no memory, here or in the daemon.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from . import frames, names
from ._conversation import Conversation
from .errors import OTHER_VERSION, ProtocolError, WaitTimeout, of_wire

_GO_ON = "; the run's log is safe. Subscribe again from the next row"


@dataclass(frozen=True)
class Row:
    """The values of one update. `index` counts the rows of the log from 0; `total` is how many rows there are now;
    `wall_time` is in seconds since 1970, and 0.0 if it is not known."""

    index: int
    total: int
    update: int
    wall_time: float
    values: dict[str, frames.Scalar]


@dataclass(frozen=True)
class Checkpoint:
    """One file of a save, and how far it is. Sizes are in bytes, times in seconds (`accepted_at` and `ended_at` since
    1970)."""

    sequence: int
    file: str
    state: Literal["accepted", "writing", "written", "durable", "stalled", "failed"]
    bytes: int
    bytes_done: int = 0
    log_update: int | None = None
    accepted_at: float | None = None
    ended_at: float | None = None
    seconds: float | None = None
    error: str | None = None

    @classmethod
    def _of(cls, message: dict[str, Any]) -> Checkpoint:
        return cls(**{key: value for key, value in message.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Opened:
    """A trainer has opened the run again."""


@dataclass(frozen=True)
class Restarted:
    """The log was cut, or begun anew: its first `rows` rows are as they were, and the next rows follow on those."""

    rows: int


@dataclass(frozen=True)
class Missed:
    """This reader was slow, and `events` events (never rows) were left out; `checkpoints` is the present state."""

    events: int
    checkpoints: list[Checkpoint]


@dataclass(frozen=True)
class Ended:
    """The run has ended, and all its rows were read."""

    state: Literal["finished", "interrupted"]


Event = Row | Checkpoint | Opened | Restarted | Missed | Ended


class Subscription(Iterator[Event]):
    """Made by `subscribe`. Iterating ends after `Ended`; `close`, or leaving a `with` block, ends it at once."""

    def __init__(self, run_id: str, start: int | None, directory: str | os.PathLike[str] | None) -> None:
        self._conversation = Conversation(_GO_ON)
        self._events: deque[Event] = deque()
        self._is_over = False
        try:
            welcome = self._conversation.welcome
            if "subscribe" not in welcome["capabilities"]:
                raise ProtocolError(f"{welcome.get('daemon')} is too old for subscriptions; {OTHER_VERSION}")
            where = None if directory is None else os.path.abspath(directory)
            message = {"run_id": run_id, "run_directory": where, "from": start}
            answer = self._conversation.ask(frames.SUBSCRIBE, message)
        except BaseException:
            self.close()
            raise
        #: The row with which the stream starts: later than asked for if the log has left the daemon's memory.
        self.start = int(answer["from"])
        self._next_row = self.start
        #: The run at the moment of subscribing, as `noether-writer show --json` prints it.
        self.run: dict[str, Any] = answer["run"]
        #: The last checkpoints of the run at the moment of subscribing, oldest first.
        self.checkpoints = [Checkpoint._of(item) for item in answer["checkpoints"]]

    def __iter__(self) -> Subscription:
        return self

    def __next__(self) -> Event:
        return self._next(None)

    def take(self, timeout: float) -> Event | None:
        """Returns the next event, or None if none comes within `timeout` seconds.

        Raises:
            StopIteration: the subscription is over, as for `next`.
        """
        try:
            return self._next(time.monotonic() + timeout)
        except WaitTimeout:
            return None

    def _next(self, deadline: float | None) -> Event:
        if self._is_over:
            self.close()
            raise StopIteration
        while not self._events:
            self._take(self._conversation.next_frame(deadline))
        event = self._events.popleft()
        self._is_over = isinstance(event, Ended)
        return event

    def _take(self, frame: frames.Frame) -> None:
        if frame.type == frames.ROWS:
            total, rows = frames.unpack_rows(frame.payload)
            for update, wall_time, values in rows:
                self._events.append(Row(self._next_row, total, update, wall_time, values))
                self._next_row += 1
        elif frame.type == frames.STREAM_EVENT:
            message = frame.json()
            if event := self._event(message):
                self._events.append(event)
        elif frame.type == frames.ERROR:
            raise of_wire(frame.json())

    def _event(self, message: dict[str, Any]) -> Event | None:
        match message["event"]:
            case "checkpoint":
                return Checkpoint._of(message["checkpoint"])
            case "opened":
                return Opened()
            case "restarted":
                self._next_row = int(message["rows"])
                return Restarted(self._next_row)
            case "missed":
                return Missed(message["missed"], [Checkpoint._of(item) for item in message["checkpoints"]])
            case "ended":
                return Ended(message["run"]["state"])
            case _:
                # An event that only a newer daemon knows.
                return None

    def close(self) -> None:
        """Ends the subscription: iterating stops. It may be called more than once."""
        self._is_over = True
        self._conversation.close()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def subscribe(run_id: str, start: int | None = 0, *, directory: str | os.PathLike[str] | None = None) -> Subscription:
    """Follows a run until it ends. The daemon must have the run, or have had it lately. Any process of the user may
    ask.

    Args:
        run_id: as given to `open_run`.
        start: the first row: 0 gives the whole log and then new rows, None gives new rows only.
        directory: the run's directory, if several runs have the same id.

    Raises:
        UnknownRun, DaemonNotFound (none listens, and none is started), DaemonUnavailable, RefusedName. Iterating
        raises TooSlow if the run has ended, rows are left, and nothing was read for 20 s.
    """
    names.component(run_id, "run_id")
    if start is not None and start < 0:
        raise ValueError(f"start must be the number of a row, 0 or more, not {start}")
    return Subscription(run_id, start, directory)
