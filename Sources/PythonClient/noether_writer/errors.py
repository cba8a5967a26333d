# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as types. Each message says what happened, what was kept, and what to do.

docs/ERRORS.md lists them with more words. Codes are those of docs/PROTOCOL.md, section 7; `of_wire` turns an `error`
message into its type.
"""

from __future__ import annotations

import sys
from typing import Any

#: What to do where a daemon and a client are of versions that do not understand one another.
OTHER_VERSION = (
    "use one version of noether-writer on both sides, and restart the daemon after an update (see docs/ERRORS.md)"
)


class NoetherWriterError(Exception):
    """Base of everything this library raises on its own account. What pickling raises comes as it is, with nothing
    sent; a variable that is mistyped is a ValueError, at once."""


class DaemonNotFound(NoetherWriterError):
    """No daemon listens, and none could be started. Nothing was sent; install noether-writerd, or read the end of its
    log that the message quotes."""


class DaemonUnavailable(NoetherWriterError, ConnectionError):
    """The daemon is away or does not answer. What it has accepted it finishes; what it has not is kept in this process
    and sent to the next daemon, so go on training, or wait again."""


class WrongSocket(DaemonUnavailable):
    """No daemon of this user can be at that path: it is another user's, a file, too long. Nothing was sent or changed;
    set NOETHER_WRITER_SOCKET right, or leave it unset."""


class ProtocolError(NoetherWriterError):
    """The daemon and this library do not understand one another. What the daemon has accepted it finishes; use one
    version on both sides, and restart the daemon after an update."""


class RefusedName(NoetherWriterError, ValueError):
    """A run id, stage, model name, tag or info that can't be a path component, or a path that is none. Nothing was
    written; choose another name."""


class UnknownRun(NoetherWriterError, KeyError):
    """A run to be followed that the daemon does not have, and has not had lately. Its files may be there: read those,
    with `noether-writer show DIRECTORY`."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TooSlow(NoetherWriterError):
    """A subscription's reader had not read every row of a run that has ended. Nothing is lost: the rest is in the run's
    entries.th."""


class DaemonBusy(NoetherWriterError):
    """The daemon has no room: storage was behind for longer than a save may wait (NOETHER_WRITER_POOL_TIMEOUT), or too
    much is connected. Nothing of this save was written, older files are as they were; save less often, or raise
    `snapshot_bytes` in its settings."""


class RunInUse(NoetherWriterError):
    """Another living process holds this run, or this rank of it. Nothing was changed; end that process, or choose
    another run id."""


class LogTakenOver(NoetherWriterError):
    """A newer writer of this process brings the run's log now, from an empty one on. This one's updates from here on
    are not logged; use the newer one."""


class LogFull(NoetherWriterError):
    """The run's log has reached the daemon's limit (its setting `log_bytes_per_run`). What was logged before is kept,
    nothing is added; raise the limit, or log less often."""


class NotRankZero(NoetherWriterError, RuntimeError):
    """No longer raised: a process of a job that is not rank 0 logs nothing, and says so once. The name stays for
    programs that catch it."""


class UpdateOrderError(NoetherWriterError, AssertionError):
    """An update that is not larger than the last one logged. Nothing of it was logged; to go back to an earlier update,
    open the run with `resume_at`."""


class DuplicateKeyError(NoetherWriterError, KeyError):
    """A key twice in one update. The first value stays."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedValue(NoetherWriterError, TypeError):
    """A value that is no scalar, a key that is no text, something larger than a message can be. Nothing of this update,
    or save, was sent."""


class NotOneElement(UnsupportedValue, RuntimeError):
    """A tensor or array of more or fewer elements than one is no scalar (torch's own error is a RuntimeError). Nothing
    of this update was logged; log its mean, or each element under a key of its own."""


class TorchMissing(NoetherWriterError, ImportError):
    """A checkpoint was to be saved where torch can't be imported. Nothing was saved, logging works without it; install
    torch."""


class PoolExhausted(NoetherWriterError, TimeoutError):
    """All buffer memory (NOETHER_WRITER_POOL_BYTES) is with the daemon, and none came back in time. Nothing was saved
    now, earlier saves go on; free storage, save less often, or raise the limit."""


class SnapshotChanged(NoetherWriterError, RuntimeError):
    """A tensor was changed while it was copied: in overlap mode, or on a device by a stream that nobody waited for.
    Nothing was sent, older files are as they were; call `ticket.wait_snapshot()` before the change, or save with
    `snapshot="copy"`; or synchronize with that stream before the save."""


class StorageError(NoetherWriterError, OSError):
    """The file system refused a file for good; `errno` and `filename` say how and where. Older files are as they were;
    mend what the message names, and save again."""

    def __str__(self) -> str:
        # The words name the path already, which OSError's would add.
        return self.strerror if self.errno and self.strerror else super().__str__()


class WaitTimeout(NoetherWriterError, TimeoutError):
    """Not durable within the time given. Nothing is lost, the daemon goes on; wait again."""


class CheckpointStalled(WaitTimeout):
    """Storage refuses for now (full, quota, I/O error, read-only). The daemon keeps the bytes and tries again: mend the
    storage, and wait again."""


_OURS = frozenset(("noether_writer", "torch", "numpy"))


def is_foreign(error: BaseException) -> bool:
    """Whether neither this library nor what it calls has raised this, but code of the trainer's that came in between: a
    signal's handler, mostly. That goes to the trainer as it is, whatever its type."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return module not in _OURS and module not in sys.stdlib_module_names


_BY_CODE: dict[str, type[NoetherWriterError]] = {
    "bad-name": RefusedName,
    "bad-path": RefusedName,
    "bad-key": UnsupportedValue,
    "run-in-use": RunInUse,
    "unknown-run": UnknownRun,
    "too-slow": TooSlow,
    "log-taken-over": LogTakenOver,
    "update-order": UpdateOrderError,
    "log-full": LogFull,
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
