# SPDX-License-Identifier: Apache-2.0
"""Finds the daemon's socket, and starts a daemon if none listens."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from . import ending
from .errors import DaemonNotFound, DaemonUnavailable, WrongSocket

_SUN_PATH_BYTES = 107
START_SECONDS = 20.0
# The exit status of a daemon that found a living one on its socket: another trainer was faster.
ALREADY_SERVED = 75
EXIT_IDLE_SECONDS = 60
_LAST_WORDS_BYTES = 4096


def socket_path() -> str:
    """`$NOETHER_WRITER_SOCKET`, or else the socket of the user's daemon, or else that of the system template. If there
    is no directory for these (in containers and batch jobs), a socket below the temporary directory."""
    if path := os.environ.get("NOETHER_WRITER_SOCKET"):
        return path
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{directory}/noether-writer/socket"
    user = os.environ.get("USER", str(os.getuid()))
    system = Path(f"/run/noether-writer/{user}")
    if system.is_dir() or os.access("/run", os.W_OK):
        return str(system / "socket")
    return f"{tempfile.gettempdir()}/noether-writer-{os.getuid()}/socket"


def daemon_executable() -> str:
    """`$NOETHER_WRITER_DAEMON`, or else the program in this package (wheel), or else the one on PATH."""
    named = os.environ.get("NOETHER_WRITER_DAEMON")
    if named:
        if os.access(named, os.X_OK):
            return named
        raise DaemonNotFound(
            f"no daemon listens on {socket_path()}, and NOETHER_WRITER_DAEMON names {named}, which is not a program "
            "that can be run"
        )
    packaged = Path(__file__).parent / "bin" / "noether-writerd"
    if os.access(packaged, os.X_OK):
        return str(packaged)
    if found := shutil.which("noether-writerd"):
        return found
    raise DaemonNotFound(
        f"no daemon listens on {socket_path()}, and no noether-writerd was found to start. Install the "
        "noether-writer wheel or package, put noether-writerd on PATH, or name it in NOETHER_WRITER_DAEMON"
    )


def connect() -> socket.socket:
    """Returns a connected socket; starts nothing.

    Raises:
        DaemonNotFound: nothing listens.
        WrongSocket: as `connect_or_start`.
    """
    path = _checked_path()
    if connected := _connect(path):
        return connected
    raise DaemonNotFound(
        f"no daemon listens on {path}: nothing trains here now, or NOETHER_WRITER_SOCKET names another socket"
    )


def is_alive() -> bool:
    """Whether the lock file beside the socket names a living process. Connects to nothing and starts nothing."""
    try:
        pid = int(Path(socket_path() + ".lock").read_text())
    except (OSError, ValueError):
        return False
    return Path(f"/proc/{pid}").exists()


def _checked_path() -> str:
    path = socket_path()
    if not path.startswith("/"):
        raise WrongSocket(
            f"NOETHER_WRITER_SOCKET is {path!r}, and must be an absolute path, because the daemon works in another "
            "directory"
        )
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise WrongSocket(
            f"the socket's path has {len(os.fsencode(path))} bytes, and at most {_SUN_PATH_BYTES} are possible: set "
            f"NOETHER_WRITER_SOCKET to a shorter one than {path}"
        )
    return path


def connect_or_start() -> socket.socket:
    """Returns a connected socket; starts a daemon for this user if none listens.

    Raises:
        DaemonNotFound: nothing listens, and no daemon could be started.
        DaemonUnavailable: a daemon is there, or was started, and does not answer.
        WrongSocket: no daemon of this user can be at that path.
    """
    path = _checked_path()
    if connected := _connect(path):
        return connected
    process, log_start = _start(path)
    deadline = time.monotonic() + ending.within(START_SECONDS)
    pause = 0.002
    while time.monotonic() < deadline:
        if connected := _connect(path):
            _end(process)
            return connected
        status = process.poll()
        if status is not None and status < 0:
            break
        if status not in (None, 0, ALREADY_SERVED):
            raise DaemonNotFound(
                f"no daemon listens on {path}, and the one that was started ({daemon_executable()}) exited with "
                f"status {status}{_last_words(path, log_start)}"
            )
        # Another trainer's daemon will listen in a moment; or it is on its way out, and the next one has its place.
        time.sleep(pause)
        if status == ALREADY_SERVED:
            process, log_start = _start(path)
        pause = min(0.1, pause * 1.5)
    raise DaemonUnavailable(f"noether-writerd was started for {path} and does not answer{_last_words(path, log_start)}")


def _connect(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # connect waits if the queue of connections of a stopped daemon is full (unix(7)).
    limit = ending.within(START_SECONDS)
    microseconds = struct.pack("ll", int(limit), int(limit % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, microseconds)
    # Told by its number: an exception could come from a signal handler.
    failed = connection.connect_ex(path)
    if failed:
        connection.close()
    if failed in (errno.ENOENT, errno.ECONNREFUSED):
        return None
    if failed == errno.EAGAIN:
        raise DaemonUnavailable(
            f"{path}: the daemon has accepted no connection for {limit:.3g} s; it is stopped or overloaded"
        )
    if failed in (errno.EACCES, errno.EPERM):
        raise WrongSocket(
            f"no permission to connect to {path}: it is another user's. Each user has a daemon of their own: set "
            "NOETHER_WRITER_SOCKET or XDG_RUNTIME_DIR to a place of yours"
        )
    if failed:
        raise WrongSocket(f"{path} is not the socket of a daemon: {os.strerror(failed)}. See NOETHER_WRITER_SOCKET")
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (os.getuid(), 0):
        connection.close()
        raise WrongSocket(
            f"{path} is served by uid {uid}, not by you (uid {os.getuid()}) or root: nothing was sent to it. Set "
            "NOETHER_WRITER_SOCKET to a socket of your own"
        )
    return connection


def _log_path(path: str) -> str:
    return str(Path(path).parent / "daemon.log")


def _last_words(path: str, start: int) -> str:
    """The last words of a daemon in its log, from offset `start` on, and where the whole log is."""
    try:
        with open(_log_path(path), "rb") as log:
            log.seek(max(start, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [
        words for line in lines for mark, _, words in (line.partition(": "),) if mark in ("noether-writerd", "Error")
    ]
    last = f": {said[-1]}" if said else ""
    return f"{last} (its log is {_log_path(path)})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Reaps a process that ends by itself, as soon as its daemon serves."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ending.within(START_SECONDS))


def _start(path: str) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a daemon. Returns the process that starts it, and the offset in its log where it begins.

    With `--detach` that process ends when the daemon serves (status 0), or with the daemon's own status: the daemon is
    no child of a trainer, and keeps nothing of it.
    """
    executable = daemon_executable()
    # The daemon checks this too, but here the error comes at once.
    # (Asked once: the socket of a daemon that starts or leaves may be gone in between.)
    try:
        is_something_else = not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        is_something_else = False
    if is_something_else:
        raise WrongSocket(f"{path} is not a socket, and is left as it is: set NOETHER_WRITER_SOCKET to another path")
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = open(_log_path(path), "ab")  # noqa: SIM115
    except OSError as error:
        raise WrongSocket(
            f"no daemon listens on {path}, and none can be started there: {error.filename}: {error.strerror}. Set "
            "NOETHER_WRITER_SOCKET or XDG_RUNTIME_DIR to a place of yours"
        ) from None
    with log:
        start = log.tell()
        try:
            process = subprocess.Popen(
                [executable, "--detach", "--socket", path, "--exit-idle", str(EXIT_IDLE_SECONDS)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise DaemonNotFound(
                f"no daemon listens on {path}, and {executable} cannot be started: {error.strerror}"
            ) from None
    return process, start
