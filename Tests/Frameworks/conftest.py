# SPDX-License-Identifier: Apache-2.0
"""The adapters with the real frameworks: `make test-frameworks`. Each test has a daemon of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Daemon:
    """A daemon; `faults` are those of Faults.swift."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "socket")
        self._state = folder / "state"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, faults: str = "") -> None:
        variables = {"NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(self._state), "NOETHER_WRITER_FAULTS": faults}
        self.process = subprocess.Popen(
            [DAEMON, "--socket", self.socket], env=os.environ | variables, stderr=subprocess.DEVNULL
        )
        pid = str(self.process.pid)
        lock = Path(self.socket + ".lock")
        until(lambda: lock.exists() and lock.read_text() == pid and Path(self.socket).exists())

    def hold(self) -> None:
        """Stops it: nothing becomes durable until `go_on`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

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


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="nw-") as folder:
        found = Daemon(Path(folder))
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", found.socket)
        found.start()
        yield found
        found.stop()


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own, in the test's directory."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
