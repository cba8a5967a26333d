# SPDX-License-Identifier: Apache-2.0
"""A run has one log. Rank 0, or the rank that brings it, may begin another one, which destroys nothing; no other rank
may, and who has lost it does not get it back by connecting again, whatever becomes of the daemon in between."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import RunningDaemon
from hostile import log_payload
from noether_writer import frames
from test_log_kept import kept, kill, leaves, logs, session
from test_log_merge import Trainer
from test_refusals import errors
from test_wire_rules import answers


def log(sequence: int, update: int) -> bytes:
    return frames.pack(frames.LOG, log_payload(sequence, update, [0]), 77)


def trainer(daemon: RunningDaemon, root: Path, rank: int, name: str, **members: object) -> Trainer:
    return Trainer(daemon.socket, root, rank=rank, world_size=4, session=name, **members)


@pytest.mark.parametrize("says_log", [True, None])
def test_another_rank_does_not_get_the_log(says_log: bool | None, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also one that leaves it to the default whether it logs, as a client may that only saves."""
    first = trainer(daemon, tmp_path, 0, session())
    assert first.opened["log"]
    logs(first, range(1, 11))
    first.acknowledged()
    name = session()
    for _ in range(2):
        other = trainer(daemon, tmp_path, 1, name, log=says_log, resume_at=3)
        assert not other.opened["log"]
        found = errors(answers(other, log(1, 100), log(2, 101)))
        assert found == [("log-taken-over", 77, 1), ("log-taken-over", 77, 2)]
        assert other.finish() == {"entries": 0}
        leaves(other)
    logs(first, range(11, 13))
    assert first.finish()["entries"] == 12
    leaves(first)
    assert kept(tmp_path) == {"entries.th": list(range(1, 13))}


def test_another_rank_does_not_get_the_log_of_who_is_waited_for(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The daemon has died, and the other rank is faster."""
    name = session()
    first = trainer(daemon, tmp_path, 0, name)
    logs(first, range(1, 11))
    first.acknowledged()
    daemon = kill(daemon)
    other = trainer(daemon, tmp_path, 1, session())
    assert errors(answers(other, log(1, 100))) == [("log-taken-over", 77, 1)]
    first.close()
    back = trainer(daemon, tmp_path, 0, name)
    assert back.opened["last_sequence"] == 10
    logs(back, [11])
    assert back.finish()["entries"] == 11
    leaves(back)
    other.close()
    assert kept(tmp_path) == {"entries.th": list(range(1, 12))}
    assert daemon.stop() == 0


def test_rank_0_begins_another_log(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Of a run whose log another rank has begun, before rank 0 came: that one's rows are kept beside."""
    other = trainer(daemon, tmp_path, 1, session())
    logs(other, range(1, 6))
    other.acknowledged()
    first = trainer(daemon, tmp_path, 0, session())
    assert first.opened["log"] and first.opened["log_entries"] == 0
    logs(first, range(1, 3))
    first.acknowledged()
    assert errors(answers(other, log(6, 6))) == [("log-taken-over", 77, 6)]
    first.finish()
    leaves(first)
    leaves(other)
    assert kept(tmp_path) == {"entries.1.th": [1, 2, 3, 4, 5], "entries.th": [1, 2]}


@pytest.mark.parametrize("rank", [0, 2])
def test_the_same_rank_begins_another_log(rank: int, daemon: RunningDaemon, tmp_path: Path) -> None:
    """As a second writer in one process does."""
    writers = [trainer(daemon, tmp_path, rank, session())]
    logs(writers[0], range(1, 6))
    writers.append(trainer(daemon, tmp_path, rank, session()))
    logs(writers[1], [7])
    writers[1].finish()
    for writer in writers:
        leaves(writer)
    assert kept(tmp_path) == {"entries.1.th": [1, 2, 3, 4, 5], "entries.th": [7]}


@pytest.mark.parametrize("between", ["nothing", "kill", "finish", "finish and kill"])
def test_what_was_taken_over_stays_so(between: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """The older session connects again, as its client does by itself when it has lost its connection."""
    old, new = session(), session()
    first = trainer(daemon, tmp_path, 0, old)
    logs(first, range(1, 6))
    first.acknowledged()
    second = trainer(daemon, tmp_path, 0, new)
    logs(second, range(1, 4))
    second.acknowledged()
    if "finish" in between:
        second.finish()
    first.close()
    if "kill" in between:
        daemon = kill(daemon)
        second.close()
    back = trainer(daemon, tmp_path, 0, old)
    assert not back.opened["log"]
    assert errors(answers(back, log(6, 6))) == [("log-taken-over", 77, 6)]
    if "kill" in between:
        sequence = second.sequence
        second = trainer(daemon, tmp_path, 0, new)
        assert second.opened["log"]
        second.sequence = sequence
    logs(second, [4])
    assert second.finish()["entries"] == 4
    leaves(second)
    leaves(back)
    assert kept(tmp_path) == {"entries.1.th": [1, 2, 3, 4, 5], "entries.th": [1, 2, 3, 4]}
    if "kill" in between:
        assert daemon.stop() == 0


RANK = """
import os, sys
sys.path[:0] = sys.argv[1].split(":")
from hostile import Raw
client = Raw(sys.argv[2])
answer = client.open_run(sys.argv[3], rank=int(sys.argv[4]), world_size=4, session=os.urandom(16).hex())
print(answer["log"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_log_of_a_dead_rank_is_free(
    daemon: RunningDaemon, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """While others have the run open: nobody else could log any more."""

    def rank(number: int) -> str:
        arguments: Sequence[str] = [str(Path(__file__).parent), daemon.socket, str(tmp_path), str(number)]
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    assert [rank(number) for number in (1, 2)] == ["True", "False"]
    processes[0].kill()
    processes[0].wait()
    assert rank(3) == "True"
