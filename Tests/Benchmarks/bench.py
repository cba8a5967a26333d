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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROUNDS = int(os.environ.get("ROUNDS", "5"))
# Shared memory, when it is fresh, is the machine's slowest part: the limits keep theirs.
_CHUNK_BYTES = 4 << 20


@contextmanager
def daemon() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """(a folder on the disk to measure, the daemon that this process's runs talk to)."""
    folder = Path(tempfile.mkdtemp(prefix="nw-bench-", dir=os.environ.get("BENCH_DIRECTORY")))
    socket = str(folder / "d/socket")
    os.environ |= {"NOETHER_WRITER_SOCKET": socket, "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(folder / "state")}
    process = subprocess.Popen([os.environ["NOETHER_WRITER_DAEMON"], "--socket", socket], stderr=subprocess.DEVNULL)
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
    os.sync()
    time.sleep(1)


class Limits:
    """One copy by two threads into warm shared memory, and one O_DIRECT write of the same bytes with fdatasync."""

    def __init__(self, nbytes: int, folder: Path) -> None:
        self.size = nbytes
        self.file = folder / "direct"
        self.source = torch.ones(nbytes // 4)
        rounded = (nbytes + _CHUNK_BYTES - 1) // _CHUNK_BYTES * _CHUNK_BYTES
        self.target = mmap.mmap(-1, rounded)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.target))
        self.threads = ThreadPoolExecutor(1)
        self.copy()

    def copy(self) -> float:
        return two_threads_copy(self.address, self.source.data_ptr(), self.size, self.threads)

    def write(self) -> float:
        rest()
        start = time.perf_counter()
        fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        view = memoryview(self.target)
        for offset in range(0, len(view), _CHUNK_BYTES):
            os.pwrite(fd, view[offset : offset + _CHUNK_BYTES], offset)
        os.fdatasync(fd)
        os.close(fd)
        taken = time.perf_counter() - start
        self.file.unlink()
        return taken


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


def show(rows: Sequence[dict[str, Any]]) -> None:
    case = None
    for each in rows:
        if each["case"] != case:
            case = each["case"]
            print(f"\n{case}\n{'way':40}{'figure':36}{'min / median / max':>30}  goal")
        text = " / ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in each["spread"])
        print(f"{each['way']:40}{each['figure'] + ', ' + each['unit']:36}{text:>30}  {each['goal']}", flush=True)


def keep(rows: Sequence[dict[str, Any]], path: str) -> None:
    Path(path).write_text(json.dumps(list(rows), indent=1) + "\n")
