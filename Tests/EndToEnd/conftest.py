"""A real daemon for each test, on a socket of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]


@pytest.fixture(autouse=True)
def state_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not the developer's own, and one a test: a daemon recovers what it finds there."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("NOETHER_WRITERD_STATE_DIRECTORY", str(path))
    return path


class RunningDaemon:
    def __init__(self, socket: str, *arguments: str) -> None:
        self.socket = socket
        self.process = subprocess.Popen([DAEMON, "--socket", socket, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 10
        while not Path(socket).exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, "the daemon did not listen"
            time.sleep(0.005)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a path short enough for a socket address."""
    path = Path(tempfile.mkdtemp(prefix="nw-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    running = RunningDaemon(str(short_directory / "d" / "socket"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", running.socket)
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0
