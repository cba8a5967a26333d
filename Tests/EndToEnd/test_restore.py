# SPDX-License-Identifier: Apache-2.0
"""Files that the daemon has written are loaded from its memory, and only if they are still what it has written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon, not_sanitized
from harness import until
from noether_writer import _restore, frames
from noether_writer._conversation import Conversation
from noether_writer.errors import ProtocolError
from noether_writer.saves import Target
from test_disks import mounted
from test_job_memory import Group

MIB = 1 << 20
F_GET_SEALS = 1034
SEALS = 0xF


def state(seed: int, mib: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(mib * MIB // 4, generator=generator), "seed": torch.tensor(seed)}


def is_same(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def image_of(path: Path | str) -> int | None:
    file = os.open(path, os.O_RDONLY)
    try:
        return _restore.image_of(file)
    finally:
        os.close(file)


def has_image(path: Path | str) -> bool:
    if (image := image_of(path)) is None:
        return False
    os.close(image)
    return True


@contextmanager
def reads(path: Path | str) -> Iterator[list[str]]:
    """What torch.load is given."""
    seen: list[str] = []
    plain = torch.load

    def load(file: Any, **arguments: Any) -> Any:
        seen.append(str(file))
        return plain(file, **arguments)

    torch.load = load
    try:
        yield seen
    finally:
        torch.load = plain


def loaded(path: Path | str, **arguments: Any) -> tuple[Any, bool]:
    """What `load` returns, and whether it came from memory."""
    with reads(path) as seen:
        value = noether_writer.load(path, **arguments)
    return value, seen[-1].startswith("/proc/self/fd/")


def metric(name: str) -> float:
    for line in metrics().splitlines():
        if line.startswith(f"noether_writer_{name}{{"):
            return float(line.split()[-1])
    raise KeyError(name)


def metrics() -> str:
    with Conversation() as daemon:
        daemon._sending(frames.pack_json(13, {}, 7), [])
        return daemon.next_frame(time.monotonic() + 10).payload.decode()


def image_bytes(daemon: RunningDaemon) -> int:
    """The memory of images that the daemon holds."""
    total = 0
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "noether-writer-image" in os.readlink(entry):
                total += entry.stat().st_blocks * 512
    return total


def saved(path: Path, seed: int, mib: int = 4) -> dict[str, torch.Tensor]:
    value = state(seed, mib)
    noether_writer.save(value, path).wait()
    return value


SAVER = """
import os, signal, sys, torch, noether_writer
seed, mib = int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(seed)
state = {"weight": torch.randn(mib << 18, generator=generator), "seed": torch.tensor(seed)}
noether_writer.save(state, sys.argv[1]).wait()
print("durable", flush=True)
signal.pause()
"""


def killed_trainer(path: Path, seed: int, mib: int = 4) -> None:
    """A trainer saves, and is killed when the file is durable."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path), str(seed), str(mib)], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "durable\n"
        trainer.kill()


def test_a_trainer_that_was_killed_loads_from_memory(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    killed_trainer(path, 1)
    value, from_memory = loaded(path)
    assert from_memory
    assert is_same(value, state(1))
    # The same bytes as the file's, for who reads them in another way.
    image = image_of(path)
    assert image is not None
    with open(image, "rb") as file:
        assert file.read() == path.read_bytes()


def test_the_image_is_the_file_byte_for_byte_and_cannot_be_changed(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    saved(path, 1)
    image = image_of(path)
    assert image is not None
    assert fcntl.fcntl(image, F_GET_SEALS) & SEALS == SEALS
    assert fcntl.fcntl(image, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert fcntl.fcntl(image, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(OSError):
        os.pwrite(image, b"x", 0)
    # Also not by a descriptor that is opened for writing.
    with pytest.raises(OSError):
        again = os.open(f"/proc/self/fd/{image}", os.O_RDWR)
        try:
            os.pwrite(again, b"x", 0)
        finally:
            os.close(again)
    assert os.pread(image, 1 << 30, 0) == path.read_bytes()
    os.close(image)


def test_what_one_reader_writes_into_its_tensors_no_other_sees(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    value = saved(path, 1)
    first, from_memory = loaded(path)
    first["weight"].zero_()
    second, again = loaded(path)
    assert (from_memory, again) == (True, True)
    assert is_same(second, value)
    assert is_same(torch.load(path), value)


def test_each_reader_has_a_position_of_its_own(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    saved(path, 1)
    one, other = image_of(path), image_of(path)
    assert one is not None and other is not None
    os.lseek(one, 100, os.SEEK_SET)
    assert os.lseek(other, 0, os.SEEK_CUR) == 0
    os.close(one)
    os.close(other)


def test_arguments_of_torch_load_count_as_ever(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    value = saved(path, 1)
    for arguments in ({}, {"mmap": True}, {"mmap": False}, {"weights_only": False}, {"map_location": "cpu"}):
        found, from_memory = loaded(path, **arguments)
        assert from_memory, arguments
        assert is_same(found, value)
    on_meta, from_memory = loaded(path, map_location="meta")
    assert from_memory
    assert on_meta["weight"].device.type == "meta"


def test_a_shared_mapping_is_one_of_the_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    saved(path, 1)
    import mmap

    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        _, from_memory = loaded(path, mmap=True)
    assert not from_memory


@pytest.mark.parametrize(
    "change", ["replaced", "rewritten", "touched", "truncated", "appended", "moved onto", "same size and times"]
)
def test_a_file_that_somebody_has_changed_is_read(daemon: RunningDaemon, tmp_path: Path, change: str) -> None:
    path, other = tmp_path / "net.pt", tmp_path / "other.pt"
    saved(path, 1)
    assert has_image(path)
    torch.save(state(2), other)
    before = path.stat()
    match change:
        case "replaced":
            path.unlink()
            shutil.copy(other, path)
        case "moved onto":
            other.rename(path)
        case "rewritten":
            path.write_bytes(other.read_bytes())
        case "same size and times":
            with path.open("r+b") as file:
                file.write(other.read_bytes()[: before.st_size].ljust(before.st_size, b"\0"))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "touched":
            path.touch()
        case "truncated":
            os.truncate(path, 100)
        case "appended":
            with path.open("ab") as file:
                file.write(b"x")
    assert not has_image(path)
    # It is not given again if somebody restores the times, as far as that can be done.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not has_image(path)
    if change in ("replaced", "moved onto", "rewritten"):
        value, from_memory = loaded(path)
        assert not from_memory
        assert is_same(value, state(2))


def test_a_file_that_was_removed_is_not_there(daemon: RunningDaemon, tmp_path: Path) -> None:
    path, other = tmp_path / "net.pt", tmp_path / "other.pt"
    saved(path, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        noether_writer.load(path)
    saved(other, 2)
    held = metric("restore_held_bytes")
    noether_writer.remove(other).wait()
    with pytest.raises(FileNotFoundError):
        noether_writer.load(other)
    # What the daemon has removed itself takes no memory any more.
    assert metric("restore_held_bytes") < held


def test_the_newest_save_of_a_file_counts(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    for seed in range(5):
        saved(path, seed)
        value, from_memory = loaded(path)
        assert from_memory
        assert is_same(value, state(seed))
    size = path.stat().st_size
    assert metric("restore_held_bytes") == size
    # Without a reader in between, the memory of one is used for the next.
    for seed in range(5, 8):
        saved(path, seed)
    assert is_same(loaded(path)[0], state(7))
    assert metric("restore_held_bytes") == size
    # Also what was given to a reader, and has been replaced since, the daemon holds no more.
    until(lambda: image_bytes(daemon) < size + 8192)


def test_a_reader_keeps_what_it_has_mapped(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    first = saved(path, 1)
    value, from_memory = loaded(path)
    assert from_memory
    saved(path, 2)
    saved(path, 3)
    assert is_same(value, first)
    newer, from_memory = loaded(path)
    assert from_memory
    assert is_same(newer, state(3))
    daemon.process.kill()
    daemon.process.wait()
    assert is_same(value, first)


def test_a_run_s_checkpoints_are_loaded_from_memory(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        for update in (10, 20, 30):
            run.log({"loss": 1.0}, update=update)
            run.save("net", f"U{update}", state(update))
        run.wait()
        directory = run.directory
    last = noether_writer.latest(directory)
    assert last is not None
    assert last.tag == "U30"
    value, from_memory = loaded(last.path)
    assert from_memory
    assert is_same(value, state(30)) or is_same(value["state_dict"], state(30))
    # Of files that differ in their tags only, the newest.
    older = Path(directory) / "checkpoints" / "net_cp=U20_model.th"
    assert older.exists()
    assert not has_image(older)


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_of_a_tag_and_latest_the_image_is_that_of_latest(kind: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also where the file system shares blocks, so that most of the second file is never written."""
    with mounted(tmp_path, kind, 300) as disk:
        weights = {f"layer{i}": torch.randn((3 << 20) // 4 + i) for i in range(5)}
        with noether_writer.open_run(disk.path, "r") as run:
            targets = [Target("net", tag, {"state": weights, "tag": tag}) for tag in ("E1_U20_S300", "latest")]
            ticket = run.save_as(targets)
            ticket.wait(60)
        assert [has_image(path) for path in ticket.paths] == [False, True]
        image = image_of(ticket.paths[1])
        assert image is not None
        with open(image, "rb") as file:
            assert file.read() == Path(ticket.paths[1]).read_bytes()
        value, from_memory = loaded(ticket.paths[1])
        assert from_memory
        assert value["tag"] == "latest"
        assert is_same(value["state"], weights)
        del value


RANK = """
import sys, torch, noether_writer
rank = int(sys.argv[2])
run = noether_writer.open_run(sys.argv[1], "r")
run.save("net", f"U5_rank{rank}", {"rank": rank, "w": torch.full((1 << 19,), float(rank))}).wait()
print("durable", flush=True)
sys.stdin.read()
"""


def test_each_rank_has_its_own_image(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also of ranks whose files differ in their tags only."""
    ranks = []
    for rank in range(3):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "3"}
        command = [sys.executable, "-c", RANK, str(tmp_path), str(rank)]
        ranks.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "durable\n"
    for process in ranks:
        process.kill()
        process.communicate()
    for rank in range(3):
        value, from_memory = loaded(tmp_path / f"r/checkpoints/net_cp=U5_rank{rank}_model.th")
        assert from_memory
        assert float(value["w"][-1]) == rank


def test_another_ranks_file_is_another_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    paths = [tmp_path / f"rank{rank}.pt" for rank in range(3)]
    for rank, path in enumerate(paths):
        killed_trainer(path, rank)
    for rank, path in enumerate(paths):
        value, from_memory = loaded(path)
        assert from_memory
        assert is_same(value, state(rank))


READER = """
import sys, torch, noether_writer
from noether_writer import _files
seen, plain = [], torch.load
torch.load = lambda file, **arguments: (seen.append(str(file)), plain(file, **arguments))[1]
value = noether_writer.load(sys.argv[1])
print(float(value["weight"].double().sum()), int(value["seed"]), seen[-1].startswith("/proc/self/fd/"))
value["weight"].fill_(int(sys.argv[2]))
print("done", flush=True)
sys.stdin.read()
"""


def test_eight_readers_at_once(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    value = saved(path, 1, mib=16)
    expected = f"{float(value['weight'].double().sum())} 1 True\n"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == expected
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "done\n"
    assert is_same(loaded(path)[0], value)
    for reader in readers:
        reader.communicate()
        assert reader.returncode == 0


def with_settings(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch, **settings: int) -> None:
    """The same daemon, started again."""
    for name, value in settings.items():
        monkeypatch.setenv(f"NOETHER_WRITER_SETTING_{name.upper()}", str(value))
    daemon.stop()
    daemon.process = RunningDaemon(daemon.socket).process


def test_the_oldest_go_when_the_budget_is_used_up(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_settings(daemon, monkeypatch, restore_bytes=10 * MIB)
    paths = [tmp_path / f"{number}.pt" for number in range(4)]
    for number, path in enumerate(paths):
        saved(path, number)
    assert [has_image(path) for path in paths] == [False, False, True, True]
    assert metric("restore_held_bytes") <= 10 * MIB
    # One that is larger than all of it leaves no image, and the others stay.
    saved(tmp_path / "large.pt", 9, mib=11)
    assert not has_image(tmp_path / "large.pt")
    assert [has_image(path) for path in paths] == [False, False, True, True]
    for number, path in enumerate(paths):
        assert is_same(noether_writer.load(path), state(number))


def test_no_budget_no_images(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(daemon, monkeypatch, restore_bytes=0)
    value = saved(tmp_path / "net.pt", 1)
    assert not has_image(tmp_path / "net.pt")
    assert is_same(noether_writer.load(tmp_path / "net.pt"), value)


def test_saves_take_the_room_of_images(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(daemon, monkeypatch, restore_bytes=12 * MIB, snapshot_bytes=20 * MIB)
    saved(tmp_path / "0.pt", 0)
    saved(tmp_path / "1.pt", 1)
    assert has_image(tmp_path / "0.pt")
    assert has_image(tmp_path / "1.pt")
    saved(tmp_path / "2.pt", 2, mib=15)
    assert [has_image(tmp_path / f"{number}.pt") for number in range(3)] == [False, True, False]


def test_after_a_restart_of_the_daemon_the_file_is_read(daemon: RunningDaemon, tmp_path: Path) -> None:
    value = saved(tmp_path / "net.pt", 1)
    assert has_image(tmp_path / "net.pt")
    daemon.crash()
    found, from_memory = loaded(tmp_path / "net.pt")
    assert not from_memory
    assert is_same(found, value)
    daemon.stop()
    assert is_same(noether_writer.load(tmp_path / "net.pt"), value)


def test_an_older_daemon_is_not_asked(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = saved(tmp_path / "net.pt", 1)
    plain = Conversation.ask

    def ask(self: Conversation, type_: int, *arguments: Any, **named: Any) -> dict[str, Any]:
        assert type_ != frames.RESTORE
        answer = plain(self, type_, *arguments, **named)
        if type_ == frames.HELLO:
            answer["capabilities"] = [each for each in answer["capabilities"] if each != "restore"]
        return answer

    monkeypatch.setattr(Conversation, "ask", ask)
    found, from_memory = loaded(tmp_path / "net.pt")
    assert not from_memory
    assert is_same(found, value)


def test_small_files_have_no_image(daemon: RunningDaemon, tmp_path: Path) -> None:
    noether_writer.save({"a": torch.zeros(10)}, tmp_path / "net.pt").wait()
    assert metric("restore_held_bytes") == 0
    assert not has_image(tmp_path / "net.pt")


def test_a_process_without_descriptors_reads_the_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    """A descriptor that is cut off (MSG_CTRUNC) is no image."""
    path = tmp_path / "net.pt"
    saved(path, 1)
    found = path.stat()
    with Conversation() as daemon_:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) - 1
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fill = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest + 1 - used + 1)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill) + 1, hard))
        try:
            with pytest.raises(ProtocolError, match="cut off"):
                daemon_.ask_for_descriptor(frames.RESTORE, _restore._stamp(found), 10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in fill:
                os.close(each)
    assert loaded(path)[1]


def test_descriptors_do_not_get_lost(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Asked many times at once on one connection: each answer brings its own."""
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for number, path in enumerate(paths):
        saved(path, number)
    with Conversation() as conversation:
        sent = b""
        for number in range(60):
            if number % 4 == 3:
                sent += frames.pack_json(frames.STATUS, {}, number + 100)
                continue
            stamp = _restore._stamp(paths[number % 4].stat())
            sent += frames.pack_json(frames.RESTORE, stamp, number + 100)
        conversation._sending(sent, [])
        for _ in range(60):
            frame = conversation.next_frame(time.monotonic() + 10)
            number = frame.request - 100
            if number % 4 == 3:
                assert (frame.type, frame.descriptors) == (frames.STATUS_REPORT, 0)
                continue
            assert frame.json() == {"found": True}
            image = conversation._descriptors.popleft()
            assert os.pread(image, 1 << 20, 3 * MIB) == paths[number % 4].read_bytes()[3 * MIB : 4 * MIB]
            os.close(image)
    before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    for _ in range(50):
        assert has_image(paths[0])
    until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= before + 2)


@pytest.fixture
def group() -> Iterator[Group]:
    found = Group()
    yield found
    until(lambda: (found.path / "cgroup.procs").read_text() == "")
    found.path.rmdir()


def join(group: Group, daemon: RunningDaemon, limit: int) -> None:
    """The daemon's control group, as that of a service or of a container."""
    (group.path / "cgroup.procs").write_text(str(daemon.process.pid))
    (group.path / group.limit_file).write_text(str(limit))


HOG = """
import mmap, sys, time
memory = mmap.mmap(-1, int(sys.argv[1]) << 20)
for start in range(0, len(memory), 16 << 20):
    for page in range(start, min(start + (16 << 20), len(memory)), 4096):
        memory[page] = 1
    time.sleep(0.02)
print("whole", flush=True)
"""


@not_sanitized("its memory is another")
def test_images_go_before_memory_runs_out(daemon: RunningDaemon, tmp_path: Path, group: Group) -> None:
    """Somebody else in the daemon's control group takes the memory: without the image there is just enough for it."""
    join(group, daemon, 1536 * MIB)
    value = saved(tmp_path / "net.pt", 1, mib=256)
    assert has_image(tmp_path / "net.pt")
    result = group.run(HOG, "1360", limit=1536 * MIB)
    assert (result.returncode, result.stdout) == (0, "whole\n"), result.stderr[-300:]
    assert not has_image(tmp_path / "net.pt")
    assert metric("restore_given_up_total") == 1
    assert is_same(noether_writer.load(tmp_path / "net.pt"), value)
    daemon.stop()


@not_sanitized("its memory is another")
def test_no_image_where_memory_is_short(daemon: RunningDaemon, tmp_path: Path, group: Group) -> None:
    join(group, daemon, 1100 * MIB)
    value = saved(tmp_path / "net.pt", 1, mib=128)
    assert not has_image(tmp_path / "net.pt")
    assert metric("restore_held_bytes") == 0
    assert is_same(noether_writer.load(tmp_path / "net.pt"), value)
    daemon.stop()


def test_sharded_state_comes_from_memory(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from noether_writer import dcp

    given: list[bool] = []
    plain = _restore.image_of

    def image_of(file: int) -> int | None:
        image = plain(file)
        given.append(image is not None)
        return image

    monkeypatch.setattr(_restore, "image_of", image_of)
    value = state(1)
    dcp.save({"model": value}, tmp_path / "step").wait()
    target = {"model": {"weight": torch.zeros(MIB), "seed": torch.tensor(0)}}
    dcp.load(target, tmp_path / "step")
    assert given == [True]
    assert is_same(target["model"], value)
    # A file that somebody has damaged is read, and found out.
    shard = next((tmp_path / "step").glob("*.distcp"))
    with shard.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"x" * 100)
    with pytest.raises(Exception, match="is not what was saved"):
        dcp.load(target, tmp_path / "step")
    assert given == [True, False]
    # What takes the place of a directory takes the place of its images.
    dcp.save({"model": state(2)}, tmp_path / "step").wait()
    dcp.load(target, tmp_path / "step")
    assert given == [True, False, True]
    assert is_same(target["model"], state(2))
    until(lambda: metric("restore_held_bytes") < 6 * MIB)


def test_latest_reads_nothing_that_is_in_memory(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=1)
        run.save("net", "U1", state(1)).wait()
        directory = run.directory
    import zipfile

    read: list[str] = []
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: read.append(str(self.filename)))
    last = noether_writer.latest(directory)
    assert last is not None
    assert read == []
    os.utime(last.path)
    assert noether_writer.latest(directory) is not None
    assert len(read) == 1
