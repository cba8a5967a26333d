# SPDX-License-Identifier: Apache-2.0
"""The adapters with the real frameworks: `make test-frameworks`. Each test has a daemon of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Daemon


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
