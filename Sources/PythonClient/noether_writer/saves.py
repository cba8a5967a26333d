# SPDX-License-Identifier: Apache-2.0
"""Saves on their way to the daemon: the ticket that a trainer holds, and what happens before a frame can be sent.

A save takes down the object (`snapshot`), copies its storages into a buffer of the pool (`copying`), and pickles. The
trainer waits for the copy. In overlap mode it waits for next to nothing: an optimizer's step waits for the rest of the
copy, and a change that came before its end is found out.

Nothing is registered until one call hands the save over to its session (`_core.Session.hand_over`). What is interrupted
before that leaves nothing behind: the copy stops and the buffer returns to the pool as soon as nobody refers to them.
What is interrupted after it continues without the trainer.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from . import _core, ending, frames, progress
from . import snapshot as snapshots
from .buffers import Buffer, pool
from .copying import Copy
from .errors import (
    CheckpointStalled,
    DaemonUnavailable,
    NoetherWriterError,
    SnapshotChanged,
    TorchMissing,
    UnsupportedValue,
    WaitTimeout,
    of_wire,
)
from .session import AWAY_SECONDS, LOOK_SECONDS, STALLED
from .snapshot import Snapshot
from .untraced import untraced
from .weakly import WeakBag

if TYPE_CHECKING:
    from .session import Session

Kind = Literal["model", "optim", "trainer"]
KINDS = ("model", "optim", "trainer")
# When the trainer continues: after the copy, or beside it.
Mode = Literal["copy", "overlap"]
MODES: dict[str, Mode] = {"copy": "copy", "overlap": "overlap"}
STALL_SECONDS = 30.0
_STORAGE_ALIGNMENT = 64
# Up to this many tensors, pickling takes less time than handing it to another thread; with more, a save returns first.
_PICKLED_AT_ONCE = 512
# How many changed tensors a message names.
_NAMED = 3
_overlapping: WeakBag[Save] = WeakBag()
_hook: Any = None


def mode_of(name: str) -> Mode:
    """
    Raises:
        ValueError: there is no such mode.
    """
    if name in MODES:
        return MODES[name]
    raise ValueError(f"snapshot must be copy or overlap, not {name!r}")


@dataclass(frozen=True)
class Target:
    """One file of a save: `<name>[_<info>]_cp=<tag>_<kind>.th`."""

    name: str
    tag: str
    obj: object
    kind: Kind = "model"
    info: str | None = None
    #: Tags of older checkpoints that stay, whatever `keep_last` removes after this one.
    kept: Sequence[str] = ()

    @property
    def archive(self) -> str:
        """The file's name without `.th`; it is the folder of the file's records in the zip archive."""
        info = f"_{self.info}" if self.info and self.kind == "model" else ""
        return f"{self.name}{info}_cp={self.tag}_{self.kind}"

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.archive}.th"

    def record(self, start: int, length: int) -> dict[str, Any]:
        """As the frame has it; its pickle lies at `start` in the buffer."""
        return {
            "kind": self.kind,
            "name": self.name,
            "tag": self.tag,
            "info": self.info,
            "pickle_offset": start,
            "pickle_length": length,
            **({"kept": list(self.kept)} if self.kept else {}),
        }


@dataclass(frozen=True)
class File:
    """A file at any path: what `torch.save(obj, path)` writes."""

    #: Absolute, without links in its directory.
    path: str
    obj: object
    #: What the names of its records begin with; None: the file has the bytes of the buffer.
    archive: str | None
    umask: int | None
    #: On which its directory is.
    device: int

    @property
    def file(self) -> str:
        return self.path

    def record(self, start: int, length: int) -> dict[str, Any]:
        return {
            "path": self.path,
            "form": "raw" if self.archive is None else "torch",
            "archive": self.archive,
            "offset": start,
            "length": length,
            "umask": self.umask,
            "device": self.device,
        }


class Ticket:
    """A save on its way: it is `accepted` (the daemon holds it), `written`, `durable`, or has an `error`."""

    def __init__(self, session: Session, saves: Sequence[Sent]) -> None:
        self._session = session
        # There is one for each group of targets that hold the same tensors.
        self._saves = tuple(saves)
        self.names: list[str] = [name for save in self._saves for name in save.files]

    @property
    def paths(self) -> list[str]:
        """The path of each file. Of a run's file the daemon says it; "" before."""
        return [path for save in self._saves for path in save.paths]

    @property
    def path(self) -> str:
        """The path of the first file."""
        return self.paths[0]

    @property
    def nbytes(self) -> int:
        """How many bytes of memory were copied."""
        return sum(save.nbytes for save in self._saves)

    @property
    def bytes_total(self) -> int:
        """The bytes of all files, as the daemon says when it has accepted them; 0 before."""
        return sum(save.bytes_total for save in self._saves)

    @property
    def bytes_done(self) -> int:
        """How many of `bytes_total` the file system has; the daemon says it a few times a second."""
        return min(sum(save.bytes_done for save in self._saves), self.bytes_total)

    @property
    def accepted(self) -> bool:
        """Whether the daemon holds the snapshot: then this process may die."""
        return all(save.is_accepted for save in self._saves)

    @property
    def written(self) -> bool:
        """Whether the file system has all bytes of every file."""
        return all(save.written == (1 << len(save.files)) - 1 for save in self._saves)

    @property
    def durable(self) -> bool:
        """Whether every file survives a power cut."""
        return all(save.durable == (1 << len(save.files)) - 1 for save in self._saves)

    @property
    def done(self) -> bool:
        """Whether every file is durable or given up."""
        return all(save.is_ended for save in self._saves)

    @property
    def error(self) -> NoetherWriterError | None:
        """Why a file was given up, or None."""
        return next((save.make_error() for save in self._saves if save.is_failed), None)

    @property
    def stalled(self) -> str | None:
        """Why storage refuses a file for now, or None."""
        return next((reason for save in self._saves if (reason := save.reason)), None)

    def __repr__(self) -> str:
        if self.error is not None:
            state = "failed"
        elif self.durable:
            state = "durable"
        elif self.stalled:
            state = "stalled"
        elif self.written:
            state = "written"
        else:
            state = "accepted" if self.accepted else "pending"
        return f"<noether_writer.Ticket of {', '.join(self.names)}: {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ticket cannot be pickled, because it is of a save of this process: keep its names or paths instead"
        )

    def __copy__(self) -> Ticket:
        return self

    def __deepcopy__(self, memo: Any) -> Ticket:
        """A copy of what holds a ticket holds the same ticket."""
        return self

    def wait(self, timeout: float | None = None) -> None:
        """Returns once every file of this save is durable.

        Args:
            timeout: in seconds; None waits as long as storage accepts data and the daemon is there.

        Raises:
            DaemonUnavailable: the daemon has been away for a minute; the save is kept here, and sent when it is back.
            StorageError, or another error that says why: the daemon has given the save up.
            CheckpointStalled: storage refused for `timeout` (or 30 s); the daemon keeps the bytes and tries again.
            WaitTimeout: it is not durable in time; the daemon continues.
        """
        timeout, deadline = ending.bounded(timeout)
        self.wait_until(deadline, timeout)

    def wait_until(self, deadline: float | None, timeout: float | None) -> None:
        """Like `wait`, for callers that have one deadline for several tickets.

        Args:
            deadline: as time.monotonic() counts; timeout: the seconds that a message names.
        """
        with progress.shown([self]):
            self.wait_for(lambda: self.done, deadline, timeout)

    def wait_for(self, is_reached: Callable[[], bool], deadline: float | None, timeout: float | None) -> None:
        """Like `wait_until`, for something else than the end, and without a bar. `is_reached` is asked once a second at
        least, and may raise."""
        session = self._session
        if session.core.is_forked:
            session.check_open()
        looked_at = time.monotonic()
        while True:
            generation = session.core.generation
            # Asked first: a session that nobody holds ends as soon as its last save has ended.
            is_over = session.core.is_over
            has_reached = is_reached()
            if has_reached or any(save.is_failed for save in self._saves):
                session.hear()
            for save in self._saves:
                if save.is_failed:
                    raise_failure(save)
            if has_reached:
                return
            now = time.monotonic()
            self._check(is_over, now, deadline, timeout)
            if timeout is None and now - looked_at > LOOK_SECONDS:
                look(session)
                looked_at = time.monotonic()
            session.wait(generation, 1.0 if deadline is None else min(1.0, deadline - now))

    def wait_accepted(self) -> None:
        """Returns once the daemon holds everything. Raises as `wait`."""
        timeout, deadline = ending.bounded(None)
        self.wait_for(lambda: self.accepted, deadline, timeout)

    def wait_quietly(self, timeout: float) -> None:
        """As `wait`, without a bar."""
        self.wait_for(lambda: self.done, time.monotonic() + timeout, timeout)

    def leave_unsaid(self) -> None:
        """If it fails, no other call raises it: whoever calls this says so."""
        for save in self._saves:
            save.tell()

    def _check(self, is_over: bool, now: float, deadline: float | None, timeout: float | None) -> None:
        """
        Raises:
            NoetherWriterError: there is no use in waiting longer.
        """
        away = self._session.core.away_seconds
        files = ", ".join(path for path in self.paths if path) or ", ".join(self.names)
        if is_over:
            raise DaemonUnavailable(
                f"{files} is not known to be durable: its run is closed. The daemon finishes what it has accepted"
            )
        if deadline is None:
            if (reason := self._stalled_for(now, STALL_SECONDS)) is not None:
                raise _stalled(files, reason)
            if away > AWAY_SECONDS:
                raise DaemonUnavailable(
                    f"the daemon has been away for {away:.0f} s; the save is kept in this process and sent when it is "
                    "back"
                )
            return
        if now < deadline:
            return
        if (reason := self._stalled_for(now, 0)) is not None:
            raise _stalled(files, reason)
        if away:
            raise WaitTimeout(
                f"{files} is not durable after {timeout:.3g} s: the daemon has been away for {away:.0f} s; "
                f"{ending.of_kept()}"
            )
        raise WaitTimeout(f"{files} is not durable after {timeout:.3g} s; the daemon continues")

    def _stalled_for(self, now: float, seconds: float) -> str | None:
        """Why storage refuses, if it has refused for this many seconds."""
        for save in self._saves:
            if (reason := save.reason) is not None and now - save.stalled_since >= seconds:
                return reason
        return None

    def wait_snapshot(self) -> None:
        """Returns when the tensors of this save may be changed. It returns at once unless the save was made with
        `snapshot="overlap"`.

        An optimizer's step does this by itself. On CUDA, work that is queued from now on may change the tensors.
        """
        for save in self._saves:
            save.before_change()


def _stalled(files: str, reason: str) -> CheckpointStalled:
    # The reason names the file in most cases.
    words = reason if files in reason else f"{files}: {reason}"
    return CheckpointStalled(f"not durable yet: {words}. {STALLED}")


def look(session: Session) -> None:
    """Finds out whether there is any use in waiting.

    Raises:
        CheckpointStalled: storage does not take this run's files.
        DaemonUnavailable: the daemon does not answer.
    """
    try:
        report = session.ask(frames.STATUS, {}, time.monotonic() + LOOK_SECONDS).json()
    except WaitTimeout as error:
        raise DaemonUnavailable(
            f"the daemon has not answered for {LOOK_SECONDS:.0f} s; what is not durable is kept and sent again"
        ) from error
    for run in report["runs"]:
        if run["run_directory"] == session.directory and run.get("stalled"):
            raise CheckpointStalled(f"run {session.run_id} is not durable yet: {run['stalled']}. {STALLED}")


def raise_failure(save: Sent) -> None:
    """Raises why a save failed; no other call says it again.

    It is a new exception each time: one that is kept would keep the frames of whoever caught it, with their tensors.
    """
    error = save.make_error()
    save.tell()
    try:
        raise error
    finally:
        # It holds this frame, and this frame must not hold it.
        del error


class Sent(_core.Save):
    """One frame, first in the making and then on its way: kept until it is released, over any number of connections."""

    #: Whether its frame takes longer than handing it to another thread.
    is_slow = False
    #: How many bytes of memory were copied.
    nbytes = 0

    def _begin(self, files: Sequence[str], paths: Sequence[str]) -> None:
        """
        Args:
            paths: of the files, as far as they are known; "" else.
        """
        self.files = list(files)
        self._known = list(paths)
        #: Why it could not be sent: a type and words.
        self.failure: tuple[type[NoetherWriterError], str] | None = None

    @property
    def paths(self) -> list[str]:
        """The path of each file; "" if it is not known yet."""
        return [
            known or (json.loads(path) if (path := self.path(index)) else "") for index, known in enumerate(self._known)
        ]

    @property
    def reason(self) -> str | None:
        """Why storage refuses it for now, or None."""
        text = None if self.is_ended else self.stalled
        return None if text is None else str(json.loads(text)["message"])

    def make_error(self) -> NoetherWriterError:
        if self.failure is not None:
            kind, words = self.failure
            return kind(words)
        path = next((path for path in self.paths if path), None)
        return of_wire(json.loads(self.error or "{}"), path)

    def frame(self) -> tuple[Sent, int, Buffer | None, bytes, int, tuple[bytes, ...]]:
        """Returns what `_core.Session.send` takes. Any number of threads may call it, any number of times."""
        raise NotImplementedError

    def before_change(self) -> None:
        """When this returns, this thread may change the tensors (on a device, work that it queues then may)."""

    def forget(self) -> None:
        """Called when the frame was sent: what it was made of is needed no more."""

    def fail(self, error: Exception) -> None:
        """Notes that it cannot be sent, and why."""
        words = str(error) if isinstance(error, NoetherWriterError) else f"the save could not be sent: {error!r}"
        self.failure = (type(error) if isinstance(error, NoetherWriterError) else NoetherWriterError, words)


class Save(Sent):
    """A save of an object.

    Args:
        session: to which it will belong.
        log_update: the last update in the log that this checkpoint belongs with.
        number: a result of `_core.Session.number`, taken when the call began.

    Raises:
        Unsupported: `shots` do not support their object; nothing is kept.
        PoolExhausted.
    """

    def __new__(
        cls,
        session: Session,
        targets: Sequence[Target | File],
        shots: Sequence[Snapshot],
        mode: Mode,
        log_update: int | None,
        number: int,
    ) -> Save:
        return super().__new__(cls, session.core, len(targets), number)

    def __init__(
        self,
        session: Session,
        targets: Sequence[Target | File],
        shots: Sequence[Snapshot],
        mode: Mode,
        log_update: int | None,
        number: int,
    ) -> None:
        """Begins the copy, and in mode `copy` ends it."""
        first = shots[0]
        if len(first.lengths) > frames.STORAGES:
            raise UnsupportedValue(
                f"{targets[0].file} has {len(first.lengths)} storages; at most {frames.STORAGES} fit into one "
                "save: save it in parts"
            )
        self._begin(
            [target.file for target in targets],
            [target.path if isinstance(target, File) else "" for target in targets],
        )
        self._member = "files" if isinstance(targets[0], File) else "targets"
        # Without the objects, which may change from here on.
        self._records = [target.record for target in map(_without_object, targets)]
        self._lengths = first.lengths
        self._log_update = log_update
        rounded = ((length + _STORAGE_ALIGNMENT - 1) & -_STORAGE_ALIGNMENT for length in first.lengths)
        offsets = list(itertools.accumulate(rounded, initial=0))
        self.nbytes = self._pickles_at = offsets.pop()
        buffer: Buffer = pool().reserve(self.nbytes + sum(shot.pickle_room for shot in shots))
        copy = Copy(first, offsets, buffer, beside=mode == "overlap")
        #: Whether the trainer continues beside the copy. It does not if no change could be found out.
        self.overlaps = mode == "overlap" and copy.overlaps
        #: The storages that changed before the copy had ended; set once, by the thread that ends it.
        self._changed: dict[str, frozenset[int]] = {}
        #: What is needed until the frame is sent; None from then on.
        self._making: tuple[Copy, Buffer, tuple[Snapshot, ...]] | None = (copy, buffer, tuple(shots))
        self._is_on_devices = copy.is_on_devices
        copy.start()
        if self.overlaps:
            copy.run_now()
            _before_next_step(self)
        for shot in shots:
            shot.describe()
        if not self.overlaps:
            copy.finish()

    @property
    def is_slow(self) -> bool:  # type: ignore[override]
        making = self._making
        is_long = self.overlaps or self._is_on_devices or len(self._lengths) > _PICKLED_AT_ONCE
        return making is not None and is_long

    def before_change(self) -> None:
        making = self._making
        if making is not None:
            making[0].before_change()
            self._look_for_changes(making[0])

    def _look_for_changes(self, copy: Copy) -> None:
        """Finds out whether a change came before the end of the copy."""
        if self.overlaps and "here" not in self._changed:
            self._changed.setdefault("here", copy.changed_here())
            _overlapping.discard(self)

    def frame(self) -> tuple[Sent, int, Buffer | None, bytes, int, tuple[bytes, ...]]:
        """
        Raises:
            SnapshotChanged: in overlap mode.
        """
        making = self._making
        if making is None:
            raise NoetherWriterError("the frame of this save was sent already")
        copy, buffer, shots = making
        copy.finish()
        self._look_for_changes(copy)
        if changed := self._changed.get("here", frozenset()) | copy.changed_on_devices():
            raise self._was_changed(shots[0], changed)
        pickles = tuple(shot.encode() for shot in shots)
        ends = list(itertools.accumulate(map(len, pickles), initial=self._pickles_at))
        message = {
            "storages_length": self._pickles_at,
            "buffer": buffer.number,
            "log_update": self._log_update,
            self._member: [
                record(start, len(pickle)) for record, start, pickle in zip(self._records, ends, pickles, strict=False)
            ],
        }
        # The session puts its number in.
        payload = frames.pack_save(0, list(self._lengths), message)
        return self, frames.SAVE, buffer, payload, self._pickles_at, pickles

    def _was_changed(self, shot: Snapshot, numbers: frozenset[int]) -> SnapshotChanged:
        names = shot.names(numbers)
        what = ", ".join(names[:_NAMED]) if names else f"{len(numbers)} of its storages"
        if len(names) > _NAMED:
            what += f" and {len(names) - _NAMED} more"
        files = f"{', '.join(self.files)} {'was' if len(self.files) == 1 else 'were'} not sent, and older ones stay"
        if self.overlaps:
            return SnapshotChanged(
                f"{what} changed while {self.files[0]} was copied: {files} as they are. Code that changes tensors, "
                "other than an optimizer's step, must call ticket.wait_snapshot() first, or save with "
                'snapshot="copy"'
            )
        return SnapshotChanged(
            f"{what} changed on the device while {self.files[0]} was copied: {files} as they are. Another stream "
            "wrote to it during the save: synchronize with that stream before the save"
        )

    def forget(self) -> None:
        self._making = None


def _without_object(target: Target | File) -> Target | File:
    return replace(target, obj=None)


class RawSave(Sent):
    """A file with the bytes at the beginning of a buffer, as they are."""

    def __new__(cls, session: Session, target: File, buffer: Buffer, nbytes: int, number: int) -> RawSave:
        return super().__new__(cls, session.core, 1, number)

    def __init__(self, session: Session, target: File, buffer: Buffer, nbytes: int, number: int) -> None:
        self._begin([target.file], [target.path])
        self.nbytes = nbytes
        self._making: Buffer | None = buffer
        self._record = target.record(0, nbytes)

    def frame(self) -> tuple[Sent, int, Buffer | None, bytes, int, tuple[bytes, ...]]:
        buffer = self._making
        if buffer is None:
            raise NoetherWriterError("the frame of this save was sent already")
        message = {"storages_length": 0, "buffer": buffer.number, "files": [self._record]}
        return self, frames.SAVE, buffer, frames.pack_save(0, [], message), 0, ()

    def forget(self) -> None:
        self._making = None


class Order(Sent):
    """A removal, or a directory's new name: what the daemon does after all that this process has handed over before it,
    and before all that comes after it.

    Args:
        type_: of the frame; `message` is its JSON but for the number.
        path: for messages.
    """

    def __new__(cls, session: Session, type_: int, message: dict[str, Any], path: str, number: int) -> Order:
        return super().__new__(cls, session.core, 1, number, True)

    def __init__(self, session: Session, type_: int, message: dict[str, Any], path: str, number: int) -> None:
        self._begin([path], [path])
        self._type = type_
        self._payload = json.dumps(message | {"sequence": number}, ensure_ascii=False).encode()

    def frame(self) -> tuple[Sent, int, Buffer | None, bytes, int, tuple[bytes, ...]]:
        return self, self._type, None, self._payload, 0, ()


def check_torch() -> None:
    """
    Raises:
        TorchMissing.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise TorchMissing(
            f"saving a checkpoint needs torch, which cannot be imported here ({error}): install it "
            "(pip install torch). Nothing was saved; logging works without it"
        ) from error


def begin(session: Session, targets: Sequence[Target | File], mode: Mode, log_update: int | None) -> Ticket:
    """Takes a snapshot of the objects, and hands it over to the session.

    Raises:
        what pickling raises; then nothing was sent.
    """
    if (failed := session.core.find(0, True)) is not None:
        raise_failure(failed)
    check_torch()
    objects = [target.obj for target in targets]
    # If a signal handler saves in the middle of this save, the handler's save was begun later, and is the newer one.
    number = session.core.number()
    try:
        saves = _prepared(session, targets, snapshots.capture(objects), mode, log_update, number)
        if saves is None:
            saves = _prepared(session, targets, snapshots.capture_pickled(objects), mode, log_update, number)
    except NoetherWriterError:
        raise
    except Exception as error:
        snapshots.explain(error, {target.file: target.obj for target in targets})
        raise
    assert saves is not None
    return hand_over(session, saves)


def _prepared(
    session: Session,
    targets: Sequence[Target | File],
    shots: Sequence[Snapshot],
    mode: Mode,
    log_update: int | None,
    number: int,
) -> list[Save] | None:
    """A save for each group of targets that hold the same storages; None if `shots` do not support their object."""
    groups: list[range] = []
    for index in range(len(shots)):
        if groups and shots[index].storage_ids == shots[groups[-1].start].storage_ids:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
    try:
        return [
            Save(
                session,
                targets[group.start : group.stop],
                shots[group.start : group.stop],
                mode,
                log_update,
                number if group.start == 0 else session.core.number(),
            )
            for group in groups
        ]
    except snapshots.Unsupported:
        return None


def hand_over(session: Session, saves: Sequence[Sent]) -> Ticket:
    """
    Raises:
        DaemonUnavailable: the session is closed.
    """
    ticket = Ticket(session, saves)
    is_kept = session.keep()
    frames_now = tuple(None if save.is_slow and is_kept else save.frame() for save in saves)
    # One call: before it nothing has happened, after it the saves are the session's.
    if not session.core.hand_over(tuple(saves), frames_now):
        session.check_open()
    for save, frame in zip(saves, frames_now, strict=True):
        if frame is not None:
            save.forget()
    return ticket


def open_saves(session: Session) -> list[Sent]:
    """Those that have not ended."""
    found: list[Sent] = []
    after = 0
    while (save := session.core.find(after, False)) is not None:
        found.append(save)
        after = save.sequence + 1
    return found


def wait_all(session: Session, deadline: float | None, timeout: float | None) -> None:
    """Returns when everything that was handed over is durable. Raises the error of the first that failed, or as
    `Ticket.wait`."""
    if session.core.is_forked:
        session.check_open()
    # Whose failure was raised may not have ended: it is not raised again.
    tickets = [Ticket(session, [save]) for save in open_saves(session) if not (save.is_failed and save.is_told)]
    with progress.shown(tickets):
        for ticket in tickets:
            ticket.wait_until(deadline, timeout)
    if (failed := session.core.find(0, True)) is not None:
        raise_failure(failed)


def _before_next_step(save: Save) -> None:
    """From now on the step of any optimizer, and the replay of a CUDA graph, which may contain one, wait for the rest
    of this save's copy."""
    global _hook
    if _hook is None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        _hook = register_optimizer_step_pre_hook(_wait_for_copies)
    if save._is_on_devices:
        _wait_in_replays()
    _overlapping.add(save)


def _wait_in_replays() -> None:
    from torch.cuda import CUDAGraph

    replay = CUDAGraph.replay
    if hasattr(replay, "waits_for_copies"):
        return

    @functools.wraps(replay)
    def waiting(self: Any) -> None:
        _wait_for_copies()
        replay(self)

    waiting.waits_for_copies = True  # type: ignore[attr-defined]
    CUDAGraph.replay = waiting  # type: ignore[method-assign]


@untraced
def _wait_for_copies(*_arguments: object) -> None:
    for save in list(_overlapping):
        save.before_change()


# The threads that copy exist in the parent only.
os.register_at_fork(after_in_child=_overlapping.clear)
