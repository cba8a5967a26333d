# SPDX-License-Identifier: Apache-2.0
"""Clients that keep no rule. Each test does its worst, and then (`unharmed`) the daemon serves others, has no
descriptor and no memory more than before, and is the same process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, IS_SANITIZED, RunningDaemon, faulty_daemon, not_sanitized
from harness import until
from hostile import Raw, definition_payload, error_of, header, log_payload, memfd, save_payload, target
from noether_writer import errors, frames

# What a client can send or do, and the tests of it; the other modules are named where they have it.
THREATS = {
    "memfd that can shrink": ["test_a_memfd_without_its_seals_is_refused"],
    "descriptor that is no memfd": ["test_a_descriptor_that_is_no_memfd_is_refused"],
    "descriptor flood, MSG_CTRUNC, two sets, on frames that declare none": [
        "test_descriptors_that_were_not_declared_end_the_connection",
        "test_a_descriptor_sent_with_each_byte_is_not_kept",
    ],
    "oversized length": ["test_a_length_beyond_its_limit_is_refused_before_the_payload"],
    "bad magic, unknown version, undecodable payload": [
        "test_broken_stream_ends_that_client_only (test_daemon)",
        "test_payloads_of_noise",
    ],
    "half a frame, slow-loris, idle connection": [
        "test_half_a_frame_ends_after_its_time",
        "test_silence_before_hello_ends_after_its_time",
        "test_partial_frames_together_are_bounded",
    ],
    "client that never reads": ["test_a_client_that_never_reads", "test_questions_without_answers_are_bounded"],
    "zero length, EOF, hang-up in the middle": ["test_a_client_that_hangs_up_after_each_byte", "test_zero_lengths"],
    "connection flood": [
        "test_1024_connections_at_once",
        "test_too_many_connections",
        "test_unfinished_hellos_of_one_process_lock_nobody_out",
        "test_flood",
    ],
    "a sparse buffer that claims a disk": ["test_a_buffer_with_holes_is_refused"],
    "saves without end": ["test_a_trainer_that_saves_without_end_leaves_others_their_room"],
    "uid or pid in a payload": ["test_who_a_client_says_it_is_counts_for_nothing"],
    "another uid": ["test_another_user_is_refused_and_logged"],
    "bad names": ["test_path_parts_in_names_are_refused (test_daemon)"],
    "symlink swapped in": ["test_paths"],
    "bad layouts": ["test_wrong_layouts_are_refused"],
    "client writes into its memfd meanwhile": ["test_a_buffer_that_changes_while_it_is_written"],
    "full disk, fsync EIO, torn journal": ["test_trainers", "test_recovery"],
    "two processes, one run": ["test_a_run_belongs_to_one_process_a_rank (test_daemon)"],
    "update not larger; key twice": ["test_updates_and_keys_out_of_order"],
    "NUL, invalid UTF-8, 64 KiB keys; 10^6 keys": ["test_bad_keys", "test_a_million_keys"],
    "a log without end": ["test_a_log_beyond_its_limit"],
    "NaN, infinities, huge ints": ["test_files"],
    "fork()ed trainer": ["test_trainers"],
    "SIGSTOPped trainer": ["test_a_stopped_trainer_holds_up_nobody"],
    "pickle bytes": ["test_a_pickle_is_never_opened"],
    "client that sends without end": [
        "test_a_client_that_sends_without_end_does_not_starve_others",
        "test_what_one_client_has_sent_is_read_in_turns_with_others",
    ],
    "words that forge log lines; log flood": ["test_log_lines_are_limited_and_printable"],
}


def test_the_table_names_tests_that_are_there() -> None:
    for names in THREATS.values():
        for name in names:
            test, _, module = name.partition(" (")
            if module or not test.startswith("test_") or test in globals():
                text = (Path(__file__).parent / f"{module.rstrip(')') or 'test_hostile'}.py").read_text()
                assert f"def {test}(" in text, name
            else:
                assert (Path(__file__).parent / f"{test}.py").exists(), name


def descriptors(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    # A sanitizer talks to its symbolizer by pipes. Images of durable files are to stay.
    return [d for d in found if not (IS_SANITIZED and d.startswith("pipe:")) and "noether-writer-image" not in d]


def memory(pid: int) -> int:
    """Resident, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


@contextlib.contextmanager
def largest(measure: Callable[[], int]) -> Iterator[list[int]]:
    """The largest value that is seen meanwhile."""
    found, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found[0] = max(found[0], measure())

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    stop.set()
    thread.join()


def serves(path: str, root: Path, run_id: str) -> None:
    """A well-behaved client, with a process's whole life: a log, a checkpoint, its end."""
    client = Raw(path)
    assert "run_directory" in client.open_run(root, run_id, session=os.urandom(16).hex())
    client.define(0, [b"loss"])
    client.log(1, 1, [0])
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    events = client.save(save_payload([100], 128, [target(pickle_length=4)]), [fd])
    os.close(fd)
    assert [e["event"] for e in events] == ["accepted", "written", "durable", "released"]
    client.send(frames.pack_json(frames.FINISH, {"sequence": 2}, 9))
    assert client.receive_type(frames.FINISHED).json()["entries"] == 1
    client.send(frames.pack(frames.CLOSE))
    client.close()
    assert torch.load(root / run_id / "checkpoints/n_cp=t_model.th") is None


# Linux's number of it, which Python does not name.
SO_SNDBUFFORCE = 32
# What malloc may keep, and what threads that were started have touched. A sanitizer's allocator keeps far more.
MEMORY_TOLERANCE = (1 << 40) if IS_SANITIZED else (24 << 20)


@pytest.fixture
def unharmed(daemon: RunningDaemon, tmp_path: Path) -> Iterator[RunningDaemon]:
    pid = daemon.process.pid
    serves(daemon.socket, tmp_path, "before")
    until(lambda: sum("memfd" in d for d in descriptors(pid)) == 0)
    before, resident = sorted(descriptors(pid)), memory(pid)
    yield daemon
    assert daemon.process.poll() is None
    serves(daemon.socket, tmp_path, "after")

    deadline = time.monotonic() + 20
    while len(now := descriptors(pid)) > len(before) or any("memfd" in d for d in now):
        assert time.monotonic() < deadline, f"descriptors stay open: {sorted(now)}, before: {before}"
        time.sleep(0.01)
    until(lambda: memory(pid) < resident + MEMORY_TOLERANCE, 20, "memory stays")


# Descriptors


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_a_memfd_without_its_seals_is_refused(seals: int, unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    fd = memfd(seals=seals)
    events = client.save(save_payload([100], 128, [target()]), [fd])
    os.close(fd)
    assert [e["event"] for e in events] == ["failed", "released"]
    assert events[0]["error"]["code"] == "bad-buffer"
    assert not list((tmp_path / "r/checkpoints").iterdir())
    client.close()


def other_descriptors(folder: Path) -> dict[str, int]:
    os.mkfifo(folder / "fifo")
    (folder / "file").write_bytes(bytes(1 << 20))
    ours, theirs = socket.socketpair()
    theirs.detach()
    return {
        "FIFO": os.open(folder / "fifo", os.O_RDWR),
        "directory": os.open(folder, os.O_RDONLY),
        "device": os.open("/dev/zero", os.O_RDWR),
        "O_PATH": os.open(folder / "file", os.O_PATH),
        "O_PATH directory": os.open(folder, os.O_PATH),
        "file": os.open(folder / "file", os.O_RDWR),
        "socket": ours.detach(),
        "procfs": os.open("/proc/self/mem", os.O_RDONLY),
        "write-only": os.open(f"/proc/self/fd/{memfd()}", os.O_WRONLY),
    }


def test_a_buffer_with_holes_is_refused(unharmed: RunningDaemon, tmp_path: Path) -> None:
    """Half a tebibyte that costs its client nothing, and would fill the disk and keep the others' saves out."""
    client = Raw(unharmed.socket)
    client.open_run(tmp_path, "sparse")
    size = 1 << 39
    fd = memfd(size + 4096, holes=True)
    os.pwrite(fd, b"\x80\x02N.", size)
    events = client.save(save_payload([size], size, [target(pickle_offset=size, pickle_length=4)]), [fd])
    assert [event["event"] for event in events] == ["failed", "released"]
    assert events[0]["error"]["code"] == "bad-buffer" and "written whole" in events[0]["error"]["message"]
    assert client.ask(frames.STATUS, {})["runs"][0]["checkpoints"]["in_flight"] == 0
    os.close(fd)


def test_a_trainer_that_saves_without_end_leaves_others_their_room(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its saves fill the daemon's memory as fast as the disk empties it; another run's save needs most of that."""
    monkeypatch.setenv("NOETHER_WRITER_SETTING_SNAPSHOT_BYTES", str(8 << 20))
    daemon = faulty_daemon(str(short_directory / "d/socket"), "checkpoint.created=slow", monkeypatch)
    flood = noether_writer.open_run(tmp_path, "flood")
    tickets = [flood.save("net", f"U{number}", {"w": torch.ones(1 << 19)}) for number in range(40)]
    until(lambda: tickets[0].accepted)
    other = noether_writer.open_run(tmp_path, "other")
    other.save("net", "t", {"w": torch.ones(3 << 19)}).wait(60)
    # Which of them had the room before is chance.
    assert not all(ticket.done for ticket in tickets)
    daemon.process.kill()
    daemon.process.wait()
    for ticket in tickets:
        ticket.wait(60)
    flood.close()
    other.close()
    stop = subprocess.run([str(Path(DAEMON).with_name("noether-writer")), "stop"], capture_output=True, timeout=60)
    assert stop.returncode == 0


def test_a_descriptor_that_is_no_memfd_is_refused(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    for sequence, (what, fd) in enumerate(other_descriptors(tmp_path).items(), 1):
        events = client.save(save_payload([100], 128, [target()], sequence), [fd])
        os.close(fd)
        kinds = [e["event"] for e in events]
        if what == "write-only":
            # A memfd, sealed; that it can't be read shows at the first read.
            assert kinds == ["accepted", "failed", "released"], what
        else:
            assert kinds == ["failed", "released"], what
            assert events[0]["error"]["code"] == "bad-buffer", what
    assert not list((tmp_path / "r/checkpoints").iterdir())
    client.close()


@pytest.mark.parametrize("count", [2, 16, 17, 253])
@pytest.mark.parametrize("declared", [0, 1])
def test_descriptors_that_were_not_declared_end_the_connection(
    count: int, declared: int, unharmed: RunningDaemon, tmp_path: Path
) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    fd = memfd()
    data = frames.pack(frames.SAVE, save_payload([100], 128, [target()]), fds=1)
    if not declared:
        data = frames.pack_json(frames.STATUS, {}, 1)
    client.send(data, [fd] * count)
    os.close(fd)
    # Closed, though it may have got its first one's answers.
    assert error_of([f for f in client.rest() if f.type == frames.ERROR]) == "bad-frame"
    client.close()


def test_one_descriptor_on_a_frame_that_declares_none(unharmed: RunningDaemon) -> None:
    client = Raw(unharmed.socket)
    fd = memfd()
    client.send(frames.pack_json(frames.STATUS, {}, 1), [fd])
    os.close(fd)
    assert error_of([f for f in client.rest() if f.type == frames.ERROR]) == "bad-frame"
    client.close()


def test_a_declared_descriptor_that_does_not_come(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    client.send(frames.pack(frames.SAVE, save_payload([100], 128, [target()]), fds=1))
    assert error_of(client.rest()) == "bad-frame"
    # And one that comes too late, with the frame's second half.
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    data = frames.pack(frames.SAVE, save_payload([100], 128, [target()]), fds=1)
    fd = memfd()
    client.send(data[:20])
    until(lambda: client.is_read())
    client.send(data[20:], [fd])
    os.close(fd)
    assert error_of(client.rest()) == "bad-frame"
    client.close()


def test_a_descriptor_sent_with_each_byte_is_not_kept(unharmed: RunningDaemon) -> None:
    pid, fd = unharmed.process.pid, memfd()
    before = len(descriptors(pid))
    client = Raw(unharmed.socket)
    client.send(header(frames.SAVE, 1 << 20, fds=1), [fd])
    most = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(2000):
            socket.send_fds(client.socket, [b"\0"], [fd])
            most = max(most, len(descriptors(pid)))
    os.close(fd)
    assert error_of(client.rest()) == "bad-frame"
    assert most < before + 40
    client.close()


# Frames


@pytest.mark.parametrize("length", [(1 << 20) + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_beyond_its_limit_is_refused_before_the_payload(length: int, unharmed: RunningDaemon) -> None:
    client = Raw(unharmed.socket)
    client.send(header(frames.LOG, length))
    assert error_of(client.rest()) == "too-large"
    client.close()


def test_payloads_of_noise(unharmed: RunningDaemon, tmp_path: Path) -> None:
    """Every frame type with noise, with and without a run; the daemon answers or closes, and nothing else happens."""
    noise = random.Random(1)
    for type_ in range(256):
        for opened in (False, True):
            client = Raw(unharmed.socket)
            if opened:
                client.open_run(tmp_path, session=os.urandom(16).hex())
            with contextlib.suppress(ConnectionError):
                client.send(frames.pack(type_, noise.randbytes(noise.choice([0, 1, 15, 16, 40, 1000])), 1))
                client.send(frames.pack_json(frames.STATUS, {}, 2))
                client.socket.shutdown(socket.SHUT_WR)
            kinds = {frame.type for frame in client.rest()}
            assert kinds & {frames.ERROR, frames.STATUS_REPORT, frames.CHECKPOINT_EVENT}, type_
            client.close()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"from": 1e400, "limit": 1}',
        '{"key": "' + "x" * 1_000_000 + '"}',
        '{"from": -9223372036854775808, "limit": 9223372036854775807, "key": "a"}',
        '{"from": 9223372036854775807, "limit": 9223372036854775807, "key": "a"}',
        '{"from": 0, "limit": -1, "key": "a"}',
        "\\u0000",
        "null",
        '{"from": "a"}',
    ],
)
def test_json_that_is_wrong(text: str, unharmed: RunningDaemon, tmp_path: Path) -> None:
    for type_ in (frames.VALUES, frames.ENTRIES):
        client = Raw(unharmed.socket)
        client.open_run(tmp_path, session=os.urandom(16).hex())
        client.send(frames.pack(type_, text.encode(), 1))
        answer = client.receive()
        assert answer.type in (frames.ERROR, type_ + 63)
        # What is quoted is cut.
        assert len(answer.payload) < 4096
        client.close()


def test_zero_lengths(unharmed: RunningDaemon) -> None:
    for type_ in range(1, 12):
        client = Raw(unharmed.socket, hello=type_ != frames.HELLO)
        client.send(frames.pack(type_, b"", 1))
        client.socket.shutdown(socket.SHUT_WR)
        client.rest()
        client.close()


def test_a_client_that_hangs_up_after_each_byte(unharmed: RunningDaemon, tmp_path: Path) -> None:
    message = {"output_root": str(tmp_path), "run_id": "cut", "session": "a" * 32}
    stream = b"".join(
        [
            frames.pack_json(frames.HELLO, {"versions": [1], "client": "x"}, 1),
            frames.pack_json(frames.OPEN_RUN, message, 2),
            frames.pack(frames.DEFINE_KEYS, definition_payload(0, [b"a"])),
            frames.pack(frames.LOG, log_payload(1, 1, [0])),
        ]
    )
    for length in range(len(stream)):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(unharmed.socket)
            client.sendall(stream[:length])
            if length % 3 == 0:
                client.shutdown(socket.SHUT_WR)
            elif length % 3 == 1:
                # Answers unread: the daemon's next send is refused.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_silence_before_hello_ends_after_its_time(unharmed: RunningDaemon) -> None:
    start = time.monotonic()
    clients = [Raw(unharmed.socket, hello=False) for _ in range(3)]
    clients[1].send(b"N")
    clients[2].send(header(frames.STATUS, 10)[:10])
    # After a handshake, silence is fine.
    quiet = Raw(unharmed.socket)
    for client in clients:
        assert error_of(client.rest()) == "handshake"
        client.close()
    assert time.monotonic() - start > 4
    assert quiet.ask(frames.STATUS, {})["state"] == "serving"
    quiet.close()


def test_half_a_frame_ends_after_its_time(unharmed: RunningDaemon) -> None:
    """Half a frame, and a frame of which a byte comes now and then; a busy connection beside them is not touched."""
    start = time.monotonic()
    half, slow, busy = Raw(unharmed.socket, timeout=60), Raw(unharmed.socket, timeout=60), Raw(unharmed.socket)
    half.send(header(frames.LOG, 1000) + bytes(500))
    slow.send(header(frames.LOG, 1000))
    ended: dict[str, float] = {}

    def drip() -> None:
        with contextlib.suppress(OSError):
            while True:
                slow.socket.send(b"\0")
                time.sleep(0.05)

    def read(name: str, client: Raw) -> None:
        assert error_of(client.rest()) == "bad-frame"
        ended[name] = time.monotonic() - start

    threads = [
        threading.Thread(target=drip),
        threading.Thread(target=read, args=("half", half)),
        threading.Thread(target=read, args=("slow", slow)),
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads[1:]):
        assert busy.ask(frames.STATUS, {})["state"] == "serving"
        time.sleep(0.2)
    assert set(ended) == {"half", "slow"} and all(seconds > 29 for seconds in ended.values()), ended
    for client in (half, slow, busy):
        client.close()
    threads[0].join()


def test_partial_frames_together_are_bounded(unharmed: RunningDaemon) -> None:
    """320 connections with 1 MiB each of a frame without end: those that hold most are closed, others are served."""
    pid, resident = unharmed.process.pid, memory(unharmed.process.pid)
    clients = [Raw(unharmed.socket) for _ in range(320)]
    for client in clients:
        with contextlib.suppress(ConnectionError, TimeoutError):
            client.send(header(frames.LOG, 1 << 20) + bytes((1 << 20) - 1))
    small = Raw(unharmed.socket)
    assert small.ask(frames.STATUS, {})["state"] == "serving"
    assert memory(pid) < resident + (700 << 20)
    closed = 0
    for client in clients:
        client.socket.settimeout(0.01)
        with contextlib.suppress(TimeoutError):
            closed += error_of(client.rest()) == "too-many"
        client.close()
    assert 60 <= closed <= 200, closed
    small.close()


# Clients that do not listen, or do not stop


def test_a_client_that_never_reads(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    client.define(0, [b"a"])
    for update in range(1, 1001):
        client.log(update, update, [0])
    before = memory(unharmed.process.pid)
    client.socket.settimeout(5)
    # Each answer has a page of 1,000 rows.
    question = frames.pack_json(frames.ENTRIES, {"from": 0, "limit": 20_000}, 1)
    with largest(lambda: memory(unharmed.process.pid)) as most, pytest.raises(ConnectionError):
        for _ in range(100_000):
            client.socket.sendall(question)
    assert most[0] < before + max(64 << 20, MEMORY_TOLERANCE)
    client.close()


def test_questions_without_answers_are_bounded(short_directory: Path, tmp_path: Path) -> None:
    """Storage hangs, and a client asks without end when it will be done."""
    path = str(short_directory / "d/socket")
    environment = os.environ | {"NOETHER_WRITER_FAULTS": "checkpoint.created=ENOSPC"}
    process = subprocess.Popen([DAEMON, "--socket", path], env=environment, stderr=subprocess.DEVNULL)
    until(lambda: Path(path).exists())
    client = Raw(path)
    client.open_run(tmp_path)
    client.define(0, [b"a"])
    client.log(1, 1, [0])
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    client.send(frames.pack(frames.SAVE, save_payload([100], 128, [target(pickle_length=4)], 2), fds=1), [fd])
    os.close(fd)
    for type_, message in ((frames.WAIT, {}), (frames.FINISH, {"sequence": 3})):
        for _ in range(200):
            client.send(frames.pack_json(type_, message, 5))
    client.send(frames.pack_json(frames.STATUS, {}, 6))
    refused = 0
    while (frame := client.receive()).type != frames.STATUS_REPORT:
        refused += frame.type == frames.ERROR and frame.json()["code"] == "too-many"
    assert refused == 400 - 64
    assert frame.json()["runs"][0]["checkpoints"]["in_flight"] == 1
    # A connection that is gone is gone, though what it asked for is still to come.
    pid = process.pid
    sockets = sum("socket" in d for d in descriptors(pid))
    client.close()
    until(lambda: sum("socket" in d for d in descriptors(pid)) == sockets - 1, 10, "the socket stays open")
    process.kill()
    process.wait()


def test_failures_are_counted_and_not_kept(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path, log=False)
    (tmp_path / "r/checkpoints/n_cp=t_model.th").mkdir()
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    for sequence in range(1, 201):
        events = client.save(save_payload([100], 128, [target(pickle_length=4)], sequence), [fd])
        assert [e["event"] for e in events][-2:] == ["failed", "released"]
    os.close(fd)
    client.send(frames.pack_json(frames.WAIT, {}, 7))
    waited = client.receive_type(frames.WAITED).json()
    assert waited["done"] and len(waited["failed"]) == 64
    [run] = [r for r in client.ask(frames.STATUS, {})["runs"] if r["run_id"] == "r"]
    assert run["checkpoints"]["failed"] == 200
    client.close()


def test_a_client_that_sends_without_end_does_not_starve_others(unharmed: RunningDaemon) -> None:
    stop = threading.Event()
    flood = Raw(unharmed.socket)
    # Answered by nothing, so that only reading it takes time.
    data = frames.pack(frames.CLOSE) * 10_000

    def send() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                flood.socket.sendall(data)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        other = Raw(unharmed.socket, timeout=120)
        assert other.ask(frames.STATUS, {})["state"] == "serving"
        other.close()
    stop.set()
    for thread in threads:
        thread.join()
    flood.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may have so large a buffer for a socket")
def test_what_one_client_has_sent_is_read_in_turns_with_others(unharmed: RunningDaemon) -> None:
    flood, other = Raw(unharmed.socket), Raw(unharmed.socket, timeout=120)
    with contextlib.ExitStack() as stack:
        stack.callback(flood.close)
        stack.callback(other.close)
        unharmed.process.send_signal(signal.SIGSTOP)
        stack.callback(unharmed.process.send_signal, signal.SIGCONT)
        flood.socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 128 << 20)
        flood.socket.setblocking(False)
        data = frames.pack(frames.CLOSE) * 4_000
        with contextlib.suppress(BlockingIOError):
            for _ in range(1_000):
                flood.socket.sendall(data)
        other.send(frames.pack_json(frames.STATUS, {}, 1))
        unharmed.process.send_signal(signal.SIGCONT)
        assert other.receive().json()["state"] == "serving"
        assert not flood.is_read()


def test_a_stopped_trainer_holds_up_nobody(unharmed: RunningDaemon, tmp_path: Path) -> None:
    script = (
        "import noether_writer, os, signal, sys, torch\n"
        "run = noether_writer.open_run(sys.argv[1], 'stopped')\n"
        "tickets = [run.save('net', f'E{i}', {'w': torch.ones(1 << 20)}) for i in range(4)]\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "[t.wait(60) for t in tickets]\n"
        "run.finish(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    assert os.waitpid(trainer.pid, os.WUNTRACED)[1] & 0xFF == 0x7F
    serves(unharmed.socket, tmp_path, "meanwhile")
    os.kill(trainer.pid, signal.SIGCONT)
    assert trainer.wait(60) == 0
    assert len(list((tmp_path / "stopped/checkpoints").glob("*.th"))) == 4


# Connections


def test_1024_connections_at_once(unharmed: RunningDaemon, tmp_path: Path) -> None:
    clients = [Raw(unharmed.socket) for _ in range(1024)]
    for number, client in enumerate(clients):
        client.send(frames.pack_json(frames.STATUS, {}, number + 1))
    for number, client in enumerate(clients):
        answer = client.receive()
        assert answer.request == number + 1 and answer.json()["connections"] == 1024
    serves(unharmed.socket, tmp_path, "beside")
    for client in clients:
        client.close()


def test_too_many_connections(unharmed: RunningDaemon) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2200:
        pytest.skip(f"this process may have {hard} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2200), hard))
    clients = [Raw(unharmed.socket) for _ in range(2048)]
    with socket.socket(socket.AF_UNIX) as one_more:
        one_more.settimeout(10)
        one_more.connect(unharmed.socket)
        received = b""
        while piece := one_more.recv(4096):
            received += piece
    [answer] = frames.FrameDecoder().feed(received)
    assert answer.json()["code"] == "too-many"
    clients.pop().close()
    until(lambda: clients[0].ask(frames.STATUS, {})["connections"] == 2047)
    Raw(unharmed.socket).close()
    for client in clients:
        client.close()


SILENT = """
import socket, sys, time
clients = []
while True:
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    client.sendall(bytes.fromhex("4e570101"))
    clients.append(client)
    if len(clients) % 1024 == 0:
        print(len(clients), flush=True)
    if len(clients) == 2048:
        break
sys.stdin.read()
"""


def test_unfinished_hellos_of_one_process_lock_nobody_out(unharmed: RunningDaemon, tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2200:
        pytest.skip("a process may have too few descriptors")
    client = Raw(unharmed.socket)
    flood = subprocess.Popen(
        ["sh", "-c", f'ulimit -n 2200 && exec "{sys.executable}" -c "$0" "$1"', SILENT, unharmed.socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert flood.stdout is not None
    assert [flood.stdout.readline() for _ in range(2)] == ["1024\n", "2048\n"]
    others = [Raw(unharmed.socket) for _ in range(70)]
    assert client.ask(frames.STATUS, {})["pid"] == unharmed.process.pid
    with noether_writer.open_run(tmp_path, "beside") as run:
        run.log({"loss": 1.0}, update=1)
        run.finish(30)
    for other in others:
        other.socket.close()
    flood.communicate("")


def test_a_trainer_that_was_refused_for_want_of_room_goes_on_when_there_is_some(
    unharmed: RunningDaemon, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2200:
        pytest.skip(f"this process may have {hard} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2200), hard))
    clients = [Raw(unharmed.socket) for _ in range(2048)]
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(noether_writer.open_run, tmp_path, "late")

        def is_refused() -> bool:
            clients[0].send(frames.pack_json(13, {}, 1))
            while (answer := clients[0].receive()).request != 1:
                pass
            return re.search(r'refusals_total{.*code="too-many"} [1-9]', answer.payload.decode()) is not None

        until(is_refused)
        for client in clients:
            client.socket.close()
        with opening.result(60) as run:
            # The refusal was of the connection: no call raises it afterwards.
            run.log({"loss": 1.0}, update=1)
            run.flush(30)
            run.finish(30)
    assert torch.load(tmp_path / "late/tracker/entries.th")["loss"] == {1: 1.0}


def test_the_daemon_takes_the_descriptors_that_it_may_have(short_directory: Path, tmp_path: Path) -> None:
    """Started from a shell with the usual soft limit."""
    path = str(short_directory / "d/socket")
    process = subprocess.Popen(
        [DAEMON, "--socket", path], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
    )
    until(lambda: Path(path).exists())
    clients = [Raw(path) for _ in range(1024)]
    assert clients[-1].ask(frames.STATUS, {})["connections"] == 1024
    for client in clients:
        client.close()
    process.terminate()
    assert process.wait(20) == 0


def test_a_daemon_out_of_descriptors_serves_again(short_directory: Path, tmp_path: Path) -> None:
    path = str(short_directory / "d/socket")
    process = subprocess.Popen(
        [DAEMON, "--socket", path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        stderr=subprocess.DEVNULL,
    )
    until(lambda: Path(path).exists())
    clients = []
    with contextlib.suppress(TimeoutError):
        for _ in range(80):
            clients.append(Raw(path, timeout=0.5))
    assert 20 < len(clients) < 64
    for client in clients:
        client.close()
    serves(path, tmp_path, "after")
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture(scope="session")
def flood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("flood") / "flood"
    source = Path(__file__).parent / "flood.c"
    subprocess.run(["clang", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", program], check=True)
    return program


@pytest.mark.parametrize("mode", ["bare", "hello", "half", "unread"])
def test_flood(mode: str, flood: Path, unharmed: RunningDaemon, tmp_path: Path) -> None:
    count = int(os.environ.get("CYCLES", "10000"))
    process = subprocess.Popen([flood, unharmed.socket, str(count), mode], stdout=subprocess.PIPE, text=True)
    with largest(lambda: len(descriptors(unharmed.process.pid))) as most:
        while process.poll() is None:
            serves(unharmed.socket, tmp_path, f"beside-{mode}")
    assert process.returncode == 0 and process.stdout is not None and process.stdout.read() == f"{count}\n"
    # As many connections as it lets in, on a machine where it falls behind; each is given back (`unharmed`).
    assert most[0] < 2048 + 64, most


def test_another_user_is_refused_and_logged(daemon: RunningDaemon, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    # As if somebody had opened it to all: the kernel's word counts, not the file's mode.
    os.chmod(daemon.socket, 0o666)
    for folder in Path(daemon.socket).parents:
        if folder.name.startswith(("d", "nw-")):
            os.chmod(folder, 0o755)
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "try:\n"
        "    s.sendall(bytes.fromhex(sys.argv[2]))\n"
        "except ConnectionError:\n"
        "    pass\n"
        "print(s.recv(4096).hex())\n"
    )
    hello = frames.pack_json(frames.HELLO, {"versions": [1], "client": "x"}, 1)
    result = subprocess.run(
        [sys.executable, "-c", script, daemon.socket, hello.hex()], capture_output=True, text=True, timeout=30
    )
    error = frames.FrameDecoder().feed(bytes.fromhex(result.stdout))[0].json()
    assert (error["code"], error["fatal"]) == ("wrong-user", True) and "uid 65534: only uid 0" in error["message"]
    Raw(daemon.socket).close()
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    assert "of uid 65534: only uid 0 and root are served" in daemon.process.stderr.read()


def test_who_a_client_says_it_is_counts_for_nothing(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path, "who", uid=0, pid=1, peer={"pid": 1}, user="root")
    [run] = [r for r in client.ask(frames.STATUS, {})["runs"] if r["run_id"] == "who"]
    assert run["pid"] == os.getpid()
    client.close()


# Layouts and content


@pytest.mark.parametrize(
    ("sizes", "length", "targets", "code"),
    [
        ([(1 << 64) - 1], 128, [target()], "bad-layout"),
        ([1 << 62, 1 << 62, 1 << 62], 0, [target()], "bad-layout"),
        ([(1 << 63) - 1] * 3, (1 << 64) - 64, [target()], "bad-layout"),
        ([1 << 41], 1 << 41, [target(pickle_offset=1 << 41)], "too-large"),
        ([100], 100, [target()], "bad-layout"),
        ([100], 192, [target()], "bad-layout"),
        ([100], 128, [target(pickle_offset=64)], "bad-layout"),
        ([100], 128, [target(pickle_length=0)], "bad-layout"),
        ([100], 128, [target(pickle_offset=(1 << 64) - 1)], "bad-layout"),
        ([100], 128, [target(pickle_offset=(1 << 63), pickle_length=(1 << 62))], "bad-layout"),
        ([100], 128, [target(pickle_offset=(1 << 20) - 2)], "bad-buffer"),
        ([2 << 20], 2 << 20, [target(pickle_offset=2 << 20)], "bad-buffer"),
        ([100], 128, [target(), target(tag="u", pickle_offset=130)], "bad-layout"),
        ([100], 128, [target(), target(pickle_offset=200)], "bad-name"),
        ([100], 128, [], "bad-layout"),
        ([100], 128, [target(tag=str(i), pickle_offset=200 + 8 * i) for i in range(5)], "too-large"),
        ([100], 128, [target(name="a/b")], "bad-name"),
        ([100], 128, [target(tag="..\0")], "bad-name"),
        ([100], 128, [target(info="../x")], "bad-name"),
        ([100], 128, [target(name="x" * 250)], "bad-name"),
        ([0] * 100_001, 0, [target()], "too-large"),
        ([64] * 100_000, 6_400_000, [target(pickle_offset=6_400_000)], "bad-buffer"),
    ],
)
def test_wrong_layouts_are_refused(
    sizes: list[int], length: int, targets: list[dict[str, object]], code: str, unharmed: RunningDaemon, tmp_path: Path
) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    fd = memfd()
    client.send(frames.pack(frames.SAVE, save_payload(sizes, length, targets), fds=1), [fd])
    os.close(fd)
    answer = client.receive().json()
    if "event" in answer:
        assert answer["event"] == "failed" and client.receive().json()["event"] == "released"
        answer = answer["error"]
    assert answer["code"] == code
    assert not list((tmp_path / "r/checkpoints").iterdir())
    client.close()


def test_a_buffer_that_changes_while_it_is_written(unharmed: RunningDaemon, tmp_path: Path) -> None:
    """Only the client's own file can be wrong, and its checksums are of the bytes that were written."""
    size = 64 << 20
    fd = memfd(size + 4096)
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            # At one place without a pause: a copy that is made there is not the one made a moment later.
            os.pwrite(fd, bytes([value & 0xFF]) * 65536, size // 2)

    thread = threading.Thread(target=scribble)
    thread.start()
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    cli = Path(DAEMON).with_name("noether-writer")
    results = []
    for sequence in range(1, 7):
        payload = save_payload([size], size, [target(pickle_offset=size, pickle_length=4)], sequence)
        events = client.save(payload, [fd])
        assert [e["event"] for e in events] == ["accepted", "written", "durable", "released"]
        results.append(subprocess.run([cli, "verify", events[2]["path"]], capture_output=True, text=True))
    stop.set()
    thread.join()
    os.close(fd)
    assert all(result.returncode == 0 for result in results), [result.stdout for result in results]
    client.close()


def test_a_pickle_is_never_opened(unharmed: RunningDaemon, tmp_path: Path) -> None:
    import zipfile

    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    fd = memfd(content=bytes(128) + bomb)
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    events = client.save(save_payload([100], 128, [target(pickle_length=len(bomb))]), [fd])
    os.close(fd)
    assert events[2]["event"] == "durable"
    with zipfile.ZipFile(events[2]["path"]) as archive:
        assert archive.read("n_cp=t_model/data.pkl") == bomb
    assert not (tmp_path / "opened").exists()
    client.close()


# Logs


def test_updates_and_keys_out_of_order(unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    client.define(0, [b"a", b"b"])
    client.log(1, 5, [0, 1])

    def refused(*frame: bytes) -> str:
        client.send(b"".join(frame))
        return str(client.receive_type(frames.ERROR).json()["code"])

    assert refused(frames.pack(frames.LOG, log_payload(2, 4, [0]))) == "update-order"
    assert refused(frames.pack(frames.LOG, log_payload(3, -(1 << 63), [0]))) == "update-order"
    assert refused(frames.pack(frames.LOG, log_payload(4, 6, [0, 0]))) == "bad-key"
    assert refused(frames.pack(frames.LOG, log_payload(5, 6, [2]))) == "bad-key"
    assert refused(frames.pack(frames.LOG, log_payload(6, 6, [(1 << 32) - 1]))) == "bad-key"
    # The same key under another id is the same column.
    client.define(2, [b"a"])
    assert refused(frames.pack(frames.LOG, log_payload(7, 6, [0, 2]))) == "bad-key"
    client.log(8, (1 << 63) - 1, [1])
    client.send(frames.pack_json(frames.FINISH, {"sequence": 9}, 3))
    client.receive_type(frames.FINISHED)
    client.close()
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries == {"a": {5: 0.5}, "b": {5: 0.5, (1 << 63) - 1: 0.5}}


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (b"", "bad-key"),
        (b"a\0b", "bad-key"),
        (b"\xff", "bad-key"),
        (b"\xed\xa0\x80", "bad-key"),
        (b"\xc0\x80", "bad-key"),
        (b"x" * 1025, "bad-key"),
        (b"x" * 65535, "bad-key"),
    ],
)
def test_bad_keys(key: bytes, code: str, unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket)
    client.open_run(tmp_path)
    client.define(0, [b"good", key])
    assert client.receive_type(frames.ERROR).json()["code"] == code
    # None of them was taken: ids start where they did.
    client.define(0, [b"good"])
    client.log(1, 1, [0])
    client.send(frames.pack_json(frames.VALUES, {"key": "good", "from": 0, "limit": 9}, 3))
    assert frames.unpack_values_page(client.receive_type(frames.VALUES_PAGE).payload)[0] == 1
    client.close()


@pytest.mark.parametrize("kind", ["different", "the same"])
def test_a_million_keys(kind: str, unharmed: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(unharmed.socket, timeout=60)
    client.open_run(tmp_path)
    first, refused = 0, 0
    for block in range(0, 1_000_000, 10_000):
        names = [b"k%d" % i if kind == "different" else b"k" for i in range(block, block + 10_000)]
        client.define(first, names)
        client.send(frames.pack_json(frames.STATUS, {}, 8))
        answer = client.receive()
        if answer.type == frames.ERROR:
            assert answer.json()["code"] == "bad-key"
            refused += 1
            client.receive_type(frames.STATUS_REPORT)
        else:
            first += 10_000
    assert (first, refused) == (60_000, 94)
    # Those that are there work, and a page over them is answered.
    for update in range(1, 2001):
        client.log(update, update, [update])
    client.send(frames.pack_json(frames.ENTRIES, {"from": 0, "limit": 20_000}, 3))
    total, rows = frames.unpack_entries_page(client.receive_type(frames.ENTRIES_PAGE).payload)
    assert total == len(rows) == 2000 and rows[-1] == (2000, {"k2000" if kind == "different" else "k": 0.5})
    client.send(frames.pack_json(frames.FINISH, {"sequence": 3000}, 3))
    client.receive_type(frames.FINISHED)
    client.send(frames.pack(frames.CLOSE))
    client.close()


def test_a_log_beyond_its_limit(short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_LOG_BYTES_PER_RUN", "100000")
    daemon = RunningDaemon(str(short_directory / "d/socket"))
    client = Raw(daemon.socket)
    client.open_run(tmp_path)
    client.define(0, [b"a"])
    sent = 0
    while True:
        sent += 1
        client.log(sent, sent, [0])
        client.send(frames.pack_json(frames.STATUS, {}, 1))
        while (answer := client.receive()).type == frames.LOG_ACK:
            pass
        if answer.type == frames.ERROR:
            break
    assert answer.json()["code"] == "log-full" and "log_bytes_per_run" in answer.json()["message"]
    assert 3000 < sent < 6000
    client.receive_type(frames.STATUS_REPORT)
    client.send(frames.pack_json(frames.FINISH, {"sequence": sent}, 3))
    assert client.receive_type(frames.FINISHED).json()["entries"] == sent - 1
    client.close()
    # The library goes on training, and says so once.
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    script = (
        "import noether_writer, sys, time\n"
        "run = noether_writer.open_run(sys.argv[1], 'full')\n"
        "for update in range(1, 20_001): run.log({'a': update}, update=update)\n"
        "run.finish(30); run.close()\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("log_bytes_per_run") == 1, result.stderr
    entries = torch.load(tmp_path / "full/tracker/entries.th")["a"]
    assert 3000 < len(entries) < 6000 and all(update == value for update, value in entries.items())
    assert daemon.stop() == 0


def test_all_logs_together_have_a_limit_and_a_run_below_its_share_continues(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_LOG_BYTES", "200000")
    daemon = RunningDaemon(str(short_directory / "d/socket"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    monkeypatch.setenv("NOETHER_WRITER_WHEN_AWAY", "raise")
    small, large = noether_writer.open_run(tmp_path, "small"), noether_writer.open_run(tmp_path, "large")
    small.log({"a": 1}, update=1)
    with pytest.raises(errors.LogFull, match=r"the logs of all runs have .* Raise log_bytes in the daemon's settings"):
        for update in range(1, 1_000_000):
            large.log({"a": update}, update=update)
            if update % 500 == 0:
                large.flush(20)
    for update in range(2, 100):
        small.log({"a": update}, update=update)
    small.finish(30)
    with contextlib.suppress(errors.LogFull):
        large.finish(30)
    small.close()
    large.close()
    assert len(torch.load(tmp_path / "small/tracker/entries.th")["a"]) == 99
    until((tmp_path / "large/tracker/entries.th").exists)
    entries = torch.load(tmp_path / "large/tracker/entries.th")["a"]
    assert len(entries) > 3000 and list(entries) == list(entries.values()) == list(range(1, len(entries) + 1))
    # Ended logs are in their files, and make room.
    with noether_writer.open_run(tmp_path, "next") as run:
        for update in range(1, 1001):
            run.log({"a": update}, update=update)
    assert daemon.stop() == 0


def test_log_lines_are_limited_and_printable(daemon: RunningDaemon, tmp_path: Path) -> None:
    for number in range(200):
        client = Raw(daemon.socket)
        client.send(frames.pack_json(frames.OPEN_RUN, {"versions": [number], "x\x1b[2J\nforged": 1}, 1))
        client.rest()
        client.close()
    # What runs and storage have to say is not hidden by that.
    serves(daemon.socket, tmp_path, "said")
    # A path may hold what a name may not.
    serves(daemon.socket, tmp_path / "x\x1b[2J\nforged", "shown")
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    lines = daemon.process.stderr.read().splitlines()
    assert all(line.startswith("noether-writerd: ") and "\x1b" not in line for line in lines)
    assert 20 <= sum("closing the connection" in line for line in lines) <= 40
    assert any("run said: durable" in line for line in lines) and any("run shown: durable" in line for line in lines)
    assert all(len(line.encode()) < 4096 for line in lines)


@not_sanitized("its allocator gives nothing back")
def test_a_run_without_a_trainer_gives_its_log_back(unharmed: RunningDaemon, tmp_path: Path) -> None:
    """A log of 40 MiB in memory goes when its run has ended, though the run is still listed with its numbers."""
    pid, before = unharmed.process.pid, memory(unharmed.process.pid)
    client = Raw(unharmed.socket)
    client.open_run(tmp_path, "large")
    client.define(0, [b"k%d" % i for i in range(1000)])
    for update in range(1, 4001):
        client.log(update, update, range(1000))
    client.send(frames.pack_json(frames.FINISH, {"sequence": 4001}, 3))
    client.receive_type(frames.FINISHED)
    assert memory(pid) > before + (30 << 20)
    client.send(frames.pack(frames.CLOSE))
    client.close()
    other = Raw(unharmed.socket)
    until(lambda: memory(pid) < before + MEMORY_TOLERANCE, 20, "the log stays in memory")
    [run] = [r for r in other.ask(frames.STATUS, {})["runs"] if r["run_id"] == "large"]
    assert (run["state"], run["entries"], run["last_update"]) == ("finished", 4000, 4000)
    other.close()


def test_the_answers_fit_into_a_frame(unharmed: RunningDaemon, tmp_path: Path) -> None:
    """Status with more runs than a payload holds."""
    root = tmp_path / ("w" * 200) / ("x" * 200) / ("y" * 200) / ("z" * 200)
    clients = []
    for number in range(1000):
        client = Raw(unharmed.socket)
        client.open_run(root, f"{number:03}" + "r" * 240, log=False, session=os.urandom(16).hex())
        clients.append(client)
    clients[0].send(frames.pack_json(frames.STATUS, {}, 1))
    answer = clients[0].receive()
    assert answer.type == frames.STATUS_REPORT and len(answer.payload) <= 1 << 20
    report = json.loads(answer.payload)
    listed = report["runs"]
    # All the living ones are known; the ended one from before has made room for them.
    assert report["runs_left_out"] == 1000 - len(listed)
    assert {run["state"] for run in listed} == {"running"}
    assert len(listed) > 100
    for client in clients:
        client.close()
