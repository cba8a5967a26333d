# SPDX-License-Identifier: Apache-2.0
"""What snapshots may take in memory, in the trainer's pool and in the daemon: the limits, and that it is given back."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import noether_writer.saves
import pytest
import torch
from conftest import RunningDaemon
from harness import until
from noether_writer import errors
from noether_writer.buffers import BufferPool

MIB = 1 << 20


def weights(mebibytes: int, value: float) -> dict[str, Any]:
    return {"w": torch.full((mebibytes * MIB // 4,), float(value))}


def buffers_mapped() -> int:
    """How many of the library's buffers this process has in its memory."""
    return Path("/proc/self/maps").read_text().count("/memfd:noether-writer")


def accepted(tickets: list[noether_writer.Ticket]) -> list[bool]:
    return [ticket.accepted for ticket in tickets]


@pytest.fixture
def own_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], BufferPool]]:
    """A pool of the test's settings, in the place of the process's."""
    pools: list[BufferPool] = []

    def make() -> BufferPool:
        pools.append(BufferPool())
        monkeypatch.setattr("noether_writer.buffers._pool", pools[-1])
        return pools[-1]

    yield make


@pytest.fixture
def small_daemon(
    request: pytest.FixtureRequest, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningDaemon]:
    """With the settings that the test names, and a disk that takes a second for each file."""
    for name, value in request.param.items():
        monkeypatch.setenv(f"NOETHER_WRITER_SETTING_{name}", str(value))
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", "checkpoint.created=slow")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    running = RunningDaemon(str(short_directory / "s"))
    yield running
    for run in list(noether_writer.run._open_runs):
        run._session.end()
    assert running.stop() == 0


@pytest.mark.parametrize("small_daemon", [{"SNAPSHOT_BYTES_PER_RUN": 9 * MIB}], indirect=True)
def test_a_save_above_the_runs_memory_limit_waits_while_training_continues(
    small_daemon: RunningDaemon, tmp_path: Path
) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        tickets = [run.save("net", f"U{i}", weights(4, i)) for i in range(4)]
        # Two fit; the others are with the trainer, and it knows of no error.
        until(lambda: accepted(tickets) == [True, True, False, False])
        until(lambda: tickets[0].durable)
        assert accepted(tickets)[3] is False
        for ticket in tickets:
            ticket.wait(20)
    for i in range(4):
        assert torch.load(tickets[i].paths[0])["w"][0] == i


@pytest.mark.parametrize("small_daemon", [{"SNAPSHOT_BYTES": 9 * MIB}], indirect=True)
def test_the_daemons_limit_holds_for_all_runs_together(small_daemon: RunningDaemon, tmp_path: Path) -> None:
    runs = [noether_writer.open_run(tmp_path, f"r{i}") for i in range(3)]
    tickets = [run.save("net", "latest", weights(4, i)) for i, run in enumerate(runs)]
    until(lambda: sum(accepted(tickets)) == 2)
    assert not any(ticket.durable for ticket in tickets)
    # The third one is taken when one of them is durable.
    until(lambda: sum(accepted(tickets)) == 3)
    assert any(ticket.durable for ticket in tickets)
    # One that is larger than the limit alone fits when nothing else is held.
    large = runs[0].save("net", "large", weights(12, 7))
    for ticket in (*tickets, large):
        ticket.wait(20)
    for i, run in enumerate(runs):
        assert torch.load(tickets[i].paths[0])["w"][0] == i
        run.finish()


@pytest.mark.parametrize("small_daemon", [{"SNAPSHOT_BYTES_PER_RUN": MIB}], indirect=True)
def test_the_newer_of_two_saves_of_latest_stays(small_daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        tickets = [run.save("net", "latest", weights(4, i)) for i in range(4)]
        for ticket in tickets:
            ticket.wait(20)
        assert torch.load(tickets[0].paths[0])["w"][0] == 3


@pytest.mark.parametrize("small_daemon", [{"SNAPSHOT_BYTES_PER_RUN": MIB}], indirect=True)
def test_a_save_that_waits_for_too_long_fails_with_its_reason(
    small_daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_pool: Callable[[], BufferPool]
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_POOL_TIMEOUT", "0.2")
    own_pool()
    with noether_writer.open_run(tmp_path, "r") as run:
        first = run.save("net", "U1", weights(4, 1))
        second = run.save("net", "U2", weights(4, 2))
        with pytest.raises(errors.DaemonBusy, match="snapshot_bytes_per_run"):
            second.wait(20)
        first.wait(20)
        run.wait()
        # Nothing stays behind of it: the next one is taken.
        run.save("net", "U3", weights(4, 3)).wait(20)
    assert sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir()) == [
        "net_cp=U1_model.th", "net_cp=U3_model.th",
    ]  # fmt: skip


def test_many_small_saves_leave_descriptors_for_the_trainer(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_pool: Callable[[], BufferPool]
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_POOL_TIMEOUT", "0.1")
    own_pool()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    tickets = []
    try:
        with noether_writer.open_run(tmp_path, "r") as run:
            daemon.hold()
            with pytest.raises(errors.PoolExhausted, match="ulimit -n"):
                for number in range(256):
                    tickets.append(run.save("net", f"U{number}", {"w": torch.full((16,), float(number))}))
            assert 32 < len(tickets) <= 65
            with contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(open(os.devnull))
            daemon.process.send_signal(signal.SIGCONT)
            for ticket in tickets:
                ticket.wait(60)
            run.save("net", "last", {"w": torch.ones(16)}).wait(60)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("small_daemon", [{}], indirect=True)
def test_a_full_buffer_pool_waits_and_then_explains_what_to_do(
    small_daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_pool: Callable[[], BufferPool]
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_POOL_BYTES", str(10 * MIB))
    monkeypatch.setenv("NOETHER_WRITER_POOL_TIMEOUT", "0.2")
    pool = own_pool()
    with noether_writer.open_run(tmp_path, "r") as run:
        first = run.save("net", "U1", weights(6, 1))
        with pytest.raises(errors.PoolExhausted, match="NOETHER_WRITER_POOL_BYTES"):
            run.save("net", "U2", weights(6, 2))
        pool.timeout_s = 20
        # It waits for the first one's buffer.
        run.save("net", "U3", weights(6, 3)).wait(20)
        assert first.durable
    assert pool.nbytes <= 10 * MIB


def test_an_idle_buffer_pool_frees_its_memory(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_pool: Callable[[], BufferPool]
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_POOL_IDLE_SECONDS", "0.3")
    pool = own_pool()
    mapped = buffers_mapped()
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "U1", weights(8, 1))
        ticket.wait(20)
        assert buffers_mapped() == mapped + 1 and pool.nbytes > 8 * MIB
        # In use again in time, it stays the same one.
        run.save("net", "U2", weights(8, 2)).wait(20)
        assert buffers_mapped() == mapped + 1
        until(lambda: pool.nbytes == 0)
        assert buffers_mapped() == mapped
        again = run.save("net", "U3", weights(8, 3))
        again.wait(20)
    assert torch.load(again.paths[0])["w"][0] == 3
