# SPDX-License-Identifier: Apache-2.0
"""Names are bytes: a letter with its accent is another one than the two, though Unicode takes both for the same."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import until
from hostile import Raw
from noether_writer import frames

CLI = Path(DAEMON).parent / "noether-writer"
ONE, TWO = "caf\u00e9", "cafe\u0301"


def cli(daemon: RunningDaemon, *arguments: str) -> str:
    return subprocess.run(
        [CLI, *arguments, "--socket", daemon.socket], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_keys(daemon: RunningDaemon, tmp_path: Path) -> None:
    wanted = {ONE: {1: 1.0, 2: 3.0}, TWO: {1: 2.0, 3: 4.0}}
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({ONE: 1.0, TWO: 2.0}, update=1)
        run.log({ONE: 3.0}, update=2)
        run.log({TWO: 4.0}, update=3)
        assert (list(run.values(ONE)), list(run.values(TWO))) == ([1.0, 3.0], [2.0, 4.0])
        first = cli(daemon, "tail", "r", "--json", "--no-follow").splitlines()[0]
        assert json.loads(first)["values"] == {ONE: "1.0", TWO: "2.0"}
        assert json.loads(cli(daemon, "export", "r", "--json", "-k", TWO)) == {TWO: {"1": 2.0, "3": 4.0}}
    assert torch.load(run.directory / "tracker/entries.th") == wanted
    for name in ("r", str(run.directory)):
        exported = json.loads(cli(daemon, "export", name, "--json"))
        assert {key: {int(u): v for u, v in values.items()} for key, values in exported.items()} == wanted
        assert cli(daemon, "export", name).splitlines()[:2] == [f"update,{ONE},{TWO}", "1,1.0,2.0"]


def test_runs(daemon: RunningDaemon, tmp_path: Path) -> None:
    for number, name in enumerate((ONE, TWO)):
        with noether_writer.open_run(tmp_path, name) as run:
            run.log({"loss": float(number)}, update=1)
            with noether_writer.subscribe(name) as events:
                assert events.run["run_id"] == name
    for number, name in enumerate((ONE, TWO)):
        assert torch.load(tmp_path / name / "tracker/entries.th") == {"loss": {1: float(number)}}
    listed = json.loads(cli(daemon, "runs", "--json"))
    assert [run["run_id"] for run in listed] == [ONE, TWO]


def test_checkpoints_with_retention(short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model's newer checkpoint removes none of another's, nor do accents that begin a tag."""
    monkeypatch.setenv("NOETHER_WRITER_SETTING_KEEP_LAST", "1")
    daemon = RunningDaemon(str(short_directory / "socket"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    with noether_writer.open_run(tmp_path, "r") as run:
        for tag in ("E1_U2_S2", "E1_U9_S9"):
            for name in (ONE, TWO):
                run.save(name, tag, {"w": torch.ones(3)}).wait(20)
        run.save(ONE, "\u0301E1_U1_S1", {"w": torch.ones(3)}).wait(20)
        files = {f"{name}_cp=E1_U9_S9_model.th" for name in (ONE, TWO)} | {f"{ONE}_cp=\u0301E1_U1_S1_model.th"}
        until(lambda: set(os.listdir(run.directory / "checkpoints")) == files)
    listed = json.loads(cli(daemon, "checkpoints", "r", "--json"))
    assert {row["file"] for row in listed if row["state"] == "durable"} >= files
    assert daemon.stop() == 0


def test_a_slash_before_a_combining_character_is_still_a_slash(daemon: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(daemon.socket)
    for name in ("a/\u0301b", "/\u0301", "../\u0301x"):
        assert client.open_run(tmp_path, name)["code"] == "bad-name"
    assert list(tmp_path.iterdir()) == []
    # In a root it parts two directories.
    opened = client.open_run(tmp_path / "a" / "\u0301b" / "c", "r")
    assert opened["run_directory"] == f"{tmp_path}/a/\u0301b/c/r"
    assert (tmp_path / "a" / "\u0301b" / "c" / "r" / "tracker").is_dir()
    client.send(frames.pack(frames.CLOSE))
    client.close()
