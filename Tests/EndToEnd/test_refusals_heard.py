# SPDX-License-Identifier: Apache-2.0
"""What the daemon refuses reaches the trainer through the Python library: also if the connection is lost before it was
heard, and without anything being sent again for ever."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from harness import until
from hostile import Raw
from noether_writer import errors, frames


class Relay:
    """Stands between a client and its daemon. While it is deaf, what the daemon says is lost."""

    def __init__(self, path: str, daemon: str) -> None:
        self.daemon = daemon
        self.is_deaf = False
        # What it cuts the connection for.
        self.poison = b""
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                if server.connect_ex(self.daemon):
                    # The next daemon is not there yet.
                    client.close()
                    server.close()
                    continue
                self._open = [client, server]
                for ends in ((client, server, False), (server, client, True)):
                    thread = threading.Thread(target=self._pass, args=ends)
                    self._threads.append(thread)
                    thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(source, 1 << 16, 4)
                if not data or (self.poison and self.poison in data):
                    break
                if not (is_answer and self.is_deaf):
                    sent = socket.send_fds(sink, [data], fds)
                    sink.sendall(data[sent:])
                for fd in fds:
                    os.close(fd)
        self.cut()

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._open):
            end.close()


@pytest.fixture
def relay(daemon: RunningDaemon, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    made = Relay(str(short_directory / "relay"), daemon.socket)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "relay"))
    yield made
    made.close()


def half(number: int) -> dict[str, float]:
    """With the other half it is one row of more values than a row may have, which only the daemon can know."""
    return {f"k{key}": 0.5 for key in range(10_000 * number, 10_000 * (number + 1))}


def last_update(daemon: RunningDaemon) -> int | None:
    client = Raw(daemon.socket)
    [run] = client.ask(frames.STATUS, {})["runs"]
    client.close()
    return run.get("last_update")  # type: ignore[no-any-return]


def test_a_frame_that_ends_each_connection_comes_with_pauses(
    relay: Relay, daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    relay.poison = frames.pack(frames.SAVE)[:4]
    run.save("n", "t", {"a": 1})
    until(lambda: run._session._attempt >= 4)
    assert not run._session.core.is_open or run._session.core.saves_not_accepted == 1
    relay.poison = b""
    run.wait(30)
    assert torch.load(tmp_path / "r/checkpoints/n_cp=t_model.th") == {"a": 1}
    run.close()


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_refused_update_is_raised_and_not_kept(
    is_deaf: bool, relay: Relay, daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log(half(0), update=1)
    run.flush(30)
    relay.is_deaf = is_deaf
    run.log(half(1), update=1)
    run.log({"k0": 0.75}, update=2)
    until(lambda: last_update(daemon) == 2)
    if is_deaf:
        assert run._core.kept_rows == 2
        relay.is_deaf = False
        relay.cut()
    with pytest.raises(errors.NoetherWriterError, match="too-many"):
        run.finish(30)
    assert run._core.kept_rows == 0
    # It was said once, and the run goes on.
    run.log({"k0": 1.0}, update=3)
    run.flush(30)
    run.finish(30)
    run.close()
    assert run._core.connection == 1 + is_deaf
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries["k0"] == {1: 0.5, 2: 0.75, 3: 1.0} and len(entries) == 10_000


def test_a_run_whose_log_was_taken_over_does_not_take_it_back(
    relay: Relay, daemon: RunningDaemon, tmp_path: Path
) -> None:
    """By its reconnects, with the same daemon and with the next one."""
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1.0}, update=1)
    run.flush(30)
    other = Raw(daemon.socket)
    name = os.urandom(16).hex()
    assert other.open_run(tmp_path, session=name)["log"]
    other.define(0, [b"a"])
    other.log(1, 7, [0])
    frames.unpack_log_ack(other.receive_type(frames.LOG_ACK).payload)
    for connection in (1, 2, 3):
        run.log({"a": 2.0}, update=1 + connection)
        with pytest.raises(errors.LogTakenOver):
            run.flush(30)
        assert run._core.kept_rows == 0 and run._core.connection >= connection
        if connection == 1:
            relay.cut()
        elif connection == 2:
            daemon.crash()
    run.close()
    back = Raw(daemon.socket)
    opened = back.open_run(tmp_path, session=name)
    assert opened["log"] and opened["last_sequence"] == 1
    assert back.ask(frames.FINISH, {"sequence": 2})["entries"] == 1
    back.close()
    other.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {7: 0.5}}
    assert torch.load(tmp_path / "r/tracker/entries.1.th") == {"a": {1: 1.0}}
