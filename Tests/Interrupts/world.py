# SPDX-License-Identifier: Apache-2.0
"""What these tests share: a daemon of their own, what a process holds, what has to be true of a run's files.

A `Record` keeps what was asked of a run. Each save fills all of its tensors with a number of its own, and each value
of the log is a number of its own, so that what came from where can be seen in the files.
"""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import noether_writer
import torch

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]
# Nothing here takes so long: who waits for longer has found a hang.
LIMIT_SECONDS = 15
# Elements of each tensor.
_LENGTH = 16
_numbers = itertools.count(1)
Held = collections.Counter[str]


class Daemon:
    """A daemon on a socket in a directory of its own, on a file system in memory if there is one."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(prefix="nw-", dir=memory if os.access(memory, os.W_OK) else None))
        self.output = self.directory / "out"
        self.output.mkdir()
        self.socket = self.directory / "socket"
        #: For its clients, which start no other one if it is not there.
        self.environment = {
            "NOETHER_WRITER_SOCKET": str(self.socket),
            "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(self.directory / "state"),
            "NOETHER_WRITER_DAEMON": "/nowhere",
        }
        self.start()

    def start(self) -> None:
        with open(self.directory / "daemon.log", "ab") as log:
            self.process = subprocess.Popen(
                [DAEMON, "--socket", str(self.socket)], stderr=log, env=os.environ | self.environment
            )
        until(lambda: self._serves() or self.process.poll() is not None, "the daemon does not listen")

    def _serves(self) -> bool:
        # A socket is there a moment before anybody listens on it.
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def is_dead(self) -> bool:
        """Also in a forked child, which is not its parent."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def start_if_dead(self) -> None:
        if (status := self.process.poll()) is not None:
            print(f"the daemon has ended with {status}:", *self.last_words(), sep="\n  ", flush=True)
            self.socket.unlink(missing_ok=True)
            self.start()

    def last_words(self) -> list[str]:
        return (self.directory / "daemon.log").read_text(errors="replace").splitlines()[-5:]

    def hold(self) -> None:
        """It does nothing from now on, until `release`."""
        self.process.send_signal(signal.SIGSTOP)

    def release(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone, and so is its socket."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def drain(self) -> None:
        """It writes what it has, and ends."""
        if self.process.poll() is None:
            self.release()
            self.process.terminate()
            self.process.wait(LIMIT_SECONDS)

    def end(self) -> None:
        self.drain()
        shutil.rmtree(self.directory, ignore_errors=True)


def until(condition: Callable[[], object], what: str, seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


def descriptors(process: int | str = "self") -> Held:
    """What a process has open, by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            target = os.readlink(f"/proc/{process}/fd/{name}")
        except FileNotFoundError:
            # The listing's own.
            continue
        if "noether-writer-image" in target:
            # Of a durable file: it is to stay.
            continue
        kind = target.split(":")[0] if target.startswith(("socket:", "pipe:")) else target
        kinds["buffer" if "memfd:noether-writer" in kind else kind] += 1
    kinds.pop(f"/proc/{os.getpid() if process == 'self' else process}/fd", None)
    return kinds


def sockets(process: int | str = "self") -> set[str]:
    """The sockets that a process has open, each by its number in the kernel."""
    found = set()
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            target = os.readlink(f"/proc/{process}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def threads() -> Held:
    """This process's threads: Python's by their names, and how many the kernel knows."""
    found = collections.Counter(f"thread {thread.name.rstrip('-0123456789')}" for thread in threading.enumerate())
    found["threads of the kernel"] = len(os.listdir("/proc/self/task"))
    return found


def held() -> Held:
    """Descriptors and threads of this process. Buffers are the pool's, which keeps some."""
    found = descriptors() + threads()
    found.pop("buffer", None)
    return found


def buffers() -> int:
    return descriptors()["buffer"]


def state(number: float, count: int) -> dict[str, torch.Tensor]:
    return {f"w{index}": torch.full((_LENGTH,), number) for index in range(count)}


def numbers_in(file: Path) -> set[float]:
    """The numbers that a checkpoint's tensors are filled with: one, or the file is a mixture.

    Not by torch.load, which takes a tenth of a second for 600 tensors.
    """
    content = file.read_bytes()
    found: set[float] = set()
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                at = record.header_offset
                start = at + 30 + sum(struct.unpack_from("<HH", content, at + 26))
                found.update(struct.unpack_from(f"<{_LENGTH}f", content, start))
    return found


def _numbers_if_whole(file: Path) -> set[float]:
    """None of a file that the daemon still writes, under a name of its own, or has just renamed: whoever waits for a
    record looks again."""
    try:
        return numbers_in(file)
    except (zipfile.BadZipFile, FileNotFoundError, struct.error):
        return set()


def row_of(update: int, keys: Iterable[str]) -> dict[str, float]:
    return {key: update * 100.0 + index for index, key in enumerate(keys)}


@dataclass
class Save:
    """One that was asked for: its files, the number that they hold, and its ticket once the call has returned."""

    files: list[str]
    number: float
    has_returned: bool = False
    ticket: noether_writer.Ticket | None = None
    error: noether_writer.NoetherWriterError | None = None
    is_durable: bool = False

    def look(self) -> None:
        if self.ticket is not None:
            self.error, self.is_durable = self.ticket.error, self.ticket.durable


class Record:
    """What was asked of the run `run_id`, and what has to be true of its files therefore."""

    def __init__(self, output: Path, run_id: str) -> None:
        self.output, self.run_id = output, run_id
        self.directory = output / run_id
        # Rows by update: all that were asked for, and those that `log` returned for.
        self._asked: dict[int, dict[str, float]] = {}
        self._logged: set[int] = set()
        self._saves: list[Save] = []

    def open(self) -> noether_writer.Run:
        return noether_writer.open_run(self.output, self.run_id)

    def log(self, run: noether_writer.Run, update: int, *keys: str, as_tensors: bool = False) -> None:
        row = self._asked[update] = row_of(update, keys)
        values: dict[str, Any] = (
            {k: torch.tensor(v, dtype=torch.float64) for k, v in row.items()} if as_tensors else row
        )
        run.log(values, update=update)
        self._logged.add(update)

    def next_update(self, run: noether_writer.Run) -> int:
        return (run.last_update or 0) + 1

    def save(
        self, run: noether_writer.Run, *tags: str, count: int = 10, snapshot: Any = "copy"
    ) -> noether_writer.Ticket:
        number = float(next(_numbers))
        tensors = state(number, count)
        asked = Save([f"net_cp={tag}_model.th" for tag in tags], number)
        self._saves.append(asked)
        if len(tags) == 1:
            ticket = run.save("net", tags[0], tensors, snapshot=snapshot)
        else:
            targets = [noether_writer.Target("net", tag, tensors) for tag in tags]
            ticket = run.save_as(targets, snapshot=snapshot)
        asked.ticket, asked.has_returned = ticket, True
        return ticket

    def save_file(self, tag: str, count: int = 10, snapshot: Any = "copy") -> noether_writer.Ticket:
        """To the path that a save of the run would have."""
        number = float(next(_numbers))
        asked = Save([f"net_cp={tag}_model.th"], number)
        self._saves.append(asked)
        asked.ticket = noether_writer.save(state(number, count), self._file(asked.files[0]), snapshot=snapshot)
        asked.has_returned = True
        return asked.ticket

    def forget_tickets(self) -> None:
        """Nobody holds anything of the run any more."""
        for save in self._saves:
            save.look()
            save.ticket = None

    def wrong_if_durable(self) -> list[str]:
        """What is called durable, and is not on disk."""
        for save in self._saves:
            save.look()
        names = [name for save in self._saves for name in save.files if save.is_durable]
        return [f"{name} is called durable, and is not there" for name in names if not self._file(name).exists()]

    def wrong(self) -> list[str]:
        """What is not true of the files, once the run has ended."""
        return [*self.wrong_if_durable(), *self._wrong_files(), *self._wrong_log()]

    def _file(self, name: str) -> Path:
        return self.directory / "checkpoints" / name

    def _wrong_files(self) -> list[str]:
        wrong = []
        folder = self.directory / "checkpoints"
        found = {file.name: _numbers_if_whole(file) for file in folder.iterdir()} if folder.exists() else {}
        asked: dict[str, list[float]] = {}
        sure: dict[str, float] = {}
        for save in self._saves:
            for name in save.files:
                asked.setdefault(name, []).append(save.number)
                if save.has_returned and save.error is None:
                    sure[name] = save.number
            if save.error is not None:
                wrong.append(f"the save of {save.files} failed: {save.error!r}")
        for save in self._saves:
            there = [name for name in save.files if found.get(name) == {save.number}]
            was_last = all(asked[name][-1] == save.number for name in save.files)
            if was_last and len(there) not in (0, len(save.files)):
                wrong.append(f"of {save.files} only {there} came")
        for name, numbers in found.items():
            if name not in asked:
                wrong.append(f"{name} is a file that nobody saved")
            elif len(numbers) != 1 or not numbers <= set(asked[name]):
                wrong.append(f"{name} holds {sorted(numbers)[:5]}, and {asked[name]} was saved")
            elif name in sure and asked[name].index(min(numbers)) < asked[name].index(sure[name]):
                wrong.append(f"{name} is older than the last save that returned")
        wrong += [f"{name} was saved, and is not there" for name in sure if name not in found]
        return wrong

    def _wrong_log(self) -> list[str]:
        rows: dict[int, dict[str, float]] = {}
        # A log that a newer one of this run would have replaced is kept beside it.
        for file in (self.directory / "tracker").glob("entries*.th"):
            for key, values in torch.load(file, weights_only=True).items():
                for update, value in values.items():
                    rows.setdefault(update, {})[key] = value
        wrong = []
        for update in sorted(self._asked.keys() | rows.keys()):
            found, asked = rows.get(update), self._asked.get(update)
            if found is None and update in self._logged:
                wrong.append(f"update {update} was logged, and is not there")
            elif found is not None and found != asked:
                wrong.append(f"update {update} is {found}, and {asked} was logged")
        return wrong
