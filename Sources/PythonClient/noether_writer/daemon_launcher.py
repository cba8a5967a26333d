# SPDX-License-Identifier: Apache-2.0
"""Finds the daemon's socket, and starts a daemon if none listens."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path

from . import ending
from .errors import OUT_OF_DESCRIPTORS, DaemonNotFound, DaemonUnavailable, WrongSocket

_SUN_PATH_BYTES = 107
_TEMPLATES = "/run/noether-writer"
START_SECONDS = 20.0
# The same for as long as the process that starts it lives: on a busy node, a program on cold network storage takes long
# to load.
_LOAD_SECONDS = 120.0
# The exit status of a daemon that found a living one on its socket: another trainer was faster.
ALREADY_SERVED = 75
EXIT_IDLE_SECONDS = 60
# How long a daemon that has the socket may take to listen, until it is taken for one that leaves.
_AGAIN_SECONDS = 0.25
_LAST_WORDS_BYTES = 4096


def socket_path() -> str:
    """`$NOETHER_WRITER_SOCKET`, or else the socket that the system keeps for this user (the template unit), or else the
    one in the user's runtime directory. If there is no directory for these (in containers and batch jobs), a socket
    below /tmp, whatever TMPDIR says: the programs that look for it may have another one."""
    if path := os.environ.get("NOETHER_WRITER_SOCKET"):
        return path
    names = [name for name in (_named(), _user_name()) if name]
    # Before the runtime directory, which every login has: whoever set up the template wants it to be used.
    for name in names:
        if _is_templates(kept := f"{_TEMPLATES}/{name}/socket"):
            return kept
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    if directory.startswith("/") and _is_ours(directory):
        return f"{directory}/noether-writer/socket"
    system = Path(_TEMPLATES, names[0] if names else str(os.geteuid()))
    if system.is_dir() or os.access("/run", os.W_OK):
        return str(system / "socket")
    return f"{_fallback_directory()}/socket"


def _named() -> str | None:
    """What USER says, unless that is another user's name: `su` and `sudo -E` leave the one of who has become root, and
    what root makes in that user's place would lock that user out."""
    name = os.environ.get("USER", "")
    if not name or "/" in name:
        return None
    try:
        return name if pwd.getpwnam(name).pw_uid == os.geteuid() else None
    except KeyError:
        return name


def _user_name() -> str | None:
    """As the system's databases know this user; many containers have none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def _is_templates(path: str) -> bool:
    """Whether a service manager keeps this socket for this user: its directory is root's, and all may enter it
    (DirectoryMode= of the unit). The one that a trainer of root's makes there, if it has no runtime directory, is
    closed to others."""
    try:
        found, directory = os.lstat(path), os.lstat(os.path.dirname(path))
    except OSError:
        return False
    is_own = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()
    return is_own and directory.st_uid == 0 and directory.st_mode & 0o005 == 0o005


def _fallback_directory() -> str:
    return f"/tmp/noether-writer-{os.geteuid()}"


def _is_ours(directory: str) -> bool:
    """Whether this user may use it as a runtime directory. Root does not use that of the user who has become root: what
    root makes there would lock that user out. One that is not there is used if this user can make it: a batch job has
    the variable of another node's login, and a program that outlives its login that of a directory that is gone."""
    try:
        return os.stat(directory).st_uid == os.geteuid()
    except FileNotFoundError:
        parent = os.path.dirname(directory)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        return os.access(parent, os.W_OK | os.X_OK)
    except OSError:
        return False


def _check_fallback(path: str) -> None:
    """Anybody may make names in /tmp. Called before anything in the directory there is opened.

    Raises:
        WrongSocket: it is somebody else's, or open to others.
    """
    directory = _fallback_directory()
    if path != f"{directory}/socket":
        return
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        what = "is not a directory"
    elif found.st_uid != os.geteuid():
        what = f"belongs to uid {found.st_uid}"
    elif found.st_mode & 0o077:
        what = "can be entered by others"
    else:
        return
    raise WrongSocket(
        f"{directory} {what}: somebody else may have put it there, and nothing in it was opened. Remove it, or set "
        "NOETHER_WRITER_SOCKET or XDG_RUNTIME_DIR to a place of yours"
    )


def _is_nobody(uid: int) -> bool:
    """Whether this number stands for all users that have none in this user namespace (user_namespaces(7))."""
    try:
        if uid != int(Path("/proc/sys/kernel/overflowuid").read_text()):
            return False
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        return False
    return not any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)


def daemon_executable() -> str:
    """`$NOETHER_WRITER_DAEMON`, or else the program in this package (wheel), or else the one on PATH."""
    named = os.environ.get("NOETHER_WRITER_DAEMON")
    if named:
        if os.access(named, os.X_OK):
            return named
        raise DaemonNotFound(
            f"no daemon listens on {socket_path()}, and NOETHER_WRITER_DAEMON names {named}, which is not a program "
            "that can be run: set it to the path of noether-writerd, or unset it to use the one of PATH"
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
        pid = int(Path(_checked_path() + ".lock").read_text())
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
    _check_fallback(path)
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
    latest = time.monotonic() + ending.within(_LOAD_SECONDS)
    pause = 0.002
    again_at: float | None = None
    while time.monotonic() < (latest if process.poll() is None else deadline):
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
        if status == ALREADY_SERVED:
            now = time.monotonic()
            if again_at is None:
                again_at = now + _AGAIN_SECONDS
            elif now >= again_at:
                process, log_start = _start(path)
                again_at = None
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)
    raise DaemonUnavailable(f"noether-writerd was started for {path} and does not answer{_last_words(path, log_start)}")


def _connect(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # connect waits if the queue of connections of a stopped daemon is full (unix(7)).
    limit = ending.within(START_SECONDS)
    seconds_and_microseconds = struct.pack("ll", int(limit), int(limit % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds_and_microseconds)
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
    uid = user_of(connection)
    if uid not in (os.getuid(), 0) or _is_nobody(uid):
        connection.close()
        raise WrongSocket(
            f"{path} is served by uid {uid}, not by you (uid {os.getuid()}) or root: nothing was sent to it. Set "
            "NOETHER_WRITER_SOCKET to a socket of your own"
        )
    return connection


def user_of(connection: socket.socket) -> int:
    """The uid of the process that serves this connection."""
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _log_path(path: str) -> str:
    return str(Path(path).parent / "daemon.log")


def _last_words(path: str, start: int) -> str:
    """The last words of a daemon in its log, from offset `start` on, and where the whole log is."""
    try:
        with open(_log_path(path), "rb", opener=_plain) as log:
            log.seek(max(start, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [
        words for line in lines for mark, _, words in (line.partition(": "),) if mark in ("noether-writerd", "Error")
    ]
    last = f": {said[-1]}" if said else ""
    return f"{last} (its log is {_log_path(path)})"


def _plain(path: str, flags: int) -> int:
    """Opens a plain file of this user's, and nothing that only has its name: a link elsewhere, a FIFO that would hang.

    Raises:
        OSError.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and found.st_nlink == 1:
        return fd
    os.close(fd)
    raise OSError(errno.EEXIST, "it is not a plain file of yours", path)


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
        _check_fallback(path)
        log = open(_log_path(path), "ab", opener=_plain)  # noqa: SIM115
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
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
            if error.errno in OUT_OF_DESCRIPTORS:
                raise
            raise DaemonNotFound(
                f"no daemon listens on {path}, and {executable} cannot be started: {error.strerror}"
            ) from None
    return process, start
