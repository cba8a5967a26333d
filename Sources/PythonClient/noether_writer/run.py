# SPDX-License-Identifier: Apache-2.0
"""Runs: the general API. A run owns one session with the daemon. The session does what must not be left half done."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import math
import operator
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from . import _checkpoints, _core, ending, environment, frames, names, progress, session
from ._keep_best import NAMES, KeepBest, has_number
from .config_file import config_yaml
from .errors import (
    OTHER_VERSION,
    OUT_OF_DESCRIPTORS,
    CheckpointStalled,
    DaemonUnavailable,
    NoetherWriterError,
    NotOneElement,
    ProtocolError,
    RefusedName,
    StorageError,
    UnsupportedValue,
    UpdateOrderError,
    WaitTimeout,
    heeding_limits,
    is_foreign,
)
from .saves import KINDS, MODES, STALL_SECONDS, Kind, Mode, Target, Ticket, begin, look, mode_of, open_saves, wait_all
from .session import ANSWER_SECONDS, STALLED, Session
from .untraced import not_followed, untraced
from .weakly import WeakBag

CLOSE_SECONDS = 60.0
# The config's share of the frame that opens a run; the rest of it needs room too.
_CONFIG_BYTES = frames.PAYLOAD_BYTES // 2
_open_runs: WeakBag[Run] = WeakBag()
# How often an update that finds no room is tried again.
_SLOW_SECONDS = 0.05
# How many of the files that are lost with a process are named.
_FILES_NAMED = 100
# After our own function of atexit has run, each call waits by itself for what it has begun: nothing comes after it.
_settles = False


class Series(list[frames.Scalar]):
    """All values of a key, in the order of their updates: a list of them; `updates` has the update of each."""

    updates: Sequence[int] = ()

    @property
    def values(self) -> list[frames.Scalar]:
        """The values alone, as a new list."""
        return list(self)


class Run:
    """A run with the daemon, made by `open_run`. It is a context manager: leaving it finishes the log and waits.

    Every method may be called from any thread, from a signal's handler and from `__del__`, and may be interrupted
    anywhere: it has then happened whole, or not at all.
    """

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
        resume: Literal["auto"] | None = None,
        snapshot: Mode | None = None,
        tensorboard: bool | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, Literal["min", "max"], int] | None = None,
    ) -> None:
        self._snapshot = self._mode(snapshot or environment.choice("NOETHER_WRITER_SNAPSHOT", "copy", MODES))
        # A variable that cannot be read is found out now, not when the training is over.
        ending.seconds()
        self.run_id = names.component(run_id, "run_id")
        if stage_name is not None:
            names.component(stage_name, "stage_name")
        root = names.path(output_root, "output_root")
        resume_at = None if resume_at is None else _whole(resume_at, "resume_at")
        keep_last = _kept(keep_last, "keep_last")
        keep_every = _kept(keep_every, "keep_every")
        #: What decides which older checkpoints stay for their worth.
        self._best = None if keep_best is None else KeepBest(keep_best)
        config_text = None
        found_rank, found_size = place_in_job()
        self.rank = found_rank if rank is None else rank
        self.world_size = found_size if world_size is None else world_size
        self.logger = logging.getLogger("noether_writer")
        if config is not None and self.rank == 0:
            config_text = _config_text(config, run_id, stage_name, self.world_size)
        self._brings_log = log and self.rank == 0
        if self._best is not None:
            # A process that does not log knows no values: what it saves stays.
            keep_last = (1 if keep_last is None else keep_last) if self._brings_log else 0
        self._removes = bool(keep_last)
        self._has_said: set[str] = set()
        self._finished_at = 0
        self._place = _real(os.path.join(root, "debug" if debug else "", run_id, stage_name or ""))
        if self._brings_log:
            self._finish_older()
        if resume is not None:
            resume_at = self._resumable_update(resume, resume_at)
        #: The update at which the run continues, or None if it begins anew.
        self.resumed_at = resume_at
        self._session = Session(
            {
                "output_root": root,
                "run_id": run_id,
                "stage_name": stage_name,
                "debug": bool(debug),
                "session": uuid.uuid4().hex,
                "log": self._brings_log,
                "rank": self.rank,
                "world_size": self.world_size,
                "node": platform.node(),
                "resume_at": resume_at,
                "progress": True,
                "tensorboard": _wants_tensorboard() if tensorboard is None else tensorboard,
                "umask": heeding_limits(umask),
                "keep_last": keep_last,
                "keep_every": keep_every,
                "config_yaml": config_text,
            }
        )
        self._core = self._session.core
        self._core_log = self._core.log
        if not (keep_last is None is keep_every) and "run_settings" not in self._session.welcome["capabilities"]:
            self.logger.warning(
                "run %s asks for keep_last or keep_every, and this daemon knows only its own settings: restart it "
                "after an update",
                run_id,
            )
        if self._best is not None and "kept_tags" not in self._session.welcome["capabilities"]:
            self._session.close()
            raise ProtocolError(
                f"keep_best needs a newer daemon than {self._session.welcome.get('daemon')}, which would remove the "
                f"best checkpoints too. Nothing was changed; {OTHER_VERSION}"
            )
        # Without this object the session ends as soon as everything has arrived.
        self._tether = self._core.tether()
        self.directory = Path(self._session.directory)
        if resume_at is not None:
            self._resume(resume_at, self._session.opened)
        elif self._brings_log and (entries := self.directory / "tracker" / "entries.th").exists():
            self.logger.warning(
                "run %s has a log already: %s. It is kept beside the new one, under a name with a number. To continue "
                "that log instead, open the run with resume_at=, the last update to keep",
                run_id,
                entries,
            )
        if self._best is not None and self._brings_log and self.last_update is not None:
            found = self.values(self._best.key)
            self._best.recall(self.directory, dict(zip(found.updates, found, strict=True)))
        self._session.keep()
        _open_runs.add(self)
        also_at_the_end_of_a_child()

    def _mode(self, name: str | None) -> Mode:
        return self._snapshot if name is None else mode_of(name)

    def _resumable_update(self, resume: str, resume_at: int | None) -> int | None:
        if resume != "auto":
            raise ValueError(f'resume must be "auto" or None, not {resume!r}; resume_at= takes an update')
        if resume_at is not None:
            raise ValueError('give either resume="auto" or resume_at=, not both')
        _checkpoints.wait_for_run(self.run_id, STALL_SECONDS)
        return _checkpoints.resumable_update(self._place)

    def _finish_older(self) -> None:
        """If this process has opened the run already (in a cell of a notebook), that one is finished first, and nothing
        of it is lost."""
        for run in list(_open_runs):
            if run._brings_log and run._place == self._place and not run._core.is_closed and not run._core.is_forked:
                self.logger.warning(
                    "run %s is opened again by this process: the one that was open is finished first", self.run_id
                )
                run.finish(ANSWER_SECONDS)
                run.close()

    def __repr__(self) -> str:
        if self._core.is_forked:
            state = "of the parent process"
        elif self._core.is_closed:
            state = "closed"
        else:
            state = "open" if self._core.is_open else f"the daemon is away for {self._core.away_seconds:.0f} s"
        last = "nothing logged" if self.last_update is None else f"update {self.last_update}"
        return f"<noether_writer.Run {self.run_id!r} in {str(self.directory)!r}: {state}, {last}>"

    @property
    def last_update(self) -> int | None:
        """The last update that was logged, or None."""
        return self._core.last_update

    @property
    def log_durable_update(self) -> int | None:
        """The last update that survives a power cut, or None."""
        return self._core.durable_update

    @property
    def entry_count(self) -> int:
        """The number of rows of the log, one for each update."""
        return self._core.rows

    def _resume(self, update: int, opened: dict[str, Any]) -> None:
        """Resumes the log up to `update`: from the daemon if it still has it, or else from entries.th."""
        self._take_log_on(update, opened)
        if self.rank == 0 and (self.last_update is None or self.last_update < update):
            end = "is empty" if self.last_update is None else f"ends at update {self.last_update}"
            self.logger.warning(
                "resume_at=%d, but the log of run %s %s (%s): it continues from there",
                update,
                self.run_id,
                end,
                self.directory,
            )

    def _take_log_on(self, update: int, opened: dict[str, Any]) -> None:
        if opened.get("log_entries"):
            self._core.take_log_on(opened["log_update"], opened["log_entries"])
            return
        file = self.directory / "tracker" / "entries.th"
        if self.rank != 0 or not file.exists():
            return
        import torch

        rows: dict[int, dict[str, Any]] = {}
        try:
            entries = torch.load(file, weights_only=True)
        except Exception as error:
            if is_foreign(error):
                raise
            raise StorageError(
                errno.EIO,
                f"{file}, the log to resume, cannot be read ({type(error).__name__}): it is left as it is. "
                "`noether-writer verify` says what is broken; move it away to begin with an empty log",
                str(file),
            ) from None
        for key, values in entries.items():
            for row, value in values.items():
                if row <= update:  # guard: cut-from-the-file (always)
                    rows.setdefault(row, {})[key] = value
        for row in sorted(rows):
            self.log(rows[row], row)

    @not_followed
    def log(
        self, values: Mapping[str, Any], update: int | None = None, *, epoch: Any = None, sample: Any = None
    ) -> None:
        """Logs scalars of one update. It does not wait.

        Args:
            values: a dict of keys and scalars: float, int, bool, str, None, or a tensor or numpy value of one element.
                A dict below a key becomes keys `key/...`.
            update: larger than the last one, or equal to it. If it is equal, the values are added to that row, and a
                key that the row has already gets the later value (said once). None: the update after the last one.

        Raises:
            UpdateOrderError, UnsupportedValue, DaemonUnavailable, LogFull: nothing of these values was logged. Also
            errors of earlier updates, each once.

        A process that is not rank 0 logs nothing, and says so once: the ranks of one job share a run and its log.
        """
        if self.rank != 0:
            self._say_once(
                f"this is rank {self.rank}, and rank 0 writes the log of run {self.run_id}: nothing is logged here"
            )
            return
        if self._session.errors:
            self._session.raise_next_error()
        if self._best is not None:
            self._look(values, update)
        try:
            code = self._core_log(values, update, epoch, sample, False)
        except RuntimeError as error:
            if _is_theirs(error):
                raise
            # Whoever looks closer says what is wrong.
            code = _core.NOT_PLAIN
        if code:
            self._log(code, values, update, epoch, sample)
        if _settles:
            self._settle()

    @untraced
    def _look(self, values: Mapping[str, Any], update: int | None) -> None:
        assert self._best is not None
        if update is None:
            update = 0 if self.last_update is None else self.last_update + 1
        if isinstance(values, Mapping):
            self._best.look(values, int(update))

    @untraced
    def _log(self, code: int, values: Mapping[str, Any], update: int | None, epoch: Any, sample: Any) -> None:
        """An update that was not simply logged: `code` says why.

        Its values become plain before it gets a number, because their code may itself log, or raise.
        """
        if code in (_core.SLOW, _core.NOT_PLAIN) and (quick := _quick(values, update)) is not None:
            code = self._put(quick, update, epoch, sample, False)
        if code in (_core.SLOW, _core.NOT_PLAIN, _core.NO_NUMBER):
            if update is not None:
                update = _update(update)
            flat: dict[str, Any] = {}
            for name, extra in (("epoch", epoch), ("sample", sample)):
                if extra is not None:
                    flat[name] = _scalar(name, extra, update)
            for name, value in _flat(values, update):
                if name in flat:
                    self._say_twice()
                flat[name] = value
            if len(flat) > frames.VALUES_PER_LOG:  # guard: client-values-of-an-update (never)
                raise UnsupportedValue(
                    f"{_named(update)} has {len(flat)} values; at most {frames.VALUES_PER_LOG} fit into one"
                )
            code = self._put(flat, update, None, None, True)
        if code != _core.LOGGED:
            self._logged(code, values, update)

    def _put(self, values: Mapping[str, Any], update: int | None, epoch: Any, sample: Any, is_converted: bool) -> int:
        """Gives an update to `_core`; waits for a daemon that is there and takes updates more slowly than they come."""
        while (code := self._core_log(values, update, epoch, sample, is_converted)) == _core.SLOW:
            self._session.wait(self._core.generation, _SLOW_SECONDS)
        return code

    def _logged(self, code: int, values: Mapping[str, Any], update: int | None) -> None:
        """Says what `_core` says of an update that was not simply logged."""
        if code == _core.LOGGED_TWICE:
            self._say_twice()
        elif code == _core.NOT_KEPT:
            self._say_once(
                f"{self._session.full()}; training continues, and the log has a gap until the daemon is back "
                "(NOETHER_WRITER_WHEN_AWAY=raise stops instead)",
                logging.ERROR,
            )
        elif code == _core.QUEUE_FULL:
            raise DaemonUnavailable(self._session.full())
        elif code in (_core.CLOSED, _core.FORKED):
            self._session.check_open()
        elif code == _core.IN_DISORDER:
            raise UpdateOrderError(
                f"{_named(update)} is not larger than the last one, {self.last_update}: nothing of it was logged"
                if update is not None
                else f"no update can come after {self.last_update}: nothing of it was logged"
            )
        elif code == _core.TOO_MANY_KEYS:
            raise UnsupportedValue(
                f"{_named(update)} would give this run more than {frames.KEYS_PER_RUN} keys: a key should name what "
                "is measured, and not contain data"
            )
        elif code == _core.TOO_LARGE:
            raise UnsupportedValue(
                f"{_named(update)} and the names of its keys have more than {frames.PAYLOAD_BYTES} bytes, and at most "
                "that many fit into one: write long texts to a file, use shorter keys, or log some in another update"
            )
        elif code == _core.NO_MEMORY:
            raise MemoryError(f"{_named(update)} was not logged")
        else:
            # That the log has ended was said when it did.
            assert code == _core.LOG_ENDED, f"{code} for {values!r}"

    def _say_twice(self) -> None:
        self._say_once(
            f"a key was logged twice at one update of run {self.run_id} (the last is {self.last_update}): its last "
            "value is kept. This is said once"
        )

    def _say_once(self, words: str, level: int = logging.WARNING) -> None:
        kind = words.split(" ")[0]
        if kind not in self._has_said:  # guard: client-warns-once (always)
            self._has_said.add(kind)
            self.logger.log(level, "%s", words)

    @not_followed
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
            snapshot: `copy` returns after one memory copy. `overlap` returns before it: the copy continues beside the
                trainer, and an optimizer's step, or the replay of a CUDA graph, waits for the rest of it. Other code
                that changes tensors must call `ticket.wait_snapshot()` first. If other code changes a tensor before
                the copy ends, that save fails (`ticket.wait` raises `SnapshotChanged`) and no file is damaged.
                Storages up to 64 KiB are copied before the call returns, so running statistics may change. None: as
                the run was opened.

        Which changes `overlap` notices: on Linux 6.7 and newer, every write of this process to the memory of a tensor
        on the CPU, whatever wrote it. A tensor in a mapped file, in shared memory or in pinned memory is copied before
        the call returns.

        On an older kernel, or if a sandbox refuses userfaultfd, torch's counters of changes in place are all there is.
        The call then copies these before it returns: a tensor without a counter, a tensor that shares its storage with
        another of the save or does not fill it, and a tensor in memory that is not torch's own; and all tensors if
        another thread than the main one saves. For the others these changes are not noticed, and damage the file:
        through `.data` or a numpy view; through a tensor outside of the save that shares the memory and has a counter
        of its own; by code that is not torch's; and by an operation of another thread that has not ended with the copy.
        Use `snapshot="copy"` with these.

        On CUDA, in both modes, the device sums up each storage in the order of the stream that is current during the
        call, and the copy must have the same sum: if another stream changes it in between, the save fails. A change
        that keeps the sum of a storage's 64-bit words, such as their exchange, is not noticed.

        Raises:
            what pickling raises, RefusedName, PoolExhausted, StorageError (no memory for a copy), TorchMissing:
            nothing was sent. Also errors of earlier saves that no other call has raised.
        """
        # A number is a tag too, but None is not.
        tag = tag if tag is None else str(tag)
        return self.save_as([Target(name, tag, obj, kind, info)], snapshot=snapshot)

    @untraced
    def save_as(self, targets: Sequence[Target], *, snapshot: Mode | None = None) -> Ticket:
        """Saves several files at one moment, from one copy if they hold the same storages (a tag and `latest`).

        Raises:
            as `save`; if pickling fails, none of the files was sent.
        """
        self._session.check_open()
        _check_targets(targets)
        if self._removes:
            self._say_unnumbered(targets)
        best, now = self._best, []
        if best is not None and self._brings_log:
            now = best.save([(target.tag, target.file) for target in targets], self.last_update)
            on_their_way = {file for save in open_saves(self._session) for file in save.files}
            kept = best.kept(now, on_their_way, self.directory / "checkpoints")
            targets = [replace(target, kept=[*target.kept, *kept]) for target in targets]
        ticket = begin(self._session, targets, self._mode(snapshot), self.last_update)
        if best is not None:
            best.begun(now)
        if _settles:
            self._settle()
        return ticket

    def _say_unnumbered(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if not has_number(target.tag) and target.tag not in NAMES:
                self._say_once(
                    f"keep_last: the tag {target.tag!r} has no number, so checkpoints with such a tag are never "
                    "removed. This is said once"
                )

    def wait(self, timeout: float | None = None) -> None:
        """Returns when all saves of this run are durable. Raises the error of the first that failed, or as
        `Ticket.wait`."""
        timeout, deadline = ending.bounded(timeout)
        self._wait_until(deadline, timeout)

    def _wait_until(self, deadline: float | None, timeout: float | None) -> None:
        wait_all(self._session, deadline, timeout)

    def _open_tickets(self) -> list[Ticket]:
        return [Ticket(self._session, [save]) for save in open_saves(self._session)]

    def values(self, key: str) -> Series:
        """Returns all values of a key, from the daemon."""
        found, updates = Series(), list[int]()
        while True:
            deadline = time.monotonic() + ending.within(ANSWER_SECONDS)
            page = self._session.ask(frames.VALUES, {"key": key, "from": len(found), "limit": 20_000}, deadline)
            total, page_updates, values = frames.unpack_values_page(page.payload)
            found += values
            updates += page_updates
            if len(found) >= total or not values:
                found.updates = updates
                return found

    def entries(self, start: int, limit: int) -> list[dict[str, Any]]:
        """Returns rows of the log, from the daemon, each with its `update`."""
        rows: list[dict[str, Any]] = []
        while limit > len(rows):
            deadline = time.monotonic() + ending.within(ANSWER_SECONDS)
            page = self._session.ask(frames.ENTRIES, {"from": start + len(rows), "limit": limit - len(rows)}, deadline)
            _, entries = frames.unpack_entries_page(page.payload)
            if not entries:
                break
            for update, entry in entries:
                row: dict[str, Any] = {"epoch": entry.pop("epoch")} if "epoch" in entry else {}
                # A key with this name is in entries.th only; in a row the name stands for its update.
                entry.pop("update", None)
                row["update"] = update
                rows.append(row | entry)
        return rows

    def flush(self, timeout: float | None = None) -> None:
        """Returns when the daemon holds every update that was logged and every save that was begun. From then on they
        survive this process.

        Args:
            timeout: in seconds; None waits as long as the daemon is there.

        Raises:
            DaemonUnavailable: the daemon has been away for a minute.
            WaitTimeout: the daemon has not taken them in time.
            NoetherWriterError: the daemon refuses an update, and says why.
        """
        if self._core.is_forked:
            self._session.check_open()
        timeout, deadline = ending.bounded(timeout)
        self._session.wait_sent(deadline)
        self._session.wait_taken(deadline, timeout)
        self._session.say_gap()

    def finish(self, timeout: float | None = None) -> None:
        """Returns when entries.th and all checkpoints are durable. What is logged later is written by the next
        `finish`.

        Args:
            timeout: in seconds, for all of it; None waits as long as storage accepts data and the daemon answers.

        Raises:
            CheckpointStalled, DaemonUnavailable, WaitTimeout: the daemon continues; call again to wait for it.
        """
        if self._core.is_forked:
            self._session.check_open()
        timeout, deadline = ending.bounded(timeout)
        if not (self._finished_at and self._finished_at == self._core.sequence):
            # The answer is only about what the daemon has.
            self._session.wait_sent(deadline)
            if not (sequence := self._core.number()):
                self._session.check_open()
            try:
                with progress.shown(self._open_tickets()):
                    self._session.ask(frames.FINISH, {"sequence": sequence}, deadline, lambda: look(self._session))
            except CheckpointStalled:
                raise
            except WaitTimeout:
                reason = next((reason for save in open_saves(self._session) if (reason := save.reason)), None)
                if reason is None:
                    raise
                raise CheckpointStalled(f"run {self.run_id} is not durable yet: {reason}. {STALLED}") from None
            self._finished_at = sequence
        if self._core.is_closed:
            return
        self._wait_until(deadline, timeout)
        self._session.say_gap()
        self._session.raise_log_damage()
        # It is about updates that the daemon has refused; nobody was told of it.
        self._session.raise_next_error()

    def close(self) -> None:
        """Ends the session; the daemon finishes what it has accepted. In a forked child it does nothing."""
        _open_runs.discard(self)
        if not self._core.is_forked and not self._core.is_over:
            self._session.wait_sent(time.monotonic() + ending.within(CLOSE_SECONDS))
            self._session.close()
            if _settles:
                self._settle()

    def _settle(self) -> None:
        """Waits for what was begun, and says what is lost."""
        say_last_words(self._session, ending.begin())

    def __reduce__(self) -> Any:
        raise TypeError(
            "a run cannot be pickled, because its connection belongs to this process: open one in the other process"
        )

    def __copy__(self) -> Run:
        return self

    def __deepcopy__(self, memo: Any) -> Run:
        """A copy of what holds a run (of a model, for an average) holds the same run."""
        return self

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


def log_update(path: str | os.PathLike[str]) -> int | None:
    """Returns the last update in the log when a checkpoint was saved: `open_run(..., resume_at=)` takes it.

    It is an extended attribute of the file (user.noether_writer.log_update).

    Returns:
        None if nothing was logged, or if the file has lost it: by a copy without attributes (`cp` without
        `--preserve=xattr`), or on a file system that keeps none.
    """
    try:
        return int(os.getxattr(path, _checkpoints.LOG_UPDATE))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def distributed_place() -> tuple[int, int] | None:
    """(rank, world size) of torch.distributed, or None if no job is set up."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None


def place_in_job() -> tuple[int, int]:
    """(rank, world size): those of torch.distributed, or else torchrun's variables, or else those of a single
    process."""
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
    resume: Literal["auto"] | None = None,
    rank: int | None = None,
    snapshot: Mode | None = None,
    tensorboard: bool | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: tuple[str, Literal["min", "max"], int] | None = None,
) -> Run:
    """Opens a run; its files go to `<output_root>[/debug]/<run_id>[/<stage_name>]`.

    Args:
        config: the hyperparameters, a dict of plain data; `tracker/config.yaml` has them under `hp`, in the form of
            Noether's BaseTracker.
        resume: "auto" continues the run at the update of its newest checkpoint, as `resume_at` does, or begins it if it
            has none. `run.resumed_at` is that update, or None; `noether_writer.latest(run.directory)` is the checkpoint
            to load. What an earlier process has handed to the daemon is waited for, for up to 30 s.
        resume_at: keeps the log up to this update, also in the later entries.th; what comes after it is dropped.
        rank: the number of this process among those that share the run; None finds it out (torch.distributed, or
            else RANK).
        tensorboard: whether the daemon writes event files for TensorBoard into the run's directory (`tensorboard
            --logdir <output_root>` shows them). None: as NOETHER_WRITER_TENSORBOARD says (1 or 0), or else as the
            daemon is set.
        snapshot: how `Run.save` takes its snapshots: `copy` or `overlap`. None: as NOETHER_WRITER_SNAPSHOT says, or
            else `copy`.
        keep_last: how many checkpoints are kept of those whose tag has a number (E1_U200_S800, step-1000), of each
            model and kind and scheme of tags: the newest ones; 0 keeps all. None: as NOETHER_WRITER_KEEP_LAST says, or
            else as the daemon is set.
        keep_every: older ones whose update (or else epoch, or else sample) is a multiple of this stay too; 0
            keeps none of them. None: as NOETHER_WRITER_KEEP_EVERY says, or else as the daemon is set.
        keep_best: (key, "min" or "max", n): the n checkpoints stay too at which this key of the log was lowest or
            highest, by the rule of `best`. Without `keep_last`, these and the newest one stay.

    The files of the run have the modes that this process's umask gives them at this moment.

    Raises:
        RefusedName, RunInUse, DaemonNotFound, DaemonUnavailable, OutOfDescriptors.
    """
    return Run(
        output_root,
        run_id,
        stage_name,
        debug,
        config,
        rank=rank,
        resume_at=resume_at,
        resume=resume,
        snapshot=snapshot,
        tensorboard=tensorboard,
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=keep_best,
    )


def _kept(number: int | None, name: str) -> int | None:
    """A number of checkpoints, or None if neither the caller nor the environment gives one."""
    if number is None:
        variable = f"NOETHER_WRITER_{name.upper()}"
        return (
            environment.count(variable, 0, "a number of checkpoints, in digits") if os.environ.get(variable) else None
        )
    whole = _whole(number, name)
    if whole < 0:
        raise ValueError(f"{name} must be a number of checkpoints, 0 or more, not {frames.shown(number)}")
    return whole


def umask() -> int | None:
    """This process's. Read, since umask(2) could only tell it by setting another one, under other threads' feet."""
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError as error:
        # Its files would get other modes, for want of a descriptor.
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
    return None


def _wants_tensorboard() -> bool | None:
    word = os.environ.get("NOETHER_WRITER_TENSORBOARD") or None
    return None if word is None else word != "0"


# The types that `_core` takes, and those for which `plain` has found that `item` gives a number.
_ATOMS = frozenset((float, int, bool, str, type(None)))
_item_types: set[type] = set()
# Whose values have an `item`.
_ARRAYS = frozenset((("torch", "Tensor"), ("numpy", "generic"), ("numpy", "ndarray")))
# torch.Tensor, once one was logged.
_tensor: Any = None


def _quick(values: Any, update: Any) -> dict[str, Any] | None:
    """The same with the numbers of tensors and of numpy's values in their place; None if it needs a closer look.

    Raises:
        UnsupportedValue.
    """
    if type(values) is not dict:
        return None
    row = dict(values)
    try:
        for key, value in row.items():
            kind = type(value)
            if kind is _tensor:
                row[key] = _tensor.item(value)
            elif kind in _item_types:
                try:
                    row[key] = _number(value)
                except UnsupportedValue as error:
                    raise _refused(error, key, update) from error.__cause__
            elif kind not in _ATOMS:
                return None
    except RuntimeError as error:
        if _is_theirs(error):
            raise
        # Whoever looks closer says what is wrong.
        return None
    return row


def _is_theirs(error: RuntimeError) -> bool:
    """Whether the trainer's code has raised it in the middle of a call, and not torch. A handler of the trainer may
    save or log: what that raises is the trainer's too."""
    return is_foreign(error) or isinstance(error, NoetherWriterError)


def _flat(values: Any, update: int | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, plain value), with the keys of dicts within dicts joined by slashes.

    Raises:
        UnsupportedValue.
    """
    if not isinstance(values, Mapping):
        raise UnsupportedValue(f"log takes a dict of keys and scalars, not {frames.kind_of(values)}")
    for key, value in values.items():
        if not isinstance(key, str):
            raise UnsupportedValue(f"the key {frames.shown(key)} is {frames.kind_of(key)}: a key must be a text")
        name = prefix + str.__str__(key)
        if isinstance(value, Mapping):
            yield from _flat(value, update, f"{name}/")
        else:
            frames.check_key(name)
            yield name, _scalar(name, value, update)


def _scalar(key: str, value: Any, update: int | None) -> Any:
    """The value as `_core.Session.log` takes it: bytes stand for an integer of more than 64 bits."""
    try:
        return frames.scalar(plain(value))
    except UnsupportedValue as error:
        raise _refused(error, key, update) from error.__cause__


def _refused(error: UnsupportedValue, key: Any, update: Any) -> UnsupportedValue:
    return type(error)(f"{frames.shown(key)} of {_named(update)}: {error}. Nothing of it was logged")


def _named(update: Any) -> str:
    return "the next update" if update is None else f"update {frames.shown(update, str)}"


def _update(update: Any) -> int:
    number = _whole(update, "update")
    if not frames.NO_UPDATE < number < 1 << 63:
        raise UnsupportedValue(f"update {frames.shown(number, str)} does not fit into 64 bits")
    return number


def plain(value: Any) -> Any:
    """Returns the Python number of a tensor or a numpy value; anything else as it is.

    Raises:
        NotOneElement: it has not exactly one element. UnsupportedValue: torch gives no number (meta tensors), or is
            gone.
    """
    global _tensor
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if (torch is not None and isinstance(value, torch.Tensor)) or (
        numpy is not None and isinstance(value, numpy.generic | numpy.ndarray)
    ):
        _check_whole(value)
        number = _number(value)
        if not hasattr(value, "placements"):
            _item_types.add(type(value))
        if torch is not None:
            _tensor = torch.Tensor
            _core.know_tensor(_tensor)
        return number
    for kind in type(value).__mro__:
        if (kind.__module__, kind.__name__) in _ARRAYS and sys.modules.get(kind.__module__) is None:
            # Some finalizers run only when the interpreter has let go of its modules.
            raise UnsupportedValue(
                f"{frames.kind_of(value)} cannot be read any more, because {kind.__module__} is gone: this process "
                "ends. Log it earlier, or log a number of Python"
            )
    return value


def _check_whole(value: Any) -> None:
    """
    Raises:
        UnsupportedValue: it is a DTensor of which each rank has a part of the number. `item` would give this rank's
            part, and no error.
    """
    for dimension, placement in enumerate(getattr(value, "placements", ())):
        if placement.is_partial() and value.device_mesh.size(dimension) > 1:
            raise UnsupportedValue(
                f"{frames.kind_of(value)} whose placements are {value.placements} is this rank's part of a number: log "
                "its full_tensor(), which every rank must call"
            )


def _number(value: Any) -> Any:
    """The number of a tensor, or of a value of numpy.

    Raises:
        as `plain`.
    """
    try:
        shape = value.shape
    except RuntimeError as error:
        if is_foreign(error):
            raise
        # A nested tensor, or a parameter that is not there yet.
        raise UnsupportedValue(f"{frames.kind_of(value)} without a shape has no number") from error
    if shape and math.prod(shape) != 1:
        raise NotOneElement(
            f"{frames.kind_of(value)} of shape {tuple(shape)} is not a scalar: log its mean, or one element"
        )
    # Values without a number, or with one in a unit that the log has no place for.
    if getattr(value, "mask", False) is not False and bool(value.mask):
        raise UnsupportedValue(f"{frames.kind_of(value)} that is masked has no number")
    if getattr(value.dtype, "kind", "") in ("m", "M"):
        raise UnsupportedValue(f"{frames.kind_of(value)} is a time: log it as a number, in a unit that the key names")
    try:
        return value.item()
    except (RuntimeError, ValueError) as error:
        if is_foreign(error):
            raise
        raise UnsupportedValue(f"{frames.kind_of(value)} without a number: {error}") from error


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UnsupportedValue(f"{what} must be a whole number, not {frames.shown(value)}") from None


def _config_text(config: Any, run_id: str, stage_name: str | None, world_size: int) -> str:
    if not isinstance(config, dict):
        raise UnsupportedValue(f"config must be a dict of plain data, not {frames.kind_of(config)}")
    text = config_yaml(config, run_id, stage_name, world_size)
    if (size := len(text.encode())) > _CONFIG_BYTES:
        raise UnsupportedValue(
            f"config has {size} bytes as YAML; at most {_CONFIG_BYTES} are possible: give hyperparameters, and no data"
        )
    return text


def _check_targets(targets: Sequence[Target]) -> None:
    """
    Raises:
        RefusedName: one of the files cannot exist. Nothing has been copied then.
    """
    for target in targets:
        names.component(target.name, "the model name")
        names.component(target.tag, "the tag")
        if target.kind not in KINDS:
            raise RefusedName(f"kind must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {target.kind!r}")
        if target.info:
            names.component(target.info, "info")
        names.component(f"{target.archive}.th", "the file name")
    files = {target.archive for target in targets}
    if not 1 <= len(targets) <= frames.TARGETS:
        raise RefusedName(f"one save writes 1 to {frames.TARGETS} files, not {len(targets)}")
    if len(files) < len(targets):
        raise RefusedName(f"two files of one save have the name {targets[0].archive}.th")


def _real(path: str) -> str:
    """The path without symbolic links; as it is if that changes while it is looked at."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def say_last_words(session: Session, deadline: float) -> None:
    """Waits until `deadline` for what is not safe yet, and says what is lost, also if the wait is interrupted."""
    try:
        _wait_safe(session, deadline)
    finally:
        for words in _last_words(session):  # guard: last-words (= [] for _last_words(session))
            _print(f"noether-writer: {session.title}: {words}")


def _wait_safe(session: Session, deadline: float) -> None:
    """Returns when everything is durable, or at `deadline`."""
    core = session.core
    while core.has_work and not core.is_over and not core.is_forked:
        generation = core.generation
        # The session's thread may be busy, or gone with the interpreter's threads.
        session.send_pending()
        if not core.is_kept and not session.keep():
            session.help()
        left = deadline - time.monotonic()
        if not core.has_work or left <= 0:
            break
        core.wait(generation, min(0.05, left))


def _last_words(session: Session) -> list[str]:
    """What a person should know of what is not safe now."""
    core = session.core
    session.hear()
    words: list[str] = []
    files_lost: list[str] = []
    after = 0
    while (save := core.find(after, False)) is not None:
        after = save.sequence + 1
        if not save.is_accepted:
            files_lost += save.files
            continue
        if core.is_closed:
            # Whoever closes the run leaves it to the daemon.
            continue
        files = ", ".join(path for path in save.paths if path) or ", ".join(save.files)
        why = f": {save.reason}" if save.reason else ""
        words.append(f"{files} is not durable yet{why}. The daemon has it, and continues after this process")
    while (save := core.find(0, True)) is not None:
        save.tell()
        words.append(str(save.make_error()))
    while (error := session.next_error()) is not None:
        words.append(str(error))
    # A file that was saved again and again is named once.
    names = list(dict.fromkeys(files_lost))
    lost = names[:_FILES_NAMED]
    if more := len(names) - len(lost):
        lost.append("another file" if more == 1 else f"{more} other files")
    if updates := core.kept_rows:
        lost.append("the last update of the log" if updates == 1 else f"the last {updates} updates of the log")
    if gap := session.gap():
        words.append(gap)
    if lost:
        # A daemon may still read what the socket holds already.
        is_away = core.away_seconds > 0
        why = "LOST with this process, the daemon is away" if is_away else "lost unless the daemon still takes it"
        words.append(f"{why}: {', '.join(lost)}. Older files stay")
    return list(dict.fromkeys(words))


def _print(words: str) -> None:
    # A program's own object in the place of standard error may be gone or broken by now: then the first one is taken.
    for stream in (sys.stderr, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(Exception):
                print(words, file=stream)
                return


def _at_exit() -> None:
    """Waits for what is not safe yet, for a bounded time, and says what is not safe after it."""
    global _settles
    deadline = ending.begin()
    _settles = True
    interrupt: BaseException | None = None
    for found in session.sessions | {run._session for run in _open_runs}:
        if found.core.is_forked:
            continue
        try:
            say_last_words(found, deadline)
        except BaseException as error:
            # Somebody does not want to wait, for any run. For each run it is said what that loses.
            interrupt = error
            deadline = 0.0
    try:
        session.dismiss()
    except BaseException as error:
        interrupt = error
    if interrupt is not None:
        raise interrupt


def settles() -> bool:
    """Whether the end of the process has come so far that each call waits by itself for what it has begun."""
    return _settles


def also_at_the_end_of_a_child() -> None:
    """A forked child of multiprocessing ends by os._exit: multiprocessing's finalizers run, and atexit's do not."""
    global _finalizes
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None and _finalizes != os.getpid():
        _finalizes = os.getpid()
        multiprocessing.util.Finalize(None, _at_exit, exitpriority=_EXIT_PRIORITY)


# It runs before multiprocessing ends what the child itself has started.
_EXIT_PRIORITY = 100
_finalizes = 0
atexit.register(_at_exit)
