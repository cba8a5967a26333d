# SPDX-License-Identifier: Apache-2.0
"""The real Noether package (PyPI: emmiai-noether), trained with its own writers and with the drop-ins, in turn: the
same files, with the same content. `make test-noether` runs this with each version that is supported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import daemon_of

TRAINING = Path(__file__).parent / "training.py"
VERSION = metadata.version("emmiai-noether")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Short, for the socket's sake. The first training starts the daemon, the end of the module ends it."""
    path = Path(tempfile.mkdtemp(prefix="nw-"))
    os.environ["NOETHER_WRITER_SOCKET"] = str(path / "d/socket")
    os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = str(path / "state")
    yield path
    if (path / "d/socket.lock").exists():
        os.kill(daemon_of(path / "d/socket"), signal.SIGTERM)
    shutil.rmtree(path)


def train(output: Path, *arguments: str, patched: bool, status: int = 0) -> str:
    output.mkdir(exist_ok=True)
    command = [sys.executable, str(TRAINING), str(output), *arguments]
    if patched:
        command = [sys.executable, "-m", "noether_writer", "run", "--", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr
    ours = "writers: noether_writer.checkpoint_writer noether_writer.log_writer"
    assert (ours in result.stdout) == patched, result.stdout
    return result.stderr


def load(path: Path) -> Any:
    return torch.load(path, weights_only=path.name != "entries.th" or None)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def compare(theirs: Path, ours: Path) -> int:
    names = [{p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (theirs, ours)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix != ".th":
            assert (theirs / name).read_text() == (ours / name).read_text(), name
            continue
        a, b = load(theirs / name), load(ours / name)
        if name.name == "entries.th":
            # How long things took is never the same twice.
            assert list(a) == list(b)
            for entries in (a, b):
                for key in [key for key in entries if key.startswith(("train_time", "profiling"))]:
                    entries[key] = list(entries[key])
        assert equal(a, b), name
    return len(names[0])


def test_a_training_leaves_the_same_files_and_resumes_from_them(root: Path) -> None:
    for patched in (False, True):
        output = root / str(patched)
        train(output, "first", "3", patched=patched)
        train(output, "second", "5", "--resume", "first", patched=patched)
        keys = (output / "first.keys").read_text().split("\n")
        assert {"epoch", "sample", "update", "loss/online/loss/U1"} <= set(keys)
    for run in ("first", "second"):
        assert compare(root / "False" / run / "train", root / "True" / run / "train") > 20
    latest = load(root / "True/second/train/checkpoints/pair_cp=latest_trainer.th")
    assert latest["training_iteration"] == {"epoch": 5, "update": 40, "sample": 320}


def test_a_killed_training_leaves_its_log_and_checkpoints(root: Path) -> None:
    train(root / "killed", "r", "3", "--kill-at", "15", patched=True, status=-signal.SIGKILL)
    entries = root / "killed/r/train/tracker/entries.th"
    deadline = time.monotonic() + 5
    while not entries.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    logged = list(torch.load(entries)["loss/online/loss/U1"])
    # What the killed process had not sent yet is an update at the most: the one it was in.
    assert logged == list(range(1, 16))
    checkpoint = load(root / "killed/r/train/checkpoints/pair.encoder_cp=latest_model.th")
    assert checkpoint["training_iteration"]["update"] == 10


def test_patch_noether_replaces_what_is_imported_already(root: Path) -> None:
    script = (
        "import sys; from noether.core.callbacks import base; import noether.training.trainers.base as trainer\n"
        "import noether_writer; noether_writer.patch_noether()\n"
        "import noether.core.writers as writers\n"
        "for module in (base, trainer, writers):\n"
        "    assert module.CheckpointWriter is noether_writer.CheckpointWriter, module\n"
        "    assert module.LogWriter is noether_writer.LogWriter, module\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_failed_training_has_its_log(root: Path) -> None:
    # With its own writers, 2.0.0 leaves none.
    error = train(root / "failed", "r", "3", "--fail-at", "15", patched=True, status=1)
    assert "this training fails" in error
    assert list(torch.load(root / "failed/r/train/tracker/entries.th")["loss/online/loss/U1"])[-1] == 15


@pytest.mark.skipif(VERSION == "2.0.0", reason="PrefixedLogWriter came with 2026.4.0")
def test_prefixed_log_writer_wraps_the_drop_in(root: Path) -> None:
    script = (
        "import sys, pathlib, noether_writer; noether_writer.patch_noether()\n"
        "from noether.core.writers import LogWriter, PrefixedLogWriter\n"
        "from noether.core.providers import PathProvider\n"
        "from types import SimpleNamespace as N\n"
        "counter = N(epoch=0, update=1, sample=2)\n"
        "inner = LogWriter(PathProvider(pathlib.Path(sys.argv[1]), 'p'), counter, N(log=lambda data: None))\n"
        "with inner:\n"
        "    writer = PrefixedLogWriter(inner=inner, prefix='ema')\n"
        "    writer.add_scalar('loss', 0.5)\n"
        "    writer.flush()\n"
        "    assert writer.get_all_metric_values('loss') == [0.5]\n"
        "    assert writer.log_entries[0]['ema/loss'] == 0.5\n"
    )
    subprocess.run([sys.executable, "-c", script, str(root / "prefixed")], check=True)
    assert torch.load(root / "prefixed/p/tracker/entries.th") == {
        "epoch": {1: 0},
        "sample": {1: 2},
        "ema/loss": {1: 0.5},
    }
