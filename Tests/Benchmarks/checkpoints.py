# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: how long a save holds the trainer, how long until it is durable, and what it costs, beside what people
use otherwise and beside the limits of memory and disk, in one run. Every one that is timed is loaded back and compared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench
import noether_writer
import torch
from bench import ROUNDS, Limits, row
from noether_writer.run import Run
from peers import CloneAndThread, DistributedCheckpoint, State, TorchSave, all_peers
from training import Saves, Training

GIB = 1 << 30


def tensors(count: int, total_bytes: int) -> State:
    torch.manual_seed(0)
    return {f"layer{i}.weight": torch.randn(total_bytes // count // 4) for i in range(count)}


class Ours(TorchSave):
    queues = True

    def __init__(self, run: Run, mode: str) -> None:
        self.name = "noether-writer" if mode == "copy" else "noether-writer, overlap"
        self._run, self._mode = run, mode

    def begin(self, state: State, path: Path) -> Callable[[], object]:
        self._ticket = self._run.save("net", "latest", state, snapshot=self._mode)  # type: ignore[arg-type]
        return self._ticket.wait

    def load(self, state: State, path: Path) -> State:
        return super().load(state, Path(self._ticket.paths[0]))


def measure(
    case: str, state: State, folder: Path, daemon_pid: int, ways: list[TorchSave], goals: dict[str, dict[str, str]],
    rounds: Iterable[int] = range(ROUNDS), limits: Limits | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    limits = limits or Limits(sum(t.nbytes for t in state.values()), folder)
    figures: dict[str, list[tuple[float, ...]]] = {way.name: [] for way in ways}
    # One of them makes a folder.
    failed: dict[str, str] = {}
    places = {way.name: folder / f"peer{index}" for index, way in enumerate(ways)}
    for way in ways:
        # Buffers are warm from the second save on, ours and theirs; the first is a case of its own.
        try:
            way.save(state, places[way.name])
        except Exception as error:
            if not way.may_fail:
                raise
            failed[way.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for _ in rounds:
        for way in ways:
            if way.name in failed:
                continue
            copy, write = limits.copy(), limits.write()
            # So that a file of the round before is seen to be one.
            for value in state.values():
                value.view(-1)[:1] += 1
            limits.settle()
            before = bench.cpu_seconds(daemon_pid)
            stall, durable = way.save(state, places[way.name])
            cpu = bench.cpu_seconds(daemon_pid) - before
            loaded = way.load(state, places[way.name])
            assert bench.is_same(loaded, state), way.name
            del loaded
            figures[way.name].append(
                (stall, stall / copy, durable, durable / write, cpu / limits.size * GIB, copy, write)
            )
    rows = []
    for way in ways:
        way.close()
        if way.name in failed:
            rows.append(bench.failure(case, way.name, failed[way.name]))
            continue
        columns = list(zip(*figures[way.name], strict=True))
        names = ("stall", f"stall, x {limits.unit}", "durable", "durable, x O_DIRECT", "CPU a GiB")
        for name, values, unit in zip(names, columns, ("s", "", "s", "", "s"), strict=False):
            rows.append(row(case, way.name, name, values, unit, goals.get(way.name, {}).get(name, "")))
    measured = [figure for each in figures.values() for figure in each]
    rows.append(row(case, limits.copy_name, "stall", [figure[5] for figure in measured], "s"))
    rows.append(row(case, "limit: O_DIRECT write, depth 1", "durable", [figure[6] for figure in measured], "s"))
    bench.show(rows)
    return rows


_FIRST = """
import sys, time, torch, noether_writer
run = noether_writer.open_run(sys.argv[1], "first")
state = {str(i): torch.ones((1 << 30) // 148 // 4) for i in range(148)}
start = time.perf_counter()
ticket = run.save("net", "first", state)
print(time.perf_counter() - start)
ticket.wait()
loaded = torch.load(ticket.paths[0], weights_only=True, mmap=True)
assert all(torch.equal(loaded[key], state[key]) for key in state)
run.finish()
"""


def first_save(folder: Path) -> list[dict[str, object]]:
    """Each in a process of its own, in turn with a copy of as much into memory that was never touched."""
    source, threads = torch.ones(GIB // 4), ThreadPoolExecutor(1)
    seconds, ratios, copies = [], [], []
    for index in range(ROUNDS + 1):
        fresh = mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        fresh.madvise(mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
        copy = bench.two_threads_copy(address, source.data_ptr(), GIB, threads)
        del fresh
        output = subprocess.check_output([sys.executable, "-c", _FIRST, str(folder)], text=True)
        # The machine itself may have to find memory the first time.
        if index > 0:
            copies.append(copy)
            seconds.append(float(output))
            ratios.append(float(output) / copy)
    case = "First save of a process, 1 GiB in 148 tensors"
    rows = [
        row(case, "noether-writer", "stall", seconds, "s"),
        row(case, "noether-writer", "stall, x fresh-memory copy", ratios, "", "<= 1.3"),
        row(case, "limit: copy into fresh memory, 2 threads", "stall", copies, "s"),
    ]
    bench.show(rows)
    return rows


def training_loop(folder: Path, run: Run) -> list[dict[str, object]]:
    """A training on both cores that saves its weights each 50 updates, against the same one that never saves."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(1536, 1536) for _ in range(14)))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    batch, updates, every = torch.randn(64, 1536), 150, 50
    dcp = DistributedCheckpoint(process=False)
    peers: list[TorchSave] = [Ours(run, "overlap"), Ours(run, "copy"), TorchSave(), CloneAndThread(), dcp]

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(batch).square().mean().backward()
        optimizer.step()

    training = Training(update, updates, torch.device("cpu"))
    saves = {way.name: Saves(way, net.state_dict, every, folder / f"loop{i}") for i, way in enumerate(peers)}
    for each in saves.values():
        each.check(update)
    never, ratios = training.slow_downs(saves, range(ROUNDS))
    size = sum(p.nbytes for p in net.parameters()) / (1 << 20)
    update_ms = statistics.median(never) / updates * 1e3
    case = f"A training loop that saves {size:.0f} MiB each {every} updates of {update_ms:.0f} ms"
    rows = [
        row(case, name, "slow-down", values, "", "<= 1.03" if "overlap" in name else "")
        for name, values in ratios.items()
    ]
    bench.show(rows)
    return rows


_TRAINER = """
import sys, time, torch, noether_writer
run = noether_writer.open_run(sys.argv[1], "many" + sys.argv[2])
state = {str(i): torch.ones((256 << 20) // 32 // 4) for i in range(32)}
run.save("net", "warm", state).wait()
print("ready", flush=True)
for line in sys.stdin:
    ticket = run.save("net", "latest", state)
    ticket.wait()
    print(time.perf_counter(), ticket.paths[0], flush=True)
run.finish()
"""


def many_trainers(folder: Path) -> list[dict[str, object]]:
    """8 trainers save 256 MiB each at one moment."""
    limits = Limits(2 * GIB, folder)
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAINER, str(folder), str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(8)
    ]
    for each in trainers:
        assert each.stdout and each.stdout.readline() == "ready\n"
    totals, shares = [], []
    for _ in range(ROUNDS):
        write = limits.write()
        bench.rest()
        start = time.perf_counter()
        for each in trainers:
            assert each.stdin
            each.stdin.write("go\n")
            each.stdin.flush()
        ends, paths = [], []
        for each in trainers:
            assert each.stdout
            end, path = each.stdout.readline().split()
            ends.append(float(end) - start)
            paths.append(path)
        # Behind all of them: reading one back takes the disk from those that still write.
        for path in paths:
            loaded = torch.load(path, weights_only=True, mmap=True)
            assert all((value == 1).all() for value in loaded.values())
        totals.append(max(ends) / write)
        # All begin together, so a fair disk ends them together: how much longer the last took than they did on average.
        shares.append(max(ends) / statistics.mean(ends))
    for each in trainers:
        each.communicate()
    case = "8 trainers save 256 MiB each at once"
    rows = [
        row(case, "noether-writer", "all durable, x O_DIRECT of the sum", totals, "", "<= 1.15"),
        row(case, "noether-writer", "the last, x the mean", shares, "", "<= 1.5"),
    ]
    bench.show(rows)
    return rows


def main() -> None:
    only = os.environ.get("CASES", "")
    rows: list[dict[str, object]] = []
    state: State = {}
    with bench.daemon() as (folder, process):
        run = noether_writer.open_run(folder, "bench")

        def ours(*modes: str) -> list[TorchSave]:
            return [Ours(run, mode) for mode in modes]

        goal = {
            "noether-writer": {"stall, x memcpy": "<= 1.1", "durable, x O_DIRECT": "<= 1.15", "CPU a GiB": "<= 0.35"}
        }
        goal["noether-writer, overlap"] = {"stall, x memcpy": "<= 0.1"}
        if not only or "1" in only:
            case, state = "1 GiB in 148 tensors", tensors(148, GIB)
            rows += measure(case, state, folder, process.pid, ours("copy", "overlap") + all_peers(), goal)
        if not only or "2" in only:
            case, state = "64 MiB in 5,000 tensors", tensors(5000, 64 << 20)
            small = {"noether-writer": {"stall, x memcpy": "<= 1.5"}}
            rows += measure(case, state, folder, process.pid, ours("copy", "overlap") + all_peers(), small)
        if not only or "3" in only:
            # Weights, and both moments of Adam.
            case, state = "3 GiB: weights and Adam, 444 tensors", tensors(444, 3 * GIB)
            large = {"noether-writer": {"stall, x memcpy": "<= 1.1"}}
            few = [TorchSave(), CloneAndThread(), DistributedCheckpoint(process=True)]
            rows += measure(case, state, folder, process.pid, ours("copy") + few, large, rounds=range(min(3, ROUNDS)))
        state.clear()
        if not only or "4" in only:
            rows += first_save(folder)
        if not only or "5" in only:
            rows += training_loop(folder, run)
        if not only or "6" in only:
            rows += many_trainers(folder)
        run.close()
    bench.keep(rows, sys.argv[1])


if __name__ == "__main__":
    main()
