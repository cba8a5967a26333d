# SPDX-License-Identifier: Apache-2.0
"""The library with another torch than the one of the other tests: `make test-torch`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import DAEMON, daemon_of, until


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
    until(lambda: Path(f"{socket}.lock").exists() and daemon_of(socket) == process.pid and socket.exists())
    yield str(socket)
    process.terminate()
    assert process.wait(60) == 0
