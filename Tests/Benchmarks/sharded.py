# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints: 1, 2 and 4 ranks with 256 MiB each save at once, by noether_writer.dcp and by DCP itself, which
is given the fsync that it leaves out. Then the time to load, by the reader that checks and by the stock one.

Usage: sharded.py RESULT.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from bench import ROUNDS, row
from noether_writer import dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

NBYTES = 256 << 20
COUNT = 64
OURS = ("noether_writer.dcp.save", "async_save, our writer")
THEIRS = ("DCP save + fsync", "DCP async_save, thread + fsync", "DCP async_save, process + fsync")


def sync(path: Path) -> None:
    """What stock DCP leaves out: its commit record and the directories."""
    for each in (path / ".metadata", path, path.parent):
        fd = os.open(each, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def begin(way: str, state: dict[str, Any], path: Path, group: Any) -> Callable[[], object]:
    """Saves; what is returned waits until it is durable."""
    if way == OURS[0]:
        return dcp.save(state, path).wait
    if way == OURS[1]:
        writer = dcp.StorageWriter(path)
        ours: Any = torch_dcp.async_save(state, storage_writer=writer, process_group=group)
        return lambda: ours.result()
    if way == THEIRS[0]:
        torch_dcp.save(state, checkpoint_id=path, process_group=group)
        return lambda: None
    kind = AsyncCheckpointerType.THREAD if way == THEIRS[1] else AsyncCheckpointerType.PROCESS
    theirs: Any = torch_dcp.async_save(state, checkpoint_id=path, process_group=group, async_checkpointer_type=kind)
    return lambda: theirs.result()


class Rank:
    def __init__(self, rank: int, world: int, folder: Path, daemon: int) -> None:
        self.rank, self.world, self.folder, self.daemon = rank, world, folder, daemon
        # A process of its own asks for these.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["BENCH_PORT"]}
        dist.init_process_group("gloo", rank=rank, world_size=world)
        self.group = dist.new_group(backend="gloo")
        mesh = init_device_mesh("cpu", (world,))
        self.state: dict[str, Any] = {"step": 1}
        each = NBYTES // COUNT // 4 // 1024
        for index in range(COUNT):
            local = torch.full((each, 1024), float(index))
            self.state[f"layer{index}"] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        (own := folder / f"rank{rank}").mkdir()
        self.limits = bench.Limits(NBYTES, own)

    def worst(self, value: float) -> float:
        return max(self.gathered(value))

    def gathered(self, value: float) -> list[float]:
        found: list[float] = [0.0] * self.world
        dist.all_gather_object(found, value)
        return found

    def children(self) -> list[int]:
        found = []
        with contextlib.suppress(OSError):
            found = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        return found

    def round(self, way: str) -> dict[str, float]:
        path = self.folder / "checkpoint"
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        copy = self.worst(self.limits.copy())
        dist.barrier()
        write = 0.0
        if self.rank == 0:
            write = sum(self.limits.write() for _ in range(self.world))
            bench.rest()
        dist.barrier()
        pids = [os.getpid(), *self.children()]
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = sum(bench.memory_kib(pid, "VmRSS") for pid in pids)
        cpu = bench.cpu_seconds(*self.children(), *([self.daemon] if self.rank == 0 else []))
        dist.barrier()
        start = time.perf_counter()
        wait = begin(way, self.state, path, self.group)
        stall = time.perf_counter() - start
        wait()
        if way in THEIRS and self.rank == 0:
            sync(path)
        durable = time.perf_counter() - start
        cpu = bench.cpu_seconds(*self.children(), *([self.daemon] if self.rank == 0 else [])) - cpu
        peak = sum(bench.memory_kib(pid, "VmHWM") for pid in pids) - before
        return {
            "copy": copy,
            "write": self.worst(write),
            "stall": self.worst(stall),
            "durable": self.worst(durable),
            "cpu": sum(self.gathered(cpu)),
            "memory": self.worst(peak * 1024 / NBYTES),
        }

    def load(self, reader: Any) -> float:
        target = {name: torch.zeros_like(value) if name != "step" else 0 for name, value in self.state.items()}
        dist.barrier()
        start = time.perf_counter()
        torch_dcp.load(target, storage_reader=reader)
        taken = time.perf_counter() - start
        for name, value in self.state.items():
            assert name == "step" or torch.equal(target[name].to_local(), value.to_local())
        return self.worst(taken)

    def run(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        case = f"{self.world} ranks of 256 MiB" if self.world > 1 else "1 rank of 256 MiB"
        figures: dict[str, list[dict[str, float]]] = {way: [] for way in (*THEIRS, *OURS)}
        loads: dict[str, list[float]] = {"stock": [], "checked": []}
        for number in range(ROUNDS + 1):
            for way, found in figures.items():
                made = self.round(way)
                # The first one warms up.
                if number:
                    found.append(made)
            path = self.folder / "checkpoint"
            stock = self.load(torch_dcp.FileSystemReader(path))
            checked = self.load(dcp.StorageReader(path))
            if number:
                loads["stock"].append(stock)
                loads["checked"].append(checked)
        for way, found in figures.items():
            is_ours = way in OURS
            for name, unit, of in (("stall", "copies", "copy"), ("durable", "O_DIRECT writes of the sum", "write")):
                goal = ("<= 1.1" if name == "stall" else "<= 1.15") if is_ours else ""
                rows.append(row(case, way, name, [each[name] / each[of] for each in found], unit, goal))
                rows.append(row(case, way, f"{name} in all", [each[name] for each in found], "s"))
            rows.append(row(case, way, "CPU a GiB", [each["cpu"] / (self.world / 4) for each in found], "s"))
            rows.append(row(case, way, "peak memory", [each["memory"] for each in found], "states"))
        ratio = [a / b for a, b in zip(loads["checked"], loads["stock"], strict=True)]
        rows.append(row(case, "noether_writer.dcp.StorageReader", "load", ratio, "stock readers", "<= 1.1"))
        return rows


def main() -> None:
    every: list[dict[str, Any]] = []
    for world in (1, 2, 4):
        with bench.daemon() as (folder, process):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_PORT": str(29700 + os.getpid() % 200)}
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, str(rank), str(world), str(folder), str(process.pid)],
                    env=environment,
                    stdout=subprocess.PIPE if rank == 0 else None,
                    text=True,
                )
                for rank in range(world)
            ]
            assert ranks[0].stdout
            # torch's process of its own logs there too.
            rows = json.loads(ranks[0].stdout.read().splitlines()[-1])
            assert all(rank.wait() == 0 for rank in ranks)
        bench.show(rows)
        every += rows
    bench.keep(every, sys.argv[1])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main()
    else:
        rank = Rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        found = rank.run()
        if rank.rank == 0:
            print(json.dumps(found))
        dist.destroy_process_group()
