# SPDX-License-Identifier: Apache-2.0
"""Daemons that die: what was acknowledged comes back, and trainers go on by themselves."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import daemon_of, until
from hostile import SESSION, Raw
from noether_writer import errors, frames


def kill(daemon: RunningDaemon) -> None:
    daemon.process.kill()
    daemon.process.wait()


def stop_successor(socket: str) -> None:
    """Ends whichever daemon serves the socket: the test's, or one that a trainer was faster to start."""

    def gone() -> bool:
        pid = daemon_of(socket)
        if Path(socket).exists() and running(pid):
            os.kill(pid, signal.SIGTERM)
        return not Path(socket).exists() and not running(pid)

    until(gone)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


LOGGER = """
import noether_writer, sys, time
run = noether_writer.open_run(sys.argv[1], "r")
for update in range(1, 1001):
    run.log({"loss": 1.0 / update, "nan": float("nan"), "text": "ä%d" % update}, update=update, epoch=update // 100)
while run._core.kept_rows:
    time.sleep(0.005)
print("acknowledged", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["tracker/entries.journal", "."])
def test_a_journal_that_somebody_looks_at_is_recovered_later(what: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Whoever looks whether a run is live shares its locks for a moment, and may be stopped just then."""
    with subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "acknowledged\n"
        # Both at once: neither the trainer nor a daemon of its own does anything.
        daemon.hold()
        trainer.kill()
        trainer.wait()
        kill(daemon)
    looking = os.open(tmp_path / "r" / what, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    # It has read what is left before it answers.
    daemon.process = RunningDaemon(daemon.socket).process
    subprocess.run([Path(DAEMON).parent / "noether-writer", "status"], check=True, stdout=subprocess.DEVNULL)
    entries = tmp_path / "r/tracker/entries.th"
    assert not entries.exists()
    os.close(looking)
    until(entries.exists)
    assert len(torch.load(entries)["loss"]) == 1000


@pytest.mark.parametrize("survivor", ["nobody", "trainer"])
def test_an_acknowledged_log_survives_the_daemon(survivor: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdin is not None
    assert trainer.stdout.readline() == "acknowledged\n"
    if survivor == "nobody":
        kill(daemon)
        trainer.kill()
        trainer.wait()
        RunningDaemon(daemon.socket)
    else:
        kill(daemon)
        RunningDaemon(daemon.socket)
        trainer.stdin.close()
        assert trainer.wait(60) == 0
    entries = tmp_path / "r/tracker/entries.th"
    until(entries.exists)
    loaded = torch.load(entries)
    assert loaded["loss"] == {u: 1.0 / u for u in range(1, 1001)}
    assert loaded["epoch"][999] == 9 and loaded["text"][1000] == "ä1000"
    until(lambda: not (tmp_path / "r/tracker/entries.journal").exists())
    stop_successor(daemon.socket)
    assert {p.name for p in (tmp_path / "r/tracker").iterdir()} == {"entries.th", "summary.yaml"}


def test_a_trainer_goes_on_over_many_daemons(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Ten daemons are killed under one trainer; nothing it logged or saved is missing."""
    run = noether_writer.open_run(tmp_path, "r")
    weights = torch.zeros(1_000_000)
    update, tickets = 0, []
    for life in range(10):
        for _ in range(200):
            update += 1
            run.log({"loss": float(update)}, update=update)
        weights.fill_(life)
        tickets.append(
            run.save_as([noether_writer.Target("net", tag, {"w": weights}) for tag in (f"E{life}", "latest")])
        )
        # Whichever daemon serves now: the test's, or one that the trainer was faster to start.
        until(lambda: running(daemon_of(daemon.socket)))
        os.kill(daemon_of(daemon.socket), signal.SIGKILL)
        RunningDaemon(daemon.socket)
    run.finish(60)
    assert run._core.kept_rows == 0
    for life, ticket in enumerate(tickets):
        ticket.wait(60)
        assert bool((torch.load(tmp_path / f"r/checkpoints/net_cp=E{life}_model.th")["w"] == life).all())
    assert bool((torch.load(tmp_path / "r/checkpoints/net_cp=latest_model.th")["w"] == 9).all())
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {u: float(u) for u in range(1, update + 1)}
    run.close()
    assert not list((tmp_path / "r").rglob(".noether-writer-*"))
    assert not (tmp_path / "r/tracker/entries.journal").exists()
    stop_successor(daemon.socket)


def test_a_daemon_that_is_told_to_leave_hands_over(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 1.0}, update=1)
    ticket = run.save("net", "t", {"w": torch.ones(5_000_000)})
    until(lambda: ticket.accepted)
    assert daemon.stop() == 0
    # What is there now is whole; the run goes on with the next daemon.
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {1: 1.0}
    second = RunningDaemon(daemon.socket)
    daemon.process = second.process
    run.log({"loss": 2.0}, update=2)
    run.finish(30)
    run.close()
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {1: 1.0, 2: 2.0}


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped"])
def test_a_torn_journal_gives_what_is_whole(damage: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    trainer.stdout.readline()
    kill(daemon)
    trainer.kill()
    trainer.wait()
    journal = tmp_path / "r/tracker/entries.journal"
    data = bytearray(journal.read_bytes())
    if damage == "cut":
        del data[-7:]
    elif damage == "zeros":
        data[-30:] = bytes(30)
        data += bytes(4096)
    else:
        data[-20] ^= 1
    journal.write_bytes(data)
    second = RunningDaemon(daemon.socket)
    daemon.process = second.process
    entries = tmp_path / "r/tracker/entries.th"
    until(entries.exists)
    assert torch.load(entries)["loss"] == {u: 1.0 / u for u in range(1, 1000)}


def test_a_journal_that_is_damaged_before_its_end_is_kept_and_said(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    trainer.stdout.readline()
    kill(daemon)
    trainer.kill()
    trainer.wait()
    journal = tmp_path / "r/tracker/entries.journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    second = RunningDaemon(daemon.socket)
    daemon.process = second.process
    entries = tmp_path / "r/tracker/entries.th"
    until(entries.exists)
    found = torch.load(entries)["loss"]
    assert 0 < len(found) < 999 and found == {u: 1.0 / u for u in range(1, len(found) + 1)}
    assert (tmp_path / "r/tracker/entries.1.journal").read_bytes() == data


def test_the_log_becomes_durable_within_a_second_or_so(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=5)
    until(lambda: run.log_durable_update == 5, 3)
    # The first one came with the journal's file; of this one a timer thinks.
    run.log({"a": 2}, update=6)
    until(lambda: run.log_durable_update == 6, 3)
    run.close()


@pytest.mark.parametrize("ended", [True, False])
def test_resume_cuts_the_log_back(ended: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for update in range(1, 101):
        run.log({"loss": float(update)}, update=update, epoch=update // 10)
    run.finish()
    run.close()
    if ended:
        # Another daemon knows nothing of the run: entries.th is all there is.
        assert daemon.stop() == 0
        daemon.process = RunningDaemon(daemon.socket).process
    resumed = noether_writer.open_run(tmp_path, "r", resume_at=60)
    assert resumed.last_update == 60
    with pytest.raises(errors.UpdateOrderError):
        resumed.log({"loss": 0.0}, update=59)
    resumed.log({"loss": -1.0}, update=61)
    assert resumed.values("loss").updates == list(range(1, 62))
    resumed.finish()
    resumed.close()
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries["loss"] == {u: float(u) for u in range(1, 61)} | {61: -1.0}
    assert entries["epoch"] == {u: u // 10 for u in range(1, 61)}


def test_resume_cuts_back_a_log_that_only_torch_can_read(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "r/tracker").mkdir(parents=True)
    entries = {"loss": {update: float(update) for update in range(1, 101)}}
    torch.save(entries, tmp_path / "r/tracker/entries.th", _use_new_zipfile_serialization=False)
    with noether_writer.open_run(tmp_path, "r", resume_at=60) as resumed:
        assert resumed.last_update == 60
        resumed.log({"loss": -1.0}, update=61)
    expected = {update: float(update) for update in range(1, 61)} | {61: -1.0}
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"loss": expected}


def test_a_checkpoint_says_where_its_log_was(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        first = run.save("net", "first", {"a": torch.ones(3)})
        for update in range(1, 101):
            run.log({"loss": float(update)}, update=update)
            if update == 60:
                ticket = run.save_as(
                    [noether_writer.Target("net", tag, {"a": torch.ones(3)}) for tag in ("U60", "latest")]
                )
        first.wait(20)
        ticket.wait(20)
    assert noether_writer.log_update(first.paths[0]) is None
    update = noether_writer.log_update(ticket.paths[1])
    assert update == noether_writer.log_update(ticket.paths[0]) == 60
    with pytest.raises(FileNotFoundError):
        noether_writer.log_update(tmp_path / "nothing.th")
    with noether_writer.open_run(tmp_path, "r", resume_at=update) as run:
        run.log({"loss": -1.0}, update=61)
    assert len(torch.load(tmp_path / "r/tracker/entries.th")["loss"]) == 61


@pytest.mark.parametrize("policy", ["keep-training", "raise"])
def test_a_daemon_that_stays_away_costs_bounded_memory(
    policy: str, daemon: RunningDaemon, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_QUEUE_BYTES", "20000")
    monkeypatch.setenv("NOETHER_WRITER_WHEN_AWAY", policy)
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 0}, update=1)
    until(lambda: run._core.kept_rows == 0)
    # Stopped, so that nothing is acknowledged; killed, it would be replaced.
    os.kill(daemon.process.pid, signal.SIGSTOP)
    # No call waits for it: it never comes back as long as these last.
    if policy == "raise":
        with pytest.raises(errors.DaemonUnavailable, match="20000"):
            for update in range(2, 10_000):
                run.log({"a": update}, update=update)
    else:
        for update in range(2, 10_000):
            run.log({"a": update}, update=update)
        assert caplog.text.count("no more are kept") == 1
    kept = run._core.kept_rows
    assert 0 < kept < 1000
    os.kill(daemon.process.pid, signal.SIGCONT)
    run.finish(30)
    run.close()
    assert len(torch.load(tmp_path / "r/tracker/entries.th")["a"]) == kept + 1


def test_two_daemons_never_share_a_log(daemon: RunningDaemon, short_directory: Path, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    until(lambda: run._core.kept_rows == 0)
    other = RunningDaemon(str(short_directory / "other"))
    script = "import noether_writer, sys; noether_writer.open_run(sys.argv[1], 'r')"
    environment = os.environ | {"NOETHER_WRITER_SOCKET": other.socket}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0 and "RunInUse" in result.stderr and "another daemon" in result.stderr
    assert other.stop() == 0
    run.log({"a": 2}, update=2)
    run.finish()
    run.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1, 2: 2}}


@pytest.mark.parametrize(
    "point",
    [
        "save.accepted",
        "checkpoint.created",
        "checkpoint.chunk",
        "checkpoint.written",
        "checkpoint.synced",
        "checkpoint.renamed",
        "checkpoint.durable",
        "file.created",
        "file.written",
        "file.synced",
        "file.renamed",
        "file.durable",
        "journal.write",
        "journal.create",
    ],
)
def test_killed_at_each_point_of_the_write_path(
    point: str, short_directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The daemon dies at a named point; the next one and the living trainer between them lose nothing."""
    socket = str(short_directory / "d/socket")
    first = faulty_daemon(socket, f"{point}=kill@1", monkeypatch)
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 0.5}, update=1)
    if point == "journal.write":
        # Rows that come before the journal is made are made with it.
        run.flush(10)
    ticket = run.save("net", "latest", {"w": torch.arange(2_000_000)})
    run.log({"loss": 0.25}, update=2)
    assert first.process.wait(20) == -signal.SIGKILL
    RunningDaemon(socket)
    ticket.wait(30)
    run.finish(30)
    run.close()
    stop_successor(socket)
    assert torch.equal(torch.load(ticket.paths[0])["w"], torch.arange(2_000_000))
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {1: 0.5, 2: 0.25}
    names = {p.relative_to(tmp_path / "r").as_posix() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert names == {"checkpoints/net_cp=latest_model.th", "tracker/entries.th", "tracker/summary.yaml"}


def test_a_state_directory_that_can_not_be_had_costs_no_log(
    short_directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY", "/proc/nowhere")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    first = RunningDaemon(str(short_directory / "s"))
    trainer = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "acknowledged\n"
    first.process.kill()
    trainer.kill()
    assert first.process.stderr is not None and "found only when it is opened again" in first.process.stderr.read()
    second = RunningDaemon(str(short_directory / "s"))
    # Opening the run finds the journal of the session before, and makes it a file.
    noether_writer.open_run(tmp_path, "r").close()
    entries = tmp_path / "r/tracker/entries.th"
    until(entries.exists)
    assert len(torch.load(entries)["loss"]) == 1000
    assert second.stop() == 0


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "ENFILE"])
@pytest.mark.parametrize(
    "point", ["checkpoint.created", "checkpoint.written", "checkpoint.synced", "checkpoint.renamed"]
)
def test_storage_that_refuses_once_is_asked_again(
    point: str, error: str, short_directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", f"{point}={error}@1,journal.write={error}@1,journal.create={error}@1")
    daemon = RunningDaemon(str(short_directory / "s"))
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    ticket = run.save("net", "t", {"w": torch.arange(2_000_000)})
    ticket.wait(30)
    run.finish(30)
    run.close()
    assert torch.equal(torch.load(ticket.paths[0])["w"], torch.arange(2_000_000))
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1}}
    assert daemon.stop() == 0
    names = {p.name for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert names == {"net_cp=t_model.th", "entries.th", "summary.yaml"}


def test_a_long_journal_holds_up_its_own_run_only(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens that run waits for it, and goes on with its log; another run is opened and written meanwhile."""
    rows = 70
    trainer = Raw(daemon.socket)
    trainer.open_run(tmp_path, "long")
    trainer.define(0, [b"text", *(b"key%d" % number for number in range(15_000))])
    for update in range(1, rows + 1):
        trainer.log(update, update, range(15_000))
    while frames.unpack_log_ack(trainer.receive_type(frames.LOG_ACK).payload)[0] < rows:
        pass
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    trainer.close()
    # A second for each 4 MiB of it.
    successor = faulty_daemon(daemon.socket, "journal.replay=slow", monkeypatch)
    waiting = Raw(successor.socket)
    message = {"output_root": str(tmp_path), "run_id": "long", "session": SESSION}
    waiting.send(frames.pack_json(frames.OPEN_RUN, message, 1))
    other = Raw(successor.socket)
    assert "run_directory" in other.open_run(tmp_path, "short", session="f" * 32)
    other.define(0, [b"loss"])
    other.log(1, 1, [0])
    other.receive_type(frames.LOG_ACK)
    assert other.ask(frames.FINISH, {"sequence": 2})["entries"] == 1
    assert not select.select([waiting.socket], [], [], 0)[0]
    opened = waiting.receive_type(frames.RUN_OPENED).json()
    assert (opened["last_sequence"], opened["log_entries"], opened["log_update"]) == (rows, rows, rows)
    waiting.send(frames.pack(frames.CLOSE))
    waiting.close()
    other.close()
    assert successor.stop() == 0


def left_by_another_host(daemon: RunningDaemon, tmp_path: Path) -> tuple[Path, Path]:
    """A daemon and its trainer are killed, and come from a host with another name, as a container does that is started
    again. Returns the run's journal and the note of it."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "acknowledged\n"
    kill(daemon)
    trainer.kill()
    trainer.wait()
    notes = Path(os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"]) / "runs"
    [note] = [each for each in notes.iterdir() if each.read_text() == str(tmp_path / "r/tracker")]
    foreign = note.with_name(f"run-pod-7f9c-{note.name.rpartition('-')[2]}")
    note.rename(foreign)
    return tmp_path / "r/tracker/entries.journal", foreign


@pytest.fixture
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY", str(tmp_path_factory.mktemp("state")))


def test_a_journal_that_another_host_has_left_is_recovered(
    own_state: None, daemon: RunningDaemon, tmp_path: Path
) -> None:
    journal, note = left_by_another_host(daemon, tmp_path)
    os.utime(journal, (0, 0))
    RunningDaemon(daemon.socket)
    until((tmp_path / "r/tracker/entries.th").exists)
    until(lambda: not journal.exists() and not note.exists())
    assert len(torch.load(tmp_path / "r/tracker/entries.th")["loss"]) == 1000


@pytest.mark.parametrize("sign", ["lock", "time"])
def test_a_journal_that_another_host_may_be_writing_is_left_alone(
    sign: str, own_state: None, daemon: RunningDaemon, tmp_path: Path
) -> None:
    journal, note = left_by_another_host(daemon, tmp_path)
    with journal.open("rb+") as held:
        if sign == "lock":
            os.utime(journal, (0, 0))
            fcntl.flock(held, fcntl.LOCK_EX)
        successor = RunningDaemon(daemon.socket)
        # It has looked at everything that it knows of before it leaves.
        with noether_writer.open_run(tmp_path, "other") as run:
            run.log({"loss": 1.0}, update=1)
        assert successor.stop() == 0
        assert journal.exists() and note.exists()
        assert not (tmp_path / "r/tracker/entries.th").exists()
