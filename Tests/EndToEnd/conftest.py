# SPDX-License-Identifier: Apache-2.0
"""A real daemon for each test, on a socket of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import noether_writer.run
import pytest
from harness import is_stopped, until

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]
# By `make sanitize`: the programs beside DAEMON are built with a sanitizer.
IS_SANITIZED = "NOETHER_WRITER_SANITIZED" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    # An exception that kills a thread of the library is a failure, not a note at the end.
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")
    # torch's, about tensors that the tests make on purpose.
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:torch")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:torch.quantize:UserWarning")


def sessions() -> set[noether_writer.session.Session]:
    """Those that are open, or closed and not delivered."""
    return noether_writer.session.sessions | {run._session for run in noether_writer.run._open_runs}


def end_all(left: set[noether_writer.session.Session]) -> None:
    """What a test leaves behind: the next test's daemon would be sent it."""
    for session in left:
        session.end()


@pytest.fixture(autouse=True)
def state_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not the developer's own, and one a test: a daemon recovers what it finds there."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY", str(path))
    # The command line looks for ended runs there too.
    monkeypatch.setenv("XDG_STATE_HOME", str(path / "home"))
    # A daemon that a trainer starts takes its settings from a file.
    config = path / "noether-writer.yaml"
    config.write_text(f"state_directory: {path}\n")
    monkeypatch.setenv("NOETHER_WRITER_CONFIG", str(config))
    before = sessions()
    yield path
    end_all(sessions() - before)


def not_sanitized(reason: str) -> pytest.MarkDecorator:
    """For a test that a sanitizer makes no sense of: of memory's size, say."""
    return pytest.mark.skipif(IS_SANITIZED, reason=f"with a sanitizer: {reason}")


class RunningDaemon:
    def __init__(self, path: str, *arguments: str) -> None:
        self.socket = path
        self.process = subprocess.Popen([DAEMON, "--socket", path, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 10
        # A trainer may have been faster to start one: then this one leaves.
        while not self._serves() and self.process.poll() is None:
            assert time.monotonic() < deadline, "the daemon did not listen"
            time.sleep(0.005)

    def _serves(self) -> bool:
        lock = Path(self.socket + ".lock")
        if not lock.exists() or lock.read_text() != str(self.process.pid):
            return False
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(self.socket) == 0

    def hold(self) -> None:
        """Stops it in the middle of what it does, until SIGCONT."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(self.process.pid))

    def crash(self) -> None:
        """Kills it, and starts the next one in its place."""
        self.process.kill()
        self.process.wait()
        self.process = RunningDaemon(self.socket).process

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def logging_trainer(folder: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has logged u / 7 for the updates 0 to 99 of the run `r`, and is killed at the end of the block.

    Args:
        options: for `open_run`.
    """
    code = (
        "import noether_writer, sys\n"
        f"run = noether_writer.open_run(sys.argv[1], 'r', **{options!r})\n"
        "for u in range(100): run.log({'loss': u / 7}, update=u)\n"
        "run.flush(30)\n"
        "print('logged', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            assert trainer.stdout is not None and trainer.stdout.readline() == "logged\n"
            yield trainer
        finally:
            trainer.kill()


def faulty_daemon(path: str, faults: str, monkeypatch: pytest.MonkeyPatch) -> RunningDaemon:
    """For this process's runs, with faults at points of the write path (Faults.swift); its successors have none."""
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", faults)
    daemon = RunningDaemon(path)
    monkeypatch.delenv("NOETHER_WRITER_FAULTS")
    return daemon


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
    before = sessions()
    yield running
    # A run that is left open would start a daemon in the place of this one.
    end_all(sessions() - before)
    if running.process.poll() is None:
        assert running.stop() == 0
