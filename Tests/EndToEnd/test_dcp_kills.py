# SPDX-License-Identifier: Apache-2.0
"""Each rank of a sharded save, each daemon, and all of them, are killed at each point of the way: then the older or the
newer checkpoint loads, whole, and the next save succeeds and leaves nothing behind. Two daemons with one directory
stand for two nodes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import RunningDaemon
from harness import until
from noether_writer import _files, dcp
from ranks import POINTS, Server, full
from test_dcp import is_whole

# Only rank 0 passes these points.
OF_COORDINATOR = {
    "partial.locked",
    "partial.made",
    "plan.global",
    "finish.before",
    "metadata.sent",
    "commit.before",
    "commit.sent",
    "commit.accepted",
    "commit.durable",
    "finish.after",
}
# From here on the daemons finish by themselves.
HANDED_OVER = {"commit.accepted", "commit.durable", "finish.after"}
DAEMON_POINTS = [
    "save.accepted",
    "checkpoint.created",
    "checkpoint.written",
    "checkpoint.synced",
    "checkpoint.renamed",
    "commit.marked",
    "commit.renamed",
    "commit.durable",
]


class Job:
    """Ranks, and the daemons of their nodes, which are started again when they die."""

    def __init__(self, directory: Path, sockets: Path, nodes: int) -> None:
        self.directory, self.path = directory, directory / "ck"
        self.sockets = [str(sockets / f"d{node}" / "socket") for node in range(nodes)]
        self.daemons: list[RunningDaemon | None] = [None] * nodes
        self.kills_all = False
        self.is_over = False
        self.server = Server(directory.parent)
        self.keeper = threading.Thread(target=self._keep)
        self.keeper.start()

    def start(self, node: int, faults: str = "") -> None:
        if (daemon := self.daemons[node]) is not None:
            self.daemons[node] = None
            daemon.stop()
        if faults:
            os.environ["NOETHER_WRITER_FAULTS"] = faults
        try:
            self.daemons[node] = RunningDaemon(self.sockets[node])
        finally:
            os.environ.pop("NOETHER_WRITER_FAULTS", None)

    def _keep(self) -> None:
        while not self.is_over:
            for node, daemon in enumerate(self.daemons):
                if daemon is not None and daemon.process.poll() is not None and self.daemons[node] is daemon:
                    if self.kills_all:
                        self._kill_ranks()
                    self.daemons[node] = RunningDaemon(self.sockets[node])
            time.sleep(0.01)

    def _kill_ranks(self) -> None:
        for pid in json.loads(self.server.pids.read_text()):
            # They are waited for only when all have ended.
            os.kill(pid, signal.SIGKILL)

    def run(self, step: int, world: int = 2, **more: Any) -> list[Any]:
        return self.server.run("save", self.path, world, self.sockets, step=step, **more)

    def loaded(self) -> int:
        """The step of the checkpoint that is there, all of whose values are of that step."""
        found: dict[str, Any] = {"sharded": torch.zeros(65, 2), "replicated": torch.zeros(65, 2), "step": 0}
        found |= {"plain": torch.zeros(1000), "of0": torch.zeros(20000), "of1": torch.zeros(20000)}
        is_whole(self.path)
        for reader in (torch_dcp.FileSystemReader(self.path), dcp.StorageReader(self.path)):
            torch_dcp.load(found, storage_reader=reader, no_dist=True)
            step = found["step"]
            assert torch.equal(found["sharded"], full(step)) and torch.equal(found["replicated"], full(step) + 1)
            assert all(bool((found[name] == step).all()) for name in ("plain", "of0", "of1"))
        return int(step)

    def end(self) -> None:
        self.is_over = True
        self.keeper.join()
        self.server.end()
        for daemon in self.daemons:
            if daemon is not None:
                daemon.stop()


@pytest.fixture(params=[1, 2], ids=["one node", "two nodes"])
def job(
    request: pytest.FixtureRequest, tmp_path: Path, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Job]:
    directory = tmp_path / "shared"
    directory.mkdir()
    made = Job(directory, short_directory, request.param)
    # What loads waits for the first node's daemon.
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", made.sockets[0])
    yield made
    made.end()


def left(job: Job) -> list[str]:
    return sorted(name for name in os.listdir(job.directory) if name != "ck")


def save_again(job: Job, step: int) -> None:
    """The next save of the job that was started again succeeds, and removes what was left."""
    assert job.run(step) == [None, None]
    assert job.loaded() == step
    until(lambda: not left(job), what=f"left behind: {left(job)}")


def test_killed_ranks_leave_the_older_or_the_newer_checkpoint(job: Job) -> None:
    for node in range(len(job.sockets)):
        job.start(node)
    steps = itertools.count(1)
    before = next(steps)
    save_again(job, before)
    table = []
    for point in POINTS:
        for who in (0, 1, "all"):
            if who == 1 and point in OF_COORDINATOR:
                continue
            step = next(steps)
            ended = job.run(step, point=point, kill=who)
            killed = ended if who == "all" else [ended[int(who)]]
            assert set(killed) == {"signal 9"}, (point, who, ended)
            # What the first node's daemon was told to do is done.
            assert _files.is_free(str(job.path), 60)
            found = job.loaded()
            assert found == step if point in HANDED_OVER else found in (before, step), (point, who, found)
            table.append((point, who, "newer" if found == step else "older"))
            # Most of what was left, the next save that is killed finds.
            before = found
            if who == "all":
                before = next(steps)
                save_again(job, before)
    print("\n" + "\n".join(f"{len(job.sockets)} nodes: rank {who} killed at {at}: {found}" for at, who, found in table))


@pytest.mark.parametrize("with_ranks", [False, True], ids=["daemon", "daemon and ranks"])
def test_killed_daemons_leave_the_older_or_the_newer_checkpoint(job: Job, with_ranks: bool) -> None:
    for node in range(len(job.sockets)):
        job.start(node)
    step = 1
    save_again(job, step)
    table = []
    for point in DAEMON_POINTS:
        for node in range(len(job.sockets)):
            # The first file and the last one.
            for turn in (1,) if point.startswith("commit") or node > 0 else (1, 2, 5 - len(job.sockets)):
                if node > 0 and point.startswith("commit"):
                    continue
                before, step = step, step + 1
                job.start(node, f"{point}=kill@{turn}")
                dying = job.daemons[node]
                job.kills_all = with_ranks
                ended = job.run(step)
                job.kills_all = False
                assert dying is not None and dying.process.wait(30) == -signal.SIGKILL, (point, node, turn)
                # What the next daemon was sent again is done.
                assert _files.is_free(str(job.path), 20)
                found = job.loaded()
                assert found in (before, step), (point, node, turn, found)
                if not with_ranks:
                    # The trainers live, and send again what the daemon had.
                    assert ended == [None, None] and found == step, (point, node, turn, ended)
                table.append((point, node, turn, "newer" if found == step else "older"))
                step += 1
                save_again(job, step)
    print("\n" + "\n".join(f"{'all' if with_ranks else 'daemon'}: {row}" for row in table))


@pytest.mark.parametrize("job", [2], indirect=True, ids=["two nodes"])
def test_a_full_disk_on_one_of_two_nodes(job: Job) -> None:
    """It holds the checkpoint up, and loses nothing: the daemon tries again, also if every rank is killed meanwhile."""
    job.start(0)
    job.start(1)
    save_again(job, 1)
    job.start(1, "checkpoint.created=ENOSPC@1")
    assert job.run(2) == [None, None]
    assert job.loaded() == 2
    # The second try comes after half a second, and the ranks are killed before.
    job.start(1, "checkpoint.created=ENOSPC@1")
    ended = job.run(3, point="commit.accepted", kill="all")
    assert ended == ["signal 9"] * 2
    assert _files.is_free(str(job.path), 60)
    assert job.loaded() == 3
    # What can never become durable fails the save on all ranks: here its directory is gone.
    job.start(1, "checkpoint.created=slow")
    found: list[Any] = []
    save = threading.Thread(target=lambda: found.extend(job.run(4)))
    save.start()
    until(lambda: list(job.directory.glob(".ck.partial-*/__0_0.distcp")), seconds=60)
    shutil.rmtree(next(job.directory.glob(".ck.partial-*")))
    save.join()
    assert all("StorageError" in each for each in found), found
    assert job.loaded() == 3
    job.start(1)
    save_again(job, 5)
