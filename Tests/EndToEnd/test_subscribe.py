# SPDX-License-Identifier: Apache-2.0
"""Following runs: live, from their beginning, by readers that are slow, and over cuts of the log."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, IS_SANITIZED, RunningDaemon
from hostile import Raw
from noether_writer import errors, frames
from noether_writer.subscription import Checkpoint, Ended, Missed, Restarted, Row

TRAINER = Path(DAEMON).parent / "SwiftTrainer"


def test_rows_and_checkpoints_are_followed_to_the_end(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    before = time.time()
    for update in range(1, 101):
        run.log({"loss": 1 / update, "nan": float("nan")} if update % 2 else {"word": "ä"}, update=update)
    run.save("net", "E1", {"w": torch.ones(5_000_000)}).wait(30)
    with noether_writer.subscribe("r") as events:
        assert events.run["run_id"] == "r" and [c.state for c in events.checkpoints] == ["durable"]
        rows = [next(events) for _ in range(100)]
        # Live from here.
        run.log({"late": True}, update=200)
        live = next(events)
        ticket = run.save("net", "E2", {"w": torch.ones(5_000_000)})
        ticket.wait(30)
        run.finish()
        run.close()
        rest = list(events)
    assert [row.index for row in rows if isinstance(row, Row)] == list(range(100))
    first, second = rows[:2]
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.update, first.values["loss"], second.values) == (1, 1.0, {"word": "ä"})
    assert str(first.values["nan"]) == "nan" and before - 1 <= first.wall_time <= time.time()
    assert isinstance(live, Row) and (live.index, live.update, live.values) == (100, 200, {"late": True})
    checkpoints = [event for event in rest if isinstance(event, Checkpoint)]
    assert [c.file for c in checkpoints] == ["net_cp=E2_model.th"] * len(checkpoints)
    states = [c.state for c in checkpoints]
    # In between there may be more of `writing`, with its progress.
    assert list(dict.fromkeys(states)) == ["accepted", "writing", "written", "durable"]
    last = checkpoints[-1]
    assert last.bytes == last.bytes_done == Path(ticket.paths[0]).stat().st_size
    assert last.log_update == 200 and last.seconds is not None and 0 < last.seconds < 30
    assert rest[-1] == Ended("finished")


def test_start_in_the_middle_and_only_what_comes(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for update in range(10):
        run.log({"a": update}, update=update)
    assert run.values("a") == list(range(10))
    with noether_writer.subscribe("r", 7) as middle, noether_writer.subscribe("r", None) as live:
        run.log({"a": 10}, update=10)
        first = next(middle), next(live)
        assert [event.index for event in first if isinstance(event, Row)] == [7, 10]
    run.close()


def test_an_event_is_waited_for_so_long(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    with noether_writer.subscribe("r") as events:
        assert events.take(0.01) is None
        run.log({"a": 1}, update=1)
        row = events.take(30)
        assert isinstance(row, Row) and row.update == 1
        assert events.take(0) is None
        run.finish()
        run.close()
        assert events.take(30) == Ended("finished")
        with pytest.raises(StopIteration):
            events.take(30)


def test_a_slow_reader_misses_no_row_and_slows_nobody(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The daemon's memory and its answers stay as they are while 20 MB of rows and hundreds of events wait."""
    run = noether_writer.open_run(tmp_path, "r")
    slow = noether_writer.subscribe("r")
    text = "x" * 1000
    for update in range(20_000):
        run.log({"n": update, "text": text}, update=update)
        if update % 100 == 0:
            run.save("net", str(update % 1000), {"a": update}).wait(60)
        if update == 10_000:
            run.flush(60)
            before = memory(daemon)
    run.wait(60)
    run.flush(60)
    # The columns themselves grew by 10 MB of text, and what holds it; nothing more may.
    assert IS_SANITIZED or memory(daemon) - before < 30 << 20
    assert len(run.values("n")) == 20_000
    run.finish()
    run.close()
    events = list(slow)
    rows = [event for event in events if isinstance(event, Row)]
    assert [row.index for row in rows] == list(range(20_000))
    assert [row.values["n"] for row in rows] == list(range(20_000))
    missed = [event for event in events if isinstance(event, Missed)]
    assert missed and missed[0].events > 100 and missed[-1].checkpoints
    assert sum(isinstance(event, Checkpoint) for event in events) < 200 * 4
    assert events[-1] == Ended("finished")


def memory(daemon: RunningDaemon) -> int:
    """Private memory of the daemon, in bytes."""
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


def followed_to_the_end(root: Path) -> noether_writer.Subscription:
    """From before the first row of a run that has ended; nothing was read."""
    run = noether_writer.open_run(root, "r")
    subscription = noether_writer.subscribe("r")
    log_much(run)
    run.finish()
    run.close()
    return subscription


def test_an_ended_log_is_kept_for_its_reader_and_then_freed(daemon: RunningDaemon, tmp_path: Path) -> None:
    behind = followed_to_the_end(tmp_path)
    with noether_writer.subscribe("r", 19_999) as another:
        assert [event.index for event in another if isinstance(event, Row)] == [19_999]
    # Up to Ended, with the subscription left open.
    events = list(iter(behind.__next__, Ended("finished")))
    assert [event.index for event in events if isinstance(event, Row)] == list(range(20_000))
    # Now it is in its file only.
    with noether_writer.subscribe("r") as late:
        assert late._next_row == late.run["entries"] == 20_000
        assert list(late) == [Ended("finished")]
    behind.close()


def test_an_ended_log_is_freed_when_nobody_reads_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    stuck = followed_to_the_end(tmp_path)
    start = time.monotonic()
    while True:
        with noether_writer.subscribe("r", None) as probe, noether_writer.subscribe("r", 0) as beginning:
            if beginning._next_row == probe._next_row:
                break
        assert time.monotonic() - start < 300, "it is kept for ever"
        time.sleep(0.2)
    assert time.monotonic() - start > 15
    seen = 0
    with pytest.raises(errors.TooSlow, match=r"rows from \d+ on are in .*/r/tracker/entries.th"):
        for _ in stuck:
            seen += 1
    assert 0 < seen < 20_000


def log_much(run: noether_writer.Run) -> None:
    """20 MB: more than socket buffers hold."""
    text = "x" * 1000
    for update in range(20_000):
        run.log({"text": text}, update=update)
    run.flush(60)


def test_a_follower_is_told_that_a_log_was_cut(daemon: RunningDaemon, tmp_path: Path) -> None:
    first = noether_writer.open_run(tmp_path, "r")
    for update in range(10):
        first.log({"a": update}, update=update)
    with noether_writer.subscribe("r") as events:
        assert [type(next(events)) for _ in range(10)] == [Row] * 10
        # A resumed trainer takes the log over.
        second = Raw(daemon.socket)
        second.open_run(tmp_path, log=True, resume_at=4, session="f" * 32)
        second.define(0, [b"a"])
        second.log(1, 50, [0])
        second.ask(frames.FINISH, {"sequence": 2})
        second.close()
        first.close()
        seen = list(events)
    assert [type(event) for event in seen] == [Restarted, Row, Ended]
    assert seen[0] == Restarted(5)
    assert isinstance(seen[1], Row) and (seen[1].index, seen[1].update) == (5, 50)


def test_a_reopened_run_continues_in_the_stream(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 0}, update=0)
    client = RawClient(daemon)
    client.send(frames.SUBSCRIBE, {"run_id": "r", "from": 0})
    run.finish()
    run.close()
    assert client.next().type == frames.SUBSCRIBED and client.next().type == frames.ROWS
    assert client.next().json()["event"] == "ended"
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    events = [client.next().json() for _ in range(2)]
    assert [event["event"] for event in events] == ["opened", "restarted"] and events[1]["rows"] == 0
    _, [(update, _, values)] = frames.unpack_rows(client.next().payload)
    assert (update, values) == (1, {"a": 1})
    run.finish()
    run.close()
    assert client.next().json()["run"]["state"] == "finished"


class RawClient:
    def __init__(self, daemon: RunningDaemon) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(daemon.socket)
        self.decoder, self.found = frames.FrameDecoder(), list[frames.Frame]()
        self.send(frames.HELLO, {"versions": [1], "client": "test"})
        assert self.next().type == frames.WELCOME

    def send(self, type_: int, message: dict[str, Any]) -> None:
        self.socket.sendall(frames.pack_json(type_, message, 1))

    def next(self) -> frames.Frame:
        while not self.found:
            self.found += self.decoder.feed(self.socket.recv(1 << 16))
        return self.found.pop(0)


def test_unknown_runs_and_second_subscriptions_are_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownRun, match="does not know the run"):
        noether_writer.subscribe("nobody")
    run = noether_writer.open_run(tmp_path, "r")
    with pytest.raises(errors.UnknownRun):
        noether_writer.subscribe("r", directory=tmp_path / "elsewhere")
    noether_writer.subscribe("r", directory=tmp_path / "r").close()
    connection = Raw(daemon.socket)
    connection.ask(frames.SUBSCRIBE, {"run_id": "r"})
    connection.send(frames.pack_json(frames.SUBSCRIBE, {"run_id": "r"}, 9))
    assert connection.receive_type(frames.ERROR).json()["code"] == "already-open"
    connection.close()
    run.close()


def test_subscriptions_are_bounded_and_come_back(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    held = [noether_writer.subscribe("r") for _ in range(64)]
    with pytest.raises(errors.DaemonBusy, match="64 subscriptions"):
        noether_writer.subscribe("r")
    held.pop().close()
    deadline = time.monotonic() + 10
    while True:
        try:
            held.append(noether_writer.subscribe("r"))
            break
        except errors.ProtocolError:
            assert time.monotonic() < deadline
    for subscription in held:
        subscription.close()
    run.close()


def test_subscribing_starts_no_daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "none"))
    with pytest.raises(errors.DaemonNotFound, match="no daemon listens"):
        noether_writer.subscribe("r")
    assert list(short_directory.iterdir()) == []


def test_an_older_daemon_is_named(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(short_directory / "s")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    pid = os.fork()
    with socket.socket(socket.AF_UNIX) as listener:
        if pid == 0:
            listener.bind(path)
            listener.listen()
            client, _ = listener.accept()
            client.recv(4096)
            welcome = {"version": 1, "daemon": "noether-writerd/0.0.9", "pid": 1, "capabilities": ["log"]}
            client.sendall(frames.pack_json(frames.WELCOME, welcome, 1))
            client.recv(4096)
            os._exit(0)
    while True:
        try:
            noether_writer.subscribe("r")
        except errors.DaemonNotFound:
            continue
        except errors.ProtocolError as error:
            assert "noether-writerd/0.0.9 is too old" in str(error)
            break
    os.waitpid(pid, 0)


def test_reports_of_the_daemon(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    client = RawClient(daemon)
    client.send(frames.SUBSCRIBE, {"interval_s": 0.1})
    found = [client.next() for _ in range(4)]
    assert [frame.type for frame in found] == [frames.SUBSCRIBED] + [frames.STREAM_EVENT] * 3
    assert found[1].json()["report"]["runs"][0]["run_id"] == "r"
    run.close()


def test_the_swift_client_follows(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 0.5}, update=1)
    follower = subprocess.Popen([TRAINER, "follow", "r"], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "row 0 1 loss=0.5\n"
    run.log({"loss": 0.25}, update=2)
    assert follower.stdout.readline() == "row 1 2 loss=0.25\n"
    run.save("net", "E1", {"w": torch.ones(10)}).wait(30)
    run.finish()
    run.close()
    rest = follower.stdout.read().splitlines()
    assert rest[0] == "checkpoint net_cp=E1_model.th accepted" and rest[-1] == "ended finished"
    assert "checkpoint net_cp=E1_model.th durable" in rest
    assert follower.wait(30) == 0
