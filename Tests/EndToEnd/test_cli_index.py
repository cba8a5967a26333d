# SPDX-License-Identifier: Apache-2.0
"""A run is found by its id when no daemon knows it any more: the index in the state directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import noether_writer
import pytest
from conftest import DAEMON, RunningDaemon
from harness import until

CLI = str(Path(DAEMON).parent / "noether-writer")


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Somewhere else than where the runs are."""
    return subprocess.run(
        [CLI, *arguments], capture_output=True, text=True, timeout=60, cwd="/", env={**os.environ, **environment}
    )


def record(root: Path, name: str, **more: Any) -> Path:
    with noether_writer.open_run(root, name, **more) as run:
        run.log({"loss": 0.5}, update=7)
    return run.directory


def found(name: str) -> str:
    result = cli("show", name, "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["last_update"] == 7 and "run" not in shown
    return str(shown["run_directory"])


def index(state_directory: Path) -> Path:
    return state_directory / "opened-runs.jsonl"


def indexed(state_directory: Path, count: int) -> None:
    """Nobody waits for the index: a test does."""
    file = index(state_directory)
    until(lambda: file.exists() and sum(map(bool, file.read_text().splitlines())) >= count)


def test_found_when_the_daemon_has_left(daemon: RunningDaemon, tmp_path: Path, state_directory: Path) -> None:
    directory = record(tmp_path, "abcde")
    staged = record(tmp_path, "staged", stage_name="train")
    indexed(state_directory, 2)
    assert daemon.stop() == 0
    assert found("abcde") == str(directory) and found("staged") == str(staged)
    assert "0.5" in cli("export", "abcde").stdout
    assert cli("plot", "abcde").stdout == "loss\n"
    assert [line["name"] for line in json.loads(cli("plot", "[as]*", "loss", "--json").stdout)] == ["abcde", "staged"]
    unknown = cli("show", "abcd")
    assert unknown.returncode == 4 and "no daemon listens" in unknown.stderr


def test_found_after_a_crash(daemon: RunningDaemon, tmp_path: Path, state_directory: Path) -> None:
    directory = record(tmp_path, "abcde")
    indexed(state_directory, 1)
    # Else the next one brings the log back, of which the first one had not come to remove the journal.
    until(lambda: not (directory / "tracker/entries.journal").exists())
    daemon.crash()
    # The next one does not know it.
    assert "no runs yet" in cli("runs").stdout
    assert found("abcde") == str(directory)
    daemon.process.kill()
    daemon.process.wait()
    assert found("abcde") == str(directory)


def test_a_run_that_is_gone_is_said_to_be(daemon: RunningDaemon, tmp_path: Path, state_directory: Path) -> None:
    old = record(tmp_path / "first", "abcde")
    indexed(state_directory, 1)
    new = record(tmp_path / "second", "abcde")
    indexed(state_directory, 2)
    assert daemon.stop() == 0
    assert found("abcde") == str(new)
    new.rename(tmp_path / "moved")
    # The one before it has this id too.
    assert found("abcde") == str(old)
    shutil.rmtree(old)
    gone = cli("show", "abcde")
    assert gone.returncode == 4 and f"it was in {new}" in gone.stderr
    assert cli("plot", "abcd*", "loss").returncode == 4
    assert found(str(tmp_path / "moved")) == str(tmp_path / "moved")


def test_lines_that_nobody_can_read(daemon: RunningDaemon, tmp_path: Path, state_directory: Path) -> None:
    directory = record(tmp_path, "first")
    indexed(state_directory, 1)
    assert daemon.stop() == 0
    file = index(state_directory)
    good = file.read_bytes()
    file.write_bytes(b'\x00\xff\n{"run_id": 3}\n[]\n{"run_id": "x", "run_directory": "y"}\n' + good + b'{"run_id": "to')
    assert found("first") == str(directory) and cli("show", "x").returncode == 4
    # What comes after a torn line has a line of its own.
    daemon.process = RunningDaemon(daemon.socket).process
    other = record(tmp_path, "od'd \u00e9 \u65e5")
    until(lambda: file.read_bytes().endswith(b'"}\n'))
    assert daemon.stop() == 0
    assert found("first") == str(directory) and found("od'd \u00e9 \u65e5") == str(other)
    assert cli("show", "od'd e\u0301 \u65e5").returncode == 4


def test_it_does_not_grow_without_end(daemon: RunningDaemon, tmp_path: Path, state_directory: Path) -> None:
    directory = record(tmp_path, "first")
    indexed(state_directory, 1)
    file = index(state_directory)
    [line] = filter(None, file.read_text().splitlines())
    other = line.replace("first", "%06d")
    with file.open("a") as more:
        for number in range(20_000):
            more.write((other.replace("%06d", f"{number:06}")) + "\n")
    assert file.stat().st_size > 1 << 20
    inode = file.stat().st_ino
    last = record(tmp_path, "last")
    until(lambda: file.stat().st_ino != inode)
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert file.stat().st_size <= 1 << 19 and lines[-1]["run_id"] == "last" and 1000 < len(lines) <= 4096
    # The newest stay, in their order.
    assert [line["run_id"] for line in lines[-3:-1]] == ["019998", "019999"]
    assert daemon.stop() == 0
    assert found("last") == str(last) and directory.exists() and cli("show", "first").returncode == 4


def test_two_daemons_share_it(
    daemon: RunningDaemon, tmp_path: Path, state_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunningDaemon(daemon.socket + "2")
    directories = []
    for number in range(20):
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", (daemon, other)[number % 2].socket)
        directories.append(record(tmp_path, f"r{number}"))
    indexed(state_directory, 20)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    assert other.stop() == 0 and daemon.stop() == 0
    assert [found(f"r{number}") for number in range(20)] == list(map(str, directories))


def test_an_index_that_cannot_be_written_stops_nothing(
    daemon: RunningDaemon, tmp_path: Path, state_directory: Path
) -> None:
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("mine")
    index(state_directory).symlink_to(elsewhere)
    record(tmp_path, "first")
    index(state_directory).unlink()
    index(state_directory).mkdir()
    directory = record(tmp_path, "second")
    assert daemon.stop() == 0 and elsewhere.read_text() == "mine"
    assert cli("show", "second").returncode == 4 and found(str(directory)) == str(directory)


def test_where_it_is_looked_for(
    daemon: RunningDaemon, tmp_path: Path, state_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = record(tmp_path, "abcde")
    indexed(state_directory, 1)
    assert daemon.stop() == 0
    monkeypatch.delenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY")
    # The file of settings says it.
    assert found("abcde") == str(directory)
    monkeypatch.delenv("NOETHER_WRITER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert cli("show", "abcde").returncode == 4
    shutil.copytree(state_directory, tmp_path / ".local/state/noether-writer")
    assert found("abcde") == str(directory)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert cli("show", "abcde").returncode == 4
    (tmp_path / ".config/noether-writer").mkdir(parents=True)
    (tmp_path / ".config/noether-writer/noether-writer.yaml").write_text(f"state_directory: {state_directory}\n")
    assert found("abcde") == str(directory)
