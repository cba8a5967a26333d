# SPDX-License-Identifier: Apache-2.0
"""Tensors on a CUDA device: checkpoints and scalars, beside what people use otherwise and beside the limits of the
device's bus and of the disk, in one run. Every checkpoint that is timed is loaded back and compared bit for bit.

Usage: gpu.py RESULT.json [--quick | --full] [--require-device] [--device DEVICE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Without a device nothing else is needed, and that is said first.
try:
    import torch
except ImportError:
    torch = None
try:
    import bench
    import checkpoints
    import noether_writer
    import peers
    import training
except ImportError as error:
    missing = str(error)
else:
    missing = ""

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    states: list[tuple[str, int, int]]
    # Of these no peer is measured: gigabytes that it takes many seconds for.
    ours_only: set[str]
    first_saves: list[tuple[str, int, int]]
    rounds: int
    # In all: what is then not measured says so.
    seconds: float
    width: int
    layers: int
    updates: int
    every: int
    loops_with_peers: bool
    calls: int


_MIDDLE, _MANY, _LARGE = "1 GiB in 148 tensors", "256 MiB in 5,000 tensors", "8 GiB in 400 tensors"
_STATES = [(_MIDDLE, GIB, 148), (_MANY, 256 * MIB, 5000), (_LARGE, 8 * GIB, 400)]
# An H200 with a disk of 2 GB/s is done in 5 minutes; the start of the last case must leave room for its first round.
QUICK = Plan(_STATES, {_LARGE}, _STATES[:1], 3, 230, 1024, 16, 80, 20, False, 300)
FULL = Plan(_STATES, set(), [_STATES[0], _STATES[2]], 5, math.inf, 1024, 16, 160, 20, True, 3000)
# All of it, in small: what runs without a device, to see that it runs.
_SMALL = [("4 MiB in 8 tensors", 4 * MIB, 8), ("1 MiB in 50 tensors", MIB, 50)]
TRIAL = Plan(_SMALL, set(), _SMALL[:1], 1, math.inf, 32, 2, 8, 4, True, 20)


def tensors(nbytes: int, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer{i}.weight": torch.randn(nbytes // count // 4, device=device) for i in range(count)}


def first_saves_of_a_process(folder: str, mode: str, nbytes: int, count: int, device: torch.device) -> None:
    """In a process of its own. Prints the seconds of the first save; of the first that needs a second buffer, because
    the one before is not written yet; of later ones; and of the limit."""
    run = noether_writer.open_run(folder, f"first-{os.getpid()}")
    state = tensors(nbytes, count, device)

    def save() -> tuple[float, Any]:
        bench.synchronize(device)
        start = time.perf_counter()
        ticket = run.save("net", "latest", state, snapshot=mode)
        return time.perf_counter() - start, ticket

    def change() -> None:
        for value in state.values():
            value[:1] += 1

    def check(ticket: Any) -> None:
        ticket.wait()
        assert bench.is_same(torch.load(ticket.paths[0], weights_only=True, mmap=True), state), mode

    first, ticket = save()
    check(ticket)
    _, before = save()
    before.wait_snapshot()
    change()
    second, ticket = save()
    check(ticket)
    before.wait()
    later = []
    for _ in range(3):
        change()
        seconds, ticket = save()
        later.append(seconds)
        check(ticket)
    run.finish()
    limits = bench.DeviceLimits(nbytes, Path(folder), device)
    print(json.dumps([first, second, statistics.median(later), min(limits.copy() for _ in range(3))]))


class Bench:
    def __init__(self, plan: Plan, device: torch.device, folder: Path, daemon_pid: int) -> None:
        self.plan, self.device, self.folder, self.daemon_pid = plan, device, folder, daemon_pid
        self.run = noether_writer.open_run(folder, "gpu")
        self.rows: list[dict[str, Any]] = []
        self._runs = 0

    def all(self) -> None:
        # With the share of the time that is left which each gets.
        cases: list[tuple[str, Callable[[float], list[dict[str, Any]]], int]] = []
        for share, state in zip((3, 1), self.plan.states, strict=False):
            cases.append((f"device: {state[0]}", self._states(*state), share))
        cases.append(("device: a training that saves", self._training, 2))
        cases.append(("device: a training that logs each update", self._logging, 1))
        for state in self.plan.first_saves:
            cases.append((f"device: first saves of a process, {state[0]}", self._first_saves(*state), 1))
        for state in self.plan.states[2:]:
            cases.append((f"device: {state[0]}", self._states(*state), 1))
        end = time.monotonic() + self.plan.seconds
        for number, (name, measure, share) in enumerate(cases):
            left = end - time.monotonic()
            if left <= 0:
                self.rows.append(bench.failure(name, "all", "no time was left; --full measures it"))
                bench.show(self.rows[-1:])
                continue
            self.rows += measure(left * share / sum(each[2] for each in cases[number:]))
        self.run.close()

    def _ours(self) -> list[peers.TorchSave]:
        return [checkpoints.Ours(self.run, "copy"), checkpoints.Ours(self.run, "overlap")]

    def _states(self, label: str, nbytes: int, count: int) -> Callable[[float], list[dict[str, Any]]]:
        goals = {
            _MIDDLE: {"noether-writer": {"stall, x pinned copy": "<= 1.1", "durable, x O_DIRECT": "<= 1.15"}},
            _MANY: {"noether-writer": {"stall": "<= 0.010"}, "noether-writer, overlap": {"stall": "<= 0.005"}},
            _LARGE: {"noether-writer": {"stall, x pinned copy": "<= 1.1", "durable, x O_DIRECT": "<= 1.15"}},
        }.get(label, {})
        if label != _MANY:
            goals["noether-writer, overlap"] = {"stall": "<= 0.002"}

        def measure(seconds: float) -> list[dict[str, Any]]:
            state = tensors(nbytes, count, self.device)
            limits = bench.DeviceLimits(sum(value.nbytes for value in state.values()), self.folder, self.device)
            ways = self._ours() + ([] if label in self.plan.ours_only else peers.device_peers())
            rounds = bench.rounds(self.plan.rounds, seconds)
            return checkpoints.measure(
                f"device: {label}", state, self.folder, self.daemon_pid, ways, goals, rounds, limits
            )

        return measure

    def _first_saves(self, label: str, nbytes: int, count: int) -> Callable[[float], list[dict[str, Any]]]:
        def measure(seconds: float) -> list[dict[str, Any]]:
            rows = []
            case = f"device: first saves of a process, {label}"
            for mode, name in (("copy", "noether-writer"), ("overlap", "noether-writer, overlap")):
                figures = []
                for _ in bench.rounds(self.plan.rounds, seconds / 2):
                    words = [str(self.folder), mode, str(nbytes), str(count), str(self.device)]
                    program = [sys.executable, __file__, "--first-saves", *words]
                    figures.append(json.loads(subprocess.check_output(program, text=True).splitlines()[-1]))
                first, second, later, limit = zip(*figures, strict=True)

                def ratios(those: tuple[float, ...], others: tuple[float, ...]) -> list[float]:
                    return [a / b for a, b in zip(those, others, strict=True)]

                rows += [
                    bench.row(case, name, "first save", first, "s"),
                    bench.row(case, name, "first save, x a later one", ratios(first, later), "", "<= 1.3"),
                    bench.row(case, name, "first save, x pinned copy", ratios(first, limit), ""),
                    bench.row(case, name, "a second buffer, x a later save", ratios(second, later), "", "<= 1.3"),
                    bench.row(case, name, "a later save", later, "s"),
                    bench.row(case, bench.DeviceLimits.copy_name, "a save", limit, "s"),
                ]
            bench.show(rows)
            return rows

        return measure

    def _model(self) -> tuple[Callable[[], torch.Tensor], Callable[[], dict[str, torch.Tensor]]]:
        """(one update, which returns its loss; the weights and the optimizer's state)"""
        torch.manual_seed(0)
        width, device = self.plan.width, self.device
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        net = torch.nn.TransformerEncoder(layer, self.plan.layers, enable_nested_tensor=False)
        net = net.to(device, torch.bfloat16)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")
        batch = torch.randn(8, width // 2, width, device=device, dtype=torch.bfloat16)

        def update() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = net(batch).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        def state() -> dict[str, torch.Tensor]:
            found = dict(net.state_dict())
            for number, moments in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
            return found

        update()
        return update, state

    def _training(self, seconds: float) -> list[dict[str, Any]]:
        update, state = self._model()
        ways: list[peers.TorchSave] = [*reversed(self._ours()), peers.CloneAndThread()]
        if self.plan.loops_with_peers:
            ways += [peers.TorchSave(), peers.DistributedCheckpoint(process=False)]
        saves = {
            way.name: training.Saves(way, state, self.plan.every, self.folder / f"loop{i}")
            for i, way in enumerate(ways)
        }
        for each in saves.values():
            each.check(update)
        loop = training.Training(update, self.plan.updates, self.device)
        never, ratios = loop.slow_downs(saves, bench.rounds(self.plan.rounds, seconds))
        size = sum(value.nbytes for value in state().values()) / MIB
        case = f"device: a training that saves {size:,.3g} MiB each {self.plan.every} updates"
        rows = []
        for name, values in ratios.items():
            rows.append(bench.row(case, name, "slow-down", values, "", "<= 1.02" if "overlap" in name else ""))
            calls = saves[name].calls
            middle = statistics.median(calls)
            goal = "<= 1.3" if name.startswith("noether-writer") else ""
            rows.append(bench.row(case, name, "a call", calls, "s"))
            rows.append(bench.row(case, name, "a call, x the median one", [call / middle for call in calls], "", goal))
            saves[name].way.close()
        rows.append(bench.row(case, "never saves", "an update", [each / self.plan.updates for each in never], "s"))
        bench.show(rows)
        return rows

    def _logging(self, seconds: float) -> list[dict[str, Any]]:
        update, _ = self._model()
        last: list[torch.Tensor] = [torch.zeros((), device=self.device)]

        def step() -> None:
            last[0] = update()

        loop = training.Training(step, self.plan.updates, self.device)
        ways = {
            "noether-writer, a float": Logs(self._logging_run(), lambda: {"loss": 0.5}),
            "noether-writer, a loss on the device": Logs(self._logging_run(), lambda: {"loss": last[0]}),
            "noether-writer, 20 scalars on the device": Logs(
                self._logging_run(), lambda: {f"loss/part{i}": last[0] for i in range(20)}
            ),
            "a loss by item(), kept in a list": Logs(None, lambda: {"loss": last[0].item()}),
        }
        _, ratios = loop.slow_downs(ways, bench.rounds(self.plan.rounds, seconds))
        case = "device: a training that logs each update"
        goals = {"noether-writer, a float": "<= 1.01", "noether-writer, a loss on the device": "<= 1.01"}
        rows = [bench.row(case, name, "slow-down", values, "", goals.get(name, "")) for name, values in ratios.items()]
        for way in ways.values():
            way.check()
        rows += self._calls(1, "<= 10") + self._calls(20, "<= 20")
        bench.show(rows)
        return rows

    def _logging_run(self) -> Any:
        self._runs += 1
        return noether_writer.open_run(self.folder, f"gpu-logging-{self._runs}")

    def _calls(self, count: int, goal: str) -> list[dict[str, Any]]:
        """How long the call takes that logs `count` scalars, while the device rests."""
        values = {f"part{i}": torch.zeros((), device=self.device) for i in range(count)}
        floats = dict.fromkeys(values, 0.5)
        plural = "1 scalar" if count == 1 else f"{count} scalars"
        ways = {
            f"noether-writer, {plural} on the device": Logs(self._logging_run(), lambda: values),
            f"noether-writer, {plural} as floats": Logs(self._logging_run(), lambda: floats),
            f"{plural} by item(), kept in a list": Logs(None, lambda: {k: v.item() for k, v in values.items()}),
        }
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.plan.calls):
            for i, value in enumerate(values.values()):
                value.fill_(number + i / 32)
            for name, way in ways.items():
                bench.synchronize(self.device)
                start = time.perf_counter()
                way.after(number)
                figures[name].append((time.perf_counter() - start) * 1e6)
            for way in ways.values():
                # The values as they are now: the next round changes the tensors.
                way.given[-1] = {key: float(value) for key, value in way.given[-1].items()}
        for way in ways.values():
            way.check()
        case = f"device: the call that logs {plural}, the device idle"
        goals = {f"noether-writer, {plural} on the device": goal}
        return [bench.row(case, name, "a call", each, "us", goals.get(name, "")) for name, each in figures.items()]


class Logs:
    """Logs what `values` gives, each update, into a run or (None) into a list."""

    def __init__(self, run: Any, values: Callable[[], dict[str, Any]]) -> None:
        self._run, self._values = run, values
        self.given: list[dict[str, Any]] = []

    def after(self, _update: int) -> None:
        values = self._values()
        self.given.append(values)
        if self._run is not None:
            self._run.log(values, update=len(self.given))

    def finish(self) -> None:
        pass

    def check(self) -> None:
        """That the log has each value that was given."""
        if self._run is None:
            return
        for key in self.given[0]:
            assert list(self._run.values(key)) == [float(values[key]) for values in self.given], key
        self._run.finish()


def no_device(device: str | None) -> str:
    """Why nothing can be measured here; "" where it can."""
    if torch is None:
        return "No benchmark of a GPU: this Python has no torch (GPU_PYTHON= names one that has)."
    if device is None and not torch.cuda.is_available():
        return f"No benchmark of a GPU: torch {torch.__version__} finds no CUDA device here."
    return ""


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: the CPU, to try the programs"
    return {
        "device": name,
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "client": noether_writer.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What `make bench-gpu` runs.")
    parser.add_argument("result", help="the JSON file to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="within 5 minutes (the default)")
    size.add_argument("--full", action="store_true", help="more rounds, and all peers at 8 GiB")
    parser.add_argument("--require-device", action="store_true", help="fail where there is no CUDA device")
    parser.add_argument("--device", help="cuda:1, say; cpu tries the programs with small sizes, to no figures of use")
    options = parser.parse_args()
    if reason := no_device(options.device):
        print(reason)
        return 1 if options.require_device else 0
    if missing:
        print(f"The client is not here ({missing}): run `make build`, or install its wheel for this Python.")
        return 1
    device = torch.device(options.device or "cuda:0")
    plan = FULL if options.full else QUICK
    if device.type == "cpu":
        plan = TRIAL
        bench.REST_SECONDS = 0
    facts = machine(device)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    with bench.daemon() as (folder, process):
        measured = Bench(plan, device, folder, process.pid)
        try:
            measured.all()
        finally:
            # What was measured before a failure is kept too.
            bench.keep(measured.rows, options.result, **facts)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--first-saves":
        first_saves_of_a_process(*sys.argv[2:4], *map(int, sys.argv[4:6]), torch.device(sys.argv[6]))
    else:
        sys.exit(main())
