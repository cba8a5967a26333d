# SPDX-License-Identifier: Apache-2.0
"""What a power loss would leave, at each moment at which the daemon promises something.

Nobody pulls a plug: Tests/Faults/recording.c notes down what the daemon does to files and what it sends, and `Disk`
plays it again with what is safe kept apart from what is not. A write is safe when a sync that began behind it has
returned, a name when its directory's has. What was under way may be there or not; both must be good.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import RunningDaemon, end_all, sessions
from harness import until
from noether_writer import frames

FAULTS = Path(__file__).parents[1] / "Faults"
ROWS = 30


class File:
    def __init__(self) -> None:
        self.content = bytearray()
        self.syncing = b""
        self.safe = b""
        # A sync has failed: the kernel may have dropped the pages and forgotten it; a later one says nothing of them.
        self.is_lost = False


class Disk:
    """Files by inode; names by (directory's inode, name): as they are, and as they are safe."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[tuple[int, str], int] = {}
        self.syncing: dict[int, dict[tuple[int, str], int]] = {}
        self.safe_names: dict[tuple[int, str], int] = {}
        self.allocated: set[int] = set()
        self.problems: list[str] = []

    def apply(self, words: list[str]) -> None:
        number = int(words[1])
        match words[0]:
            case "create":
                self.files[number] = File()
                self.names[int(words[2]), words[3]] = number
            case "write":
                file, offset, data = self.file(number), int(words[2]), bytes.fromhex(words[3])
                if not file.content and number not in self.allocated and number in self.names.values():
                    self.problems.append(f"inode {number} is written before its room is reserved")
                file.content.extend(bytes(max(0, offset + len(data) - len(file.content))))
                file.content[offset : offset + len(data)] = data
            case "truncate":
                file, length = self.file(number), int(words[2])
                del file.content[length:]
                file.content.extend(bytes(length - len(file.content)))
            case "allocate":
                self.allocated.add(number)
            case "syncing":
                self.file(number).syncing = bytes(self.file(number).content)
                self.syncing[number] = {name: to for name, to in self.names.items() if name[0] == number}
            case "synced":
                file = self.file(number)
                if not file.is_lost:
                    file.safe = file.syncing
                self.safe_names = {n: to for n, to in self.safe_names.items() if n[0] != number} | self.syncing[number]
            case "unsynced":
                self.file(number).is_lost = True
            case "renaming":
                file = self.files[self.names[number, words[2]]]
                if file.safe != file.content:
                    self.problems.append(f"{words[3]} is given to a file that is not safe")
            case "renamed":
                self.names[number, words[3]] = self.names.pop((number, words[2]))
            case "unlink":
                self.names.pop((number, words[2]), None)

    def file(self, inode: int) -> File:
        return self.files.setdefault(inode, File())

    def views(self, directory: int, name: str, *, after_power_loss: bool = True) -> list[bytes]:
        """What a name may stand for: where what was not synced of the directory is there, and where it is not."""
        found = []
        for names in (self.names, self.safe_names) if after_power_loss else (self.names,):
            inode = names.get((directory, name))
            file = self.files.get(inode) if inode is not None else None
            found.append(b"" if file is None else file.safe if after_power_loss else bytes(file.content))
        return found


def journaled(data: bytes) -> set[int]:
    """Updates of a journal's rows, up to the first record that is not whole (JournalFormat.swift)."""
    found: set[int] = set()
    at = 16
    while len(data) >= at + 9:
        length, checksum, kind = struct.unpack_from("<IIB", data, at)
        body = data[at + 9 : at + 9 + length]
        if len(body) < length or zlib.crc32(bytes([kind]) + body) != checksum:
            break
        if kind == 3:
            found.add(struct.unpack_from("<Qq", body)[1])
        at += 9 + length
    return found


def entered(data: bytes) -> set[int]:
    return set(torch.load(io.BytesIO(data))["loss"]) if data else set()


class Promises:
    """Each thing that the daemon says to its trainer, held against the disk of that moment."""

    def __init__(self, root: Path) -> None:
        self.disk = Disk()
        self.root, self.run = (path.stat().st_ino for path in (root, root / "r"))
        self.tracker, self.checkpoints = ((root / "r" / n).stat().st_ino for n in ("tracker", "checkpoints"))
        self.decoders: dict[str, frames.FrameDecoder] = {}
        self.kept: dict[str, int] = {"durable": 0, "log durable": 0, "acked": 0, "finished": 0}

    def play(self, lines: list[str]) -> None:
        for line in lines:
            words = line.split()
            if words[0] != "send":
                self.disk.apply(words)
                continue
            decoder = self.decoders.setdefault(words[1], frames.FrameDecoder())
            for frame in decoder.feed(bytes.fromhex(words[2])):
                self.check(frame)
        assert not self.disk.problems, self.disk.problems

    def check(self, frame: frames.Frame) -> None:
        if frame.type == frames.LOG_ACK:
            _, update, durable = struct.unpack("<Qqq", frame.payload)
            if update > 0:
                self.kept["acked"] = update
                self.log_holds(update, after_power_loss=False)
            if durable > 0:
                self.kept["log durable"] = durable
                self.log_holds(durable, after_power_loss=True)
        elif frame.type == frames.CHECKPOINT_EVENT and frame.json()["event"] == "durable":
            self.kept["durable"] += 1
            self.directories_hold(self.checkpoints, "checkpoints")
            name = Path(frame.json()["path"]).name
            for data in self.disk.views(self.checkpoints, name):
                assert data, f"{name} is said to be durable, and a power loss takes it"
                assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
        elif frame.type == frames.FINISHED:
            self.kept["finished"] += 1
            for data in self.disk.views(self.tracker, "entries.th"):
                assert entered(data) == set(range(1, ROWS + 1))

    def log_holds(self, update: int, *, after_power_loss: bool) -> None:
        if after_power_loss:
            self.directories_hold(self.tracker, "tracker")
        journals, files = (
            self.disk.views(self.tracker, name, after_power_loss=after_power_loss)
            for name in ("entries.journal", "entries.th")
        )
        for journal in journals:
            for file in files:
                found = journaled(journal) | entered(file)
                assert found >= set(range(1, update + 1)), f"update {update} is acknowledged, and there is {found}"

    def directories_hold(self, inode: int, name: str) -> None:
        assert self.disk.safe_names.get((self.run, name)) == inode, f"{name} itself is not durable"
        assert self.disk.safe_names.get((self.root, "r")) == self.run, "the run's directory is not durable"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("libraries")
    for name in ("recording", "failing"):
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        subprocess.run(["clang", *options, FAULTS / f"{name}.c", "-o", folder / f"{name}.so"], check=True)
    # What fails has not been done: the recording is before it.
    return f"{folder}/recording.so:{folder}/failing.so"


@pytest.fixture
def recorded(
    libraries: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """What a daemon does, with a fault where the test has one."""
    recording = short_directory / "recording"
    fault = {"FAILING": request.param} if request.param else {}
    # Each directory on the way is synced: a short way, so that the numbers of failures are those of the run's own.
    monkeypatch.setenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY", str(short_directory / "state"))
    given = {"LD_PRELOAD": libraries, "RECORDING": str(recording), **fault}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    daemon = RunningDaemon(str(short_directory / "s"))
    for name in given:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
    yield recording
    end_all(sessions())
    assert daemon.stop() == 0


FAILURES = ["", *(f"{call}:5:{n}" for call, last in (("fdatasync", 8), ("fsync", 12)) for n in range(1, last))]


@pytest.mark.parametrize("recorded", FAILURES, indirect=True, ids=lambda fault: fault or "nothing fails")
def test_no_promise_is_made_before_it_is_kept(recorded: Path, short_directory: Path) -> None:
    """Also where the n-th fdatasync or fsync fails with EIO: what was written before it is never counted on."""
    root = short_directory / "out"
    root.mkdir()
    deadline = time.monotonic() + 60
    while True:
        try:
            run = noether_writer.open_run(root, "r")
            break
        except OSError:
            # Refused, with words, where making the directory durable fails.
            assert time.monotonic() < deadline
    for update in range(1, ROWS + 1):
        run.log({"loss": 1.0 / update}, update=update)
        if update == 10:
            until(lambda update=update: run.log_durable_update == update)
        elif update % 3 == 0:
            run.flush(10)
        if update % 10 == 0:
            weights = {"w": torch.full((2_000,), float(update))}
            run.save_as([noether_writer.Target("net", tag, weights) for tag in (f"U{update}", "latest")])
    run.wait(30)
    run.finish(30)
    until(lambda: not (root / "r/tracker/entries.journal").exists())
    run.close()
    promises = Promises(root)
    promises.play(recorded.read_text().splitlines())
    assert promises.kept == {"durable": 6, "log durable": ROWS, "acked": ROWS, "finished": 1}
    assert os.listdir(root / "r/tracker") == ["entries.th", "summary.yaml"] or len(os.listdir(root / "r/tracker")) == 2


ANY_FILE_FAILURES = ["", *(f"{call}:5:{n}" for call, last in (("fdatasync", 3), ("fsync", 8)) for n in range(1, last))]


@pytest.mark.parametrize("recorded", ANY_FILE_FAILURES, indirect=True, ids=lambda fault: fault or "nothing fails")
def test_a_file_at_any_path_is_durable_with_the_way_to_it(recorded: Path, tmp_path: Path) -> None:
    """The trainer has made the directories a moment ago, and nobody but the daemon makes them durable."""
    folders = [tmp_path, tmp_path / "new", tmp_path / "new/er"]
    folders[-1].mkdir(parents=True)
    inodes = [folder.stat().st_ino for folder in folders]
    for step in range(2):
        noether_writer.save({"w": torch.full((2_000,), float(step))}, folders[-1] / "x.pt")
    noether_writer._files.save_bytes(b"raw", folders[-1] / "raw")
    noether_writer.wait(60)
    disk = Disk()
    disk.names[inodes[0], "new"], disk.names[inodes[1], "er"] = inodes[1:]
    decoders: dict[str, frames.FrameDecoder] = {}
    durable = 0
    for line in recorded.read_text().splitlines():
        words = line.split()
        if words[0] != "send":
            disk.apply(words)
            continue
        for frame in decoders.setdefault(words[1], frames.FrameDecoder()).feed(bytes.fromhex(words[2])):
            if frame.type != frames.CHECKPOINT_EVENT or frame.json()["event"] != "durable":
                continue
            durable += 1
            assert disk.safe_names.get((inodes[0], "new")) == inodes[1]
            assert disk.safe_names.get((inodes[1], "er")) == inodes[2]
            for data in disk.views(inodes[2], Path(frame.json()["path"]).name):
                assert data == b"raw" or zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert durable == 3 and not disk.problems, disk.problems
