# SPDX-License-Identifier: Apache-2.0
"""The same update again adds to its row: over the wire, in a killed daemon's journal, in what is made of the log."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import until
from hostile import Raw, log_payload
from noether_writer import frames
from noether_writer.subscription import Ended, Restarted, Row
from test_tensorboard import Shown
from test_wire_rules import answers, codes

CLI = Path(DAEMON).parent / "noether-writer"
KEYS = [b"loss", b"acc", b"note", b"epoch"]


class Trainer(Raw):
    """A client that logs in pieces: what the rows must be is kept beside it."""

    def __init__(self, path: str, root: Path, **members: Any) -> None:
        super().__init__(path)
        self.opened = self.open_run(root, **members)
        self.define(0, KEYS)
        self.sequence = int(self.opened["last_sequence"])
        self.rows: dict[int, dict[str, frames.Scalar]] = {}

    def adds(self, update: int, **values: float) -> None:
        ids = [KEYS.index(key.encode()) for key in values]
        self.sequence += 1
        self.send(frames.pack(frames.LOG, log_payload(self.sequence, update, ids, list(values.values()))))
        self.rows.setdefault(update, {}).update(values)

    def adds_keys_until_acknowledged(self, update: int) -> None:
        """Each addition is of a key of its own, which is there later only if that addition was kept."""
        number = len(KEYS)
        while not select.select([self.socket], [], [], 0.02)[0]:
            self.define(number, [f"key {number}".encode()])
            self.sequence += 1
            self.send(frames.pack(frames.LOG, log_payload(self.sequence, update, [number], [1.0])))
            self.rows.setdefault(update, {})[f"key {number}"] = 1.0
            number += 1

    def acknowledged(self) -> tuple[int, int]:
        """The update of the last acknowledgement, and the one that is durable, once all is durable."""
        while True:
            sequence, update, durable = frames.unpack_log_ack(self.receive_type(frames.LOG_ACK).payload)
            if sequence == self.sequence and durable is not None and durable == update:
                return update, durable

    def entries(self) -> list[tuple[int, dict[str, frames.Scalar]]]:
        self.send(frames.pack_json(frames.ENTRIES, {"from": 0, "limit": 1000}, 7))
        return frames.unpack_entries_page(self.receive_type(frames.ENTRIES_PAGE).payload)[1]

    def finish(self) -> dict[str, Any]:
        self.sequence += 1
        return self.ask(frames.FINISH, {"sequence": self.sequence})


def columns(rows: dict[int, dict[str, frames.Scalar]]) -> dict[str, dict[int, frames.Scalar]]:
    found: dict[str, dict[int, frames.Scalar]] = {}
    for update, values in rows.items():
        for key, value in values.items():
            found.setdefault(key, {})[update] = value
    return found


def file_of(root: Path) -> dict[str, dict[int, frames.Scalar]]:
    return dict(torch.load(root / "r/tracker/entries.th"))


def logs_in_pieces(trainer: Trainer, updates: Sequence[int]) -> None:
    for update in updates:
        trainer.adds(update, loss=update / 2, epoch=update // 4)
        trainer.adds(update, acc=update / 8)
        # The later value of a key counts.
        trainer.adds(update, acc=update / 4)


def test_the_same_update_again_adds_to_its_row(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path)
    logs_in_pieces(trainer, range(1, 21))
    assert trainer.acknowledged() == (20, 20)
    assert trainer.entries() == list(trainer.rows.items())
    trainer.send(frames.pack_json(frames.VALUES, {"key": "acc", "from": 0, "limit": 100}, 7))
    total, updates, values = frames.unpack_values_page(trainer.receive_type(frames.VALUES_PAGE).payload)
    assert (total, updates, values) == (20, list(range(1, 21)), [update / 4 for update in range(1, 21)])
    assert trainer.finish()["entries"] == 20
    assert file_of(tmp_path) == columns(trainer.rows)
    # Behind a finish too: the file that is written then has it.
    trainer.adds(20, note=1.5)
    trainer.finish()
    assert file_of(tmp_path) == columns(trainer.rows)
    trainer.close()


def test_an_empty_addition_and_a_refused_one_change_nothing(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path)
    trainer.adds(1, loss=0.5)
    frames_of = [log_payload(2, 1, []), log_payload(3, 1, [1, 1]), log_payload(4, 0, [1]), log_payload(5, 1, [9])]
    found = answers(trainer, *(frames.pack(frames.LOG, payload) for payload in frames_of))
    assert codes(found) == ["bad-key", "update-order", "bad-key"]
    assert trainer.entries() == [(1, {"loss": 0.5})]
    trainer.close()


def test_a_row_that_a_session_resumes_with_stays_as_it_is(daemon: RunningDaemon, tmp_path: Path) -> None:
    first = Trainer(daemon.socket, tmp_path, session=os.urandom(16).hex())
    logs_in_pieces(first, range(1, 6))
    first.acknowledged()
    first.close()
    second = Trainer(daemon.socket, tmp_path, session=os.urandom(16).hex(), resume_at=4)
    assert second.opened["log_update"] == 4
    assert codes(answers(second, frames.pack(frames.LOG, log_payload(1, 4, [2])))) == ["update-order"]
    second.adds(5, loss=9.0)
    second.adds(5, note=1.0)
    assert second.entries() == [(u, first.rows[u]) for u in range(1, 5)] + [(5, {"loss": 9.0, "note": 1.0})]
    second.close()


@pytest.mark.parametrize("faults", ["", "journal.create=slow"], ids=["at once", "a journal that takes its time"])
def test_a_killed_daemon_loses_no_addition(
    faults: str, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that come while the journal's file is made too, to the row that it has and to later ones."""
    daemon = faulty_daemon(str(short_directory / "socket"), faults, monkeypatch)
    trainer = Trainer(daemon.socket, tmp_path)
    trainer.adds(1, loss=0.5)
    # Nothing is acknowledged before the file is made, so that some of them come while it is being made.
    trainer.adds_keys_until_acknowledged(1)
    trainer.adds(1, acc=0.25)
    assert trainer.entries() == list(trainer.rows.items())
    logs_in_pieces(trainer, range(1, 8))
    trainer.acknowledged()
    rows = trainer.rows
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    trainer.close()
    successor = RunningDaemon(daemon.socket)
    again = Trainer(successor.socket, tmp_path)
    assert again.sequence == trainer.sequence
    again.rows = rows
    # To a row that it had before it was killed, and to new ones.
    again.adds(7, note=3.0)
    logs_in_pieces(again, range(8, 10))
    assert again.entries() == list(rows.items())
    assert again.finish()["entries"] == 9
    assert file_of(tmp_path) == columns(rows)
    again.close()
    assert successor.stop() == 0


def test_a_follower_gets_a_changed_row_again(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path)
    tail = subprocess.Popen(
        [CLI, "tail", "--socket", daemon.socket, "r"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TZ": "UTC"},
    )
    assert tail.stdout
    with noether_writer.subscribe("r") as events:
        trainer.adds(1, loss=0.5, acc=0.25)
        first = next(events)
        assert isinstance(first, Row) and (first.index, first.values) == (0, {"loss": 0.5, "acc": 0.25})
        lines = [tail.stdout.readline()]
        trainer.adds(1, note=3.0, acc=0.75)
        assert next(events) == Restarted(0)
        again = next(events)
        assert isinstance(again, Row) and (again.index, again.values) == (0, trainer.rows[1])
        lines.append(tail.stdout.readline())
        trainer.adds(2, loss=0.125)
        later = next(events)
        assert isinstance(later, Row) and (later.index, later.values) == (1, {"loss": 0.125})
        trainer.finish()
        trainer.send(frames.pack(frames.CLOSE))
        trainer.close()
        assert list(events) == [Ended("finished")]
    lines += tail.stdout.read().splitlines(keepends=True)
    assert tail.wait() == 0
    assert lines == ["1  loss=0.5  acc=0.25\n", "1  acc=0.75  note=3.0\n", "2  loss=0.125\n", "run finished\n"]
    exported = subprocess.run([CLI, "export", str(tmp_path / "r")], stdout=subprocess.PIPE, text=True, check=True)
    assert exported.stdout == "update,loss,acc,note\n1,0.5,0.75,3.0\n2,0.125,,\n"


@pytest.mark.parametrize("is_killed", [False, True])
def test_tensorboard_shows_what_was_added(is_killed: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Trainer(daemon.socket, tmp_path, tensorboard=True)
    trainer.adds(1, loss=0.5)
    trainer.adds(2, loss=0.25)
    folder = tmp_path / "r"
    until(lambda: any(folder.glob("events.*")) and Shown(folder).steps("loss") == [1, 2])
    trainer.adds(2, acc=0.75)
    trainer.acknowledged()
    running = daemon
    if is_killed:
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
        trainer.close()
        running = RunningDaemon(daemon.socket)
        trainer = Trainer(running.socket, tmp_path, tensorboard=True)
    until(lambda: Shown(folder).steps("acc") == [2])
    trainer.adds(2, note=1.0)
    trainer.adds(3, loss=0.125)
    trainer.adds(3, acc=0.875)
    until(lambda: Shown(folder).steps("acc") == [2, 3])
    trainer.finish()
    trainer.send(frames.pack(frames.CLOSE))
    trainer.close()
    until(lambda: bool(Shown(folder).texts("summary")))
    shown = Shown(folder)
    assert (shown.steps("loss"), shown.steps("acc"), shown.steps("note")) == ([1, 2, 3], [2, 3], [2])
    if is_killed:
        assert running.stop() == 0


def test_the_welcome_announces_log_merge(daemon: RunningDaemon) -> None:
    client = Raw(daemon.socket, hello=False)
    client.send(frames.pack_json(frames.HELLO, {"versions": [1], "client": "x"}, 1))
    assert "log_merge" in client.receive().json()["capabilities"]
    client.close()
