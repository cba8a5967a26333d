# SPDX-License-Identifier: Apache-2.0
"""A daemon for each test, and trainers as processes of their own."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import world


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[world.Daemon]:
    running = world.Daemon()
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    yield running
    # What a failed test has left behind.
    gc.collect()
    is_dead = running.is_dead()
    running.end()
    assert not is_dead, "the daemon has died"


@pytest.fixture
def trainer(daemon: world.Daemon) -> Callable[..., str]:
    """Runs a script, with the directory of the runs as its first argument; it must end well and in time.

    Returns:
        what it prints.
    """

    def run(script: str, *arguments: str, seconds: float = 120) -> str:
        command = [sys.executable, "-X", "faulthandler", "-c", script, str(daemon.output), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
