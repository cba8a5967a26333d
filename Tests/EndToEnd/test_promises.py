# SPDX-License-Identifier: Apache-2.0
"""What the daemon says it keeps, one promise a test: accepted, acknowledged, the old file or the new one, and that it
says where storage refuses. What a power loss leaves is in test_power_loss, what a client is refused in test_wire_rules.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import until
from hostile import SESSION, Raw, log_payload, memfd, save_payload, target
from noether_writer import frames

sys.path.insert(0, str(Path(__file__).parents[1] / "Torture"))
from manager import Manager

CLI = Path(DAEMON).with_name("noether-writer")
Start = Callable[..., RunningDaemon]


@pytest.fixture
def start(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts daemons with faults at points of the write path (Faults.swift)."""
    started: list[RunningDaemon] = []

    def start(faults: str = "", name: str = "s") -> RunningDaemon:
        monkeypatch.setenv("NOETHER_WRITER_FAULTS", faults)
        started.append(RunningDaemon(str(short_directory / name)))
        monkeypatch.delenv("NOETHER_WRITER_FAULTS")
        return started[-1]

    yield start
    for daemon in started:
        daemon.process.kill()
        daemon.process.wait()


def pickled(value: int) -> bytes:
    """What torch.save would write for an int below 256."""
    return b"\x80\x02K" + bytes([value]) + b"."


def save(client: Raw, value: int, sequence: int, tag: str = "latest") -> None:
    """Sends a checkpoint of one number."""
    content = pickled(value)
    fd = memfd(content=bytes(128) + content)
    payload = save_payload([100], 128, [target(name="net", tag=tag, pickle_length=len(content))], sequence)
    client.send(frames.pack(frames.SAVE, payload, fds=1), [fd])
    os.close(fd)


def event(client: Raw, kind: str) -> dict[str, object]:
    while (found := client.receive_type(frames.CHECKPOINT_EVENT).json())["event"] != kind:
        pass
    return dict(found)


def open_run(daemon: RunningDaemon, root: Path, **members: object) -> Raw:
    client = Raw(daemon.socket)
    assert "run_directory" in client.open_run(root, **members)
    return client


def acknowledged(client: Raw, update: int, *, durable: bool = False) -> None:
    while True:
        payload = client.receive_type(frames.LOG_ACK).payload
        if int.from_bytes(payload[16 if durable else 8 :][:8], "little", signed=True) >= update:
            return


def finish(client: Raw, sequence: int) -> dict[str, object]:
    client.send(frames.pack_json(frames.FINISH, {"sequence": sequence}, 7))
    return dict(client.receive_type(frames.FINISHED).json())


# Accepted


SAVES_AND_DIES = """
import noether_writer, os, signal, sys, time, torch
run = noether_writer.open_run(sys.argv[1], "r")
tickets = [run.save("net", "latest", {"w": torch.full((1000,), i)}) for i in range(4)]
while not all(ticket.accepted for ticket in tickets):
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_accepted_checkpoints_survive_their_trainer(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start("checkpoint.created=slow@1")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    assert subprocess.run([sys.executable, "-c", SAVES_AND_DIES, str(tmp_path)]).returncode == -signal.SIGKILL
    path = tmp_path / "r/checkpoints/net_cp=latest_model.th"
    assert not path.exists()
    until(lambda: path.exists() and torch.load(path)["w"][0] == 3)
    assert daemon.stop() == 0


def test_accepted_checkpoints_survive_the_daemon_and_the_trainer(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a service manager that keeps descriptors: the first daemon writes nothing, and dies after the trainer."""
    manager = Manager(DAEMON, short_directory / "s", store=True, log=short_directory / "log")
    try:
        manager.ask("start", lives=["checkpoint.created=hang"])
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
        assert subprocess.run([sys.executable, "-c", SAVES_AND_DIES, str(tmp_path)]).returncode == -signal.SIGKILL
        assert len(manager.ask("state")["kept"]) == 4
        manager.ask("kill")
        path = tmp_path / "r/checkpoints/net_cp=latest_model.th"
        until(lambda: path.exists() and torch.load(path)["w"][0] == 3)
        # What is durable is kept no longer: its memory is free.
        until(lambda: manager.ask("state")["kept"] == [])
        assert manager.ask("stop") == 0
    finally:
        manager.close()


def test_no_more_is_accepted_than_the_service_manager_keeps(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a full store does not keep would die with the daemon and the trainer."""
    # Three descriptors each at most.
    monkeypatch.setenv("FDSTORE", "6")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    manager = Manager(DAEMON, short_directory / "s", store=True, log=short_directory / "log")
    try:
        manager.ask("start", lives=["checkpoint.created=hang"])
        with noether_writer.open_run(tmp_path, "r") as run:
            tickets = [run.save("net", f"E{i}", {"w": torch.ones(3)}) for i in range(4)]
            until(lambda: [ticket.accepted for ticket in tickets] == [True, True, False, False])
            # One that finds no room is asked for again each second.
            time.sleep(1.5)
            assert [ticket.accepted for ticket in tickets] == [True, True, False, False]
            manager.ask("kill")
            for ticket in tickets:
                ticket.wait(30)
        assert manager.ask("stop") == 0
    finally:
        manager.close()


# The old file or the new one


@pytest.mark.parametrize(
    ("point", "value"),
    [("created", 1), ("chunk", 1), ("written", 1), ("synced", 1), ("renamed", 2), ("durable", 2)],
)
def test_a_name_has_the_old_file_until_it_has_the_new_one(point: str, value: int, start: Start, tmp_path: Path) -> None:
    daemon = start(f"checkpoint.{point}=kill@2")
    client = open_run(daemon, tmp_path, log=False)
    save(client, 1, 1)
    event(client, "released")
    save(client, 2, 2)
    assert daemon.process.wait(20) == -signal.SIGKILL
    path = tmp_path / "r/checkpoints/net_cp=latest_model.th"
    assert torch.load(path) == value
    # What was half written goes with the next daemon.
    leftovers = path.parent.glob(".noether-writer-*")
    assert len(list(leftovers)) == (value == 1)
    open_run(start(name="next"), tmp_path, log=False)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
def test_a_refusal_leaves_the_old_file_and_is_not_the_end(error: str, start: Start, tmp_path: Path) -> None:
    daemon = start(f"checkpoint.synced={error}@2")
    client = open_run(daemon, tmp_path, log=False)
    save(client, 1, 1)
    event(client, "released")
    save(client, 2, 2)
    assert "error" in event(client, "stalled")
    path = tmp_path / "r/checkpoints/net_cp=latest_model.th"
    assert torch.load(path) == 1 and [p.name for p in path.parent.iterdir()] == [path.name]
    event(client, "durable")
    assert torch.load(path) == 2
    client.close()
    assert daemon.stop() == 0


def test_a_living_writers_temporary_file_is_not_removed(start: Start, tmp_path: Path) -> None:
    client = open_run(start("checkpoint.created=hang"), tmp_path, log=False)
    save(client, 1, 1)
    folder = tmp_path / "r/checkpoints"
    until(lambda: list(folder.iterdir()))
    # This one is another rank, whose daemon may be another one, as on another node.
    open_run(start(name="other"), tmp_path, log=False, rank=1, session="f" * 32)
    assert len(list(folder.glob(".noether-writer-*"))) == 1


def test_an_older_checkpoint_that_comes_late_does_not_replace_a_newer_one(start: Start, tmp_path: Path) -> None:
    """As when a client sends again what it has not seen the end of."""
    client = open_run(start(), tmp_path, log=False)
    for value, sequence in ((2, 2), (1, 1)):
        save(client, value, sequence)
        event(client, "released")
    assert torch.load(tmp_path / "r/checkpoints/net_cp=latest_model.th") == 2


def test_a_save_that_is_sent_again_on_its_way_is_written_once(start: Start, tmp_path: Path) -> None:
    client = open_run(start("checkpoint.created=slow@1"), tmp_path, log=False)
    for value in (1, 2):
        save(client, value, 1)
    client.send(frames.pack_json(frames.WAIT, {}, 8))
    kinds = []
    while (frame := client.receive()).type != frames.WAITED:
        kinds.append(frame.json()["event"])
    assert kinds == ["accepted", "accepted", "written", "durable", "released"]
    assert torch.load(tmp_path / "r/checkpoints/net_cp=latest_model.th") == 1


# The log


def test_an_update_is_acknowledged_when_it_is_in_the_journal(start: Start, tmp_path: Path) -> None:
    """Writing the journal takes a second, and the acknowledgement no less; the daemon is killed when it comes."""
    daemon = start("journal.write=slow")
    client = open_run(daemon, tmp_path)
    client.define(0, [b"a"])
    client.log(1, 1, [0])
    acknowledged(client, 1)
    client.log(2, 2, [0])
    acknowledged(client, 2)
    daemon.process.kill()
    daemon.process.wait()
    again = Raw(start().socket).open_run(tmp_path, session=SESSION)
    assert (again["last_sequence"], again["log_update"]) == (2, 2)


def test_the_journal_stays_for_rows_that_came_while_the_file_was_written(start: Start, tmp_path: Path) -> None:
    daemon = start("file.written=slow")
    client = open_run(daemon, tmp_path)
    client.define(0, [b"a"])
    client.log(1, 1, [0])
    acknowledged(client, 1, durable=True)
    client.send(frames.pack_json(frames.FINISH, {"sequence": 2}, 7))
    time.sleep(0.3)
    client.log(3, 2, [0])
    answers = set()
    while answers < {"finished", "durable"}:
        frame = client.receive()
        if frame.type == frames.FINISHED:
            answers.add("finished")
        elif frame.type == frames.LOG_ACK and frame.payload[16:] == (2).to_bytes(8, "little"):
            answers.add("durable")
    # Time for what would take the journal away.
    time.sleep(0.3)
    daemon.process.kill()
    daemon.process.wait()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 0.5}}
    second = Raw(start().socket)
    assert second.open_run(tmp_path, session=SESSION)["last_sequence"] == 3
    assert finish(second, 4)["entries"] == 2
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 0.5, 2: 0.5}}


def test_an_older_journal_does_not_replace_a_newer_log_file(start: Start, tmp_path: Path) -> None:
    """The daemon is killed when entries.th (its second file) is durable, while its journal is still there."""
    daemon = start("journal.write=slow,file.durable=kill@2")
    client = open_run(daemon, tmp_path)
    client.define(0, [b"a"])
    client.log(1, 1, [0])
    acknowledged(client, 1)
    rows = [frames.pack(frames.LOG, log_payload(update, update, [0])) for update in range(2, 101)]
    client.send(b"".join(rows) + frames.pack_json(frames.FINISH, {"sequence": 101}, 7))
    assert daemon.process.wait(20) == -signal.SIGKILL
    assert len(torch.load(tmp_path / "r/tracker/entries.th")["a"]) == 100
    assert (tmp_path / "r/tracker/entries.journal").exists()
    # A new session takes over; what a journal holds becomes a file first.
    second = open_run(start(), tmp_path, session="f" * 32)
    second.send(frames.pack_json(frames.WAIT, {}, 8))
    second.receive_type(frames.WAITED)
    assert len(torch.load(tmp_path / "r/tracker/entries.th")["a"]) == 100


def test_a_log_that_was_cut_stays_cut(start: Start, tmp_path: Path) -> None:
    """Resumed at update 6, then everything dies before another update comes."""
    daemon = start()
    client = open_run(daemon, tmp_path)
    client.define(0, [b"a"])
    for update in range(1, 11):
        client.log(update, update, [0])
    acknowledged(client, 10)
    resumed = open_run(daemon, tmp_path, session="f" * 32, resume_at=6)
    # A new journal says so; the old one is never behind its name again.
    journal = tmp_path / "r/tracker/entries.journal"
    until(lambda: b"f" * 32 in journal.read_bytes())
    daemon.process.kill()
    daemon.process.wait()
    again = Raw(start().socket).open_run(tmp_path, session="f" * 32)
    assert (again["log_entries"], again["log_update"]) == (6, 6)
    resumed.close()
    client.close()


# What is said where storage refuses


def test_a_storage_refusal_is_reported_everywhere(
    start: Start, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the client's event, in STATUS=, in the status of the command line, and in the operator's log."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_directory / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "notify"))
        daemon = start("checkpoint.created=ENOSPC")
        client = open_run(daemon, tmp_path, log=False)
        save(client, 1, 1)
        words = b""
        while b"STALLED: " not in words:
            words = socket.recv_fds(manager, 4096, 8)[0]
        assert b"No space left on device" in words
        assert "No space left on device" in str(event(client, "stalled")["error"])
        # The trainer's other questions are answered meanwhile.
        [run] = client.ask(frames.STATUS, {})["runs"]
        assert "No space left on device" in run["stalled"] and run["checkpoints"]["in_flight"] == 1
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
        shown = subprocess.run([CLI, "status"], capture_output=True, text=True).stdout
        assert "STALLED" in shown and "No space left on device" in shown
    daemon.process.kill()
    assert daemon.process.stderr is not None
    assert "storage refuses " in (lines := daemon.process.stderr.read()) and "kept in memory, tried again" in lines


@pytest.mark.parametrize("point", ["create", "write"])
def test_a_journal_that_storage_refuses_is_reported(point: str, start: Start, tmp_path: Path) -> None:
    """And what is not in it is not acknowledged; when storage accepts again, it is."""
    daemon = start(f"journal.{point}=ENOSPC@1")
    client = open_run(daemon, tmp_path)
    client.define(0, [b"a"])
    client.log(1, 1, [0])
    if point == "write":
        acknowledged(client, 1)
        client.log(2, 2, [0])
    other = Raw(daemon.socket)
    until(lambda: "the log's journal" in other.ask(frames.STATUS, {})["runs"][0].get("stalled", ""), 5)
    acknowledged(client, 2 if point == "write" else 1)
    until(lambda: "stalled" not in other.ask(frames.STATUS, {})["runs"][0])


# Clocks


def test_a_clock_that_jumps_ends_nothing(
    start: Start, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day ahead: a frame that is coming and a connection without a hello have their time as before."""
    library = short_directory / "jumping.so"
    source = Path(__file__).parents[1] / "Faults/jumping.c"
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run(["clang", *options, source, "-o", library], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("JUMPED", str(short_directory / "jumped"))
    daemon = start()
    monkeypatch.delenv("LD_PRELOAD")
    half, silent = Raw(daemon.socket), Raw(daemon.socket, hello=False)
    question = frames.pack_json(frames.STATUS, {}, 5)
    half.send(question[:10])
    until(half.is_read)
    time.sleep(0.1)
    (short_directory / "jumped").touch()
    time.sleep(2.5)
    half.send(question[10:])
    report = half.receive_type(frames.STATUS_REPORT).json()
    assert report["uptime_s"] < 60
    silent.send(frames.pack_json(frames.HELLO, {"versions": [1], "client": "late"}, 1))
    assert silent.receive().type == frames.WELCOME
