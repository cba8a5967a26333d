# SPDX-License-Identifier: Apache-2.0
"""Files at any path: `noether_writer.save`, `load`, `remove` and `wait`, with real daemons that are stopped, killed and
replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from noether_writer import _files
from test_files import without_serialization_id as content_of

CLI = str(Path(DAEMON).parent / "noether-writer")


def state(value: float = 1, count: int = 1000) -> dict[str, Any]:
    return {"model": {"weight": torch.full((count,), value), "bias": torch.zeros(3)}, "step": int(value)}


def value_of(path: object) -> float:
    return float(torch.load(str(path))["model"]["weight"][0])


def in_a_process(program: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Runs a program in another trainer; `import noether_writer, torch, sys` is done."""
    text = "import os, sys, signal, noether_writer, torch\n" + textwrap.dedent(program)
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "go") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


# What is written, and where

NAMES = [
    "model.pt",
    "model",
    "a.b.c.pt",
    ".hidden.pt",
    "with space.bin",
    "back\\slash.pt",
    "\u00fcn\u00ef.pt",
    "decomposed-u\u0308.pt",
    "new\nline.pt",
    "trailing.",
    "x" * 255,
    "\u00fc" * 127 + "x",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_torch_save(daemon: RunningDaemon, tmp_path: Path, name: str) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    theirs, ours = tmp_path / "theirs" / name, tmp_path / "ours" / name
    torch.save(state(), theirs)
    ticket = noether_writer.save(state(), ours)
    assert ticket.path == str(ours) and ticket.paths == [str(ours)]
    ticket.wait(60)
    assert content_of(ours) == content_of(theirs)
    assert os.listdir(tmp_path / "ours") == [name]


def test_a_relative_path_is_of_the_moment_of_the_call(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there", "\u00fcber"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ticket = noether_writer.save(state(), "x.pt")
    monkeypatch.chdir(tmp_path / "there")
    assert ticket.path == str(tmp_path / "here/x.pt")
    ticket.wait(60)
    assert (tmp_path / "here/x.pt").exists() and not (tmp_path / "there/x.pt").exists()
    # The records have the name of the path as it is given, which is ASCII here though the directory is not.
    monkeypatch.chdir(tmp_path / "\u00fcber")
    torch.save(state(), "x.pt")
    theirs = content_of(Path("x.pt"))
    noether_writer.save(state(), "x.pt").wait(60)
    assert content_of(Path("x.pt")) == theirs
    torch.save(state(), tmp_path / "\u00fcber/x.pt")
    theirs = content_of(Path("x.pt"))
    noether_writer.save(state(), tmp_path / "\u00fcber/x.pt").wait(60)
    assert content_of(Path("x.pt")) == theirs


def test_many_saves_overlap_and_all_modes_work(daemon: RunningDaemon, tmp_path: Path) -> None:
    large = {f"layer{i}": torch.randn(100) for i in range(700)}
    tickets = [noether_writer.save(large, tmp_path / "large.pt")]
    tickets += [noether_writer.save(state(i), tmp_path / f"{i}.pt", snapshot="overlap") for i in range(5)]
    noether_writer.wait(60)
    assert all(ticket.durable for ticket in tickets)
    torch.save(large, tmp_path / "theirs.pt")
    assert torch.load(tmp_path / "large.pt").keys() == large.keys()
    for i in range(5):
        assert value_of(tmp_path / f"{i}.pt") == i


def test_links_are_followed_as_torch_save_follows_them(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "latest.pt").symlink_to("real/model.pt")
    # What the link names is not there yet.
    ticket = noether_writer.save(state(1), tmp_path / "latest.pt")
    assert ticket.path == str(tmp_path / "real/model.pt")
    ticket.wait(60)
    assert (tmp_path / "latest.pt").is_symlink() and value_of(tmp_path / "real/model.pt") == 1
    torch.save(state(1), tmp_path / "latest.pt")
    theirs = content_of(tmp_path / "real/model.pt")
    noether_writer.save(state(1), tmp_path / "latest.pt").wait(60)
    assert content_of(tmp_path / "real/model.pt") == theirs
    ticket = noether_writer.save(state(2), tmp_path / "linked/other.pt")
    assert ticket.path == str(tmp_path / "real/other.pt")
    ticket.wait(60)
    assert value_of(tmp_path / "real/other.pt") == 2


def test_bytes_as_they_are(daemon: RunningDaemon, tmp_path: Path) -> None:
    content = os.urandom(5_000_001)
    _files.save_bytes(content, tmp_path / "shard").wait(60)
    assert (tmp_path / "shard").read_bytes() == content
    _files.save_bytes(b"", tmp_path / "empty").wait(60)
    assert (tmp_path / "empty").read_bytes() == b""

    def fill(memory: memoryview) -> None:
        torch.frombuffer(memory, dtype=torch.float32).copy_(torch.arange(1000.0))

    _files.save_raw(tmp_path / "tensor", 4000, fill).wait(60)
    assert torch.frombuffer(bytearray((tmp_path / "tensor").read_bytes()), dtype=torch.float32)[999] == 999
