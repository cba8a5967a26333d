"""How long a save holds the trainer, and how long until it is durable: this writer beside torch.save and beside the
limits of memory and disk, in one run. `make bench`. Every checkpoint that is timed is loaded back and compared.

Ratios are what carries over between machines: stall against one warm memory copy, durable against one O_DIRECT write of
the same bytes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import noether_writer
import torch

ROUNDS = int(os.environ.get("ROUNDS", "5"))


def tensors(count: int, total_bytes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer{i}.weight": torch.randn(total_bytes // count // 4) for i in range(count)}


class Limits:
    """One warm copy by two threads, and one O_DIRECT write of the same bytes."""

    def __init__(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        self.size = sum(t.nbytes for t in state.values())
        self.file = folder / "direct"
        self.source = torch.cat([t.view(-1) for t in state.values()])
        rounded = (self.size + (1 << 22) - 1) >> 22 << 22
        self.target = mmap.mmap(-1, rounded)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.target))
        self.threads = ThreadPoolExecutor(1)
        self.copy()

    def copy(self) -> float:
        half = self.size // 2
        start = time.perf_counter()
        other = self.threads.submit(
            ctypes.memmove, self.address + half, self.source.data_ptr() + half, self.size - half
        )
        ctypes.memmove(self.address, self.source.data_ptr(), half)
        other.result()
        return time.perf_counter() - start

    def write(self) -> float:
        self.file.unlink(missing_ok=True)
        start = time.perf_counter()
        fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        view = memoryview(self.target)
        for offset in range(0, len(view), 4 << 20):
            os.pwrite(fd, view[offset : offset + (4 << 20)], offset)
        os.fdatasync(fd)
        os.close(fd)
        return time.perf_counter() - start


def cpu_seconds(pid: int | None = None) -> float:
    if pid is None:
        times = os.times()
        return times.user + times.system
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert list(loaded) == list(state) and all(torch.equal(loaded[key], state[key]) for key in state), path


def save_and_fsync(state: dict[str, torch.Tensor], path: Path) -> tuple[float, float]:
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - start
    check(path, state)
    return taken, taken


def clone_and_thread(state: dict[str, torch.Tensor], path: Path) -> tuple[float, float]:
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    clone = {key: value.clone() for key, value in state.items()}
    thread = threading.Thread(target=save_and_fsync, args=(clone, path))
    thread.start()
    stall = time.perf_counter() - start
    thread.join()
    return stall, time.perf_counter() - start


def measure(name: str, state: dict[str, torch.Tensor], folder: Path) -> list[dict[str, Any]]:
    limits = Limits(state, folder)
    run = noether_writer.open_run(folder, name.replace(" ", "-"))
    pid = run._link._connection.welcome["pid"]  # type: ignore[union-attr]

    def ours() -> tuple[float, float]:
        start = time.perf_counter()
        ticket = run.save("net", "latest", state)
        stall = time.perf_counter() - start
        ticket.wait()
        durable = time.perf_counter() - start
        check(ticket.paths[0], state)
        return stall, durable

    start = time.perf_counter()
    first = run.save("net", "first", state)
    first_stall = time.perf_counter() - start
    first.wait()
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "noether-writer": ours,
        "torch.save + fsync": lambda: save_and_fsync(state, folder / "peer.th"),
        "clone + torch.save in a thread": lambda: clone_and_thread(state, folder / "peer.th"),
    }
    figures: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        # In turn, so that a slow moment of the machine hits all of them.
        copy, write = limits.copy(), limits.write()
        for way, call in ways.items():
            before = cpu_seconds() + cpu_seconds(pid)
            stall, durable = call()
            cpu = cpu_seconds() + cpu_seconds(pid) - before
            figures[way].append((stall, durable, stall / copy, durable / write, cpu / limits.size * (1 << 30)))
            copy, write = limits.copy(), limits.write()
    run.close()
    limits.file.unlink()
    print(f"\n{name}: {limits.size / 1e9:.2f} GB in {len(state)} tensors, {ROUNDS} rounds; min / median / max")
    print(f"first save of the process: {first_stall:.3f} s")
    print(f"{'way':32}{'stall s':>24}{'x memcpy':>20}{'durable s':>24}{'x O_DIRECT':>20}")
    rows = []
    for way, rounds in figures.items():
        columns = list(zip(*rounds, strict=True))
        spread = [[min(c), statistics.median(c), max(c)] for c in columns]
        rows.append(
            {"case": name, "way": way, "stall_s": spread[0], "durable_s": spread[1], "stall_x_memcpy": spread[2]}
        )
        rows[-1] |= {"durable_x_direct": spread[3], "cpu_s_per_gib_with_check": spread[4], "first_stall_s": first_stall}
        text = [
            " / ".join(f"{value:.{digits}f}" for value in spread[i]) for i, digits in ((0, 3), (2, 1), (1, 2), (3, 1))
        ]
        print(f"{way:32}{text[0]:>24}{text[1]:>20}{text[2]:>24}{text[3]:>20}")
    return rows


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="nw-bench-", dir=os.environ.get("BENCH_DIRECTORY")))
    socket = str(folder / "d/socket")
    os.environ |= {"NOETHER_WRITER_SOCKET": socket, "NOETHER_WRITERD_STATE_DIRECTORY": str(folder / "state")}
    daemon = subprocess.Popen([os.environ["NOETHER_WRITER_DAEMON"], "--socket", socket], stderr=subprocess.DEVNULL)
    while not Path(socket).exists():
        time.sleep(0.01)
    try:
        rows = measure("1 GiB", tensors(148, 1 << 30), folder)
        rows += measure("5000 tensors", tensors(5000, 64 << 20), folder)
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(folder)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
