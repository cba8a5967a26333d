# SPDX-License-Identifier: Apache-2.0
"""Brings one run to one tracker: reads its rows, compares them with what was sent before, and sends the others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import DaemonBusy, DaemonNotFound, DaemonUnavailable, ProtocolError, TooSlow, UnknownRun
from ..subscription import Ended, Opened, Restarted, Row
from ._notes import Notes, digest
from ._source import Filed, Live, open_source
from ._tracker import Gone, Identity, Lost, Refused, Tracker, Unreachable, Upload, Voice

Result = TypeVar("Result")

# How long the first row of a batch waits for others.
_BATCH_SECONDS = 0.5
_BATCH_ROWS = 1000
# How long the last row stays as it is, until it is sent although more values might be added to it.
_SETTLED_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
# How long a log may be in a journal that no daemon has, if nobody wants to wait.
_JOURNAL_SECONDS = 30.0


class Cut(Exception):
    """The log no longer has rows that the tracker has."""


class Stopped(Exception):
    """The bridge is told to leave."""


@dataclass(frozen=True)
class Options:
    project: str | None
    state_directory: Path | None
    # Whether to wait for a run that has no rows that can be read.
    waits: bool


class Follower:
    """
    Args:
        directory: the run's.
        name: what people see.
    """

    def __init__(
        self, directory: Path, name: str, kind: type[Tracker], options: Options, stop: threading.Event
    ) -> None:
        self.directory = directory
        self.name = name
        self._kind = kind
        self._options = options
        self._stop = stop
        self._voice = Voice(kind.name, name)

    def follow(self) -> bool:
        """Returns when the run has ended and the tracker has all of it: true; or when there is nothing that can be
        read, or the bridge is told to leave: false.

        Raises:
            BridgeInUse, Refused, OSError, sqlite3.Error.
        """
        with self._notes() as notes:
            waited_from = time.monotonic()
            while not self._stop.is_set():
                source = None
                with contextlib.suppress(ProtocolError, DaemonBusy):
                    source = open_source(self.directory, self._voice)
                if source is None:
                    is_over = time.monotonic() - waited_from > _JOURNAL_SECONDS
                    if is_over:
                        self._voice.once(
                            "its log can't be read yet: it is empty, or in a journal that no daemon has. It is "
                            "uploaded when a daemon has written it to tracker/entries.th"
                        )
                    if is_over and not self._options.waits:
                        return False
                    self._stop.wait(1)
                    continue
                passage = _Passage(self, source, notes)
                try:
                    passage.bring()
                    return True
                except Cut:
                    passage.supersede(
                        f"The log of {self.name} was cut or begun anew: from now on it is uploaded to another run"
                    )
                    notes.begin_anew(beside_the_old_one=True)
                    self._voice.say(
                        "the log was cut or begun anew, and rows that were uploaded are no longer in it. The tracker's "
                        f"run stays as it is, and the whole log is uploaded to another run, {self.shown_name(notes)}"
                    )
                except Gone as error:
                    notes.begin_anew(beside_the_old_one=False)
                    self._voice.say(f"{error}. The whole log is uploaded again")
                except (Lost, TooSlow, UnknownRun, DaemonNotFound, DaemonUnavailable, DaemonBusy):
                    passage.leave(None)
                    self._stop.wait(0.2)
                except Stopped:
                    passage.leave(None)
                except BaseException:
                    passage.leave(None)
                    raise
                finally:
                    source.close()
        return False

    def _notes(self) -> Notes:
        folder = self._state_folder()
        try:
            return Notes(folder, self._kind.name)
        except (OSError, sqlite3.Error) as error:
            raise Refused(
                f"what is uploaded cannot be noted in {folder} ({error}). Nothing was uploaded; --state names another "
                "directory for the notes"
            ) from error

    def _state_folder(self) -> Path:
        if self._options.state_directory is None:
            return self.directory / "tracker" / "bridges"
        name = hashlib.sha256(os.fsencode(os.path.realpath(self.directory))).hexdigest()[:16]
        return self._options.state_directory / name

    def shown_name(self, notes: Notes) -> str:
        name, generation = notes.recall("name") or self.name, notes.recall("generation")
        return name if generation == 1 else f"{name}.{generation}"

    def project(self) -> str:
        root = self.directory.parents[self.name.count("/")]
        if root.name == "debug":
            root = root.parent
        return self._options.project or os.environ.get(self._kind.project_variable) or root.name or "noether-writer"

    def attempt(self, action: Callable[[], Result]) -> Result:
        """Makes a call until the tracker answers."""
        pause, is_away = 0.5, False
        while True:
            try:
                result = action()
            except Unreachable as error:
                if not is_away:
                    is_away = True
                    self._voice.say(
                        f"the tracker does not answer: {error}. Nothing is lost; it is asked again until it does"
                    )
                if self._stop.wait(pause):
                    raise Stopped from None
                pause = min(_LONGEST_PAUSE, pause * 2)
                continue
            if is_away:
                self._voice.say("the tracker answers again")
            return result

    def voice(self) -> Voice:
        return self._voice

    def has_stopped(self) -> bool:
        return self._stop.is_set()


class _Passage:
    """From the opening of a source to its end, or to what makes another one necessary."""

    def __init__(self, follower: Follower, source: Live | Filed, notes: Notes) -> None:
        self._follower = follower
        self._source = source
        self._notes = notes
        self._tracker: Tracker | None = None
        # How many rows of the log were read, without empty ones; and the daemon's index of each.
        self._count = 0
        self._indexes: list[int] = []
        # What is to be sent: rows from position `_first` on, and additions to the row before them.
        self._first = notes.kept
        self._pending: list[Row] = []
        self._pending_since = 0.0
        self._last_at = 0.0
        self._addition: tuple[Row, dict[str, Any]] | None = None
        self._config_seen: float | None = None
        self._began: float | None = None

    def bring(self) -> None:
        """
        Raises:
            Cut, Gone, Lost, Stopped, Refused, what a subscription raises.
        """
        while True:
            if self._follower.has_stopped():
                raise Stopped
            event = self._source.take(0.1 if self._pending or self._addition else 0.5)
            match event:
                case Row():
                    self._read(event)
                case Restarted():
                    self._go_back(event.rows)
                case Opened():
                    self._config_seen = None
                case Ended():
                    self._end(event.state)
                    return
            self._send_some(is_idle=event is None)
            if event is None and self._tracker is not None:
                self._configure(self._tracker)
                self._note_kept()

    # MARK: reading

    def _read(self, row: Row) -> None:
        if not row.values:
            return
        position = self._count
        self._count += 1
        self._indexes.append(row.index)
        if self._began is None:
            self._began = row.wall_time
        now = time.monotonic()
        if position < len(self._notes):
            self._compare(position, row)
            if position < self._first:
                return
        if not self._pending:
            self._pending_since = now
        self._last_at = now
        self._pending.append(row)

    def _compare(self, position: int, row: Row) -> None:
        """
        Raises:
            Cut: another row was sent.
        """
        noted = self._notes.digest(position)
        if noted == digest(row.update, row.values):
            return
        keys = self._notes.keys(position)
        if keys is not None and position < self._first and set(keys) <= set(row.values):
            sent = {key: row.values[key] for key in keys}
            if noted == digest(row.update, sent):
                self._addition = row, {key: value for key, value in row.values.items() if key not in sent}
                self._last_at = time.monotonic()
                return
        raise Cut

    def _go_back(self, rows: int) -> None:
        """The first `rows` rows of the daemon are as they were, and others follow."""
        self._count = bisect_left(self._indexes, rows)
        del self._indexes[self._count :]
        if self._count < self._first + len(self._pending):
            del self._pending[max(0, self._count - self._first) :]
        if self._count < self._first:
            self._addition = None

    # MARK: sending

    def _send_some(self, is_idle: bool) -> None:
        """Sends what is complete: all rows but the last one, to which values may still be added."""
        now = time.monotonic()
        if self._addition is not None and (now - self._last_at > _SETTLED_SECONDS or self._pending):
            self._send_addition()
        if not self._pending:
            return
        is_settled = is_idle and self._takes_additions() and now - self._last_at > _SETTLED_SECONDS
        ready = len(self._pending) - (not is_settled)
        if ready and (is_idle or len(self._pending) > _BATCH_ROWS or now - self._pending_since > _BATCH_SECONDS):
            self._send(ready, is_settled)

    def _takes_additions(self) -> bool:
        return self._follower._kind.takes_additions

    def _send(self, ready: int, last_may_grow: bool) -> None:
        tracker = self._opened()
        # Opening may have shown that the tracker has some of them.
        ready = min(ready, len(self._pending))
        rows = self._pending[:ready]
        if not rows:
            return
        if isinstance(self._source, Filed) and not self._source.has_times:
            self._follower.voice().once(
                "the run has ended, and its files do not say when each row was logged: such rows get the time at which "
                "the log was written. (open_run(..., tensorboard=True) keeps the times; so does a bridge that follows "
                "the run while it lives)"
            )
        new = rows[max(0, len(self._notes) - self._first) :]
        in_doubt = len(rows) - len(new)
        self._notes.note(
            [
                (
                    row.update,
                    digest(row.update, row.values),
                    list(row.values) if last_may_grow and row is rows[-1] else None,
                )
                for row in new
            ]
        )
        uploads = [
            Upload(self._first + place, row.update, row.wall_time, row.values, is_in_doubt=place < in_doubt)
            for place, row in enumerate(rows)
        ]
        self._follower.attempt(lambda: tracker.send(uploads))
        del self._pending[:ready]
        self._first += ready
        self._pending_since = time.monotonic()
        self._note_kept()

    def _send_addition(self) -> None:
        assert self._addition is not None
        row, values = self._addition
        tracker = self._opened()
        # One for each value: an earlier process may have sent some of them, together with others.
        uploads = [
            Upload(
                len(self._notes) - 1,
                row.update,
                row.wall_time,
                {key: value},
                is_in_doubt=True,
                part=digest(row.update, {key: value}).hex(),
            )
            for key, value in values.items()
        ]
        self._follower.attempt(lambda: tracker.send(uploads))
        self._notes.amend(digest(row.update, row.values), list(row.values))
        self._addition = None

    def _note_kept(self) -> None:
        if self._tracker is not None:
            self._notes.keep(min(self._tracker.kept(), len(self._notes)))

    def _opened(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._open()
        return self._tracker

    def _open(self, is_superseded: bool = False) -> Tracker:
        follower, notes = self._follower, self._notes
        if notes.recall("project") is None:
            # Another name on the command line is for runs that are not uploaded yet.
            notes.remember(project=follower.project(), name=follower.name)
        if notes.recall("finished"):
            notes.remember(finished=None)
        tracker = follower._kind(follower.voice(), notes)
        identity = Identity(
            key=notes.recall("key"),
            name=follower.shown_name(notes),
            project=notes.recall("project"),
            directory=str(follower.directory),
            noted=notes.updates,
            kept=notes.kept,
            began=self._began or None,
        )
        kept = follower.attempt(lambda: tracker.open(identity))
        if is_superseded:
            return tracker
        if kept < notes.kept:
            # The tracker has lost what it had: that is sent again.
            tracker.leave(None)
            notes.remember(kept=kept)
            raise Lost
        notes.keep(kept)
        passed = min(max(0, notes.kept - self._first), len(self._pending))
        del self._pending[:passed]
        self._first += passed
        self._config_seen = None
        self._configure(tracker)
        return tracker

    def _configure(self, tracker: Tracker) -> None:
        path = self._follower.directory / "tracker" / "config.yaml"
        try:
            written_at = path.stat().st_mtime
        except OSError:
            return
        if written_at == self._config_seen:
            return
        config = _hyperparameters(path, self._follower.voice())
        if config:
            self._follower.attempt(lambda: tracker.configure(config))
        self._config_seen = written_at

    # MARK: the end

    def _end(self, state: Literal["finished", "interrupted"]) -> None:
        if self._count < len(self._notes):
            raise Cut
        noted = self._notes.recall("finished")
        is_complete = self._tracker is None and not self._pending and self._addition is None
        if noted and is_complete and isinstance(self._source, Filed) and not self._source.is_state_known:
            state = noted[0]
        # The same log, and nothing that the tracker lacks: it need not even be asked.
        if is_complete and noted == [state, self._config_time()]:
            return
        tracker = self._opened()
        if self._addition is not None:
            self._send_addition()
        while self._pending:
            self._send(min(len(self._pending), _BATCH_ROWS), last_may_grow=False)
        self._configure(tracker)
        self._follower.attempt(lambda: tracker.finish(state == "finished"))
        self._note_kept()
        if self._notes.kept < len(self._notes):
            raise Lost
        self._notes.remember(finished=[state, self._config_seen])
        self._tracker = None
        self._follower.voice().say(f"the run is {state}, and the tracker has all of its {len(self._notes)} rows")

    def _config_time(self) -> float | None:
        with contextlib.suppress(OSError):
            return (self._follower.directory / "tracker" / "config.yaml").stat().st_mtime
        return None

    def supersede(self, note: str) -> None:
        """The tracker's run says that it is not continued."""
        with contextlib.suppress(Lost, Gone):
            tracker, self._tracker = self._tracker or self._open(is_superseded=True), None
            self._follower.attempt(lambda: tracker.leave(note))

    def leave(self, note: str | None) -> None:
        if self._tracker is None:
            return
        with contextlib.suppress(Unreachable, Lost, Gone):
            self._tracker.leave(note)
            self._note_kept()
        self._tracker = None


def _hyperparameters(path: Path, voice: Voice) -> dict[str, Any]:
    """`hp` of config.yaml, or all of one that only holds hyperparameters, as far as there is a YAML reader."""
    try:
        import yaml
    except ImportError:
        voice.once("the hyperparameters are not uploaded: reading config.yaml needs the package pyyaml")
        return {}

    class Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
        """Also takes tuples and other objects of Python, as plain data."""

    def construct(loader: Any, suffix: str, node: Any) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        return loader.construct_scalar(node)

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", construct)
    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        voice.once(f"the hyperparameters are not uploaded: {path} cannot be read: {error}")
        return {}
    if isinstance(content, dict) and "run_name" not in content:
        # The Swift library writes what it is given; this one writes it as `hp`, beside the run's name.
        content = {"hp": content, **content}
    hyperparameters = content.get("hp") if isinstance(content, dict) else None
    return hyperparameters if isinstance(hyperparameters, dict) else {}
