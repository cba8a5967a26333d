# SPDX-License-Identifier: Apache-2.0
"""A trainer that is started again: how long until it has its state, from the daemon's memory and from the disk, and
what the images cost the saves that make them.

Usage: restore.py RESULT.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
from bench import ROUNDS, row

GIB = 1 << 30
COUNT = 64
WAYS = {
    "from memory": "noether_writer.load",
    "from memory, mmap=False": "noether_writer.load",
    "from disk, mmap": "torch.load(mmap=True)",
    "from disk": "torch.load",
}

# Each is a process of its own: a trainer that was killed has nothing that is warm.
TRAINER = """
import os, signal, sys, time, torch, noether_writer
torch.set_num_threads(1)
path, count = sys.argv[1], int(sys.argv[2])
state = {f"layer{i}": torch.full(((1 << 28) // count,), float(i)) for i in range(count)}
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    ticket = noether_writer.save(state, path)
    ticket.wait()
    print(time.perf_counter() - start, flush=True)
    sys.stdin.readline()
signal.pause()
"""
AGAIN = """
import json, sys, time, torch, noether_writer
torch.set_num_threads(1)
path, way, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
parameters = {f"layer{i}": torch.zeros((1 << 28) // count) for i in range(count)}
other = torch.ones(1 << 28)
target = torch.zeros(1 << 28)
start = time.perf_counter()
target.copy_(other)
memcpy = time.perf_counter() - start
seen, plain = [], torch.load
def load(file, **arguments):
    seen.append(str(file))
    return plain(file, **arguments)
torch.load = load
start = time.perf_counter()
if way == "from memory":
    found = noether_writer.load(path)
elif way == "from memory, mmap=False":
    found = noether_writer.load(path, mmap=False)
else:
    found = torch.load(path, mmap=way == "from disk, mmap")
loaded = time.perf_counter()
for name, parameter in parameters.items():
    parameter.copy_(found[name])
copied = time.perf_counter()
assert seen[0].startswith("/proc/self/fd/") == way.startswith("from memory"), seen
assert all(float(parameters[f"layer{i}"][-1]) == i for i in range(count))
print(json.dumps({"loaded": loaded - start, "copied": copied - loaded, "memcpy": memcpy}))
"""


def drop_cache(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def shared_bytes(pid: int) -> int:
    """Of memfds that the process holds."""
    total = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "noether-writer-image" in os.readlink(entry):
                total += entry.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def restarts() -> list[dict[str, Any]]:
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    held = 0
    with bench.daemon() as (folder, process):
        path = folder / "net.pt"
        for _ in range(ROUNDS):
            with subprocess.Popen(
                [sys.executable, "-c", TRAINER, str(path), str(COUNT), "1"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ) as trainer:  # fmt: skip
                assert trainer.stdout is not None
                trainer.stdout.readline()
                trainer.send_signal(signal.SIGKILL)
            held = shared_bytes(process.pid)
            for way in WAYS:
                drop_cache(path)
                bench.rest()
                command = [sys.executable, "-c", AGAIN, str(path), way, str(COUNT)]
                figures[way].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    rows = []
    case = "a trainer that was killed has its state of 1 GiB again"
    for way, name in WAYS.items():
        goal = "0.1" if way == "from memory" else ""
        label = f"{name}, {way}"
        rows.append(row(case, label, "until it has returned", [each["loaded"] for each in figures[way]], "s", goal))
        rows.append(row(case, label, "copy into parameters", [each["copied"] for each in figures[way]], "s"))
        whole = [(each["loaded"] + each["copied"]) / each["memcpy"] for each in figures[way]]
        rows.append(row(case, label, "both", whole, "warm memory copies"))
    rows.append(row(case, "a warm memory copy", "", [each["memcpy"] for each in figures["from memory"]], "s"))
    rows.append(row(case, "the daemon", "memory held", [held / GIB], "GiB"))
    return rows


def saves() -> list[dict[str, Any]]:
    """What an image costs the save that makes it."""
    case = "a save of 1 GiB by a process that has saved before"
    rows = []
    for setting, name in ((None, "with images"), ("0", "restore_bytes: 0")):
        if setting is not None:
            os.environ["NOETHER_WRITER_SETTING_RESTORE_BYTES"] = setting
        durable, cpu = [], []
        with bench.daemon() as (folder, process):
            path = folder / "net.pt"
            with subprocess.Popen(
                [sys.executable, "-c", TRAINER, str(path), str(COUNT), str(ROUNDS + 1)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ) as trainer:  # fmt: skip
                assert trainer.stdout is not None and trainer.stdin is not None
                trainer.stdout.readline()
                for _ in range(ROUNDS):
                    bench.rest()
                    before = bench.cpu_seconds(process.pid)
                    trainer.stdin.write("\n")
                    trainer.stdin.flush()
                    durable.append(float(trainer.stdout.readline()))
                    cpu.append(bench.cpu_seconds(process.pid) - before)
                trainer.kill()
        rows.append(row(case, name, "until durable", durable, "s"))
        rows.append(row(case, name, "CPU time of the daemon", cpu, "s"))
    os.environ.pop("NOETHER_WRITER_SETTING_RESTORE_BYTES", None)
    return rows


def main() -> None:
    rows = restarts() + saves()
    bench.show(rows)
    bench.keep(rows, sys.argv[1])


if __name__ == "__main__":
    main()
