# SPDX-License-Identifier: Apache-2.0
"""Real disks that fail: full, read-only, gone, not permitted, hung. Training goes on, it is said why, and all of it
arrives.

Loop-mounted ext4 and a FUSE server that is stopped: they need root, and say so where they can't run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import daemon_of, until
from noether_writer import errors
from noether_writer.saves import Target

CLI = str(Path(DAEMON).parent / "noether-writer")
# linux/ext4.h, EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH: as if the device were pulled out.
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def command(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert not check or result.returncode == 0, f"{words}: {result.stderr}"
    return result


def status() -> str:
    return command(CLI, "status").stdout


MAKE = {"ext4": ("mkfs.ext4", "-q", "-m", "0"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}


class Disk:
    """A file system in a file."""

    def __init__(self, folder: Path, kind: str = "ext4", mebibytes: int = 64) -> None:
        self.image, self.path = folder / "image", folder / "disk"
        self.path.mkdir()
        with open(self.image, "wb") as image:
            image.truncate(mebibytes << 20)
        if shutil.which(MAKE[kind][0]) is None:
            pytest.skip(f"no {MAKE[kind][0]} here")
        command(*MAKE[kind], self.image)
        self.mount()

    def mount(self) -> None:
        result = command("mount", "-o", "loop", self.image, self.path, check=False)
        if result.returncode != 0:
            pytest.skip(f"no loop device can be mounted here: {result.stderr.strip()}")

    def unmounts(self) -> bool:
        return command("umount", self.path, check=False).returncode == 0

    def shut_down(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)


@contextlib.contextmanager
def mounted(folder: Path, kind: str = "ext4", mebibytes: int = 64) -> Iterator[Disk]:
    disk = Disk(folder, kind, mebibytes)
    try:
        yield disk
    finally:
        until(lambda: disk.unmounts() or not os.path.ismount(disk.path), 10)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path) as disk:
        yield disk


def holds(path: str, weights: torch.Tensor) -> bool:
    return torch.equal(torch.load(path)["w"], weights)


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_a_tag_and_latest_share_their_blocks(kind: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    with mounted(tmp_path, kind, 400) as disk:
        weights = {f"layer{i}": torch.randn((5 << 20) // 4 + i) for i in range(12)} | {"small": torch.randn(10)}
        with noether_writer.open_run(disk.path, "r") as run:
            first = run.save("net", "warm", weights)
            first.wait(60)
            os.sync()
            before = shutil.disk_usage(disk.path).free
            # Names of many lengths: headers, and so the places of storages, differ.
            tags = ("E1_U20_S300", "latest", "best_model.loss.test.total.of_everything")
            targets = [Target("net", tag, {"state": weights, "tag": tag}) for tag in tags]
            ticket = run.save_as(targets)
            ticket.wait(60)
            os.sync()
            taken = (before - shutil.disk_usage(disk.path).free) / (60 << 20)
        assert 2.9 < taken < 3.2 if kind == "ext4" else 0.9 < taken < 1.2
        for path, target in zip(ticket.paths, targets, strict=True):
            for mmap in (False, True):
                loaded = torch.load(path, weights_only=True, mmap=mmap)
                assert loaded["tag"] == target.tag
                assert all(torch.equal(loaded["state"][key], weights[key]) for key in weights)
            # What torch would find by calculating, it must not calculate.
            with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
                loaded = torch.load(path, weights_only=True, mmap=True)
            assert all(torch.equal(loaded["state"][key], weights[key]) for key in weights)
            del loaded
        assert command(CLI, "verify", *ticket.paths).returncode == 0
        command("unzip", "-tqq", ticket.paths[1])
        # Neither changes with the other.
        with open(ticket.paths[0], "r+b") as file:
            file.seek(30 << 20)
            file.write(bytes(1 << 20))
        assert command(CLI, "verify", ticket.paths[0], check=False).returncode == 1
        assert command(CLI, "verify", *ticket.paths[1:]).returncode == 0


def fill(disk: Disk) -> Path:
    filler = disk.path / "filler"
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    return filler


def test_wait_and_drain_say_what_holds_them_up(daemon: RunningDaemon, disk: Disk) -> None:
    run = noether_writer.open_run(disk.path, "r")
    # The journal's file is made while there is room.
    run.log({"loss": 1.0}, update=1)
    until(lambda: run.log_durable_update == 1, 40)
    filler = fill(disk)
    ticket = run.save("net", "latest", {"w": torch.randn(1 << 20)})
    run.save("net", "behind", {"w": torch.ones(10)})
    until(lambda: ticket.stalled, 40)
    path = f"{disk.path}/r/checkpoints/net_cp=latest_model.th"
    for words in (("wait",), ("wait", "r"), ("drain",)):
        result = command(CLI, *words, "--timeout", "0.5", check=False)
        assert (result.returncode, result.stdout) == (2, "2 checkpoints still in flight\n")
        [line] = [line for line in result.stderr.splitlines() if "checkpoints" in line]
        assert line.startswith("stalled  ") and line.count(path) == 1 and line.endswith(": No space left on device")
        result = command(CLI, *words, "--timeout", "0.5", "--json", check=False)
        told = json.loads(result.stdout)
        assert (result.returncode, told["done"], told["pending"], told["failed"]) == (2, False, 2, [])
        [stall] = [stall for stall in told["stalled"] if stall["path"] == path]
        assert stall["message"].endswith(": No space left on device")
    filler.unlink()
    ticket.wait(60)
    told = json.loads(command(CLI, "drain", "--timeout", "60", "--json").stdout)
    assert told == {"done": True, "failed": [], "pending": 0, "stalled": []}
    run.finish(60)
    run.close()


def test_a_daemon_that_leaves_and_waits_for_a_full_disk_holds_up_no_trainer_elsewhere(
    daemon: RunningDaemon, disk: Disk, tmp_path: Path
) -> None:
    run = noether_writer.open_run(disk.path, "r")
    filler = fill(disk)
    ticket = run.save("net", "latest", {"w": torch.randn(1 << 20)})
    until(lambda: ticket.stalled, 40)
    first = daemon.process
    first.send_signal(signal.SIGTERM)
    # It has drain_seconds, 600.
    script = "import noether_writer, sys; noether_writer.open_run(sys.argv[1], 'r').save('net', 't', {}).wait(60)"
    result = command(sys.executable, "-c", script, tmp_path / "healthy")
    assert first.poll() is None and not ticket.done
    assert (tmp_path / "healthy/r/checkpoints/net_cp=t_model.th").exists()
    # Its run is its own until it has ended.
    result = command(sys.executable, "-c", script, disk.path, check=False)
    assert result.returncode == 1 and "is held by a daemon that leaves" in result.stderr
    filler.unlink()
    assert first.wait(60) == 0
    ticket.wait(60)
    run.log({"a": 1}, update=1)
    run.finish(60)
    run.close()
    assert torch.load(disk.path / "r/tracker/entries.th")["a"] == {1: 1}
    os.kill(daemon_of(daemon.socket), signal.SIGTERM)


def test_a_full_disk_is_reported_everywhere(disk: Disk, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_directory / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "notify"))
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
        daemon = RunningDaemon(str(short_directory / "s"))
        run = noether_writer.open_run(disk.path, "r")
        filler = fill(disk)
        weights = torch.randn(1 << 20)
        ticket = run.save("net", "latest", {"w": weights})
        for update in range(1, 2001):
            run.log({"loss": 1.0 / update, "text": "x" * 100}, update=update)
        until(lambda: ticket.stalled, 40)
        assert "No space left" in str(ticket.stalled) and "STALLED" in status()
        words = b""
        while b"STALLED" not in words:
            words = socket.recv_fds(manager, 4096, 8)[0]
        assert b"No space left on device" in words
        filler.unlink()
        ticket.wait(60)
        run.finish(60)
        run.close()
        assert holds(ticket.paths[0], weights)
        assert len(torch.load(disk.path / "r/tracker/entries.th")["loss"]) == 2000
        assert "STALLED" not in status()
        assert daemon.stop() == 0


def test_a_read_only_disk_is_waited_for(daemon: RunningDaemon, disk: Disk) -> None:
    run = noether_writer.open_run(disk.path, "r")
    command("mount", "-o", "remount,ro", disk.path)
    weights = torch.randn(1000)
    ticket = run.save("net", "t", {"w": weights})
    run.log({"a": 1}, update=1)
    until(lambda: ticket.stalled, 40)
    assert "Read-only file system" in status()
    with pytest.raises(errors.CheckpointStalled, match="Read-only"):
        ticket.wait(0.1)
    command("mount", "-o", "remount,rw", disk.path)
    ticket.wait(60)
    run.finish(60)
    run.close()
    assert holds(ticket.paths[0], weights)
    assert torch.load(disk.path / "r/tracker/entries.th") == {"a": {1: 1}}


def test_a_disk_that_is_gone_can_be_unmounted_and_mounted_again(daemon: RunningDaemon, disk: Disk) -> None:
    run = noether_writer.open_run(disk.path, "r")
    run.log({"a": 1}, update=1)
    run.save("net", "before", {"w": torch.ones(3)}).wait(30)
    until(lambda: run.log_durable_update == 1, 40)
    disk.shut_down()
    weights = torch.randn(1000)
    ticket = run.save("net", "t", {"w": weights})
    run.log({"a": 2}, update=2)
    until(lambda: ticket.stalled, 40)
    assert "STALLED" in status()
    # The daemon does not pin the dead file system.
    until(disk.unmounts, 20)
    # A try while nothing is mounted makes nothing below the empty mount point.
    time.sleep(1.5)
    assert list(disk.path.iterdir()) == []
    disk.mount()
    ticket.wait(60)
    run.finish(60)
    run.close()
    assert holds(ticket.paths[0], weights)
    assert holds(str(disk.path / "r/checkpoints/net_cp=before_model.th"), torch.ones(3))
    assert torch.load(disk.path / "r/tracker/entries.th") == {"a": {1: 1, 2: 2}}
    assert not (disk.path / "r/tracker/entries.journal").exists()


def test_a_quota_that_is_used_up_is_waited_for(daemon: RunningDaemon, tmp_path: Path) -> None:
    with mounted(tmp_path, "btrfs", 400) as disk:
        runs = disk.path / "runs"
        command("btrfs", "quota", "enable", disk.path)
        command("btrfs", "subvolume", "create", runs)
        command("btrfs", "qgroup", "limit", "20m", runs)
        run = noether_writer.open_run(runs, "r")
        weights = torch.randn(30 << 18)
        run.save("net", "small", {"w": torch.ones(10)}).wait(20)
        ticket = run.save("net", "latest", {"w": weights})
        for update in range(1, 501):
            run.log({"loss": 1.0 / update}, update=update)
        until(lambda: ticket.stalled, 40)
        assert "quota" in str(ticket.stalled) and "quota" in status()
        assert not ticket.done
        command("btrfs", "qgroup", "limit", "none", runs)
        ticket.wait(60)
        run.finish(60)
        run.close()
        assert holds(ticket.paths[0], weights)
        assert len(torch.load(runs / "r/tracker/entries.th")["loss"]) == 500


def test_saves_after_a_lazy_unmount_wait_for_the_disk(daemon: RunningDaemon, disk: Disk) -> None:
    """`umount --lazy`: gone by its path, there for who has it open: nothing is called durable there."""
    run = noether_writer.open_run(disk.path, "r")
    run.log({"a": 1}, update=1)
    before = run.save("net", "before", {"w": torch.ones(3)})
    before.wait(20)
    command("umount", "--lazy", disk.path)
    ticket = run.save("net", "behind", {"w": torch.full((3,), 2.0)})
    run.log({"a": 2}, update=2)
    with pytest.raises(errors.CheckpointStalled, match="gone with its file system"):
        ticket.wait(3)
    # Nothing came into being at the bare path, and the daemon lets go of the disk.
    assert not list(disk.path.iterdir())
    losetup = ("losetup", "-j", disk.image)
    until(lambda: not command(*losetup).stdout, 20)
    disk.mount()
    ticket.wait(60)
    run.finish(60)
    run.close()
    assert holds(before.paths[0], torch.ones(3)) and holds(ticket.paths[0], torch.full((3,), 2.0))
    assert torch.load(disk.path / "r/tracker/entries.th") == {"a": {1: 1, 2: 2}}


@pytest.fixture
def unprivileged(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A daemon of root without its power over permissions."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("capabilities can be dropped by root only")
    path = str(short_directory / "s")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    drop = "-dac_override,-dac_read_search"
    process = subprocess.Popen(["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", DAEMON, "--socket", path])
    with socket.socket(socket.AF_UNIX) as probe:
        until(lambda: probe.connect_ex(path) == 0, 10)
    yield
    for run in list(noether_writer.run._open_runs):
        run._session.end()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_permission_that_is_missing_is_waited_for(unprivileged: None, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    (tmp_path / "r/checkpoints").chmod(0o555)
    (tmp_path / "r/tracker").chmod(0o555)
    ticket = run.save("net", "t", {"w": torch.ones(3)})
    run.log({"a": 1}, update=1)
    until(lambda: ticket.stalled, 40)
    assert "Permission denied" in status()
    (tmp_path / "r/checkpoints").chmod(0o755)
    (tmp_path / "r/tracker").chmod(0o755)
    ticket.wait(60)
    run.finish(60)
    run.close()
    assert holds(ticket.paths[0], torch.ones(3))


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A file system whose server can be stopped, and how."""
    if not shutil.which("bindfs") or not Path("/dev/fuse").exists():
        pytest.skip("bindfs or /dev/fuse is missing")
    (tmp_path / "behind").mkdir()
    path = tmp_path / "fuse"
    path.mkdir()
    server = subprocess.Popen(["bindfs", "-f", str(tmp_path / "behind"), str(path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 10
    while not os.path.ismount(path):
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"no FUSE here: {server.stderr and server.stderr.read()}")
        time.sleep(0.01)
    yield path, lambda number: os.kill(server.pid, number)
    os.kill(server.pid, signal.SIGCONT)
    until(lambda: command("umount", path, check=False).returncode == 0, 10)
    server.wait(10)


def test_a_hung_disk_holds_up_its_own_files_only(
    daemon: RunningDaemon, hanging: tuple[Path, Callable[[int], None]], tmp_path: Path
) -> None:
    path, send = hanging
    # More runs than a file system has queues, and a second one of logs.
    stuck = [noether_writer.open_run(path, f"stuck{i}") for i in range(4)]
    for run in stuck:
        run.log({"a": 1}, update=1)
    until(lambda: all(run._core.kept_rows == 0 for run in stuck), 40)
    send(signal.SIGSTOP)
    tickets: list[Any] = []
    for run in stuck:
        tickets += [run.save("net", tag, {"w": torch.ones(100_000)}) for tag in ("t", "latest")]
        run.log({"a": 2}, update=2)
    until(lambda: all(ticket.accepted for ticket in tickets), 40)
    # Others open, save, log and finish as if nothing were.
    for number in range(3):
        with noether_writer.open_run(tmp_path / "good", f"r{number}") as run:
            run.log({"a": 1}, update=1)
            run.save("net", "t", {"w": torch.ones(1000)}).wait(120)
        assert not any(ticket.done for ticket in tickets)
    # The silence is reported, and bounds the trainer's wait.
    until(lambda: all(ticket.stalled for ticket in tickets[::2]), 30)
    assert "nothing has moved for" in status()
    with pytest.raises(errors.CheckpointStalled, match="nothing has moved"):
        tickets[0].wait(0.1)
    send(signal.SIGCONT)
    for ticket in tickets:
        ticket.wait(60)
    for run in stuck:
        run.finish(60)
        run.close()
    for number in range(4):
        assert torch.load(path / f"stuck{number}/tracker/entries.th") == {"a": {1: 1, 2: 2}}
        assert holds(str(path / f"stuck{number}/checkpoints/net_cp=latest_model.th"), torch.ones(100_000))
    assert "STALLED" not in status()
