# SPDX-License-Identifier: Apache-2.0
"""A log is never destroyed by another one: what a new session would replace is kept beside it, and a session that comes
back after `finish`, to whatever daemon, goes on with its own. With daemons that are killed at each step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunningDaemon, faulty_daemon
from harness import until
from hostile import Raw
from noether_writer import frames
from test_log_merge import Trainer

ATTRIBUTE = "user.noether_writer.log"


def session() -> str:
    return os.urandom(16).hex()


def logs(trainer: Trainer, updates: Sequence[int], factor: float = 1.0) -> None:
    for update in updates:
        trainer.adds(update, loss=factor * update)


def leaves(trainer: Trainer) -> None:
    trainer.send(frames.pack(frames.CLOSE))
    trainer.close()


def losses(path: Path) -> dict[int, float]:
    return dict(torch.load(path).get("loss", {}))


def kept(root: Path, run: str = "r") -> dict[str, list[int]]:
    """The updates of each log that is there."""
    return {path.name: list(losses(path)) for path in sorted((root / run / "tracker").glob("entries*.th"))}


def resumed(resume_at: int | None, *more: int) -> dict[str, list[int]]:
    """What there is of a log of 20 updates that was resumed (or begun anew) and got more; nothing of it is lost."""
    longer = {} if resume_at == 20 else {"entries.1.th": list(range(1, 21))}
    return {**longer, "entries.th": [*range(1, (resume_at or 0) + 1), *more]}


def state_of(daemon: RunningDaemon) -> str:
    client = Raw(daemon.socket)
    state = client.ask(frames.STATUS, {})["runs"][0]["state"]
    client.close()
    return str(state)


def kill(daemon: RunningDaemon) -> RunningDaemon:
    """It is killed, and another one comes."""
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    return RunningDaemon(daemon.socket)


# A log that a new one would replace


def test_a_log_that_is_begun_anew_keeps_the_old_ones(daemon: RunningDaemon, tmp_path: Path) -> None:
    for count in (20, 10, 5):
        trainer = Trainer(daemon.socket, tmp_path, session=session())
        logs(trainer, range(1, count + 1))
        trainer.finish()
        leaves(trainer)
    silent = Trainer(daemon.socket, tmp_path, session=session())
    assert silent.finish() == {"entries": 0}
    leaves(silent)
    every = {"entries.1.th": 20, "entries.2.th": 10, "entries.th": 5}
    assert kept(tmp_path) == {name: list(range(1, count + 1)) for name, count in every.items()}


def test_a_second_finish_of_a_session_keeps_no_copy(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path)
    for update in range(1, 4):
        logs(trainer, [update])
        trainer.finish()
        trainer.adds(update, acc=0.5)
        trainer.finish()
    assert kept(tmp_path) == {"entries.th": [1, 2, 3]}
    leaves(trainer)


@pytest.mark.parametrize("resume_at", [None, 10, 20])
def test_rows_only_in_a_journal_outlive_the_next_session(
    resume_at: int | None, daemon: RunningDaemon, tmp_path: Path
) -> None:
    first = Trainer(daemon.socket, tmp_path, session=session())
    logs(first, range(1, 21))
    first.acknowledged()
    first.close()
    daemon = kill(daemon)
    second = Trainer(daemon.socket, tmp_path, session=session(), resume_at=resume_at)
    logs(second, [21, 22], 2.0)
    second.finish()
    leaves(second)
    assert kept(tmp_path) == resumed(resume_at, 21, 22)
    assert daemon.stop() == 0


KILLED = """
import os, sys, time
import noether_writer, torch
run = noether_writer.open_run(sys.argv[1], "r")
for update in range(1, 21):
    run.log({"loss": float(update)}, update=update)
while run.log_durable_update != 20:
    time.sleep(0.005)
for tag in ("one", "two"):
    ticket = run.save("net", tag, {"w": torch.ones(4)})
while not ticket.accepted:
    time.sleep(0.001)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("resume_at", [None, 10, 20])
def test_a_log_is_resumed_while_the_one_before_waits_behind_checkpoints(
    resume_at: int | None, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer dies while its checkpoints are written, and is started again at once."""
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=slow", monkeypatch)
    first = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert first.returncode == -signal.SIGKILL
    second = Trainer(daemon.socket, tmp_path, session=session(), resume_at=resume_at)
    logs(second, [21, 22], 2.0)
    second.acknowledged()
    second.finish()
    leaves(second)
    assert kept(tmp_path) == resumed(resume_at, 21, 22)
    assert daemon.stop() == 0


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("resume_at", [0, 10, 20])
def test_a_finished_log_is_resumed(resume_at: int, is_restarted: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also by a daemon that has never seen it: it takes the rows from the file."""
    first = Trainer(daemon.socket, tmp_path, session=session())
    logs(first, range(1, 21))
    first.finish()
    leaves(first)
    if is_restarted:
        daemon = kill(daemon)
    second = Trainer(daemon.socket, tmp_path, session=session(), resume_at=resume_at)
    assert (second.opened.get("log_update"), second.opened["log_entries"]) == (resume_at or None, resume_at)
    logs(second, [21], 2.0)
    second.finish()
    leaves(second)
    assert kept(tmp_path) == resumed(resume_at, 21)
    if is_restarted:
        assert daemon.stop() == 0


def test_a_log_of_somebody_else_is_kept_and_resumed(daemon: RunningDaemon, tmp_path: Path) -> None:
    """As torch.save writes it, with keys in which updates go back and forth; and one that is no log of ours."""
    theirs = {"loss": {update: update / 3 for update in (5, 3, 4)}, "word": {3: "ä"}, "big": {4: 2**70, 5: -(2**80)}}
    for name, entries in (("a", theirs), ("b", {"loss": {1: torch.ones(3)}})):
        folder = tmp_path / name / "tracker"
        folder.mkdir(parents=True)
        torch.save(entries, folder / "entries.th")
    resumed = Trainer(daemon.socket, tmp_path, run_id="a", session=session(), resume_at=9)
    values = {3: {"loss": 1.0, "word": "ä"}, 4: {"loss": 4 / 3, "big": 2**70}, 5: {"loss": 5 / 3, "big": -(2**80)}}
    assert resumed.entries() == list(values.items())
    logs(resumed, [6])
    resumed.finish()
    leaves(resumed)
    assert kept(tmp_path, "a") == {"entries.th": [3, 4, 5, 6]}
    other = Trainer(daemon.socket, tmp_path, run_id="b", session=session(), resume_at=9)
    assert other.opened["log_entries"] == 0
    logs(other, [6])
    other.finish()
    leaves(other)
    assert kept(tmp_path, "b") == {"entries.1.th": [1], "entries.th": [6]}


def test_nothing_takes_a_name_that_is_there(daemon: RunningDaemon, tmp_path: Path) -> None:
    folder = tmp_path / "r/tracker"
    folder.mkdir(parents=True)
    (folder / "entries.1.th").write_bytes(b"mine")
    (folder / "entries.2.th").mkdir()
    (folder / "entries.th").write_bytes(b"no log")
    trainer = Trainer(daemon.socket, tmp_path)
    logs(trainer, [1])
    trainer.finish()
    leaves(trainer)
    assert (folder / "entries.1.th").read_bytes() == b"mine"
    assert (folder / "entries.3.th").read_bytes() == b"no log"
    assert losses(folder / "entries.th") == {1: 1.0}


POINTS = [f"file.{point}" for point in ("created", "written", "synced", "kept", "renamed", "durable")]
POINTS += [f"journal.{point}" for point in ("create", "created", "written", "synced", "renamed", "durable", "write")]


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_killed_while_a_log_is_replaced_loses_neither(
    point: str, turn: int, daemon: RunningDaemon, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old log is in a journal; the new session's client sends again what was not acknowledged."""
    old = Trainer(daemon.socket, tmp_path, session=session())
    logs(old, range(1, 21))
    old.acknowledged()
    old.close()
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    dying = faulty_daemon(daemon.socket, f"{point}=kill@{turn}", monkeypatch)
    name = session()
    try:
        new = Trainer(dying.socket, tmp_path, session=name)
        logs(new, range(1, 4), 2.0)
        new.acknowledged()
        new.finish()
        new.close()
    except (AssertionError, ConnectionError):
        dying.process.wait()
    is_dead = dying.process.poll() is not None
    last = dying if not is_dead else RunningDaemon(daemon.socket)
    again = Trainer(last.socket, tmp_path, session=name)
    logs(again, range(again.sequence + 1, 4), 2.0)
    assert again.finish()["entries"] == 3
    leaves(again)
    tracker = tmp_path / "r/tracker"
    assert losses(tracker / "entries.th") == {update: 2.0 * update for update in range(1, 4)}
    assert kept(tmp_path) == {"entries.1.th": list(range(1, 21)), "entries.th": [1, 2, 3]}
    assert last.stop() == 0
    assert sorted(path.name for path in tracker.iterdir()) == ["entries.1.th", "entries.th", "summary.yaml"]


def test_a_log_that_cannot_become_a_file_keeps_its_journal(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "r/tracker/entries.th").mkdir(parents=True)
    first = Trainer(daemon.socket, tmp_path, session=session())
    logs(first, range(1, 21))
    first.acknowledged()
    first.close()
    second = Trainer(daemon.socket, tmp_path, session=session())
    logs(second, [1])
    second.acknowledged()
    second.close()
    journals = sorted(path.name for path in (tmp_path / "r/tracker").glob("*.journal"))
    assert journals == ["entries.1.journal", "entries.journal"]
    old = tmp_path / "r/tracker/entries.1.journal"
    assert len(re.findall(rb"loss", old.read_bytes())) == 1 and old.stat().st_size > 20 * 40
    # Files have failed, which its exit status may say.
    daemon.stop()


# After finish


def test_updates_logged_after_finish_are_written(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path, tensorboard=True)
    logs(trainer, [1, 2])
    assert trainer.finish()["entries"] == 2 and state_of(daemon) == "finished"
    logs(trainer, [3])
    trainer.acknowledged()
    assert state_of(daemon) == "running"
    assert trainer.finish()["entries"] == 3
    assert kept(tmp_path) == {"entries.th": [1, 2, 3]}
    logs(trainer, [4])
    # It dies: with what it has logged since.
    trainer.close()
    until(lambda: kept(tmp_path) == {"entries.th": [1, 2, 3, 4]})
    until(lambda: state_of(daemon) == "interrupted")
    until(lambda: not (tmp_path / "r/tracker/entries.journal").exists())


def test_updates_after_finish_are_written_when_the_daemon_leaves(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path)
    logs(trainer, [1, 2])
    trainer.finish()
    logs(trainer, [3])
    trainer.acknowledged()
    assert daemon.stop() == 0
    assert kept(tmp_path) == {"entries.th": [1, 2, 3]}
    trainer.close()


@pytest.mark.parametrize("has_attributes", [True, False])
def test_a_daemon_killed_after_finish(has_attributes: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    """200 rows are not replaced by one. Where the file has lost what it says of its session, they are kept beside."""
    trainer = Trainer(daemon.socket, tmp_path)
    logs(trainer, range(1, 201))
    trainer.finish()
    trainer.close()
    last = trainer.sequence - 1
    # As long as it is there, it says whose rows these are.
    until(lambda: not (tmp_path / "r/tracker/entries.journal").exists())
    daemon = kill(daemon)
    if not has_attributes:
        os.removexattr(tmp_path / "r/tracker/entries.th", ATTRIBUTE)
    again = Trainer(daemon.socket, tmp_path)
    if has_attributes:
        assert (again.opened["last_sequence"], again.opened["log_entries"]) == (last, 200)
        assert again.opened["log_update"] == 200
        # Asked again: what is on disk.
        assert again.finish()["entries"] == 200
    again.sequence = last + 1
    logs(again, [201])
    again.acknowledged()
    # Its rows are in the journal now, with those of before.
    daemon = kill(daemon)
    again.close()
    once_more = Trainer(daemon.socket, tmp_path)
    assert once_more.opened["last_sequence"] == last + 2
    finished: dict[str, Any] = once_more.finish()
    leaves(once_more)
    whole = list(range(1, 201))
    if has_attributes:
        assert finished["entries"] == 201 and kept(tmp_path) == {"entries.th": [*whole, 201]}
    else:
        assert kept(tmp_path) == {"entries.1.th": whole, "entries.th": [201]}
    assert daemon.stop() == 0
