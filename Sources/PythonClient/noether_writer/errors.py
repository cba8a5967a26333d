"""What can go wrong, as types. Each message says what happened, what was kept, and what to do.

Codes are those of PROTOCOL.md section 7; `of_wire` turns an `error` message into its type.
"""

from __future__ import annotations

from typing import Any


class NoetherWriterError(Exception):
    """Base of everything this library raises on its own account."""


class DaemonNotFound(NoetherWriterError):
    """No daemon listens, and no noether-writerd was found to start."""


class DaemonUnavailable(NoetherWriterError, ConnectionError):
    """The connection to the daemon is lost or could not be made."""


class ProtocolError(NoetherWriterError):
    """The daemon and this library do not understand one another."""


class RefusedName(NoetherWriterError, ValueError):
    """A run id, stage, model name, tag or info that can't be a path component."""


class UnknownRun(NoetherWriterError, KeyError):
    """A run that the daemon does not have, and has not had lately. Its files may be there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TooSlow(NoetherWriterError):
    """A subscription's reader had not read every row of a run that has ended: the rest is in the run's entries.th."""


class DaemonBusy(NoetherWriterError):
    """Storage was behind for longer than a save may wait (NOETHER_WRITER_POOL_TIMEOUT): nothing of it was written."""


class RunInUse(NoetherWriterError):
    """Another living process holds this run."""


class LogTakenOver(NoetherWriterError):
    """A newer writer of this process brings the run's log now."""


class LogFull(NoetherWriterError):
    """The run's log has reached the daemon's limit (its setting `log_bytes_per_run`); nothing is added to it."""


class NotRankZero(NoetherWriterError, RuntimeError):
    """A process of a job that is not rank 0 wants to log: a run has one log."""


class UpdateOrderError(NoetherWriterError, AssertionError):
    """An update that is not larger than the last one logged."""


class DuplicateKeyError(NoetherWriterError, KeyError):
    """A key twice in one update."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedValue(NoetherWriterError, TypeError):
    """A value that is no scalar."""


class PoolExhausted(NoetherWriterError, TimeoutError):
    """All buffer memory is with the daemon, and none came back in time."""


class SnapshotChanged(NoetherWriterError, RuntimeError):
    """In overlap mode, a tensor was changed while it was copied. Nothing was sent; older files are as they were."""


class StorageError(NoetherWriterError, OSError):
    """The file system refused a file for good; `errno` and `filename` say how and where."""


class WaitTimeout(NoetherWriterError, TimeoutError):
    """Not durable within the time given. The daemon goes on writing."""


class CheckpointStalled(WaitTimeout):
    """Storage refuses for now (full, quota, I/O error). The daemon keeps the bytes and tries again."""


_BY_CODE: dict[str, type[NoetherWriterError]] = {
    "bad-name": RefusedName,
    "bad-path": RefusedName,
    "run-in-use": RunInUse,
    "unknown-run": UnknownRun,
    "too-slow": TooSlow,
    "log-taken-over": LogTakenOver,
    "update-order": UpdateOrderError,
    "log-full": LogFull,
    "draining": DaemonUnavailable,
    "busy": DaemonBusy,
}


def of_wire(error: dict[str, Any], path: str | None = None) -> NoetherWriterError:
    """The exception for an `error` object of the protocol."""
    code, message = str(error.get("code")), str(error.get("message"))
    if code == "storage" or (code == "bad-path" and error.get("errno")):
        return StorageError(int(error.get("errno") or 0), message, path)
    return _BY_CODE.get(code, ProtocolError)(f"{message} ({code})")
