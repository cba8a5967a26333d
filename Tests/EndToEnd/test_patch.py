# SPDX-License-Identifier: Apache-2.0
"""`python -m noether_writer run` puts the drop-ins into whatever imports `noether.core.writers`. The package here has
Noether's shape; the real one needs Python 3.12 and a CUDA torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def shaped_noether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "noether" / "core" / "writers"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text("class CheckpointWriter: pass\nclass LogWriter: pass\n")
    (tmp_path / "noether" / "trainer.py").write_text("from noether.core.writers import CheckpointWriter, LogWriter\n")
    import os

    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"] + os.pathsep + str(tmp_path))
    return tmp_path


SHOW = "import noether.trainer as t; print(t.CheckpointWriter.__module__, t.LogWriter.__module__)"


def test_run_patches_a_command_and_its_children(shaped_noether: Path) -> None:
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SHOW!r}]))"
    result = subprocess.run(
        [sys.executable, "-m", "noether_writer", "run", "--", sys.executable, "-c", child],
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["noether_writer.checkpoint_writer", "noether_writer.log_writer"], result.stderr


def test_patch_reaches_modules_that_were_imported_before(shaped_noether: Path) -> None:
    script = f"import noether.trainer, noether_writer as n; n.patch_noether(); n.patch_noether(); {SHOW}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == ["noether_writer.checkpoint_writer", "noether_writer.log_writer"], result.stderr


def test_exit_status_is_the_commands() -> None:
    base = [sys.executable, "-m", "noether_writer", "run", "--"]
    assert subprocess.run([*base, sys.executable, "-c", "raise SystemExit(7)"]).returncode == 7
    assert subprocess.run([*base, "no-such-command"]).returncode == 127
    assert subprocess.run(base).returncode == 2


def test_run_has_a_help() -> None:
    for words in (["--help"], ["-h"], ["run", "--help"], ["run", "-h"]):
        result = subprocess.run([sys.executable, "-m", "noether_writer", *words], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, ""), words
        assert result.stdout.startswith("usage: python -m noether_writer run -- CMD")
