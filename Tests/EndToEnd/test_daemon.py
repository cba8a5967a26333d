# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process: its socket, its end, trainers that die, and input that is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import daemon_of, until
from hostile import Raw
from noether_writer import daemon_launcher, errors, frames
from noether_writer.buffers import BufferPool

TRAINER = """
import noether_writer, os, signal, sys, time
run = noether_writer.open_run(sys.argv[1], "killed")
for update in range(1, 101):
    run.log({"loss": 1.0 / update}, update=update)
while len(run.values("loss")) < 100:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.01)


def test_killed_trainer_leaves_its_log(daemon: RunningDaemon, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", TRAINER, str(tmp_path)])
    assert result.returncode == -signal.SIGKILL
    entries = tmp_path / "killed/tracker/entries.th"
    wait_for(entries, 1.0)
    assert torch.load(entries)["loss"] == {u: 1.0 / u for u in range(1, 101)}


def test_socket_is_private_and_live_daemon_is_not_replaced(daemon: RunningDaemon) -> None:
    assert stat.S_IMODE(os.stat(daemon.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(Path(daemon.socket).parent).st_mode) == 0o700
    second = subprocess.run([DAEMON, "--socket", daemon.socket], capture_output=True, text=True)
    assert second.returncode == daemon_launcher.ALREADY_SERVED
    assert f"process {daemon.process.pid}" in second.stderr


def test_stale_socket_is_replaced(daemon: RunningDaemon) -> None:
    daemon.process.kill()
    daemon.process.wait()
    assert Path(daemon.socket).exists()
    second = RunningDaemon(daemon.socket)
    deadline = time.monotonic() + 5
    # Not through the library, which would start a daemon of its own.
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(daemon.socket) != 0:
            assert time.monotonic() < deadline, "the stale socket was not replaced"
            time.sleep(0.005)
    assert second.stop() == 0


def test_sigterm_finishes_accepted_work(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    weights = torch.randn(20_000_000)
    run.log({"loss": 1.0}, update=1)
    tickets = [run.save("net", f"E{i}", {"w": weights}) for i in range(4)]
    while not all(ticket.accepted for ticket in tickets):
        time.sleep(0.001)
    assert daemon.stop() == 0
    for i in range(4):
        loaded = torch.load(tmp_path / f"r/checkpoints/net_cp=E{i}_model.th")
        assert torch.equal(loaded["w"], weights)
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"loss": {1: 1.0}}
    assert not list((tmp_path / "r").rglob("*.tmp"))


def test_a_daemon_that_nobody_can_find_leaves_and_its_successor_keeps_its_socket(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=1)
        run.flush(20)
        # As a cleaner of temporary directories does.
        Path(daemon.socket + ".lock").unlink()
        successor = RunningDaemon(daemon.socket)
        assert daemon.process.wait(30) == 0
        run.log({"loss": 2.0}, update=2)
        run.flush(20)
        with socket.socket(socket.AF_UNIX) as client:
            assert client.connect_ex(daemon.socket) == 0
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {1: 1.0, 2: 2.0}
    assert successor.stop() == 0
    assert not Path(daemon.socket).exists()


def test_a_daemon_removes_only_its_own_socket(daemon: RunningDaemon) -> None:
    Path(daemon.socket).unlink()
    with socket.socket(socket.AF_UNIX) as somebody_elses:
        somebody_elses.bind(daemon.socket)
        assert daemon.process.wait(30) == 0
        assert Path(daemon.socket).is_socket()


@pytest.mark.parametrize("words", [["wait", "r"], ["wait"], ["drain"]], ids=str)
def test_wait_and_drain_return_while_new_saves_and_updates_keep_coming(
    words: list[str], short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second a file: with three on their way at any time, the daemon is never idle.
    daemon = faulty_daemon(str(short_directory / "d/socket"), "checkpoint.created=slow", monkeypatch)
    run = noether_writer.open_run(short_directory, "r")
    tickets: list[noether_writer.Ticket] = []
    has_answered = threading.Event()

    def train() -> None:
        update = 0
        while not has_answered.is_set():
            update += 1
            run.log({"a": update}, update=update)
            while sum(not ticket.done for ticket in tickets) < 3:
                tickets.append(run.save("net", f"S{len(tickets)}", {"a": 1}))
            time.sleep(0.005)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        until(lambda: len(tickets) >= 3 and tickets[2].accepted)
        result = subprocess.run(
            [Path(DAEMON).with_name("noether-writer"), *words], capture_output=True, text=True, timeout=100
        )
        assert (result.returncode, result.stdout) == (0, "all durable\n"), result.stderr
        assert all(ticket.done for ticket in tickets[:3]) and not tickets[-1].done
    finally:
        has_answered.set()
        trainer.join()
    run.wait(60)
    run.close()
    assert daemon.stop() == 0


def test_idle_daemon_leaves(short_directory: Path) -> None:
    daemon = RunningDaemon(str(short_directory / "s"), "--exit-idle", "0.2")
    assert daemon.process.wait(10) == 0
    assert not Path(daemon.socket).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("disk_queues: 2\nbogus: 1\n", ["line 2", "bogus"]),
        ("disk_queues: many\n", ["line 1", "disk_queues", "many"]),
    ],
)
def test_wrong_setting_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    result = subprocess.run([DAEMON, "--config", str(config)], capture_output=True, text=True)
    assert result.returncode != 0
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("name", ["../up", "a/b", "", "..", "nul\0", "line\n", "x" * 300])
def test_path_parts_in_names_are_refused(name: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    with pytest.raises(errors.RefusedName):
        noether_writer.open_run(tmp_path / "out", name)
    run = noether_writer.open_run(tmp_path / "out", "r")
    with pytest.raises(errors.RefusedName):
        run.save(name, "t", {"a": 1}).wait(10)
    run.close()
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<HBBIIHH", 0x574E, 9, 1, 1, 0, 0, 0),
        struct.pack("<HBBIIHH", 0x574E, 1, 4, 1, 1 << 31, 0, 0),
        frames.pack(frames.LOG, b"\0" * 7),
        frames.pack(frames.HELLO, b"{"),
        frames.pack_json(frames.HELLO, {"versions": [9], "client": "from the future"}),
    ],
)
def test_broken_stream_ends_that_client_only(data: bytes, daemon: RunningDaemon) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(daemon.socket)
        client.sendall(data)
        received = b""
        while piece := client.recv(4096):
            received += piece
    [answer] = frames.FrameDecoder().feed(received)
    assert answer.type == frames.ERROR and answer.json()["fatal"]
    other = Raw(daemon.socket)
    assert other.ask(frames.STATUS, {})["state"] == "serving"
    other.close()


def save_frame(
    raw: Raw, fd: int, sizes: list[int], storages_length: int, more: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Sends a hand-made save and gives back the error of its failed event."""
    target = {"kind": "model", "name": "n", "tag": "t", "pickle_offset": 1024, "pickle_length": 5}
    targets = [target, *({**target, **other} for other in more or [])]
    text = json.dumps({"storages_length": storages_length, "buffer": 1, "targets": targets}).encode()
    payload = struct.pack("<QII", 1, len(sizes), len(text)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    events = raw.save(payload + text, [fd])
    assert [event["event"] for event in events] == ["failed", "released"]
    return dict(events[0]["error"])


def test_bad_buffers_and_layouts_are_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    length = 128
    raw = Raw(daemon.socket)
    raw.open_run(tmp_path)
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 20)
    short = BufferPool().reserve(10)
    pipe, _ = os.pipe()
    assert save_frame(raw, unsealed, [100], length)["code"] == "bad-buffer"
    assert save_frame(raw, pipe, [100], length)["code"] == "bad-buffer"
    assert save_frame(raw, short.fd, [1 << 32], 1 << 32)["code"] == "bad-layout"
    assert save_frame(raw, short.fd, [], 0, [{"tag": "u", "pickle_offset": 1 << 33}])["code"] == "bad-buffer"
    assert save_frame(raw, short.fd, [(1 << 64) - 1], length)["code"] == "bad-layout"
    assert save_frame(raw, short.fd, [100], length + 1)["code"] == "bad-layout"
    # Pickles that overlap the storages, one another, or lie nowhere; and one name twice.
    for more in (
        [{"tag": "u", "pickle_offset": 64}],
        [{"tag": "u", "pickle_offset": 1024}],
        [{"tag": "u", "pickle_offset": 4096}, {"tag": "v", "pickle_offset": 4098}],
        [{"tag": "u", "pickle_offset": (1 << 64) - 2}],
    ):
        assert save_frame(raw, short.fd, [100], length, more)["code"] == "bad-layout"
    assert save_frame(raw, short.fd, [100], length, [{"pickle_offset": 4096}])["code"] == "bad-name"
    assert save_frame(raw, short.fd, [100], length, [{"tag": "../u", "pickle_offset": 4096}])["code"] == "bad-name"
    assert list((tmp_path / "r/checkpoints").iterdir()) == []
    raw.close()
    with noether_writer.open_run(tmp_path, "r") as run:
        run.save("net", "fine", {"a": torch.ones(2)}).wait(10)


def test_a_run_belongs_to_one_process_a_rank(daemon: RunningDaemon, tmp_path: Path) -> None:
    script = (
        "import noether_writer, sys\n"
        "run = noether_writer.open_run(sys.argv[1], 'r', rank=int(sys.argv[2]))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )

    def start(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # Rank 1 first: it does not take rank 0's place.
    holders = [start(1), start(0)]
    for holder in holders:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    for rank, holder in ((0, holders[1]), (1, holders[0])):
        _, error = start(rank).communicate(timeout=60)
        assert f"RunInUse: run r is held by process {holder.pid} on " in error
    holders[1].kill()
    holders[1].wait()
    # A dead holder's place is free at once.
    again = start(0)
    assert again.stdout is not None and again.stdout.readline() == "open\n"
    for process in (holders[0], again):
        process.communicate()


def test_two_trainers_start_one_daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "d/socket"))
    script = (
        "import noether_writer as n, sys; r = n.open_run(sys.argv[1], sys.argv[2]); "
        "print(r._session.welcome['pid']); r.log({'a': 1}, update=1); r.finish()"
    )
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(short_directory / "o"), f"r{i}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    pids = {trainer.communicate(timeout=60)[0].strip() for trainer in trainers}
    assert len(pids) == 1 and "" not in pids
    os.kill(int(pids.pop()), signal.SIGTERM)
    for i in range(2):
        assert (short_directory / f"o/r{i}/tracker/entries.th").exists()


def test_no_daemon_anywhere_is_one_clear_error(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "none"))
    monkeypatch.delenv("NOETHER_WRITER_DAEMON")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(errors.DaemonNotFound, match="noether-writerd"):
        noether_writer.open_run(short_directory, "r")


def test_readiness_is_told_to_the_service_manager(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_directory / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "notify"))
        daemon = RunningDaemon(str(short_directory / "s"))
        words = [manager.recv(4096)]
        assert b"READY=1" not in words[0]
        while b"READY=1" not in words[-1]:
            words.append(manager.recv(4096))
        assert b"STATUS=recovering" in words
        assert daemon.stop() == 0
        while b"STOPPING=1" not in words[-1]:
            words.append(manager.recv(4096))


def test_a_service_manager_that_does_not_read_stops_nothing(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_directory / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "notify"))
        # Full before the daemon says its first word.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    filler.sendto(b"X=1", str(short_directory / "notify"))
            daemon = RunningDaemon(str(short_directory / "s"))
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
        with noether_writer.open_run(short_directory / "o", "r") as run:
            run.log({"a": 1}, update=1)
            run.save("net", "t", {"a": torch.ones(3)}).wait(20)
        assert daemon.stop() == 0


HAND_OVER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], [sys.argv[2], "--socket", sys.argv[1]])
"""


def test_handed_over_socket_is_served(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(short_directory / "s")
    process = subprocess.Popen([sys.executable, "-c", HAND_OVER, path, DAEMON])
    deadline = time.monotonic() + 10
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(path) != 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    with noether_writer.open_run(short_directory / "o", "r") as run:
        assert run._session.welcome["pid"] == process.pid
        run.save("net", "t", {"a": 1}).wait(10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    # The socket belongs to who made it, and outlives the daemon.
    assert Path(path).exists()


CLOSED = """
import os, sys
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.closerange(3, 4)
os.execv(sys.argv[2], [sys.argv[2], "--socket", sys.argv[1]])
"""


def test_a_handed_over_descriptor_that_is_closed_is_reported(short_directory: Path) -> None:
    path = str(short_directory / "s")
    process = subprocess.Popen([sys.executable, "-c", CLOSED, path, DAEMON], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while "serving" not in lines[-1]:
        lines.append(process.stderr.readline())
    assert any("LISTEN_FDS counts descriptors that are not there" in line for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


@pytest.mark.parametrize("client", ["Python", "Swift"])
def test_a_trainer_that_comes_while_a_daemon_leaves_starts_the_next_one(
    client: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drains what its disk takes slowly: its socket is gone already, and its lock is not."""
    path = str(short_directory / "d/socket")
    first = faulty_daemon(path, "checkpoint.created=slow", monkeypatch)
    run = noether_writer.open_run(short_directory / "out", "first")
    ticket = run.save("net", "t", {"w": torch.ones(3)})
    while not ticket.accepted:
        time.sleep(0.001)
    first.process.send_signal(signal.SIGTERM)
    while Path(path).exists():
        time.sleep(0.001)
    assert first.process.poll() is None
    if client == "Python":
        script = "import noether_writer, sys; noether_writer.open_run(sys.argv[1], 'second').close()"
        command = [sys.executable, "-c", script, str(short_directory / "out")]
    else:
        command = [str(Path(DAEMON).with_name("SwiftTrainer")), str(short_directory / "out"), "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert first.process.wait(30) == 0
    assert len(list((short_directory / "out").iterdir())) == 2 and ticket.done
    run.close()
    os.kill(daemon_of(path), signal.SIGTERM)
