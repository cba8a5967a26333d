# SPDX-License-Identifier: Apache-2.0
"""Trainers that die, come back, and go back in their logs; daemons that die; directories of runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import noether_writer
import pytest
from conftest import Store
from harness import Daemon, until
from test_bridges import check, notes, sent_and_kept, train, values_at

# Logs from `first` to `last`, each value times `factor`, and then waits for its death.
TRAINER = """
import sys, time, noether_writer
root, first, last, factor, resume_at = sys.argv[1], *map(int, sys.argv[2:])
run = noether_writer.open_run(root, "r", resume_at=resume_at if resume_at >= 0 else None)
for update in range(first, last + 1):
    run.log({"loss": factor / update, "acc/val": update * 0.5 * factor}, update=update)
run.flush(60)
print("logged", flush=True)
sys.stdin.read()
run.finish()
run.close()
"""


class Trainer:
    def __init__(self, root: Path, first: int, last: int, factor: int = 1, resume_at: int = -1) -> None:
        command = [sys.executable, "-c", TRAINER, str(root), *map(str, (first, last, factor, resume_at))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "logged\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def finish(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


def test_a_trainer_that_repeats_what_it_had_logged_stays_one_run(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    bridge = store.bridge(tmp_path, "--project", "p")
    trainer = Trainer(tmp_path / "runs", 1, 200)
    until(lambda: (tmp_path / "runs/r/tracker/bridges").exists())
    trainer.kill()
    until(lambda: "the run is interrupted, and the tracker has all of its 200 rows" in bridge.said)
    trainer = Trainer(tmp_path / "runs", 101, 300, resume_at=100)
    trainer.finish()
    until(lambda: "the run is finished, and the tracker has all of its 300 rows" in bridge.said)
    bridge.stop()
    assert list(store.runs()) == ["r"]
    check(store.runs()["r"], 300)


def test_a_trainer_that_goes_back_gets_another_run(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """What was uploaded stays under its name, and the whole new log is in `r.2`: no tracker has both in one curve."""
    bridge = store.bridge(tmp_path, "--project", "p")
    trainer = Trainer(tmp_path / "runs", 1, 200)
    until(lambda: (tmp_path / "runs/r/tracker/bridges").exists())
    trainer.kill()
    until(lambda: "the run is interrupted" in bridge.said)
    trainer = Trainer(tmp_path / "runs", 101, 150, factor=4, resume_at=100)
    until(lambda: "the log was cut or begun anew" in bridge.said, what=bridge.said)
    trainer.finish()
    until(lambda: "the run is finished, and the tracker has all of its 150 rows" in bridge.said, what=bridge.said)
    bridge.stop()
    runs = store.runs()
    assert set(runs) == {"r", "r.2"}
    check(runs["r"], 200)
    assert {(step, key): value for step, key, value, _ in runs["r.2"]} == {
        (update, key): value * (4 if update > 100 else 1)
        for update in range(1, 151)
        for key, value in values_at(update).items()
    }
    assert len(runs["r.2"]) == 300
    if store.tracker == "mlflow":
        found = {run.info.run_name: run for run in store.mlflow_runs()}
        assert found["r"].info.status == "KILLED" and found["r.2"].info.status == "FINISHED"
        assert "was cut or begun anew" in found["r"].data.tags["mlflow.note.content"]
    if store.tracker == "wandb":
        tags = [(record.run.display_name, list(record.run.tags)) for _, record in store.wandb_records("run")]
        assert ("r", ["superseded"]) in tags and ("r.2", ["superseded"]) not in tags


@pytest.mark.parametrize("store", ["trackio", "mlflow"], indirect=True)
def test_a_run_that_was_deleted_in_the_tracker_is_uploaded_again(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(run.directory)
    train(run, 1, 100)
    until(lambda: sent_and_kept(run, store)[1] > 50, what=bridge.said)
    store.delete("r")
    train(run, 101, 200)
    run.finish()
    run.close()
    bridge.wait()
    [(name, points)] = store.runs().items()
    assert name == "r"
    check(sorted(points, key=lambda point: point[0]), 200)


@pytest.mark.parametrize("store", ["trackio"], indirect=True)
def test_notes_that_cannot_be_kept_are_kept_elsewhere(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        train(run, 1, 10)
    # Root may write anywhere, but not into a file.
    (Path(run.directory) / "tracker/bridges").write_text("")
    said = store.bridge(run.directory).wait(1)
    assert "--state names another directory" in said and store.runs() == {}
    store.bridge(run.directory, "--state", str(tmp_path / "notes")).wait()
    check(store.runs()["r"], 10)
    store.bridge(run.directory, "--state", str(tmp_path / "notes")).wait()
    check(store.runs()["r"], 10)


def test_a_log_that_is_cut_while_it_is_followed(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    first = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(first.directory)
    train(first, 1, 100)
    until(lambda: sent_and_kept(first, store)[0] > 50)
    # As a cell of a notebook that is run again.
    second = noether_writer.open_run(tmp_path / "runs", "r", resume_at=50)
    second.log({"loss": 9.0, "acc/val": 9.0}, update=51)
    second.finish()
    second.close()
    bridge.wait()
    last = store.runs()["r.2"]
    assert [value for step, _, value, _ in last if step == 51] == [9.0, 9.0] and len(last) == 102


def test_a_daemon_that_dies(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(run.directory)
    train(run, 1, 100)
    until(lambda: notes(run, store).exists())
    daemon.kill()
    daemon.start()
    train(run, 101, 200)
    run.flush(60)
    daemon.kill()
    train(run, 201, 300)
    daemon.start()
    run.finish()
    run.close()
    bridge.wait()
    check(store.runs()["r"], 300)


def test_a_second_bridge_is_refused(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        bridge = store.bridge(run.directory)
        until(lambda: notes(run, store).exists())
        train(run, 1, 50)
        second = store.bridge(run.directory)
        said = second.wait(1)
        assert f"another bridge, process {bridge.process.pid}, uploads this run" in said
    bridge.wait()
    check(store.runs()["r"], 50)


def test_a_directory_has_runs_that_have_ended_live_and_begin(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "ended") as run:
        train(run, 1, 30)
    living = noether_writer.open_run(tmp_path / "runs", "living", "stage")
    train(living, 1, 20)
    bridge = store.bridge(tmp_path / "runs")
    until(lambda: notes(living, store).exists() and "ended: the run is finished" in bridge.said)
    new = noether_writer.open_run(tmp_path / "runs", "new")
    train(new, 1, 40)
    train(living, 21, 60)
    for each in (new, living):
        each.finish()
        each.close()
    until(lambda: bridge.said.count("the run is finished") == 3, what=bridge.said)
    bridge.stop()
    assert set(store.runs()) == {"ended", "living/stage", "new"}
    for name, last in (("ended", 30), ("new", 40), ("living/stage", 60)):
        check(store.runs()[name], last)
    # Nothing more is to be done, and the daemon is away.
    daemon.stop()
    assert store.bridge(tmp_path / "runs", "--once").wait() == ""


def test_the_times_of_an_ended_run_are_in_its_event_files(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r", tensorboard=True) as run:
        run.log({"loss": 1.0}, update=1)
        run.flush(30)
        first = next(noether_writer.subscribe("r"))
        run.log({"loss": 2.0}, update=2)
    os.utime(Path(run.directory) / "tracker/entries.th", (5, 5))
    daemon.stop()
    store.bridge(run.directory).wait()
    [(step, _, _, seconds), _] = store.runs()["r"]
    assert step == 1 and isinstance(first, noether_writer.subscription.Row)
    assert abs(seconds - first.wall_time) < 0.001


def test_without_event_files_the_time_is_that_of_the_file(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r", tensorboard=False) as run:
        train(run, 1, 3)
    os.utime(Path(run.directory) / "tracker/entries.th", (1_700_000_000, 1_700_000_000))
    daemon.stop()
    said = store.bridge(run.directory).wait()
    assert "do not say when each row was logged" in said
    assert {seconds for *_, seconds in store.runs()["r"]} == {1_700_000_000}


@pytest.mark.parametrize("store", ["trackio"], indirect=True)
def test_what_is_no_run_is_refused(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    said = store.bridge("nothing").wait(1)
    assert "nothing is neither a directory nor the id of a run" in said
