# SPDX-License-Identifier: Apache-2.0
"""Directories in which sharded checkpoints are made: `.NAME.partial-NONCE`, beside the place that they will have.

Who makes one holds a lock (fcntl) of a file in it, which is known on every node that shares the file system, and which
the kernel gives back when that process ends, however it ends. One that nobody holds is of a save that nobody finishes,
unless a daemon has been told already to give it its name. It is never removed where it is: it gets another name first,
in one step, so that whoever would still give it the checkpoint's name finds it whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import platform
import re
import uuid

from . import _files
from .errors import NoetherWriterError, StorageError

OWNER = ".noether_writer_owner"
_LEFT = re.compile(r"\..+\.(partial|new|trash)-[0-9a-f]{32}", re.DOTALL)
# What is left of a save to another path is removed when it is so old, by the clock of the file system: a daemon may
# have been told to finish it, and has given up by then.
_OLD_SECONDS = 3600.0
#: For how long a daemon waits for files of other nodes.
PATIENCE_SECONDS = 3000.0
# How long what a daemon has accepted for an abandoned directory is waited for.
_FREE_SECONDS = 30.0
# Those of this process, which its own locks do not keep out.
_own: set[str] = set()
os.register_at_fork(after_in_child=_own.clear)


class Partial:
    """One that this process makes.

    Args:
        place: of the checkpoint: absolute, without links in its directory.

    Raises:
        StorageError: another process saves to this place now; or no directory can be made.
    """

    def __init__(self, place: str) -> None:
        self._lock = -1
        self._directory = -1
        self.place = place
        self.path = ""
        _clear(place)
        parent, name = os.path.split(place)
        nonce = uuid.uuid4().hex
        self.path = _files._checked(os.path.join(parent, f".{name}.partial-{nonce}"))
        made = os.path.join(parent, f".{name}.new-{nonce}")
        _own.add(self.path)
        try:
            os.mkdir(made)
            self._directory = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock = os.open(OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=self._directory)
            os.write(self._lock, json.dumps({"node": platform.node(), "pid": os.getpid()}).encode())
            with contextlib.suppress(OSError):
                # A file system without locks: nobody is kept out.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(made, self.path)
        except OSError as error:
            self.release()
            raise StorageError(
                error.errno or errno.EIO, f"{self.path}: {error.strerror}. Nothing was saved", place
            ) from None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """From now on it is nobody's."""
        # The lock goes when the file is closed.
        fds = [fd for fd in (self._lock, self._directory) if fd >= 0]
        self._lock = self._directory = -1
        for fd in fds:
            os.close(fd)
        _own.discard(self.path)

    def committed(self) -> None:
        """It has the checkpoint's name."""
        with contextlib.suppress(OSError):
            os.unlink(OWNER, dir_fd=self._directory)
        self.release()
        with contextlib.suppress(OSError):
            _clear_old(os.path.dirname(self.place), os.stat(self.place).st_mtime)

    def abandon(self) -> None:
        """Nobody gives it the name any more, and it is removed."""
        with contextlib.suppress(OSError, NoetherWriterError):
            _throw_away(self.path)
        self.release()

    def __del__(self) -> None:
        self.release()


def _clear(place: str) -> None:
    """Removes what saves to this place that nobody finishes have left.

    Raises:
        StorageError: somebody makes one.
    """
    parent, name = os.path.split(place)
    start = glob.escape(os.path.join(parent, f".{name}."))
    for found in sorted([*glob.glob(f"{start}new-*"), *glob.glob(f"{start}partial-*")]):
        if found in _own or not _LEFT.fullmatch(os.path.basename(found)):
            continue
        if (owner := _owner(found)) is not None:
            raise StorageError(
                errno.EBUSY, f"another process saves to {place} now ({owner}, {found}). Nothing was saved", place
            )
        # What a daemon was told to finish, it finishes first.
        _files.is_free(found, _FREE_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            _throw_away(found)
    for found in glob.glob(f"{start}trash-*"):
        if _LEFT.fullmatch(os.path.basename(found)):
            _remove(found)


def _clear_old(parent: str, now: float) -> None:
    """The same for all places in this directory, for what is old."""
    for name in os.listdir(parent):
        if (match := _LEFT.fullmatch(name)) is None or (path := os.path.join(parent, name)) in _own:
            continue
        with contextlib.suppress(OSError, NoetherWriterError):
            if os.lstat(path).st_mtime < now - _OLD_SECONDS and (match[1] == "trash" or _owner(path) is None):
                _throw_away(path)


def _owner(partial: str) -> str | None:
    """Who holds the lock of a directory, in words; None: nobody."""
    try:
        fd = os.open(os.path.join(partial, OWNER), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return "of another user"
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            # A file system without locks.
            return None
        try:
            owner = json.loads(os.read(fd, 4096))
            return f"process {owner['pid']} on {owner['node']}"
        except (ValueError, KeyError, TypeError):
            return "a process that is not known"
    finally:
        os.close(fd)


def _throw_away(path: str) -> None:
    parent, name = os.path.split(path)
    trash = os.path.join(parent, re.sub(r"\.(partial|new|trash)-[0-9a-f]{32}$", ".trash-", name) + uuid.uuid4().hex)
    os.rename(path, trash)
    _remove(trash)


def _remove(path: str) -> None:
    """By the daemon. If that fails, what is left is removed another time."""
    ticket = _files.remove(path, recursive=True)
    ticket.leave_unsaid()
