# SPDX-License-Identifier: Apache-2.0
"""The library with another torch than the one of the other tests: `make test-torch`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("d")
    socket = folder / "socket"
    state = {
        "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(folder / "state"),
        "NOETHER_WRITER_STATE_DIRECTORY": str(folder),
    }
    process = subprocess.Popen([DAEMON, "--socket", str(socket)], env=os.environ | state, stderr=subprocess.DEVNULL)
    os.environ["NOETHER_WRITER_SOCKET"] = str(socket)
    lock, deadline = Path(f"{socket}.lock"), time.monotonic() + 60
    while not (lock.exists() and lock.read_text() == str(process.pid) and socket.exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield str(socket)
    process.terminate()
    assert process.wait(60) == 0
