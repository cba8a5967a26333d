# SPDX-License-Identifier: Apache-2.0
"""A process that does for the daemon what systemd does: holds its socket, keeps what it puts into the fd store,
starts it again when it dies. Rounds of the torture program are too short to boot a systemd for each; Tests/Systemd
has the real one.

Commands come on standard input, one JSON object a line, and are answered on standard output. Single-threaded: one
selector.

Usage: manager.py DAEMON SOCKET STORE(0|1) LOG
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

FIRST_DESCRIPTOR = 3
# Out of the way of the numbers that are handed over.
_ASIDE = 500


class Serving:
    """In the manager's process."""

    def __init__(self, daemon: str, path: str, store: bool, log: str) -> None:
        self.daemon, self.store = daemon, store
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(512)
        self.notify_path = path + ".notify"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(self.notify_path)
        # recv_fds of Python 3.11 leaves its flags argument out.
        self.notify.setblocking(False)
        self.kept: dict[str, list[int]] = {}
        self.pid = 0
        self.pidfd = -1
        self.ready = False
        # What the next lives of the daemon come to, in NOETHER_WRITER_FAULTS.
        self.lives: list[str] = []
        self.deaths = 0
        self.stopping = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        self.selector.register(self.notify, selectors.EVENT_READ)

    def serve(self) -> None:
        stdin = sys.stdin.buffer
        while True:
            ready = {key.fileobj for key, _ in self.selector.select()}
            if self.notify in ready:
                self.hear()
            if self.pidfd in ready:
                self.bury()
            if stdin in ready:
                line = stdin.readline()
                if not line:
                    self.end(signal.SIGKILL)
                    return
                answer = self.obey(json.loads(line))
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()

    def obey(self, command: dict[str, Any]) -> Any:
        match command["op"]:
            case "start":
                self.lives = list(command["lives"])
                self.start(command.get("environment", {}))
                return self.pid
            case "lives":
                self.lives = list(command["lives"])
                return None
            case "kill":
                # Whatever it has said before it died counts, as with systemd.
                if self.pid:
                    os.kill(self.pid, signal.SIGKILL)
                return None
            case "stop":
                return self.end(signal.SIGTERM)
            case "replace":
                # As a restart of the unit: it finishes what it has, and the next one starts.
                if self.pid:
                    os.kill(self.pid, signal.SIGTERM)
                return None
            case "state":
                return {"pid": self.pid, "ready": self.ready, "kept": sorted(self.kept), "deaths": self.deaths}
        raise ValueError(command)

    def start(self, more: dict[str, str] | None = None) -> None:
        """With `more` in the environment of this life."""
        self.ready = False
        fds = [self.listener.fileno()]
        names = ["socket"]
        for name, kept in self.kept.items():
            fds += kept
            names += [name] * len(kept)
        environment = {k: v for k, v in os.environ.items() if k != "NOETHER_WRITER_SOCKET"}
        environment |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        if self.store:
            environment["NOTIFY_SOCKET"] = self.notify_path
        environment |= more or {}
        if faults := (self.lives.pop(0) if self.lives else ""):
            environment["NOETHER_WRITER_FAULTS"] = faults
        self.pid = os.fork()
        if self.pid == 0:
            try:
                aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, _ASIDE) for fd in fds]
                os.dup2(self.log, 2)
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(0, 1)
                for index, fd in enumerate(aside):
                    os.dup2(fd, FIRST_DESCRIPTOR + index)
                os.closerange(FIRST_DESCRIPTOR + len(fds), 1024)
                environment["LISTEN_PID"] = str(os.getpid())
                os.execve(self.daemon, [self.daemon], environment)
            finally:
                os._exit(127)
        self.pidfd = os.pidfd_open(self.pid)
        self.selector.register(self.pidfd, selectors.EVENT_READ)

    def bury(self) -> int:
        # systemd reads what a service has said before it looks at its end.
        self.hear()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.selector.unregister(self.pidfd)
        os.close(self.pidfd)
        self.pid, self.pidfd, self.ready = 0, -1, False
        self.deaths += 1
        if not self.stopping:
            self.start()
        return status

    def end(self, number: int) -> int:
        self.stopping = True
        if self.pid:
            os.kill(self.pid, number)
        while self.pid:
            ready = {key.fileobj for key, _ in self.selector.select(1)}
            if self.notify in ready:
                self.hear()
            if self.pidfd in ready:
                return self.bury()
        return 0

    def hear(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.notify, 65536, 16)
            except BlockingIOError:
                return
            words = dict(part.split("=", 1) for part in data.decode().splitlines() if "=" in part)
            name = words.get("FDNAME", "")
            if "FDSTOREREMOVE" in words:
                for fd in self.kept.pop(name, []):
                    os.close(fd)
            elif "FDSTORE" in words:
                self.kept.setdefault(name, []).extend(fds)
                fds = []
            self.ready = self.ready or "READY" in words
            # A barrier's descriptor too: its closing is the answer.
            for fd in fds:
                os.close(fd)


class Manager:
    """The same, from outside."""

    def __init__(self, daemon: str, path: Path, *, store: bool, log: Path) -> None:
        command = [sys.executable, "-S", __file__, daemon, str(path), str(int(store)), str(log)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in: IO[str] = self._process.stdin
        self._out: IO[str] = self._process.stdout

    def ask(self, op: str, **more: Any) -> Any:
        self._in.write(json.dumps({"op": op} | more) + "\n")
        self._in.flush()
        return json.loads(self._out.readline())

    def close(self) -> None:
        self._in.close()
        self._process.wait(30)
        self._out.close()


if __name__ == "__main__":
    Serving(sys.argv[1], sys.argv[2], sys.argv[3] == "1", sys.argv[4]).serve()
