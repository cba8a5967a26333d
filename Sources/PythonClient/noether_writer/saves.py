"""Saves on their way to the daemon: the ticket that a trainer holds, and what happens before a frame can be sent.

A save takes down the object (`snapshot`), copies its storages into a buffer of the pool (`copying`), and pickles. The
trainer waits for the copy, or, in overlap mode, for next to nothing: then an optimizer's step waits for what is left of
the copy, and a change that came too early is found out.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from . import frames, progress
from .buffers import Buffer, BufferPool
from .connection import LOOK_SECONDS
from .copying import SMALL_BYTES, Copy
from .errors import (
    CheckpointStalled,
    DaemonUnavailable,
    NoetherWriterError,
    SnapshotChanged,
    UnsupportedValue,
    WaitTimeout,
)
from .link import AWAY_SECONDS
from .snapshot import Snapshot

Kind = Literal["model", "optim", "trainer"]
KINDS = ("model", "optim", "trainer")
#: What is kept where storage refuses, and what to do.
STALLED = "The daemon keeps it in memory and tries again: mend the storage (space, quota, permission), and it arrives"
# When the trainer goes on: after the copy, or beside it.
Mode = Literal["copy", "overlap"]
STALL_SECONDS = 30.0
_STORAGE_ALIGNMENT = 64
# Up to here pickling takes less time than handing it to another thread; with more tensors a save returns before it.
_PICKLED_AT_ONCE = 512
_pools: dict[int, BufferPool] = {}
_finishers: dict[int, ThreadPoolExecutor] = {}
_overlapping: set[Save] = set()
_hook: Any = None


def pool() -> BufferPool:
    """One pool a process; a forked child makes its own."""
    return _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), BufferPool())


def _finisher() -> ThreadPoolExecutor:
    """The thread that ends what saves have begun, in order. One a process, as the pool."""
    if (found := _finishers.get(os.getpid())) is None:
        new = ThreadPoolExecutor(1, thread_name_prefix="noether-writer-finish")
        found = _finishers.setdefault(os.getpid(), new)
    return found


@dataclass(frozen=True)
class Target:
    """One file of a save: `<name>[_<info>]_cp=<tag>_<kind>.th`."""

    name: str
    tag: str
    obj: object
    kind: Kind = "model"
    info: str | None = None

    @property
    def archive(self) -> str:
        """The file's name without `.th`, which is what its records are below in the zip archive."""
        info = f"_{self.info}" if self.info and self.kind == "model" else ""
        return f"{self.name}{info}_cp={self.tag}_{self.kind}"


class Ticket:
    """A save on its way: `accepted` (the daemon holds it), `written`, `durable`, or `error`."""

    def __init__(self, count: int, nbytes: int, away_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self._away_seconds = away_seconds
        self.paths: list[str] = [""] * count
        self.names: list[str] = [""] * count
        self.nbytes = nbytes
        self.error: NoetherWriterError | None = None
        self.stalled: str | None = None
        self._stalled_since = 0.0
        self._written: set[int] = set()
        self._durable: set[int] = set()
        self._count = count
        # Raises where there is no use in waiting on.
        self._look: Callable[[], None] = lambda: None
        # Of several saves where the targets hold different tensors; each is known by its first target.
        self._parts = 1
        self._saves: list[Save] = []
        self._accepted: set[int] = set()
        self._released: set[int] = set()
        self._changed = threading.Condition()
        # In bytes: of each save once it is accepted; of each target what the file system has.
        self._totals: dict[int, int] = {}
        self._handed: dict[int, int] = {}

    @property
    def bytes_total(self) -> int:
        """Bytes of all files, as the daemon says when it has accepted them; 0 before."""
        return sum(self._totals.values())

    @property
    def bytes_done(self) -> int:
        """Of `bytes_total`, what the file system has: told by the daemon a few times a second."""
        with self._changed:
            return min(sum(self._handed.values()), sum(self._totals.values()))

    @property
    def accepted(self) -> bool:
        """The daemon holds the snapshot: this process may die."""
        return len(self._accepted) == self._parts

    @property
    def written(self) -> bool:
        """The file system has all bytes of every file."""
        return len(self._written) == self._count

    @property
    def durable(self) -> bool:
        """Every file survives power loss."""
        return len(self._durable) == self._count

    @property
    def done(self) -> bool:
        """Durable or failed."""
        return len(self._released) == self._parts

    def wait(self, timeout: float | None = None) -> None:
        """Returns once every file of this save is durable.

        Args:
            timeout: in seconds; None waits as long as storage accepts data and the daemon is there.

        Raises:
            DaemonUnavailable: away for a minute; the save is kept here, and sent when it is back.
            StorageError: given up by the daemon, or another error that says why.
            CheckpointStalled: storage refused for `timeout` (or 30 s); the daemon keeps the bytes and tries again.
            WaitTimeout: not durable in time; the daemon goes on.
        """
        try:
            self._wait_for(timeout)
        except NoetherWriterError as error:
            error._was_raised = True
            raise

    def _wait_for(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        looked = time.monotonic()
        with progress.shown([self]):
            while not self._wait(deadline, timeout):
                if timeout is None and time.monotonic() - looked > LOOK_SECONDS:
                    self._look()
                    looked = time.monotonic()

    def _wait(self, deadline: float | None, timeout: float | None) -> bool:
        """For a second or so; whether it has ended."""
        with self._changed:
            if not self.done and self.error is None:
                now = time.monotonic()
                stalled_out = timeout is None and self.stalled is not None and now - self._stalled_since > STALL_SECONDS
                if stalled_out or (deadline is not None and now >= deadline):
                    files = ", ".join(path for path in self.paths if path) or "the save"
                    if self.stalled:
                        # The reason mostly names the file.
                        reason = self.stalled if files in self.stalled else f"{files}: {self.stalled}"
                        raise CheckpointStalled(f"not durable yet: {reason}. {STALLED}")
                    if away := self._away_seconds():
                        raise WaitTimeout(
                            f"{files} is not durable after {timeout:.3g} s: the daemon has been away for {away:.0f} s. "
                            "What it has not taken is kept in this process and sent when it is back"
                        )
                    raise WaitTimeout(f"{files} is not durable after {timeout:.3g} s; the daemon goes on")
                if timeout is None and self._away_seconds() > AWAY_SECONDS:
                    raise DaemonUnavailable(
                        f"the daemon has been away for {self._away_seconds():.0f} s; the save is kept in this process "
                        "and sent when it is back"
                    )
                self._changed.wait(1.0 if deadline is None else min(1.0, deadline - now))
            if self.error:
                raise self.error
            return self.done

    def wait_snapshot(self) -> None:
        """Returns when the tensors of this save may be changed; at once unless it was made with `snapshot="overlap"`.

        An optimizer's step does this by itself. Tensors on CUDA may be changed by what is queued from now on.
        """
        for save in self._saves:
            save.before_change()

    def _fail(self, error: NoetherWriterError) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def _event(self, event: dict[str, Any], first_target: int, error: NoetherWriterError | None = None) -> None:
        """
        Args:
            error: of a `failed` event.
        """
        with self._changed:
            kind, target = event["event"], first_target + int(event.get("target") or 0)
            if event.get("path"):
                self.paths[target] = event["path"]
            if kind == "accepted":
                self._accepted.add(first_target)
                self._totals[first_target] = event.get("bytes") or 0
            elif kind == "progress":
                self._handed[target] = event.get("bytes_done") or 0
            elif kind == "written":
                self._written.add(target)
                self._handed[target] = event.get("bytes") or 0
            elif kind == "durable":
                self._durable.add(target)
                self._handed[target] = event.get("bytes") or 0
                self.stalled = None
            elif kind == "stalled":
                if self.stalled is None:
                    self._stalled_since = time.monotonic()
                self.stalled = event["error"]["message"]
            elif kind == "failed":
                self.error = self.error or error
            elif kind == "released":
                self._released.add(first_target)
                # Its buffer is not its own any more, however long the trainer keeps the ticket.
                self._saves = [save for save in self._saves if save.first_target != first_target]
            self._changed.notify_all()


class Save:
    """One frame in the making, then in flight: kept until it is released, over any number of connections."""

    def __init__(
        self,
        targets: Sequence[Target],
        shots: Sequence[Snapshot],
        ticket: Ticket,
        first_target: int,
        mode: Mode,
        log_update: int | None,
    ) -> None:
        """Begins the copy, and in mode `copy` ends it.

        Args:
            first_target: which of the ticket's targets is the first of these.
            log_update: the last update in the log that this checkpoint belongs with.

        Raises:
            Unsupported: `shots` do not know their object; nothing is kept.
            PoolExhausted.
        """
        first = shots[0]
        if len(first.lengths) > frames.STORAGES:
            raise UnsupportedValue(
                f"{targets[0].archive}.th has {len(first.lengths)} storages; at most {frames.STORAGES} go into one "
                "save: save it in parts"
            )
        self.ticket, self.first_target = ticket, first_target
        self.sequence = 0
        # Since when the daemon has no room for it; time.monotonic().
        self.refused_since: float | None = None
        self.frame: bytes | None = None
        self.sent = threading.Event()
        self.copy: Copy | None = None
        self._looking = threading.Lock()
        self._changed_count = 0
        self._targets, self._shots, self._log_update = targets, shots, log_update
        rounded = ((length + _STORAGE_ALIGNMENT - 1) & -_STORAGE_ALIGNMENT for length in first.lengths)
        offsets = list(itertools.accumulate(rounded, initial=0))
        end = self._pickles_at = offsets.pop()
        self.buffer: Buffer = pool().take(end + sum(shot.pickle_room for shot in shots))
        copy: Copy | None = None
        try:
            # Where changes can't be found out the copy is not left to run beside them.
            self._versions = first.versions(SMALL_BYTES) if mode == "overlap" else None
            self.overlaps = self._versions is not None
            copy = Copy(
                first.storages,
                first.addresses,
                first.lengths,
                offsets,
                self.buffer,
                on_cpu=first.on_cpu,
                small_first=self.overlaps,
            )
            if self.overlaps:
                copy.run_small()
                self.copy = copy
                _before_next_step(self)
            else:
                copy.start()
            for shot in shots:
                shot.describe()
            if not self.overlaps:
                copy.finish()
        except BaseException:
            _overlapping.discard(self)
            if copy is not None:
                copy.stop()
            pool().release(self.buffer.number)
            raise
        self.copy = copy
        ticket._saves.append(self)

    @property
    def accepted(self) -> bool:
        """The daemon holds it, or has ended it."""
        done = self.ticket._accepted | self.ticket._released
        return self.first_target in done or self.ticket.error is not None

    @property
    def files(self) -> list[str]:
        return [f"{target.archive}.th" for target in self._targets]

    def give_up(self) -> None:
        """Nothing of it goes out; its buffer is free."""
        _overlapping.discard(self)
        if self.copy is not None:
            self.copy.stop()
        self.copy, self._shots = None, ()
        pool().release(self.buffer.number)

    def when_ready(self, send: Callable[[], None]) -> None:
        """Calls `send`: now, where a frame can be made in no time, else on another thread."""
        if self.overlaps or len(self._shots[0].storages) > _PICKLED_AT_ONCE:
            _finisher().submit(send)
        else:
            send()

    def before_change(self) -> None:
        """When this returns, this thread may change the tensors (on a device: what it queues may)."""
        if (copy := self.copy) is not None:
            copy.before_change()
            self._look_for_changes()

    def _look_for_changes(self) -> None:
        """Whether a change came before the end of the copy. Looked for once, when the copy has ended: what comes later
        is the trainer's right."""
        with self._looking:
            shots = self._shots
            if self._versions is None or not shots:
                return
            now = shots[0].versions(SMALL_BYTES) or []
            self._changed_count = sum(a != b for a, b in zip(self._versions, now, strict=True))
            self._versions = None
            _overlapping.discard(self)

    def make_frame(self) -> None:
        """
        Raises:
            SnapshotChanged: in overlap mode.
        """
        assert self.copy is not None
        self.copy.finish()
        self._look_for_changes()
        if self._changed_count:
            raise SnapshotChanged(
                f"{self._changed_count} tensors were changed while {self._targets[0].archive}.th was copied; it was "
                "not sent, and the file of before stays. What changes tensors other than an optimizer's step must wait "
                'for ticket.wait_snapshot() first, or save with snapshot="copy"'
            )
        first = self._shots[0]
        targets = []
        end = self._pickles_at
        for target, shot in zip(self._targets, self._shots, strict=True):
            pickle = shot.encode()
            self.buffer.map[end : end + len(pickle)] = pickle
            targets.append(
                {
                    "kind": target.kind,
                    "name": target.name,
                    "tag": target.tag,
                    "info": target.info,
                    "pickle_offset": end,
                    "pickle_length": len(pickle),
                }
            )
            end += len(pickle)
        message = {
            "storages_length": self._pickles_at,
            "buffer": self.buffer.number,
            "log_update": self._log_update,
            "targets": targets,
        }
        self.frame = frames.pack(frames.SAVE, frames.pack_save(self.sequence, list(first.lengths), message), fds=1)
        # The trainer's tensors are its own again.
        self.copy, self._shots = None, ()


def _before_next_step(save: Save) -> None:
    """An optimizer's step, any optimizer's, waits for what is left of this save's copy."""
    global _hook
    if _hook is None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        _hook = register_optimizer_step_pre_hook(_wait_for_copies)
    _overlapping.add(save)


def _wait_for_copies(*_arguments: object) -> None:
    for save in list(_overlapping):
        save.before_change()


# The threads that copy stay behind in the parent.
os.register_at_fork(after_in_child=_overlapping.clear)
