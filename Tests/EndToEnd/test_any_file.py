# SPDX-License-Identifier: Apache-2.0
"""Files at any path: `noether_writer.save`, `load`, `remove` and `wait`, with real daemons that are stopped, killed and
replaced."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import until
from hostile import SESSION, Raw, memfd, save_payload, target
from noether_writer import _files, errors, frames
from test_disks import Disk, disk
from test_files import without_serialization_id as content_of

sys.path.insert(0, str(Path(__file__).parents[1] / "Torture"))
from manager import Manager

__all__ = ["disk"]
CLI = str(Path(DAEMON).parent / "noether-writer")


def state(value: float = 1, count: int = 1000) -> dict[str, Any]:
    return {"model": {"weight": torch.full((count,), value), "bias": torch.zeros(3)}, "step": int(value)}


def value_of(path: object) -> float:
    return float(torch.load(str(path))["model"]["weight"][0])


def in_a_process(program: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Runs a program in another trainer; `import noether_writer, torch, sys` is done."""
    text = "import os, sys, signal, noether_writer, torch\n" + textwrap.dedent(program)
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "go") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def descriptors(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def end_session() -> None:
    """It would start a daemon in the place of the one that is stopped."""
    if (session := _files._known_session()) is not None:
        session.end()


def end_daemon() -> None:
    """One that this process's session has started."""
    end_session()
    subprocess.run([CLI, "stop"], check=True, capture_output=True)


# What is written, and where

NAMES = [
    "model.pt",
    "model",
    "a.b.c.pt",
    ".hidden.pt",
    "with space.bin",
    "back\\slash.pt",
    "\u00fcn\u00ef.pt",
    "decomposed-u\u0308.pt",
    "new\nline.pt",
    "trailing.",
    "x" * 255,
    "\u00fc" * 127 + "x",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_torch_save(daemon: RunningDaemon, tmp_path: Path, name: str) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    theirs, ours = tmp_path / "theirs" / name, tmp_path / "ours" / name
    torch.save(state(), theirs)
    ticket = noether_writer.save(state(), ours)
    assert ticket.path == str(ours) and ticket.paths == [str(ours)]
    ticket.wait(60)
    assert content_of(ours) == content_of(theirs)
    assert os.listdir(tmp_path / "ours") == [name]


def test_a_relative_path_is_of_the_moment_of_the_call(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there", "\u00fcber"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ticket = noether_writer.save(state(), "x.pt")
    monkeypatch.chdir(tmp_path / "there")
    assert ticket.path == str(tmp_path / "here/x.pt")
    ticket.wait(60)
    assert (tmp_path / "here/x.pt").exists() and not (tmp_path / "there/x.pt").exists()
    # The records have the name of the path as it is given, which is ASCII here though the directory is not.
    monkeypatch.chdir(tmp_path / "\u00fcber")
    torch.save(state(), "x.pt")
    theirs = content_of(Path("x.pt"))
    noether_writer.save(state(), "x.pt").wait(60)
    assert content_of(Path("x.pt")) == theirs
    torch.save(state(), tmp_path / "\u00fcber/x.pt")
    theirs = content_of(Path("x.pt"))
    noether_writer.save(state(), tmp_path / "\u00fcber/x.pt").wait(60)
    assert content_of(Path("x.pt")) == theirs


def test_many_saves_overlap_and_all_modes_work(daemon: RunningDaemon, tmp_path: Path) -> None:
    large = {f"layer{i}": torch.randn(100) for i in range(700)}
    tickets = [noether_writer.save(large, tmp_path / "large.pt")]
    tickets += [noether_writer.save(state(i), tmp_path / f"{i}.pt", snapshot="overlap") for i in range(5)]
    noether_writer.wait(60)
    assert all(ticket.durable for ticket in tickets)
    torch.save(large, tmp_path / "theirs.pt")
    assert torch.load(tmp_path / "large.pt").keys() == large.keys()
    for i in range(5):
        assert value_of(tmp_path / f"{i}.pt") == i


def test_links_are_followed_as_torch_save_follows_them(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "latest.pt").symlink_to("real/model.pt")
    # What the link names is not there yet.
    ticket = noether_writer.save(state(1), tmp_path / "latest.pt")
    assert ticket.path == str(tmp_path / "real/model.pt")
    ticket.wait(60)
    assert (tmp_path / "latest.pt").is_symlink() and value_of(tmp_path / "real/model.pt") == 1
    torch.save(state(1), tmp_path / "latest.pt")
    theirs = content_of(tmp_path / "real/model.pt")
    noether_writer.save(state(1), tmp_path / "latest.pt").wait(60)
    assert content_of(tmp_path / "real/model.pt") == theirs
    ticket = noether_writer.save(state(2), tmp_path / "linked/other.pt")
    assert ticket.path == str(tmp_path / "real/other.pt")
    ticket.wait(60)
    assert value_of(tmp_path / "real/other.pt") == 2


def test_bytes_are_saved_unchanged(daemon: RunningDaemon, tmp_path: Path) -> None:
    content = os.urandom(5_000_001)
    _files.save_bytes(content, tmp_path / "shard").wait(60)
    assert (tmp_path / "shard").read_bytes() == content
    _files.save_bytes(b"", tmp_path / "empty").wait(60)
    assert (tmp_path / "empty").read_bytes() == b""

    def fill(memory: memoryview) -> None:
        torch.frombuffer(memory, dtype=torch.float32).copy_(torch.arange(1000.0))

    _files.save_raw(tmp_path / "tensor", 4000, fill).wait(60)
    assert torch.frombuffer(bytearray((tmp_path / "tensor").read_bytes()), dtype=torch.float32)[999] == 999


# What is refused in the call


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("missing/x.pt", errno.ENOENT, "Parent directory .*missing does not exist"),
        ("folder", errno.EISDIR, "is a directory"),
        ("folder/", errno.EISDIR, "names a directory"),
        ("folder/..", errno.EISDIR, "names a directory"),
        ("file/x.pt", errno.ENOTDIR, "is not a directory"),
        ("fifo", errno.EEXIST, "not a regular file"),
        ("/dev/null", errno.EEXIST, "not a regular file"),
        ("round.pt", errno.ELOOP, "Too many levels"),
        ("x" * 256, errno.ENAMETOOLONG, "File name too long"),
        ("to-nowhere.pt", errno.ENOENT, "Parent directory .*gone does not exist"),
    ],
)
def test_what_cannot_be_written_is_an_error_of_the_call(
    name: str, number: int, words: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "round.pt").symlink_to("round.pt")
    (tmp_path / "to-nowhere.pt").symlink_to(tmp_path / "gone/x.pt")
    with pytest.raises(errors.StorageError, match=f"(?s){words}.*Nothing was changed") as caught:
        noether_writer.save(state(), f"{tmp_path}/{name}" if name[0] != "/" else name)
    assert caught.value.errno == number
    noether_writer.wait(0)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", [b"\xff.pt", "half \udc80.pt", "a\0b", ".pt", 7])
def test_an_invalid_path_is_refused(path: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    where = path if not isinstance(path, str | bytes) else os.path.join(type(path)(), path)
    with pytest.raises(errors.RefusedName):
        noether_writer.save(state(), where)


def test_what_torch_cannot_pickle_is_torchs_error(daemon: RunningDaemon, tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "x.pt")
    with pytest.raises(AttributeError, match="local object"):
        noether_writer.save({"f": lambda: None}, tmp_path / "x.pt")
    assert value_of(tmp_path / "x.pt") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["theirs/x.pt", "mine/locked.pt"])
def test_a_permission_that_lacks_is_an_error_of_the_call(name: str, short_directory: Path) -> None:
    short_directory.chmod(0o755)
    for folder, owner in (("theirs", 0), ("mine", 65534)):
        (short_directory / folder).mkdir()
        os.chown(short_directory / folder, owner, owner)
    locked = short_directory / "mine/locked.pt"
    locked.write_bytes(b"kept")
    locked.chmod(0o444)
    program = """
        os.setgid(65534); os.setuid(65534)
        try:
            noether_writer.save({}, sys.argv[1])
        except noether_writer.NoetherWriterError as error:
            print(type(error).__name__, error.errno)
    """
    process = in_a_process(program, short_directory / name)
    assert process.communicate()[0].split() == ["StorageError", str(errno.EACCES)]
    assert locked.read_bytes() == b"kept"


# Modes


def test_modes_are_the_umasks_or_those_of_the_file_before(daemon: RunningDaemon, tmp_path: Path) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    for mask in (0o027, 0o002):
        before = os.umask(mask)
        try:
            noether_writer.save(state(), tmp_path / f"{mask}.pt").wait(60)
        finally:
            os.umask(before)
        assert mode(f"{mask}.pt") == 0o666 & ~mask
    (tmp_path / "secret.pt").touch(0o600)
    noether_writer.save(state(), tmp_path / "secret.pt").wait(60)
    assert mode("secret.pt") == 0o600


# Daemons and trainers that die

POINTS = ["save.accepted", *(f"checkpoint.{point}" for point in ("created", "chunk", "written", "synced"))]
POINTS += ["checkpoint.renamed", "checkpoint.durable"]


@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_that_dies_at_any_point_loses_nothing(
    point: str, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), f"{point}=kill@1", monkeypatch)
    torch.save(state(1), tmp_path / "x.pt")
    ticket = noether_writer.save(state(2), tmp_path / "x.pt")
    assert daemon.process.wait(60) == -signal.SIGKILL
    assert value_of(tmp_path / "x.pt") in (1, 2)
    # The client starts the next one.
    ticket.wait(60)
    assert value_of(tmp_path / "x.pt") == 2
    # What the dead one had begun has gone, too.
    assert os.listdir(tmp_path) == ["x.pt"]
    end_daemon()


SAVES_AND_DIES = """
    tickets = [noether_writer.save({"model": {"weight": torch.full((1000,), i)}}, sys.argv[1]) for i in range(4)]
    session = noether_writer._files._known_session()
    while not all(ticket.accepted for ticket in tickets):
        session.wait(session.core.generation, 0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_accepted_files_survive_their_trainer(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)
    assert in_a_process(SAVES_AND_DIES, tmp_path / "x.pt").wait(60) == -signal.SIGKILL
    until(lambda: (tmp_path / "x.pt").exists() and value_of(tmp_path / "x.pt") == 3)
    assert daemon.stop() == 0


def test_accepted_files_survive_the_daemon_and_the_trainer(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a service manager that keeps descriptors: the first daemon writes nothing, and dies after the trainer."""
    manager = Manager(DAEMON, short_directory / "s", store=True, log=short_directory / "log")
    try:
        manager.ask("start", lives=["checkpoint.created=hang"])
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
        assert in_a_process(SAVES_AND_DIES, tmp_path / "x.pt").wait(60) == -signal.SIGKILL
        assert len(manager.ask("state")["kept"]) == 4
        manager.ask("kill")
        until(lambda: (tmp_path / "x.pt").exists() and value_of(tmp_path / "x.pt") == 3)
        until(lambda: manager.ask("state")["kept"] == [])
        assert manager.ask("stop") == 0
    finally:
        manager.close()


# Order


def test_the_last_of_200_saves_of_two_processes_counts(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is held up by storage, so that all others wait in line."""
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)
    program = """
        tickets = []
        for line in sys.stdin:
            ticket = noether_writer.save({"model": {"weight": torch.full((10,), int(line))}}, sys.argv[1])
            session = noether_writer._files._known_session()
            while not ticket.accepted:
                session.wait(session.core.generation, 0.05)
            print(line, flush=True)
    """
    trainers = [in_a_process(program, tmp_path / "x.pt") for _ in range(2)]
    for number in range(200):
        trainer = trainers[number % 2]
        tell(trainer, str(number))
        while line_of(trainer) != str(number):
            pass
    for trainer in trainers:
        trainer.communicate()
        assert trainer.returncode == 0
    assert value_of(tmp_path / "x.pt") == 199
    assert daemon.stop() == 0


def test_a_slow_save_does_not_land_over_a_quick_one_that_came_after_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    slow = {f"layer{i}": torch.zeros(10) for i in range(3000)} | state(1)
    for _ in range(5):
        first = noether_writer.save(slow, tmp_path / "x.pt", snapshot="overlap")
        noether_writer.save(state(2), tmp_path / "x.pt").wait(60)
        first.wait(60)
        assert value_of(tmp_path / "x.pt") == 2


def test_one_path_does_not_wait_for_another(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)
    first = noether_writer.save(state(1), tmp_path / "first.pt")
    until(lambda: first.stalled)
    noether_writer.save(state(2), tmp_path / "second.pt").wait(60)
    first.wait(60)
    end_session()
    assert daemon.stop() == 0


# Removals


def test_a_removal_comes_after_the_saves_before_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    slow = {f"layer{i}": torch.zeros(10) for i in range(3000)}
    for obj in (state(), slow):
        ticket = noether_writer.save(obj, tmp_path / "x.pt", snapshot="overlap")
        removal = noether_writer.remove(tmp_path / "x.pt")
        assert removal.path == str(tmp_path / "x.pt")
        noether_writer.wait(60)
        assert ticket.durable and removal.durable and not (tmp_path / "x.pt").exists()
    noether_writer.save(slow, tmp_path / "x.pt")
    noether_writer.remove(tmp_path / "x.pt")
    noether_writer.save(state(3), tmp_path / "x.pt")
    noether_writer.wait(60)
    assert value_of(tmp_path / "x.pt") == 3
    # What is not there is removed.
    noether_writer.remove(tmp_path / "never.pt").wait(60)


def test_a_directory_goes_with_all_that_was_saved_below_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    folder, outside = tmp_path / "checkpoint-1", tmp_path / "outside"
    (folder / "deep/er").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (folder / "link").symlink_to(outside)
    os.mkdir(os.fsencode(folder) + b"/not utf-8 \xff")
    for i in range(20):
        noether_writer.save(state(i), folder / f"deep/er/{i}.pt")
    with pytest.raises(errors.StorageError, match="recursive=True"):
        noether_writer.remove(folder)
    noether_writer.remove(folder, recursive=True).wait(60)
    assert not folder.exists() and (outside / "kept").read_text() == "kept"
    # After a link, `..` is not the directory that the link is in.
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "to-b").symlink_to("a/b")
    for name in ("x", "a/x"):
        (tmp_path / name).write_text(name)
    noether_writer.remove(f"{tmp_path}/to-b/../x").wait(60)
    assert (tmp_path / "x").exists() and not (tmp_path / "a/x").exists()
    with pytest.raises(errors.StorageError, match="names a directory"):
        noether_writer.remove(f"{tmp_path}/to-b/..", recursive=True)
    # A link itself goes.
    noether_writer.remove(tmp_path / "link", recursive=True).wait(60)
    assert not os.path.lexists(tmp_path / "link") and (outside / "kept").exists()


def test_a_removal_waits_for_what_takes_its_place(daemon: RunningDaemon, tmp_path: Path) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    noether_writer.save(state(1), old).wait()
    daemon.hold()
    noether_writer.save(state(2), new)
    noether_writer.remove(old, after=[new])
    # Neither was heard of; the next daemon gets both.
    daemon.crash()
    noether_writer.wait()
    assert value_of(new) == 2 and not old.exists()


def test_a_removal_is_not_done_if_what_takes_its_place_fails(daemon: RunningDaemon, tmp_path: Path) -> None:
    old, folder = tmp_path / "old.pt", tmp_path / "folder"
    folder.mkdir()
    noether_writer.save(state(1), old).wait()
    daemon.hold()
    ticket = noether_writer.save(state(2), folder / "new.pt")
    # A directory that was to have taken its name counts too, with all below it.
    removal = noether_writer.remove(old, after=[folder])
    folder.rmdir()
    folder.write_text("in its place")
    daemon.process.send_signal(signal.SIGCONT)
    with pytest.raises(errors.StorageError, match="Not a directory"):
        ticket.wait()
    with pytest.raises(errors.StorageError, match=r"old\.pt, which stays, since .*folder/new\.pt is missing"):
        removal.wait()
    assert value_of(old) == 1
    # The reason is gone: it is asked for anew.
    folder.unlink()
    folder.mkdir()
    noether_writer.save(state(3), folder / "new.pt")
    noether_writer.remove(old, after=[folder])
    noether_writer.wait()
    assert value_of(folder / "new.pt") == 3 and not old.exists()


def test_the_next_daemon_finishes_a_removal(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "path.remove=kill@1", monkeypatch)
    noether_writer.save(state(), tmp_path / "x.pt").wait(60)
    ticket = noether_writer.remove(tmp_path / "x.pt")
    assert daemon.process.wait(60) == -signal.SIGKILL
    ticket.wait(60)
    assert os.listdir(tmp_path) == []
    end_daemon()


# Loading


def test_load_waits_for_what_this_process_has_saved(daemon: RunningDaemon, tmp_path: Path) -> None:
    noether_writer.save(state(1), tmp_path / "x.pt").wait(60)
    daemon.hold()
    noether_writer.save(state(2), tmp_path / "x.pt")
    began = threading.Event()
    found: list[float] = []

    def load() -> None:
        began.set()
        found.append(noether_writer.load(tmp_path / "x.pt", map_location="cpu", mmap=True)["step"])

    thread = threading.Thread(target=load)
    thread.start()
    began.wait()
    daemon.process.send_signal(signal.SIGCONT)
    thread.join(60)
    assert found == [2]


def test_load_waits_for_another_process(short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)
    torch.save(state(1), tmp_path / "x.pt")
    program = """
        ticket = noether_writer.save({"model": {"weight": torch.full((10,), 2.0)}}, sys.argv[1])
        session = noether_writer._files._known_session()
        while not ticket.accepted:
            session.wait(session.core.generation, 0.05)
        print("accepted", flush=True)
        sys.stdin.readline()
    """
    trainer = in_a_process(program, tmp_path / "x.pt")
    assert line_of(trainer) == "accepted"
    (tmp_path / "link").symlink_to(tmp_path)
    # Without a session of this process.
    assert noether_writer.load(tmp_path / "link/x.pt")["model"]["weight"][0] == 2
    tell(trainer)
    assert trainer.wait(60) == 0
    assert daemon.stop() == 0


def test_load_raises_a_failed_save_once_and_names_the_older_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    folder, moved = tmp_path / "folder", tmp_path / "moved"
    folder.mkdir()
    torch.save(state(1), folder / "x.pt")
    noether_writer.save(state(), tmp_path / "first.pt").wait(60)
    daemon.hold()
    ticket = noether_writer.save(state(2), folder / "x.pt")
    folder.rename(moved)
    daemon.process.send_signal(signal.SIGCONT)
    until(lambda: ticket.error is not None)
    moved.rename(folder)
    with pytest.raises(
        errors.StorageError, match=r"directory was removed.*x.pt holds what was saved before it"
    ) as caught:
        noether_writer.load(folder / "x.pt")
    assert caught.value.errno == errno.ENOENT and caught.value.filename == str(folder / "x.pt")
    assert noether_writer.load(folder / "x.pt")["step"] == 1
    noether_writer.wait(60)
    # Another process, which nobody has told.
    program = """
        for _ in range(2):
            try:
                print(noether_writer.load(sys.argv[1])["step"])
            except noether_writer.NoetherWriterError as error:
                print(type(error).__name__, "holds what was saved before it" in str(error))
    """
    assert in_a_process(program, folder / "x.pt").communicate()[0].splitlines() == ["StorageError True", "1"]
    # A save that succeeds takes the failure back.
    noether_writer.save(state(3), folder / "x.pt").wait(60)
    assert in_a_process(program, folder / "x.pt").communicate()[0].splitlines() == ["3", "3"]


def test_load_without_a_daemon_reads_the_file_and_starts_none(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "none/socket"))
    torch.save(state(1), tmp_path / "x.pt")
    assert noether_writer.load(tmp_path / "x.pt", weights_only=True)["step"] == 1
    with open(tmp_path / "x.pt", "rb") as file:
        assert noether_writer.load(file)["step"] == 1
    with pytest.raises(FileNotFoundError):
        noether_writer.load(tmp_path / "missing/x.pt")
    noether_writer.wait(0)
    assert os.listdir(short_directory) == []


def test_load_of_what_storage_refuses_says_so(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC", monkeypatch)
    program = """
        ticket = noether_writer.save({}, sys.argv[1])
        session = noether_writer._files._known_session()
        while not ticket.stalled:
            session.wait(session.core.generation, 0.05)
        print("stalled", flush=True)
        sys.stdin.readline()
        os._exit(0)
    """
    trainer = in_a_process(program, tmp_path / "x.pt")
    assert line_of(trainer) == "stalled"
    monkeypatch.setattr(_files, "STALL_SECONDS", 0.1)
    with pytest.raises(errors.CheckpointStalled, match=r"x.pt is not durable yet: .*fault at checkpoint.created"):
        noether_writer.load(tmp_path / "x.pt")
    tell(trainer)
    trainer.wait(60)
    daemon.process.kill()
    daemon.process.wait()


# Directories and disks that go


def test_a_directory_that_is_removed_after_the_call_fails_aloud(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    noether_writer.save(state(), tmp_path / "first.pt").wait(60)
    daemon.hold()
    ticket = noether_writer.save(state(), tmp_path / "folder/x.pt")
    (tmp_path / "folder").rmdir()
    daemon.process.send_signal(signal.SIGCONT)
    with pytest.raises(errors.StorageError, match=r"folder/x.pt, whose directory was removed after the save had begun"):
        ticket.wait(60)
    assert not ticket.durable and sorted(os.listdir(tmp_path)) == ["first.pt"]


def test_a_link_that_takes_the_place_of_a_directory_leads_nowhere(daemon: RunningDaemon, tmp_path: Path) -> None:
    for name in ("folder", "elsewhere"):
        (tmp_path / name).mkdir()
    noether_writer.save(state(), tmp_path / "first.pt").wait(60)
    daemon.hold()
    ticket = noether_writer.save(state(), tmp_path / "folder/x.pt")
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").symlink_to("elsewhere")
    daemon.process.send_signal(signal.SIGCONT)
    with pytest.raises(errors.StorageError):
        ticket.wait(60)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_full_disk_is_waited_for_and_others_go_on(daemon: RunningDaemon, disk: Disk, tmp_path: Path) -> None:
    filler = disk.path / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    ticket = noether_writer.save(state(2, 1_000_000), disk.path / "x.pt")
    until(lambda: ticket.stalled)
    assert "No space left on device" in str(ticket.stalled)
    noether_writer.save(state(), tmp_path / "x.pt").wait(60)
    with pytest.raises(errors.CheckpointStalled):
        ticket.wait(0)
    filler.unlink()
    noether_writer.wait(60)
    assert ticket.durable and value_of(disk.path / "x.pt") == 2


def test_a_file_system_that_is_unmounted_is_waited_for(daemon: RunningDaemon, disk: Disk) -> None:
    noether_writer.save(state(1), disk.path / "first.pt").wait(60)
    until(lambda: not any(str(disk.path) in path for path in descriptors(daemon.process.pid)))
    daemon.hold()
    tickets = [noether_writer.save(state(2), disk.path / "x.pt")]
    (disk.path / "deep").mkdir()
    tickets.append(noether_writer.save(state(3), disk.path / "deep/y.pt"))
    until(disk.unmounts)
    daemon.process.send_signal(signal.SIGCONT)
    for ticket in tickets:
        until(lambda ticket=ticket: ticket.stalled)  # type: ignore[misc]
        assert "gone with its file system" in str(ticket.stalled)
    assert os.listdir(disk.path) == []
    disk.mount()
    noether_writer.wait(60)
    assert value_of(disk.path / "x.pt") == 2 and value_of(disk.path / "deep/y.pt") == 3


# Processes: forks, interrupts, the end


def test_a_forked_child_has_saves_of_its_own(daemon: RunningDaemon, tmp_path: Path) -> None:
    ticket = noether_writer.save(state(1), tmp_path / "parent.pt")

    def child() -> None:
        with pytest.raises(errors.DaemonUnavailable, match="parent"):
            ticket.wait(1)
        noether_writer.save(state(2), tmp_path / "child.pt").wait(60)
        noether_writer.save(state(3), tmp_path / "child-at-exit.pt")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    ticket.wait(60)
    assert [value_of(tmp_path / f"{name}.pt") for name in ("parent", "child", "child-at-exit")] == [1, 2, 3]


def test_the_end_of_a_process_waits_for_its_files(daemon: RunningDaemon, tmp_path: Path) -> None:
    program = """
        import atexit
        late = {"model": {"weight": torch.full((10,), 2.0)}}
        atexit.register(lambda: noether_writer.save(late, sys.argv[1] + "/late.pt"))
        noether_writer.save({"model": {"weight": torch.full((1_000_000,), 1.0)}}, sys.argv[1] + "/x.pt")
    """
    assert in_a_process(program, tmp_path).wait(60) == 0
    assert value_of(tmp_path / "x.pt") == 1 and value_of(tmp_path / "late.pt") == 2


def test_the_end_of_a_process_says_what_is_not_safe(daemon: RunningDaemon, tmp_path: Path) -> None:
    program = """
        noether_writer.save({}, sys.argv[1] + "/first.pt").wait()
        print("ready", flush=True)
        sys.stdin.readline()
        noether_writer.save({}, sys.argv[1] + "/x.pt")
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", "import sys, noether_writer\n" + textwrap.dedent(program), tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NOETHER_WRITER_EXIT_TIMEOUT": "0.2"},
    )
    assert line_of(trainer) == "ready"
    daemon.hold()
    tell(trainer)
    words = trainer.communicate()[1]
    daemon.process.send_signal(signal.SIGCONT)
    assert f"the files that this process saves: lost unless the daemon still takes it: {tmp_path}/x.pt" in words


def test_an_interrupt_ends_the_wait_and_not_the_save(daemon: RunningDaemon, tmp_path: Path) -> None:
    program = """
        noether_writer.save({}, sys.argv[1] + "/first.pt").wait()
        print("ready", flush=True)
        sys.stdin.readline()
        noether_writer.save({"model": {"weight": torch.full((10,), 2.0)}}, sys.argv[1] + "/x.pt")
        try:
            print("waits", flush=True)
            noether_writer.wait()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    trainer = in_a_process(program, tmp_path)
    assert line_of(trainer) == "ready"
    daemon.hold()
    tell(trainer)
    assert line_of(trainer) == "waits"
    trainer.send_signal(signal.SIGINT)
    assert line_of(trainer) == "interrupted"
    daemon.process.send_signal(signal.SIGCONT)
    assert trainer.wait(60) == 0
    assert value_of(tmp_path / "x.pt") == 2


def test_a_signal_handler_saves_during_a_save(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Whatever it interrupts, also the making of the session, both arrive."""
    program = """
        count = 0
        def handler(*_):
            global count
            count += 1
            noether_writer.save({"model": {"weight": torch.full((10,), float(count))}}, f"{sys.argv[1]}/h{count}.pt")
            if count < 40:
                signal.setitimer(signal.ITIMER_REAL, 0.0005)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        for i in range(30):
            noether_writer.save({"model": {"weight": torch.full((10,), float(i))}}, f"{sys.argv[1]}/{i}.pt")
        noether_writer.wait(60)
        print(count)
    """
    trainer = in_a_process(program, tmp_path)
    count = int(trainer.communicate()[0])
    assert trainer.returncode == 0
    for name in [str(i) for i in range(30)] + [f"h{i}" for i in range(1, count + 1)]:
        assert value_of(tmp_path / f"{name}.pt") == float(name.lstrip("h"))


def test_many_threads(daemon: RunningDaemon, tmp_path: Path) -> None:
    def work(number: int) -> None:
        for i in range(10):
            noether_writer.save(state(number * 10 + i), tmp_path / f"{number}-{i}.pt")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    noether_writer.wait(60)
    for number in range(8):
        for i in range(10):
            assert value_of(tmp_path / f"{number}-{i}.pt") == number * 10 + i


# Directories that get their name when they are whole


def test_a_directory_gets_its_name_when_all_in_it_is_durable(daemon: RunningDaemon, tmp_path: Path) -> None:
    partial, final = tmp_path / ".step-1.partial", tmp_path / "step-1"
    (partial / "deep").mkdir(parents=True)
    slow = {f"layer{i}": torch.zeros(10) for i in range(3000)}
    noether_writer.save(slow, partial / "slow.pt", snapshot="overlap")
    for i in range(6):
        _files.save_bytes(bytes([i]) * 1000, partial / f"deep/{i}.distcp")
    ticket = _files.commit(partial, final)
    assert ticket.path == str(final)
    later = noether_writer.save(state(7), tmp_path / "later.pt")
    ticket.wait(60)
    later.wait(60)
    assert sorted(os.listdir(tmp_path)) == ["later.pt", "step-1"]
    assert sorted(os.listdir(final)) == ["deep", "slow.pt"] and len(os.listdir(final / "deep")) == 6
    # The name is taken.
    partial.mkdir()
    with pytest.raises(errors.StorageError, match="File exists") as caught:
        _files.commit(partial, final).wait(60)
    assert caught.value.errno == errno.EEXIST and (final / "slow.pt").exists() and partial.is_dir()
    # One in the place of the other.
    _files.save_bytes(b"new", partial / "new.distcp")
    _files.commit(partial, final, replace=True).wait(60)
    assert os.listdir(final) == ["new.distcp"] and not partial.exists()
    with pytest.raises(errors.StorageError, match="no directory"):
        _files.commit(partial, final, replace=True).wait(60)


def test_a_commit_with_a_missing_file_does_not_rename_the_directory(daemon: RunningDaemon, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    (partial / "gone").mkdir(parents=True)
    noether_writer.save(state(), tmp_path / "first.pt").wait(60)
    daemon.hold()
    lost = noether_writer.save(state(), partial / "gone/x.pt")
    _files.save_bytes(b"there", partial / "there")
    ticket = _files.commit(partial, tmp_path / "final")
    (partial / "gone").rmdir()
    daemon.process.send_signal(signal.SIGCONT)
    with pytest.raises(errors.StorageError, match=r"since .*gone/x.pt is missing: .*directory was removed"):
        ticket.wait(60)
    assert lost.error is not None and (partial / "there").exists() and not (tmp_path / "final").exists()
    with pytest.raises(errors.StorageError, match="directory was removed"):
        noether_writer.wait(60)
    # Saved anew, it counts.
    (partial / "gone").mkdir()
    noether_writer.save(state(), partial / "gone/x.pt")
    with pytest.raises(errors.StorageError, match=r"partial/never is not there"):
        _files.commit(partial, tmp_path / "final", files=["never"]).wait(60)
    _files.commit(partial, tmp_path / "final").wait(60)
    assert (tmp_path / "final/gone/x.pt").exists()


@pytest.mark.parametrize("point", ["marked", "renamed", "durable"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_daemon_that_dies_in_a_commit_leaves_one_of_both(
    point: str, replace: bool, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if point == "durable" and not replace:
        pytest.skip("nothing is left to do then")
    daemon = faulty_daemon(str(short_directory / "s"), f"commit.{point}=kill@1", monkeypatch)
    partial, final = tmp_path / "partial", tmp_path / "final"
    partial.mkdir()
    if replace:
        final.mkdir()
        (final / "old").write_bytes(b"old")
    _files.save_bytes(b"new", partial / "new")
    ticket = _files.commit(partial, final, replace=replace)
    assert daemon.process.wait(60) == -signal.SIGKILL
    assert not final.exists() or os.listdir(final) in (["old"], ["new"])
    ticket.wait(60)
    assert os.listdir(final) == ["new"] and os.listdir(tmp_path) == ["final"]
    end_daemon()


# The daemon's side


def opened(daemon: RunningDaemon) -> Raw:
    client = Raw(daemon.socket)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    client.send(frames.pack(frames.OPEN_RUN, json.dumps(message_of()).encode(), 1, 1), [root])
    os.close(root)
    assert client.receive().json()["run_directory"] == "/"
    return client


def message_of(**members: Any) -> dict[str, Any]:
    return {"output_root": "/", "run_id": "files", "layout": "files", "session": SESSION, **members}


def events(client: Raw, type_: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    client.send(frames.pack_json(type_, message))
    found: list[dict[str, Any]] = []
    while not found or found[-1]["event"] != "released":
        found.append(client.receive_type(frames.CHECKPOINT_EVENT).json())
    return found


def test_refusals_on_a_files_connection(daemon: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(daemon.socket)
    assert "files" in client.welcome["capabilities"]
    # Without the descriptor; with a layout that nobody knows; without a session of files.
    assert client.ask(frames.OPEN_RUN, message_of())["code"] == "bad-path"
    assert client.ask(frames.OPEN_RUN, message_of(layout="folders"))["code"] == "bad-layout"
    assert client.ask(frames.WAIT_PATH, {"path": "/x"})["code"] == "not-open"
    [failed, _] = events(client, frames.REMOVE, {"sequence": 1, "path": "/x"})
    assert failed["error"]["code"] == "not-open" and failed["sequence"] == 1
    client.close()
    client = opened(daemon)
    assert client.ask(frames.OPEN_RUN, message_of())["code"] == "already-open"
    assert client.ask(frames.VALUES, {"key": "a", "from": 0, "limit": 1})["code"] == "not-open"
    for path in ("x", "/a/../x", "/a/./x", "/" + "x" * 256, "/x\0", "/" + "x/" * 2100, "/"):
        [failed, _] = events(client, frames.REMOVE, {"sequence": 1, "path": path})
        assert failed["error"]["code"] == "bad-path", path
    [failed, _] = events(client, frames.COMMIT, {"sequence": 1, "from": "/a", "to": "/a/b"})
    assert failed["error"]["code"] == "bad-path"
    [failed, _] = events(client, frames.REMOVE, {"sequence": 0, "path": "/x"})
    assert failed["error"]["code"] == "bad-sequence"
    # A number is one's own.
    path = str(tmp_path / "x")
    assert [e["event"] for e in events(client, frames.REMOVE, {"sequence": 1, "path": path})][-2:] == [
        "durable",
        "released",
    ]
    [failed, _] = events(client, frames.REMOVE, {"sequence": 1, "path": path})
    assert failed["error"]["code"] == "bad-sequence"
    # A save of a run's target.
    [failed, _] = client.save(save_payload([100], 128, [target()], 2), [memfd()])
    assert failed["error"]["code"] == "bad-layout"
    client.close()


def test_the_command_line_counts_files(short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CLI, *words], capture_output=True, text=True)

    assert "files" not in cli("status").stdout
    ticket = noether_writer.save(state(), tmp_path / "x.pt")
    until(lambda: ticket.stalled)
    shown = cli("status")
    assert "1 in flight" in shown.stdout and "of 1 process" in shown.stdout and "STALLED" in shown.stdout
    assert "runs         0 live, 0 ended" in shown.stdout
    assert cli("wait").stdout == "all durable\n" and ticket.durable
    assert cli("drain").stdout == "all durable\n"
    status = json.loads(cli("status", "--json").stdout)
    assert status["runs"] == [] and status["files"]["checkpoints"]["durable"] == 1
    assert cli("top", "--once").returncode in (0, 64)
    end_session()
    assert daemon.stop() == 0


def test_one_save_too_many_in_flight_is_answered_busy(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "path.remove=hang", monkeypatch)
    client = opened(daemon)
    limit = client.welcome["limits"]["files_in_flight_per_session"]
    for number in range(1, limit + 2):
        client.send(frames.pack_json(frames.REMOVE, {"sequence": number, "path": f"{tmp_path}/{number}"}))
    found = [client.receive_type(frames.CHECKPOINT_EVENT).json() for _ in range(limit + 1)]
    assert [event["event"] for event in found] == ["accepted"] * limit + ["failed"]
    assert (found[-1]["sequence"], found[-1]["error"]["code"]) == (limit + 1, "busy")
    # Another connection of the session is answered, for what is on its way and for what is not.
    other = opened(daemon)
    assert other.ask(frames.WAIT_PATH, {"path": "/elsewhere", "timeout_s": 60})["done"]
    answer = other.ask(frames.WAIT_PATH, {"path": f"{tmp_path}/1", "timeout_s": 0})
    assert (answer["done"], answer["pending"]) == (False, 1)
    daemon.process.kill()
    daemon.process.wait()


def test_nothing_of_an_ended_process_is_kept(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Its root directory may be a container's, which could not go as long as somebody holds it."""
    program = """
        noether_writer.save({}, sys.argv[1])
        print("saved", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    trainer = in_a_process(program, tmp_path / "x.pt")
    assert line_of(trainer) == "saved"
    assert "/" in descriptors(daemon.process.pid)
    tell(trainer)
    trainer.wait(60)
    until(lambda: (tmp_path / "x.pt").exists() and "/" not in descriptors(daemon.process.pid))
    noether_writer.load(tmp_path / "x.pt")
    until(lambda: "/" not in descriptors(daemon.process.pid))
