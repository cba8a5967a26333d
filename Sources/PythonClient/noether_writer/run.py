"""Runs and tickets: the general API. A run owns one connection, its sequence numbers and its open tickets."""

from __future__ import annotations

import atexit
import errno
import functools
import itertools
import logging
import math
import operator
import os
import platform
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import environment, frames, names, progress
from . import snapshot as snapshots
from .config_file import config_yaml
from .connection import LOOK_SECONDS
from .errors import (
    CheckpointStalled,
    DaemonUnavailable,
    NoetherWriterError,
    NotOneElement,
    NotRankZero,
    RefusedName,
    StorageError,
    UnsupportedValue,
    UpdateOrderError,
    WaitTimeout,
    of_wire,
)
from .link import Kept, Link
from .saves import KINDS, STALLED, Kind, Mode, Save, Target, Ticket, pool

CLOSE_SECONDS = 60.0
_EXIT_SECONDS = 30.0
# Shapes of updates that are kept: a few in a training, unless keys are made from data.
_PACKERS = 1024
# Of updates; there may be one an update.
_ERRORS_KEPT = 64
# Between two tries of a save that the daemon has no room for.
_BUSY_SECONDS = 1.0
# Of the frame that opens a run, and room for the rest of it.
_CONFIG_BYTES = frames.PAYLOAD_BYTES // 2
_MODES: dict[str, Mode] = {"copy": "copy", "overlap": "overlap"}
_open_runs: weakref.WeakSet[Run] = weakref.WeakSet()


class Values(list[frames.Scalar]):
    """A key's values over the run, with the update of each in `updates`."""

    updates: Sequence[int] = ()


class Run:
    """A run with the daemon. Made by `open_run`; a context manager: leaving it finishes the log and waits."""

    def __init__(
        self,
        output_root: str | os.PathLike[str],
        run_id: str,
        stage_name: str | None = None,
        debug: bool = False,
        config: dict[str, Any] | None = None,
        *,
        log: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        resume_at: int | None = None,
        snapshot: Mode | None = None,
        tensorboard: bool | None = None,
    ) -> None:
        self._snapshot = self._mode(snapshot or environment.choice("NOETHER_WRITER_SNAPSHOT", "copy", _MODES))
        # Wrong ones are found out now, not when the training is over.
        _exit_seconds()
        self.run_id = names.component(run_id, "run_id")
        if stage_name is not None:
            names.component(stage_name, "stage_name")
        resume_at = None if resume_at is None else _whole(resume_at, "resume_at")
        config_text = None
        found_rank, found_size = place_in_job()
        self.rank = found_rank if rank is None else rank
        self.world_size = found_size if world_size is None else world_size
        self.logger = logging.getLogger("noether_writer")
        self.last_update: int | None = None
        self.log_durable_update: int | None = None
        self.entry_count = 0
        if config is not None and self.rank == 0:
            config_text = _config_text(config, run_id, stage_name, self.world_size)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sequence = 0
        self._tickets: dict[int, Save] = {}
        self._refused: set[int] = set()
        self._failed: list[NoetherWriterError] = []
        self._errors: list[NoetherWriterError] = []
        self._key_ids: dict[str, int] = {}
        self._packers: dict[tuple[Any, ...], frames.LogPacker] = {}
        # The last one that was used, and of what.
        self._packer: frames.LogPacker
        self._packed_keys: tuple[str, ...] | None = None
        self._packed_types: tuple[type, ...] = ()
        self._finished = False
        self._link = Link(
            {
                "output_root": str(Path(output_root).absolute()),
                "run_id": run_id,
                "stage_name": stage_name,
                "debug": bool(debug),
                "session": uuid.uuid4().hex,
                "log": log and self.rank == 0,
                "rank": self.rank,
                "world_size": self.world_size,
                "node": platform.node(),
                "resume_at": resume_at,
                "progress": True,
                "tensorboard": _wants_tensorboard() if tensorboard is None else tensorboard,
                "config_yaml": config_text,
            },
            self._on_event,
            self._kept_saves,
            self._lock,
        )
        opened = self._link.opened
        self.directory = Path(opened["run_directory"])
        if resume_at is not None:
            try:
                self._resume(resume_at, opened)
            except BaseException:
                self._link.close()
                raise
        elif log and self.rank == 0 and (entries := self.directory / "tracker" / "entries.th").exists():
            self.logger.warning(
                "run %s has a log already, which this one replaces when it ends: %s. To go on with that log instead, "
                "open the run with resume_at=, the last update to keep",
                run_id,
                entries,
            )
        _open_runs.add(self)

    def _mode(self, name: str | None) -> Mode:
        if name is None:
            return self._snapshot
        if name in _MODES:
            return _MODES[name]
        raise ValueError(f"snapshot is copy or overlap, not {name!r}")

    def _resume(self, update: int, opened: dict[str, Any]) -> None:
        """Takes the log up to `update` on: from the daemon where it still has it, else from entries.th."""
        self._take_log_on(update, opened)
        if self.rank == 0 and (self.last_update is None or self.last_update < update):
            end = "is empty" if self.last_update is None else f"ends at update {self.last_update}"
            self.logger.warning(
                "resume_at=%d, but the log of run %s %s (%s): it goes on from there",
                update,
                self.run_id,
                end,
                self.directory,
            )

    def _take_log_on(self, update: int, opened: dict[str, Any]) -> None:
        if opened.get("log_entries"):
            self.last_update, self.entry_count = opened["log_update"], opened["log_entries"]
            return
        file = self.directory / "tracker" / "entries.th"
        if self.rank != 0 or not file.exists():
            return
        import torch

        rows: dict[int, dict[str, Any]] = {}
        try:
            entries = torch.load(file, weights_only=True)
        except Exception as error:
            raise StorageError(
                errno.EIO,
                f"{file}, the log to resume, can't be read ({type(error).__name__}): it is left as it is. "
                "`noether-writer verify` says what is broken; move it away to begin with an empty log",
                str(file),
            ) from None
        for key, values in entries.items():
            for row, value in values.items():
                if row <= update:
                    rows.setdefault(row, {})[key] = value
        for row in sorted(rows):
            self.log(rows[row], update=row)

    def _kept_saves(self) -> list[Kept]:
        with self._lock:
            return [
                Kept(sequence, save.frame, save.buffer.fd)
                for sequence, save in self._tickets.items()
                if save.frame is not None
            ]

    def log(self, values: dict[str, Any], *, update: int, epoch: Any = None, sample: Any = None) -> None:
        """Logs one update's scalars, in one frame. Does not wait.

        Args:
            values: key -> float, int, bool, str, None, or a tensor or numpy value of one element.
            update: larger than the last one.

        Raises:
            UpdateOrderError, UnsupportedValue, DaemonUnavailable, LogFull: nothing of this update was logged. Errors of
            earlier updates, each once.
            NotRankZero: ranks of one job share a run, and one log.
        """
        if not isinstance(values, dict):
            raise UnsupportedValue(f"log takes a dict of keys and scalars, not {frames.kind_of(values)}")
        entry = values
        if epoch is not None or sample is not None:
            entry = {} if epoch is None else {"epoch": epoch}
            if sample is not None:
                entry["sample"] = sample
            entry.update(values)
        if type(update) is not int:
            update = _whole(update, "update")
        self._check_process()
        if self.rank != 0:
            raise NotRankZero(f"this is rank {self.rank}: a run has one log, and rank 0 writes it")
        with self._lock:
            if self._errors:
                raise self._errors.pop(0)
            if self.last_update is not None and update <= self.last_update:
                raise UpdateOrderError(
                    f"update {update} is not larger than the last one, {self.last_update}: nothing of it was logged"
                )
            sequence = self._sequence + 1
            # Keys and types repeat from update to update: only the numbers are packed anew.
            keys, types = tuple(entry), tuple(map(type, entry.values()))
            if keys == self._packed_keys and types == self._packed_types:
                frame = self._packer.pack(sequence, update, time.time(), entry.values())
            else:
                frame = self._pack(sequence, update, entry, keys, types)
            self._sequence = sequence
            if not self._link.log(sequence, frame):
                return
            self.last_update = update
            self.entry_count += 1

    def _pack(
        self, sequence: int, update: int, entry: dict[str, Any], keys: tuple[str, ...], types: tuple[type, ...]
    ) -> bytes:
        """The frame of an entry of other keys or types than the last one."""
        shape = (keys, types)
        if (packer := self._packers.get(shape)) is not None:
            self._packer, self._packed_keys, self._packed_types = packer, keys, types
            return packer.pack(sequence, update, time.time(), entry.values())
        tagged: list[tuple[int, int, bytes]] = []
        try:
            for value in entry.values():
                tagged.append(frames.tag_scalar(plain(value)))
        except UnsupportedValue as error:
            raise type(error)(f"{keys[len(tagged)]!r} of update {update}: {error}. Nothing of it was logged") from None
        ids_of = self._key_ids
        if new := [key for key in keys if key not in ids_of]:
            for key in new:
                frames.check_key(key)
            if len(ids_of) + len(new) > frames.KEYS_PER_RUN:
                raise UnsupportedValue(
                    f"update {update} would give this run {len(ids_of) + len(new)} keys; at most "
                    f"{frames.KEYS_PER_RUN}: name keys after what is measured, not after data"
                )
            ids_of = ids_of | dict(zip(new, itertools.count(len(ids_of)), strict=False))
        ids = [ids_of[key] for key in keys]
        frame = frames.pack_log(sequence, update, time.time(), ids, tagged)
        if len(frame) + len(keys) * (6 + frames.KEY_BYTES) > frames.PAYLOAD_BYTES:
            # A row must fit into a page of `entries`, with the names of its keys.
            size = len(frame) + sum(6 + len(key.encode()) for key in keys)
            if size > frames.PAYLOAD_BYTES:
                raise UnsupportedValue(
                    f"update {update} and the names of its keys have {size} bytes; at most {frames.PAYLOAD_BYTES} go "
                    "into one: name them shorter, or log some in another update"
                )
        # Only now: ids must count up as the daemon counts them, also when this update was refused.
        self._key_ids = ids_of
        if new:
            self._link.define(new)
        if len(self._packers) < _PACKERS and frames.LogPacker.knows(types):
            self._packers[shape] = frames.LogPacker(ids, types)
        return frame

    def save(
        self,
        name: str,
        tag: str,
        obj: object,
        kind: Kind = "model",
        info: str | None = None,
        *,
        snapshot: Mode | None = None,
    ) -> Ticket:
        """Saves `obj` as `checkpoints/<name>[_<info>]_cp=<tag>_<kind>.th`.

        Args:
            snapshot: `copy` returns after one memory copy. `overlap` returns before it: it goes on beside the trainer,
                and an optimizer's step waits for what is left of it. What else changes tensors must call
                `ticket.wait_snapshot()` first; a change that comes too early fails the save (`SnapshotChanged`) and
                never spoils a file. Storages up to 64 KiB are copied before the call returns, so running statistics may
                change. None: as the run was opened.

        Raises:
            whatever pickling raises, RefusedName, PoolExhausted, StorageError (no memory for a copy): nothing was sent.
            Errors of earlier saves, each once.
        """
        # A number is a tag too; None is none.
        tag = tag if tag is None else str(tag)
        return self.save_as([Target(name, tag, obj, kind, info)], snapshot=snapshot)

    def save_as(self, targets: Sequence[Target], *, snapshot: Mode | None = None) -> Ticket:
        """Several files at one moment: from one copy where they hold the same storages (a tag and `latest`).

        Raises:
            as `save`; where pickling fails, none of the files was sent.
        """
        self._check_process()
        self._link.check_open()
        _check_targets(targets)
        with self._lock:
            if self._failed:
                raise self._failed.pop(0)
        objects = [target.obj for target in targets]
        mode = self._mode(snapshot)
        try:
            shots = snapshots.take(objects)
            try:
                return self._save(targets, shots, mode)
            except snapshots.Unsupported:
                return self._save(targets, snapshots.take_pickled(objects), mode)
        except NoetherWriterError:
            raise
        except Exception as error:
            snapshots.explain(error, {f"{target.archive}.th": target.obj for target in targets})
            raise

    def _save(self, targets: Sequence[Target], shots: Sequence[snapshots.Snapshot], mode: Mode) -> Ticket:
        groups: list[range] = []
        for index in range(len(shots)):
            if groups and shots[index].storage_ids == shots[groups[-1].start].storage_ids:
                groups[-1] = range(groups[-1].start, index + 1)
            else:
                groups.append(range(index, index + 1))
        ticket = Ticket(len(targets), 0, lambda: self._link.away_seconds)
        ticket.names = [f"{target.archive}.th" for target in targets]
        ticket._parts = len(groups)
        ticket._look = self._look
        saves: list[Save] = []
        try:
            for group in groups:
                part = slice(group.start, group.stop)
                saves.append(Save(targets[part], shots[part], ticket, group.start, mode, self.last_update))
        except BaseException:
            for save in saves:
                save.give_up()
            raise
        for save in saves:
            with self._lock:
                self._sequence += 1
                save.sequence = self._sequence
                self._tickets[save.sequence] = save
            save.when_ready(functools.partial(self._send_save, save))
        return ticket

    def _send_save(self, save: Save) -> None:
        try:
            save.make_frame()
            assert save.frame is not None
            with self._lock:
                self._link.save(Kept(save.sequence, save.frame, save.buffer.fd))
        except BaseException as error:
            if not isinstance(error, NoetherWriterError):
                error = NoetherWriterError(f"the save could not be sent: {error!r}")
            with self._lock:
                del self._tickets[save.sequence]
                self._failed.append(error)
            save.give_up()
            save.ticket._fail(error)
        finally:
            save.sent.set()

    def _wait_sent(self, deadline: float | None) -> None:
        """Saves that another thread makes ready are on their way when this returns."""
        with self._lock:
            saves = list(self._tickets.values())
        for save in saves:
            save.sent.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def wait(self, timeout: float | None = None) -> None:
        """Returns when all saves of this run are durable; raises the first that failed, or as `Ticket.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        tickets = self._open_tickets()
        with progress.shown(tickets):
            for ticket in tickets:
                ticket.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        with self._lock:
            if self._failed:
                raise self._failed.pop(0)

    def _open_tickets(self) -> list[Ticket]:
        with self._lock:
            return list(dict.fromkeys(save.ticket for save in self._tickets.values()))

    def values(self, key: str) -> Values:
        """All values of a key, from the daemon."""
        found, updates = Values(), list[int]()
        while True:
            page = self._link.request(frames.VALUES, {"key": key, "from": len(found), "limit": 20_000})
            total, page_updates, values = frames.unpack_values_page(page.payload)
            found += values
            updates += page_updates
            if len(found) >= total or not values:
                found.updates = updates
                return found

    def entries(self, start: int, limit: int) -> list[dict[str, Any]]:
        """Rows of the log from the daemon, each with its `update`."""
        rows: list[dict[str, Any]] = []
        while limit > len(rows):
            page = self._link.request(frames.ENTRIES, {"from": start + len(rows), "limit": limit - len(rows)})
            _, entries = frames.unpack_entries_page(page.payload)
            if not entries:
                break
            for update, entry in entries:
                row: dict[str, Any] = {"epoch": entry.pop("epoch")} if "epoch" in entry else {}
                row["update"] = update
                rows.append(row | entry)
        return rows

    def finish(self, timeout: float | None = None) -> None:
        """Returns when entries.th and all checkpoints are durable.

        Args:
            timeout: in seconds; None waits as long as storage accepts data and the daemon answers.

        Raises:
            CheckpointStalled, DaemonUnavailable, WaitTimeout: the daemon goes on; call again to wait for it.
        """
        self._check_process()
        if self._finished:
            return
        # Its answer is about what the daemon has.
        self._wait_sent(None if timeout is None else time.monotonic() + timeout)
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
        try:
            with progress.shown(self._open_tickets()):
                self._link.request(frames.FINISH, {"sequence": sequence}, timeout, self._look)
        except CheckpointStalled:
            raise
        except WaitTimeout:
            with self._lock:
                reasons = [save.ticket.stalled for save in self._tickets.values() if save.ticket.stalled]
            if not reasons:
                raise
            raise CheckpointStalled(f"run {self.run_id} is not durable yet: {reasons[0]}. {STALLED}") from None
        self._link.acknowledge(sequence)
        self._finished = True
        self.wait(timeout)
        with self._lock:
            if self._errors:
                # Of updates that the daemon has not taken: nobody has heard of them.
                raise self._errors.pop(0)

    def _look(self) -> None:
        """Looks whether there is any use in waiting.

        Raises:
            CheckpointStalled: storage does not take this run's files.
            DaemonUnavailable: the daemon does not answer.
        """
        try:
            report = self._link.request(frames.STATUS, {}, LOOK_SECONDS).json()
        except WaitTimeout as error:
            raise DaemonUnavailable(
                f"the daemon has not answered for {LOOK_SECONDS:.0f} s; what is not durable is kept and sent again"
            ) from error
        for run in report["runs"]:
            if run["run_directory"] == str(self.directory) and run.get("stalled"):
                raise CheckpointStalled(f"run {self.run_id} is not durable yet: {run['stalled']}. {STALLED}")

    def close(self) -> None:
        """Lets go of the daemon; what it has accepted it finishes. In a forked child: does nothing."""
        _open_runs.discard(self)
        if os.getpid() != self._pid:
            # A lock that another thread of the parent held when it forked is held here for ever.
            return
        self._wait_sent(time.monotonic() + CLOSE_SECONDS)
        self._link.close()

    def _last_words(self, deadline: float) -> list[str]:
        """Waits until `deadline`; then what a person should know of what is not safe."""
        with self._lock:
            saves = list(self._tickets.values())
        self._link.wait_acknowledged(max(0.0, deadline - time.monotonic()))
        words: list[str] = []
        for save in saves:
            save.sent.wait(max(0.0, deadline - time.monotonic()))
            try:
                save.ticket._wait_for(max(0.0, deadline - time.monotonic()))
            except WaitTimeout as error:
                if save.accepted:
                    words.append(str(error))
            except NoetherWriterError:
                # Among those that failed.
                continue
        with self._lock:
            words += [str(error) for error in (*self._failed, *self._errors) if not error._was_raised]
            lost = [name for save in self._tickets.values() if not save.accepted for name in save.files]
        if updates := self._link.unacknowledged:
            lost.append("the last update of the log" if updates == 1 else f"the last {updates} updates of the log")
        if lost:
            away = self._link.away_seconds > 0
            why = "LOST with this process, the daemon is away" if away else "lost unless the daemon still takes it"
            words.append(f"{why}: {', '.join(lost)}. Older files stay")
        return list(dict.fromkeys(words))

    def __reduce__(self) -> Any:
        raise TypeError("a run can't be pickled, its connection is of this process: open one in the other process")

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise DaemonUnavailable("this run belongs to the parent process; open a run in this one to write from it")

    def _on_event(self, frame: frames.Frame) -> None:
        if frame.type == frames.LOG_ACK:
            _, _, self.log_durable_update = frames.unpack_log_ack(frame.payload)
        elif frame.type == frames.CHECKPOINT_EVENT:
            event = frame.json()
            with self._lock:
                found = self._tickets.get(event["sequence"])
                if found is None:
                    return
                code = event["error"].get("code") if event["event"] == "failed" else None
                if code == "draining" or (code == "busy" and self._send_later(found)):
                    # Not taken: by the next daemon, or a little later.
                    self._refused.add(event["sequence"])
                    return
                if event["event"] == "released" and event["sequence"] in self._refused:
                    self._refused.discard(event["sequence"])
                    return
                error = None
                if event["event"] == "failed":
                    error = of_wire(event["error"], event.get("path"))
                    self._failed.append(error)
                elif event["event"] == "released":
                    del self._tickets[event["sequence"]]
            # The buffer first: whoever waited may save again at once.
            if event["event"] == "released":
                pool().release(found.buffer.number, reuse=event.get("buffer") is not None)
            was_stalled = found.ticket.stalled
            found.ticket._event(event, found.first_target, error)
            if event["event"] == "stalled" and was_stalled != (reason := event["error"]["message"]):
                self.logger.warning("storage refuses for now: %s. %s", reason, STALLED)
            elif event["event"] == "durable" and was_stalled:
                self.logger.warning("storage accepts again: %s is durable", event["path"])
        elif frame.type == frames.ERROR:
            message = frame.json()
            if message["code"] == "log-full" and self._link.log_is_full(message["sequence"], message["message"]):
                return
            if len(self._errors) < _ERRORS_KEPT:
                self._errors.append(of_wire(message))

    def _send_later(self, save: Save) -> bool:
        """Whether it may wait on for storage that is behind; then it is sent again by itself."""
        now = time.monotonic()
        if save.refused_since is None:
            save.refused_since = now
        waited = now - save.refused_since
        if waited > pool().timeout_s:
            return False
        timer = threading.Timer(min(_BUSY_SECONDS, max(_BUSY_SECONDS / 10, waited)), self._send_again, (save,))
        timer.daemon = True
        timer.start()
        return True

    def _send_again(self, save: Save) -> None:
        with self._lock:
            if self._tickets.get(save.sequence) is save and save.frame is not None:
                self._link.save(Kept(save.sequence, save.frame, save.buffer.fd))


def log_update(path: str | os.PathLike[str]) -> int | None:
    """The last update in the log when a checkpoint was saved: where `open_run(..., resume_at=)` goes on with it.

    It is an extended attribute of the file (user.noether_writer.log_update).

    Returns:
        None: nothing was logged, or the file has lost it: by a copy without attributes (`cp` without
        `--preserve=xattr`), or on a file system that keeps none.
    """
    try:
        return int(os.getxattr(path, "user.noether_writer.log_update"))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def distributed_place() -> tuple[int, int] | None:
    """(rank, world size) by torch.distributed, or None where no job is set up."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None


def place_in_job() -> tuple[int, int]:
    """(rank, world size): torch.distributed's, else torchrun's variables, else of a process alone."""
    return distributed_place() or (
        environment.count("RANK", 0, "this process's number in its job"),
        environment.count("WORLD_SIZE", 1, "the number of processes of this job"),
    )


def open_run(
    output_root: str | os.PathLike[str],
    run_id: str,
    stage_name: str | None = None,
    debug: bool = False,
    config: dict[str, Any] | None = None,
    resume_at: int | None = None,
    *,
    rank: int | None = None,
    snapshot: Mode | None = None,
    tensorboard: bool | None = None,
) -> Run:
    """Opens a run; its files go to `<output_root>[/debug]/<run_id>[/<stage_name>]`.

    Args:
        config: the hyperparameters, a dict of plain data; `tracker/config.yaml` holds them under `hp`, in the form of
            Noether's BaseTracker.
        resume_at: keeps the log up to this update, also in the later entries.th; what lies behind is dropped.
        rank: of this process among those that share the run; None finds it out (`place_in_job`).
        tensorboard: whether event files for TensorBoard come with the log, in `tracker/` (`tensorboard --logdir
            <output_root>` shows them); None: as NOETHER_WRITER_TENSORBOARD says (1 or 0), else as the daemon is set.
        snapshot: how `Run.save` takes its snapshots; None: as NOETHER_WRITER_SNAPSHOT says, else `copy`.

    Raises:
        RefusedName, RunInUse, DaemonNotFound, DaemonUnavailable.
    """
    return Run(
        output_root,
        run_id,
        stage_name,
        debug,
        config,
        rank=rank,
        resume_at=resume_at,
        snapshot=snapshot,
        tensorboard=tensorboard,
    )


def _wants_tensorboard() -> bool | None:
    word = os.environ.get("NOETHER_WRITER_TENSORBOARD") or None
    return None if word is None else word != "0"


def plain(value: Any) -> Any:
    """A tensor's or numpy value's Python number; anything else as it is.

    Raises:
        NotOneElement: it has more or fewer elements than one. UnsupportedValue: torch does not give it (meta tensors).
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if (torch is not None and isinstance(value, torch.Tensor)) or (
        numpy is not None and isinstance(value, numpy.generic | numpy.ndarray)
    ):
        try:
            return value.item()
        except (RuntimeError, ValueError) as error:
            what = frames.kind_of(value)
            shape = tuple(value.shape)
            if math.prod(shape) == 1:
                raise UnsupportedValue(f"{what} without a number: {error}") from error
            raise NotOneElement(f"{what} of shape {shape} is no scalar: log its mean, or one element") from error
    return value


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UnsupportedValue(f"{what} is a whole number, not {value!r}") from None


def _config_text(config: Any, run_id: str, stage_name: str | None, world_size: int) -> str:
    if not isinstance(config, dict):
        raise UnsupportedValue(f"config is a dict of plain data, not {frames.kind_of(config)}")
    text = config_yaml(config, run_id, stage_name, world_size)
    if (size := len(text.encode())) > _CONFIG_BYTES:
        raise UnsupportedValue(
            f"config has {size} bytes as YAML; at most {_CONFIG_BYTES}: give hyperparameters, and no data"
        )
    return text


def _check_targets(targets: Sequence[Target]) -> None:
    """
    Raises:
        RefusedName: a file of them can't be. Nothing has been looked at or copied then.
    """
    for target in targets:
        names.component(target.name, "the model name")
        names.component(target.tag, "the tag")
        if target.kind not in KINDS:
            raise RefusedName(f"kind is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {target.kind!r}")
        if target.info:
            names.component(target.info, "info")
        names.component(f"{target.archive}.th", "the file name")
    files = {target.archive for target in targets}
    if not 1 <= len(targets) <= frames.TARGETS:
        raise RefusedName(f"one save writes 1 to {frames.TARGETS} files, not {len(targets)}")
    if len(files) < len(targets):
        raise RefusedName(f"two files of one save have the name {targets[0].archive}.th")


def _exit_seconds() -> float:
    return environment.seconds("NOETHER_WRITER_EXIT_TIMEOUT", _EXIT_SECONDS)


def _at_exit() -> None:
    """A bounded wait for what is not safe yet, and words about what is not then."""
    try:
        limit = _exit_seconds()
    except ValueError:
        # Said when a run was to be opened.
        limit = _EXIT_SECONDS
    deadline = time.monotonic() + limit
    for run in list(_open_runs):
        if run._pid != os.getpid():
            continue
        for words in run._last_words(deadline):
            print(f"noether-writer: run {run.run_id}: {words}", file=sys.stderr)
        run.close()


atexit.register(_at_exit)
