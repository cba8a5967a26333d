# SPDX-License-Identifier: Apache-2.0
"""What the tests with real daemons share: waiting for an event, and a daemon with a state directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]


def until(
    condition: Callable[[], object],
    seconds: float = 60,
    what: str | Callable[[], str] = "no event came",
) -> None:
    """Waits for an event.

    Raises:
        AssertionError: It has not come after `seconds`, which is long enough for it to never come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.005)


def daemon_of(socket: str | Path) -> int:
    """The process that serves, or has served last, on a socket: its lock file names it.

    A process that has just taken the lock has not written its number yet, so the number is waited for.
    """
    numbers: list[int] = []

    def is_named() -> bool:
        text = Path(f"{socket}.lock").read_text()
        numbers.extend(int(word) for word in text.split())
        return bool(numbers)

    until(is_named)
    return numbers[-1]


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has come to it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class Daemon:
    """A daemon in a folder of its own; `faults` are those of Faults.swift."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "socket")
        self._state = folder / "state"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, faults: str = "") -> None:
        variables = {
            "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(self._state),
            "NOETHER_WRITER_FAULTS": faults,
        }
        self.process = process = subprocess.Popen(
            [DAEMON, "--socket", self.socket],
            env=os.environ | variables,
            stderr=subprocess.DEVNULL,
        )
        lock = Path(self.socket + ".lock")
        until(lambda: lock.exists() and daemon_of(self.socket) == process.pid and Path(self.socket).exists())

    def hold(self) -> None:
        """Stops it: nothing becomes durable until `go_on`."""
        assert self.process is not None
        pid = self.process.pid
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(pid))

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            assert self.process.wait(60) == 0
