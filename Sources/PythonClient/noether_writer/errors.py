# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as types. Each message says what happened, what was kept, and what to do.

docs/ERRORS.md lists them with more words. Codes are those of docs/PROTOCOL.md, section 7; `of_wire` turns an `error`
message into its type.
"""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

#: What to do if the daemon and the client have versions that do not understand one another.
OTHER_VERSION = (
    "use one version of noether-writer on both sides, and restart the daemon after an update (see docs/ERRORS.md)"
)


class NoetherWriterError(Exception):
    """The base of all errors of this library. An error of pickling is raised as it is, and nothing is sent then; a
    variable of the environment that cannot be read is a ValueError, at once."""


class DaemonNotFound(NoetherWriterError):
    """No daemon listens, and none could be started. Nothing was sent. Install noether-writerd, or read the end of its
    log, which the message quotes."""


class DaemonUnavailable(NoetherWriterError, ConnectionError):
    """The daemon is away or does not answer. It finishes what it has accepted; the rest is kept in this process and
    sent to the next daemon. Continue to train, or wait again."""


class WrongSocket(DaemonUnavailable):
    """No daemon of this user can be at that path: it belongs to another user, is not a socket, or is too long.
    Nothing was sent or changed. Correct NOETHER_WRITER_SOCKET, or unset it."""


class ProtocolError(NoetherWriterError):
    """The daemon and this library do not understand one another. The daemon finishes what it has accepted. Use one
    version on both sides, and restart the daemon after an update."""


class RefusedName(NoetherWriterError, ValueError):
    """A run id, stage, model name, tag or info cannot be one part of a path, or a path is not a path. Nothing was
    written. Choose another name."""


class DamagedCheckpoint(NoetherWriterError):
    """What was read of a sharded checkpoint is not what was saved: its checksum differs. What was read before it is in
    the tensors that were to be loaded. Load another checkpoint."""


class UnknownRun(NoetherWriterError, KeyError):
    """The daemon does not know the run that is to be followed, or a directory is not the directory of a run. The files
    of the run may be there: read them with `noether-writer show DIRECTORY`."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TooSlow(NoetherWriterError):
    """The reader of a subscription had not read every row when the run ended, and then read nothing for a while.
    Nothing is lost: all rows are in the run's entries.th."""


class DaemonBusy(NoetherWriterError):
    """The daemon has no room: storage was too slow for longer than a save may wait (NOETHER_WRITER_POOL_TIMEOUT), or
    too many connections are open. Nothing of this save was written, and older files are as they were. Save less often,
    or raise `snapshot_bytes` in the daemon's settings."""


class RunInUse(NoetherWriterError):
    """Another living process has this run, or this rank of it, whatever the spelling of its path. Nothing was changed.
    End that process, or choose another run id."""


class NameInUse(RefusedName):
    """Another rank of the job has saved a file of this name in this run, and this save would have replaced it. Nothing
    of this save was written, and the other rank's file is as it was. Put the rank into the name, save on rank 0 only,
    or save sharded state with `noether_writer.dcp`."""


class LogTakenOver(NoetherWriterError):
    """A newer writer of this process writes the log of this run now, and began it anew, or another rank writes it.
    Further updates of this writer are not logged; what it has logged before is kept in a file. Use the newer one, or
    log on rank 0."""


class LogFull(NoetherWriterError):
    """The run's log has reached the daemon's limit (its setting `log_bytes_per_run`), or the logs of all runs together
    have (`log_bytes`), and this one has more than its share. What was logged before is kept, and nothing is added.
    Raise the limit, or log less often."""


class LogDamaged(NoetherWriterError):
    """Updates of this run's log that the daemon had acknowledged are gone: its journal was damaged or removed. The rows
    before them and those after them are kept, and a damaged journal is kept beside the log. Check the disk, and go back
    to a checkpoint with `resume_at` if the missing rows matter."""


class NotRankZero(NoetherWriterError, RuntimeError):
    """This is no longer raised: a process of a job that is not rank 0 logs nothing, and says so once. The name stays
    for programs that catch it."""


class UpdateOrderError(NoetherWriterError, AssertionError):
    """An update is smaller than the last one that was logged (for LogWriter: not larger). Nothing of it was logged. To
    go back to an earlier update, open the run with `resume_at`."""


class DuplicateKeyError(NoetherWriterError, KeyError):
    """A key came twice in one update. The first value stays. Give the second value another key."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedValue(NoetherWriterError, TypeError):
    """A value is not a scalar, a key is not a text, or something is larger than a message can be. Nothing of this
    update or save was sent."""


class NotOneElement(UnsupportedValue, RuntimeError):
    """A tensor or array that has not exactly one element is not a scalar (torch's own error is a RuntimeError). Nothing
    of this update was logged. Log its mean, or each element under a key of its own."""


class TorchMissing(NoetherWriterError, ImportError):
    """A checkpoint was to be saved, and torch cannot be imported. Nothing was saved; logging works without torch.
    Install torch."""


class PoolExhausted(NoetherWriterError, TimeoutError):
    """All memory for buffers (NOETHER_WRITER_POOL_BYTES) is in use by saves on their way, and none came back in time.
    This save was not made; earlier ones continue. Free storage, save less often, or raise the limit."""


class SnapshotChanged(NoetherWriterError, RuntimeError):
    """A tensor was changed while it was copied: in overlap mode, or on a device by a stream that nobody waited for.
    Nothing was sent, and older files are as they were. Call `ticket.wait_snapshot()` before the change, or save with
    `snapshot="copy"`; on a device, synchronize with that stream before the save."""


class StorageError(NoetherWriterError, OSError):
    """The file system refused a file for good; `errno` and `filename` say how and where. Older files are as they were.
    Correct what the message names, and save again."""

    def __str__(self) -> str:
        # The words name the path already, which OSError's would add.
        return self.strerror if self.errno and self.strerror else super().__str__()


class OutOfDescriptors(NoetherWriterError, OSError):
    """This process, or the machine, has no descriptor left for a connection to the daemon. Nothing was sent, and what
    the daemon has accepted is safe with it. Close files, or raise the limit (`ulimit -n`)."""

    def __str__(self) -> str:
        return self.strerror if self.errno and self.strerror else super().__str__()


class WaitTimeout(NoetherWriterError, TimeoutError):
    """The save or the log was not durable within the given time. Nothing is lost, and the daemon continues.
    Wait again."""


class CheckpointStalled(WaitTimeout):
    """Storage refuses for now (full, quota, I/O error, read-only). The daemon keeps the bytes and tries again. Free
    space or correct the permissions, and wait again."""


_OURS = frozenset(("noether_writer", "torch", "numpy"))


def is_foreign(error: BaseException) -> bool:
    """Whether code of the trainer has raised this (mostly a signal handler that ran in the middle of a call), and not
    this library or what it calls. Such an error goes to the trainer as it is, whatever its type."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return module not in _OURS and module not in sys.stdlib_module_names


#: Numbers of an OSError.
OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def heeding_limits(call: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
    """What `call` returns.

    Raises:
        OutOfDescriptors, and what `call` raises.
    """
    try:
        return call(*args, **kwargs)
    except OSError as error:
        if error.errno not in OUT_OF_DESCRIPTORS or is_foreign(error) or isinstance(error, NoetherWriterError):
            raise
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            whose = f"this process has none left (`ulimit -n` is {limit}): close files, or raise the limit"
        else:
            whose = "this machine has none left: close files, or raise the limit (fs.file-max)"
        raise OutOfDescriptors(error.errno, f"a connection to the daemon needs a descriptor, and {whose}") from None


#: This library's own code beside those of the protocol: the daemon cannot know what it has forgotten.
LOG_DAMAGED = "log-damaged"
_BY_CODE: dict[str, type[NoetherWriterError]] = {
    "bad-name": RefusedName,
    "bad-path": RefusedName,
    "bad-key": UnsupportedValue,
    "bad-rank": UnsupportedValue,
    "wrong-user": WrongSocket,
    "run-in-use": RunInUse,
    "name-in-use": NameInUse,
    "unknown-run": UnknownRun,
    "too-slow": TooSlow,
    "log-taken-over": LogTakenOver,
    "update-order": UpdateOrderError,
    "log-full": LogFull,
    LOG_DAMAGED: LogDamaged,
    "draining": DaemonUnavailable,
    "busy": DaemonBusy,
    "too-many": DaemonBusy,
}
_OF_VERSIONS = ("unsupported-version", "unknown-type")


def of_wire(error: dict[str, Any], path: str | None = None) -> NoetherWriterError:
    """The exception for an `error` object of the protocol."""
    code, message = str(error.get("code")), str(error.get("message"))
    if code == "storage" or (code == "bad-path" and error.get("errno")):
        return StorageError(int(error.get("errno") or 0), message, path)
    if code in _OF_VERSIONS:
        return ProtocolError(f"{message}; {OTHER_VERSION} ({code})")
    return _BY_CODE.get(code, ProtocolError)(f"{message} ({code})")
