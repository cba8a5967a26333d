# SPDX-License-Identifier: Apache-2.0
"""Directories of a living run that are removed or moved: what is saved next goes to the path, or waits, and nothing is
called durable where its path no longer leads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import noether_writer
import pytest
import torch
from conftest import RunningDaemon, faulty_daemon
from harness import until
from noether_writer import errors


def weights(run: noether_writer.Run, tag: str, value: float = 1) -> noether_writer.Ticket:
    return run.save("net", tag, {"w": torch.full((3,), value)})


def removed(path: Path) -> None:
    shutil.rmtree(path)


def moved(path: Path) -> None:
    path.rename(path.with_name(path.name + "-moved"))


def made_anew(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


WAYS = [removed, moved, made_anew]
# Each may cost a save its three tries at once, and then a pause that grows.
REMOVALS = 12
PARTS = ["checkpoints", "tracker", ".", ".."]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("goes", WAYS)
def test_what_is_saved_next_goes_to_the_path(
    goes: Callable[[Path], None], part: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    run = noether_writer.open_run(root, "r", "stage")
    home = root / "r/stage"
    for update in (1, 2):
        run.log({"a": update}, update=update)
    weights(run, "U2").wait(30)
    until(lambda: run.log_durable_update == 2)
    goes(Path(os.path.normpath(home / part)))
    weights(run, "U3", 3).wait(30)
    assert torch.load(home / "checkpoints/net_cp=U3_model.th")["w"].tolist() == [3, 3, 3]
    run.log({"a": 3}, update=3)
    until(lambda: run.log_durable_update == 3)
    # All of the log, also what was acknowledged in the journal that is gone; a daemon that dies now loses none of it.
    journal = home / "tracker/entries.journal"
    assert journal.exists()
    daemon.crash()
    run.finish(30)
    run.close()
    assert torch.load(home / "tracker/entries.th") == {"a": {1: 1, 2: 2, 3: 3}}
    until(lambda: not journal.exists())


def test_a_journal_that_is_unlinked_is_written_anew(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    until(lambda: run.log_durable_update == 1)
    journal = tmp_path / "r/tracker/entries.journal"
    journal.unlink()
    run.log({"a": 2}, update=2)
    until(lambda: run.log_durable_update == 2)
    assert journal.exists()
    # Another file under the name is none of the run's, and makes room.
    journal.unlink()
    journal.write_text("somebody's")
    run.log({"a": 3}, update=3)
    until(lambda: run.log_durable_update == 3)
    run._session.end()
    daemon.crash()
    run = noether_writer.open_run(tmp_path, "r", resume_at=2)
    run.finish(30)
    run.close()
    assert torch.load(tmp_path / "r/tracker/entries.th")["a"][2] == 2


def test_a_journal_that_is_unlinked_while_nothing_is_logged_is_written_anew(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    until(lambda: run.log_durable_update == 1)
    journal = tmp_path / "r/tracker/entries.journal"
    shutil.rmtree(tmp_path / "r")
    until(journal.exists)
    run._session.end()
    daemon.crash()
    run = noether_writer.open_run(tmp_path, "r", resume_at=1)
    run.finish(30)
    run.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1}}


@pytest.mark.parametrize("goes", WAYS)
def test_a_run_that_ends_after_its_directory_went_makes_nothing_but_its_log(
    goes: Callable[[Path], None], daemon: RunningDaemon, tmp_path: Path
) -> None:
    with noether_writer.open_run(tmp_path, "logged") as run:
        run.log({"a": 1}, update=1)
        until(lambda: run.log_durable_update == 1)
        goes(tmp_path / "logged")
    assert torch.load(tmp_path / "logged/tracker/entries.th") == {"a": {1: 1}}
    run = noether_writer.open_run(tmp_path, "silent")
    shutil.rmtree(tmp_path / "silent")
    run.finish(30)
    run.close()
    # Another run after it: the daemon has done with the first.
    noether_writer.open_run(tmp_path, "next").close()
    assert not (tmp_path / "silent").exists()


@pytest.mark.parametrize("goes", [moved, removed])
def test_a_directory_that_goes_in_the_middle_of_a_write(
    goes: Callable[[Path], None], short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is on its way: it is written again where the path leads, before it is called durable."""
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.written=slow@1", monkeypatch)
    run = noether_writer.open_run(tmp_path, "r")
    checkpoints = tmp_path / "r/checkpoints"
    ticket = weights(run, "U1")
    until(lambda: list(checkpoints.glob(".noether-writer-*")))
    goes(checkpoints)
    ticket.wait(30)
    assert torch.load(checkpoints / "net_cp=U1_model.th")["w"].tolist() == [1, 1, 1]
    run.close()
    assert daemon.stop() == 0


def test_a_storm_of_removals(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Whatever is called durable was under its path at some moment after the save."""
    run = noether_writer.open_run(tmp_path, "r")
    random = Random(1)
    seen: set[str] = set()
    checkpoints = tmp_path / "r/checkpoints"

    def remove() -> None:
        for number in range(REMOVALS):
            gone = tmp_path / f"gone{number}"
            # At any moment of a write: looked at for a while, then gone.
            for _ in range(random.randrange(20_000)):
                checkpoints.exists()
            until(checkpoints.exists)
            checkpoints.rename(gone)
            seen.update(p.name for p in gone.iterdir())

    thread = threading.Thread(target=remove)
    thread.start()
    tickets = []
    while thread.is_alive():
        tickets.append(weights(run, f"U{len(tickets)}"))
        # Stalled now and then, never failed.
        tickets[-1].wait(60)
    thread.join()
    weights(run, "last").wait(60)
    for number in range(REMOVALS):
        seen.update(p.name for p in (tmp_path / f"gone{number}").iterdir())
    seen.update(p.name for p in checkpoints.iterdir())
    assert len(tickets) > 1 and {Path(ticket.paths[0]).name for ticket in tickets} <= seen
    run.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("mounted", ["root", "root/r", "root/r/checkpoints"])
def test_what_was_a_mount_is_not_made_below_its_mount_point(
    mounted: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    """Unmounted, it is waited for; nothing comes into being in its place."""
    place = tmp_path / mounted
    place.mkdir(parents=True)

    def mount() -> None:
        if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")

    mount()
    run = noether_writer.open_run(tmp_path / "root", "r")
    weights(run, "U1").wait(30)
    # Away from under the daemon, which holds it.
    subprocess.run(["umount", "--lazy", place], check=True)
    ticket = weights(run, "U2")
    with pytest.raises(errors.CheckpointStalled, match=r"gone with its file system|No such file"):
        ticket.wait(3)
    assert list(place.iterdir()) == []
    mount()
    try:
        (tmp_path / "root/r/checkpoints").mkdir(parents=True, exist_ok=True)
        ticket.wait(60)
        assert (tmp_path / "root/r/checkpoints/net_cp=U2_model.th").exists()
        run.close()
    finally:
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(30)
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_path_that_leads_to_another_daemons_run_is_left_to_it(
    daemon: RunningDaemon, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's directory is moved, and another daemon's run stands at its path: what is saved then waits."""
    run = noether_writer.open_run(tmp_path, "r")
    weights(run, "U1").wait(30)
    moved(tmp_path / "r")
    other = RunningDaemon(str(short_directory / "other"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", other.socket)
    second = noether_writer.open_run(tmp_path / "elsewhere", "r")
    (tmp_path / "elsewhere/r").rename(tmp_path / "r")
    ticket = weights(run, "U2")
    with pytest.raises(errors.CheckpointStalled, match="another daemon holds"):
        ticket.wait(2)
    second.close()
    assert other.stop() == 0
    ticket.wait(60)
    assert (tmp_path / "r/checkpoints/net_cp=U2_model.th").exists()
    run.close()


@pytest.mark.parametrize("part", ["checkpoints", "tracker"])
def test_a_run_is_opened_while_somebody_removes_what_it_has_just_made(
    part: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    for number in range(5):
        path = tmp_path / f"r{number}" / part
        is_open = threading.Event()

        def remove_once(path: Path = path, is_open: threading.Event = is_open) -> None:
            while not is_open.is_set():
                try:
                    path.rmdir()
                    return
                except OSError:
                    continue

        remover = threading.Thread(target=remove_once)
        remover.start()
        try:
            with noether_writer.open_run(tmp_path, f"r{number}") as run:
                run.log({"a": 1}, update=1)
                weights(run, "U1").wait(30)
        finally:
            is_open.set()
            remover.join()


@pytest.mark.parametrize("way", ["run", "file"])
def test_the_file_on_its_way_is_removed(way: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """As `rm -rf` of its directory does it, before the directory itself goes."""
    run = noether_writer.open_run(tmp_path, "r")
    directory = tmp_path / "r/checkpoints" if way == "run" else tmp_path
    for number in range(3):
        is_done = threading.Event()

        def remove_once(is_done: threading.Event = is_done) -> None:
            while not is_done.is_set():
                for path in directory.glob(".noether-writer-*.tmp"):
                    path.unlink(missing_ok=True)
                    return

        remover = threading.Thread(target=remove_once)
        remover.start()
        try:
            value = {"w": torch.full((1 << 20,), number)}
            ticket = run.save("net", "t", value) if way == "run" else noether_writer.save(value, tmp_path / "t.pt")
            ticket.wait(30)
        finally:
            is_done.set()
            remover.join()
        assert torch.equal(torch.load(ticket.paths[0])["w"], value["w"])
    run.finish()
