# SPDX-License-Identifier: Apache-2.0
"""What every benchmark here shares: a daemon of its own, the limits of the machine, processor time, and how figures are
kept: each round pairs a way with the limits measured right beside it, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from noether_writer.daemon_launcher import daemon_executable

ROUNDS = int(os.environ.get("ROUNDS", "5"))
# 0: a trial of the programs, whose figures nobody reads.
REST_SECONDS = float(os.environ.get("REST_SECONDS", "1"))
# Shared memory, when it is fresh, is the machine's slowest part: the limits keep theirs.
_CHUNK_BYTES = 4 << 20


@contextmanager
def daemon() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """(a folder on the disk to measure, the daemon that this process's runs talk to)."""
    folder = Path(tempfile.mkdtemp(prefix="nw-bench-", dir=os.environ.get("BENCH_DIRECTORY")))
    socket = str(folder / "d/socket")
    os.environ |= {"NOETHER_WRITER_SOCKET": socket, "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(folder / "state")}
    process = subprocess.Popen([daemon_executable(), "--socket", socket], stderr=subprocess.DEVNULL)
    try:
        while not Path(socket).exists():
            time.sleep(0.005)
        yield folder, process
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def cpu_seconds(*pids: int) -> float:
    """Of this process, its ended children, and the processes named."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_kib(pid: int, field: str) -> int:
    """A line of /proc/<pid>/status, in KiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[field].split()[0])


def rest() -> None:
    """Until the disk has done what it still does for files that were replaced or removed: giving gigabytes back, and
    discarding them, takes as long as writing them on some, and would be counted for whoever comes next."""
    if REST_SECONDS:
        os.sync()
        time.sleep(REST_SECONDS)


def rounds(count: int, seconds: float = float("inf")) -> Iterator[int]:
    """At most `count` of them; after the first, none that would end later than `seconds` from now, if each takes as
    long as those before."""
    start = time.monotonic()
    for done in range(count):
        taken = time.monotonic() - start
        if done and taken + taken / done > seconds:
            return
        yield done


class Limits:
    """One copy by two threads into warm shared memory, and one O_DIRECT write of the same bytes, made durable as a
    checkpoint is: fdatasync, rename, fsync of the directory."""

    unit = "memcpy"
    copy_name = "limit: memcpy, warm, 2 threads"

    def __init__(self, nbytes: int, folder: Path) -> None:
        self.size = nbytes
        self.file = folder / "direct"
        self.source = torch.ones(nbytes // 4)
        rounded = (nbytes + _CHUNK_BYTES - 1) // _CHUNK_BYTES * _CHUNK_BYTES
        self.target = mmap.mmap(-1, rounded)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.target))
        self.threads = ThreadPoolExecutor(1)
        self.copy()

    def settle(self) -> None:
        """Until nothing that was asked for before is still going on."""
        rest()

    def copy(self) -> float:
        return two_threads_copy(self.address, self.source.data_ptr(), self.size, self.threads)

    def write(self) -> float:
        rest()
        directory = os.open(self.file.parent, os.O_RDONLY | os.O_DIRECTORY)
        view = memoryview(self.target)
        start = time.perf_counter()
        fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for offset in range(0, self.size, _CHUNK_BYTES):
            at = offset % len(view)
            os.pwrite(fd, view[at : at + _CHUNK_BYTES], offset)
        os.fdatasync(fd)
        os.close(fd)
        self.file.rename(self.file.with_suffix(".durable"))
        os.fsync(directory)
        taken = time.perf_counter() - start
        os.close(directory)
        self.file.with_suffix(".durable").unlink()
        return taken


class DeviceLimits(Limits):
    """One copy of as much, in one piece, from the device into pinned memory; the write is that of `Limits`. With the
    CPU as the device (nothing to pin), one copy within memory."""

    unit = "pinned copy"
    copy_name = "limit: pinned copy, one piece"

    def __init__(self, nbytes: int, folder: Path, device: torch.device) -> None:
        self.size = nbytes
        self.file = folder / "direct"
        self.device = device
        self.piece = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        # The same few bytes again and again: not all memory that a driver has pinned may be written with O_DIRECT.
        self.target = mmap.mmap(-1, 16 * _CHUNK_BYTES)
        self.target.write(b"\1" * len(self.target))
        self.copy()

    def settle(self) -> None:
        rest()
        synchronize(self.device)

    def copy(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self.pinned.copy_(self.piece, non_blocking=True)
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_same(loaded: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit, wherever the tensors are."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1).view(torch.uint8)

    return loaded.keys() == state.keys() and all(
        loaded[key].shape == value.shape
        and loaded[key].dtype == value.dtype
        and torch.equal(bits(loaded[key].to(value.device)), bits(value))
        for key, value in state.items()
    )


def two_threads_copy(target: int, source: int, size: int, threads: ThreadPoolExecutor) -> float:
    half = size // 2
    start = time.perf_counter()
    other = threads.submit(ctypes.memmove, target + half, source + half, size - half)
    ctypes.memmove(target, source, half)
    other.result()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> list[float]:
    """[min, median, max]."""
    return [min(values), statistics.median(values), max(values)]


def row(case: str, way: str, figure: str, values: Sequence[float], unit: str, goal: str = "") -> dict[str, Any]:
    return {"case": case, "way": way, "figure": figure, "unit": unit, "spread": spread(values), "goal": goal}


def failure(case: str, way: str, reason: str) -> dict[str, Any]:
    """A row for what could not be measured."""
    return {"case": case, "way": way, "figure": "not measured", "unit": "", "spread": [], "goal": "", "note": reason}


def show(rows: Sequence[dict[str, Any]]) -> None:
    case = None
    for each in rows:
        if each["case"] != case:
            case = each["case"]
            print(f"\n{case}\n{'way':42}{'figure':36}{'min / median / max':>30}  goal")
        if not each["spread"]:
            print(f"{each['way']:42}{each['figure']}: {each['note']}", flush=True)
            continue
        text = " / ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in each["spread"])
        figure = f"{each['figure']}, {each['unit']}" if each["unit"] else each["figure"]
        print(f"{each['way']:42}{figure:36}{text:>30}  {each['goal']}".rstrip(), flush=True)


def keep(rows: Iterable[dict[str, Any]], path: str, **facts: object) -> None:
    """`facts` of the machine, if any, lie beside the rows."""
    content = {**facts, "rows": list(rows)} if facts else list(rows)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def kept(path: str) -> list[dict[str, Any]]:
    """The rows in a file of `keep`."""
    content = json.loads(Path(path).read_text())
    rows: list[dict[str, Any]] = content["rows"] if isinstance(content, dict) else content
    return rows
