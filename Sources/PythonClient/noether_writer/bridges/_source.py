# SPDX-License-Identifier: Apache-2.0
"""The rows of one run: from the daemon as long as it has the run's log, or else from the run's files."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import frames
from .._checkpoints import plain_content
from .._conversation import Conversation
from ..errors import DaemonNotFound, DaemonUnavailable, UnknownRun
from ..subscription import Ended, Event, Row, Subscription
from ._tracker import Voice

_SCALARS = (bool, int, float, str, type(None))


def entries_file(directory: Path) -> Path:
    return directory / "tracker" / "entries.th"


def journal_file(directory: Path) -> Path:
    return directory / "tracker" / "entries.journal"


def known_runs() -> list[dict[str, Any]]:
    """The runs that the user's daemon knows, as in a status report; none if no daemon is there."""
    try:
        with Conversation() as daemon:
            return list(daemon.ask(frames.STATUS, {}, timeout=30)["runs"])
    except (DaemonNotFound, DaemonUnavailable):
        return []


def is_same(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, other)
    return os.path.abspath(path) == os.path.abspath(other)


class Live:
    """The daemon has the rows."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def take(self, timeout: float) -> Event | None:
        return self._subscription.take(timeout)

    def close(self) -> None:
        self._subscription.close()


class Filed:
    """The run has ended, and its rows are in its file. `state` is None if nobody knows how it has ended."""

    def __init__(self, directory: Path, state: str | None, voice: Voice) -> None:
        self.is_state_known = state is not None
        #: Whether the files say when each row was logged. Right from the first event on.
        self.has_times = True
        self._events = self._read(directory, state, voice)

    def take(self, timeout: float) -> Event | None:
        return next(self._events)

    def close(self) -> None:
        pass

    def _read(self, directory: Path, state: str | None, voice: Voice) -> Iterator[Event]:
        path = entries_file(directory)
        rows: dict[int, dict[str, frames.Scalar]] = {}
        with path.open("rb") as file:
            written_at = os.fstat(file.fileno()).st_mtime
            content = plain_content(path, None)
        for key, series in content.items():
            for update, value in series.items():
                if isinstance(value, _SCALARS):
                    rows.setdefault(update, {})[key] = value
                else:
                    voice.once(f"{path} holds values of {key!r} that are no numbers or texts: they are left out")
        times = _event_times(directory)
        self.has_times = times.keys() >= rows.keys()
        for index, update in enumerate(sorted(rows)):
            yield Row(index, len(rows), update, times.get(update, written_at), rows[update])
        yield Ended("interrupted" if state == "interrupted" else "finished")


def open_source(directory: Path, voice: Voice) -> Live | Filed | None:
    """Returns None if the run has no rows that can be read now: it has not logged yet, or its log is in a journal and
    no daemon has it."""
    run = next((each for each in reversed(known_runs()) if is_same(each["run_directory"], directory)), None)
    state = run["state"] if run else None
    if run:
        with contextlib.suppress(UnknownRun, DaemonNotFound, DaemonUnavailable):
            subscription = Subscription(run["run_id"], 0, run["run_directory"])
            if subscription.start == 0:
                return Live(subscription)
            # The log of a run that has ended has left the daemon's memory.
            state = subscription.run["state"]
            subscription.close()
    if entries_file(directory).exists() and not journal_file(directory).exists():
        return Filed(directory, state, voice)
    return None


def _event_times(run: Path) -> dict[int, float]:
    """When each update was logged, as far as the run has event files of TensorBoard: entries.th has no times."""
    times: dict[int, float] = {}
    for path in sorted(run.glob("events.out.tfevents.*.noether-writer"), key=lambda path: path.name):
        with contextlib.suppress(OSError):
            times.update(_times_of(path.read_bytes()))
    return times


def _times_of(data: bytes) -> Iterator[tuple[int, float]]:
    at = 0
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + length]
        at += length + 16
        if at > len(data):
            return
        wall_time, step, has_summary = _event(event)
        if has_summary:
            yield step, wall_time


def _event(data: bytes) -> tuple[float, int, bool]:
    """(wall time, step, whether it has values) of an Event message."""
    wall_time, step, has_summary, at = 0.0, 0, False, 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                if tag >> 3 == 2:
                    step = value - (1 << 64) if value >= 1 << 63 else value
            case 1:
                if tag >> 3 == 1:
                    (wall_time,) = struct.unpack_from("<d", data, at)
                at += 8
            case 2:
                length, at = _varint(data, at)
                has_summary = has_summary or tag >> 3 == 5
                at += length
            case 5:
                at += 4
            case _:
                break
    return wall_time, step, has_summary


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return value, at
