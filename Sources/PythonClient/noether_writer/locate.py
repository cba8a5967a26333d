"""Where the daemon's socket is, and how a daemon is started where none listens."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from .errors import DaemonNotFound, DaemonUnavailable

_SUN_PATH_BYTES = 107
START_SECONDS = 20.0
EXIT_IDLE_SECONDS = 60


def socket_path() -> str:
    """`$NOETHER_WRITER_SOCKET`, else the user's daemon, else the system template's, else (containers and batch jobs,
    which have none of these directories) one below the temporary directory."""
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
    """`$NOETHER_WRITER_DAEMON`, else the one in this package (wheel), else on PATH."""
    named = os.environ.get("NOETHER_WRITER_DAEMON")
    if named:
        if os.access(named, os.X_OK):
            return named
        raise DaemonNotFound(f"NOETHER_WRITER_DAEMON names {named}, which is no program that can be run")
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
    """A connected socket; starts nothing.

    Raises:
        DaemonNotFound: nothing listens.
    """
    path = _checked_path()
    if connected := _connect(path):
        return connected
    raise DaemonNotFound(
        f"no daemon listens on {path}: nothing trains here now, or NOETHER_WRITER_SOCKET names another"
    )


def _checked_path() -> str:
    path = socket_path()
    if len(path.encode()) > _SUN_PATH_BYTES:
        raise DaemonUnavailable(
            f"the socket path {path} is longer than {_SUN_PATH_BYTES} bytes; set NOETHER_WRITER_SOCKET to a shorter one"
        )
    return path


def connect_or_start() -> socket.socket:
    """A connected socket; starts a daemon for this user where none listens.

    Raises:
        DaemonNotFound: nothing listens and there is no daemon to start.
        DaemonUnavailable: a daemon was started and does not answer.
    """
    path = _checked_path()
    if connected := _connect(path):
        return connected
    process = _start(path)
    deadline = time.monotonic() + START_SECONDS
    pause = 0.002
    while time.monotonic() < deadline:
        if connected := _connect(path):
            return connected
        if process.poll() not in (None, 0, 75):
            break
        # 75: another trainer's daemon was faster; it will listen in a moment.
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)
    raise DaemonUnavailable(f"noether-writerd was started for {path} and does not answer; see {_log_path(path)}")


def _connect(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # connect waits where a stopped daemon's queue of connections is full (unix(7)).
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(START_SECONDS), 0))
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BlockingIOError as error:
        connection.close()
        raise DaemonUnavailable(f"{path}: the daemon takes no connections") from error
    except PermissionError as error:
        connection.close()
        raise DaemonUnavailable(f"no permission to connect to {path}: it is another user's") from error
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (os.getuid(), 0):
        connection.close()
        raise DaemonUnavailable(f"{path} is served by uid {uid}, not by you or root: refused")
    return connection


def _log_path(path: str) -> str:
    return str(Path(path).parent / "daemon.log")


def _start(path: str) -> subprocess.Popen[bytes]:
    executable = daemon_executable()
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(_log_path(path), "ab") as log:
        process = subprocess.Popen(
            [executable, "--socket", path, "--exit-idle", str(EXIT_IDLE_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    # Reaped when it ends, so that a long training leaves no zombie behind.
    threading.Thread(target=process.wait, daemon=True, name="noether-writer-reaper").start()
    return process
