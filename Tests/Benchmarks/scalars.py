# SPDX-License-Identifier: Apache-2.0
"""Scalars: what logging 20 of them an update costs the trainer, beside what people use otherwise and one send; and what
the daemon can take, keep and write.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import noether_writer
import torch
from bench import ROUNDS, row
from noether_writer import frames

sys.path.insert(0, str(Path(__file__).parents[1] / "EndToEnd"))
from hostile import definition_payload, log_payload

KEYS = [f"loss/part{i}" for i in range(20)]
# Whoever logs has made it, for whatever takes it: making it is not timed.
ROW = {key: 0.1 * i for i, key in enumerate(KEYS)}


class NoetherDataFlow:
    """What Noether's LogWriter does with an update: a dict, checked and kept in a list until training ends."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.non_scalar: set[str] = set()

    def log(self, update: int, row: dict[str, float]) -> None:
        cache: dict[str, Any] = {"epoch": 1, "update": update, "sample": update * 4}
        for key, value in row.items():
            key = key.removesuffix("/")
            if key in cache:
                raise KeyError(key)
            cache[key] = value
        if self.entries and not cache["update"] > self.entries[-1]["update"]:
            raise AssertionError
        self.entries.append({key: value for key, value in cache.items() if key not in self.non_scalar})


def one_send(_folder: Path) -> Callable[[int, dict[str, float]], object]:
    """Of an update's bytes, to a process that reads and throws away."""
    here, there = socket.socketpair()
    if os.fork() == 0:
        here.close()
        while there.recv(1 << 16):
            pass
        os._exit(0)
    there.close()
    message = bytes(16 + 32 + 20 * 13)
    return lambda _update, _row: here.send(message)


def ours(folder: Path) -> Callable[[int, dict[str, float]], object]:
    run = noether_writer.open_run(folder, f"scalars-{os.getpid()}")

    def check() -> None:
        count = run.last_update
        found = run.values(KEYS[3])
        assert count and len(found) == count and set(found) == {ROW[KEYS[3]]}
        run.finish()

    atexit.register(check)
    return lambda update, row: run.log(row, update=update)


def tensorboard(folder: Path) -> Callable[[int, dict[str, float]], object]:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder / "tensorboard"))

    def log(update: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            board.add_scalar(key, value, update)

    return log


def wandb_offline(folder: Path) -> Callable[[int, dict[str, float]], object]:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}
    import wandb

    offline = wandb.init(project="bench", dir=str(folder))
    return lambda update, row: offline.log(row, step=update)


def trackio_here(folder: Path) -> Callable[[int, dict[str, float]], object]:
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    import trackio

    trackio.init(project="bench")
    return lambda update, row: trackio.log(row, step=update)


# name -> (makes what logs an update, how many updates to time)
WAYS: dict[str, tuple[Callable[[Path], Callable[[int, dict[str, float]], object]], int]] = {
    "limit: one AF_UNIX send": (one_send, 40_000),
    "noether-writer": (ours, 40_000),
    "Noether's LogWriter data flow": (lambda _folder: NoetherDataFlow().log, 40_000),
    "TensorBoard SummaryWriter": (tensorboard, 300),
    "wandb, offline": (wandb_offline, 2_000),
    "trackio": (trackio_here, 2_000),
}


def time_one(name: str, folder: Path) -> None:
    """In a process of its own, since peers have threads: seconds an update, behind a first quarter that warms up."""
    make, count = WAYS[name]
    log = make(folder)
    for update in range(1, count // 4):
        log(update, ROW)
    start = time.perf_counter()
    for update in range(count // 4, count + count // 4):
        log(update, ROW)
    print("seconds", (time.perf_counter() - start) / count, flush=True)


def caller(folder: Path) -> list[dict[str, object]]:
    micros: dict[str, list[float]] = {name: [] for name in WAYS}
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name in WAYS:
            output = subprocess.run(
                [sys.executable, __file__, "--way", name, str(folder)], stdout=subprocess.PIPE, text=True
            ).stdout
            found = [line.split()[1] for line in output.splitlines() if line.startswith("seconds ")]
            if not found:
                print(f"{name} is left out: it did not run here")
                continue
            micros[name].append(float(found[0]) * 1e6)
            ratios[name].append(micros[name][-1] / micros["limit: one AF_UNIX send"][-1])
    case = "20 scalars an update, the caller's side"
    rows = []
    for name in WAYS:
        if micros[name]:
            goal = "<= 1.3" if name == "noether-writer" else ""
            rows += [
                row(case, name, "an update", micros[name], "us"),
                row(case, name, "an update, x one send", ratios[name], "", goal),
            ]
    bench.show(rows)
    return rows


def of_tensors(folder: Path, blocks: int = 60, updates: int = 300) -> list[dict[str, object]]:
    """As losses come: tensors of one element on the CPU. They and the same floats are logged in turn, in short blocks
    of one process, and a round's figure is the median of its blocks."""
    run = noether_writer.open_run(folder, "tensors")
    tensors = {key: torch.tensor(value) for key, value in ROW.items()}

    def micros(log: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            log()
        return (time.perf_counter() - start) / updates * 1e6

    more, items = [], []
    for _ in range(ROUNDS):
        floats, of_tensors, item = [], [], []
        for _ in range(blocks):
            floats.append(micros(lambda: run.log(ROW)))
            of_tensors.append(micros(lambda: run.log(tensors)))
            item.append(micros(lambda: list(map(torch.Tensor.item, tensors.values()))))
        more.append(statistics.median(map(operator.sub, of_tensors, floats)))
        items.append(statistics.median(item))
    run.finish()
    run.close()
    case = "20 tensors an update, in turn with 20 floats"
    rows = [
        row(case, "noether-writer", "an update, more than the floats", more, "us", "<= 10"),
        row(case, "item() of the 20 tensors alone", "an update", items, "us"),
    ]
    bench.show(rows)
    return rows


def intake(folder: Path, pid: int, updates: int = 8_000, connections: int = 64) -> list[dict[str, object]]:
    """64 connections send as fast as the daemon takes it: values a second of its processor time."""
    runs = [noether_writer.open_run(folder, f"intake{i}") for i in range(connections)]
    for run in runs:
        run.close()
    before_memory = bench.memory_kib(pid, "RssAnon")
    open_sockets = []
    for index in range(connections):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(os.environ["NOETHER_WRITER_SOCKET"])
        opening: dict[str, Any] = {"output_root": str(folder), "run_id": f"flood{index}", "debug": False, "log": True}
        opening["session"] = uuid.uuid4().hex
        peer.sendall(frames.pack_json(frames.HELLO, {"versions": [1], "client": "bench"}, 1))
        peer.sendall(frames.pack_json(frames.OPEN_RUN, opening, 2))
        decoder = frames.FrameDecoder()
        while not any(frame.type == frames.RUN_OPENED for frame in decoder.feed(peer.recv(1 << 16))):
            pass
        peer.sendall(frames.pack(frames.DEFINE_KEYS, definition_payload(0, [key.encode() for key in KEYS])))
        peer.setblocking(False)
        open_sockets.append(peer)
    values = [0.5 * i for i in range(20)]
    stream = memoryview(
        b"".join(
            frames.pack(frames.LOG, log_payload(update, update, range(20), values)) for update in range(1, updates + 1)
        )
    )
    at = dict.fromkeys(open_sockets, 0)
    acked = dict.fromkeys(open_sockets, 0)
    decoders = {peer: frames.FrameDecoder() for peer in open_sockets}
    selector = selectors.DefaultSelector()
    for peer in open_sockets:
        selector.register(peer, selectors.EVENT_READ | selectors.EVENT_WRITE)
    before, start = _daemon_cpu(pid), time.perf_counter()
    while min(acked.values()) < updates:
        for key, events in selector.select():
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            if events & selectors.EVENT_WRITE:
                at[peer] += peer.send(stream[at[peer] : at[peer] + (1 << 17)])
                if at[peer] == len(stream):
                    selector.modify(peer, selectors.EVENT_READ)
            if events & selectors.EVENT_READ:
                for frame in decoders[peer].feed(peer.recv(1 << 16)):
                    if frame.type == frames.LOG_ACK:
                        acked[peer] = struct.unpack_from("<Q", frame.payload)[0]
    cpu, wall = _daemon_cpu(pid) - before, time.perf_counter() - start
    total = updates * connections * 20
    # What was on its way to the journals is given back within two seconds.
    time.sleep(3)
    grown = (bench.memory_kib(pid, "RssAnon") - before_memory) * 1024
    for peer in open_sockets:
        peer.close()
    for index in range(connections):
        path = folder / f"flood{index}/tracker/entries.th"
        while not path.exists():
            time.sleep(0.01)
    loaded = torch.load(path, weights_only=True)
    assert loaded[KEYS[7]] == dict.fromkeys(range(1, updates + 1), 3.5)
    case = f"The daemon's side: {connections} connections, {total / 1e6:.0f} M scalars, journals written"
    rows = [
        row(case, "noether-writer", "scalars a second of one core", [total / cpu], "", ">= 1,000,000"),
        row(case, "noether-writer", "scalars a second, client on the other core", [total / wall], ""),
        row(case, "noether-writer", "memory a scalar", [grown / total], "bytes", "<= 9"),
    ]
    bench.show(rows)
    return rows


def _daemon_cpu(pid: int) -> float:
    return bench.cpu_seconds(pid) - bench.cpu_seconds()


def entries_file(updates: int = 500_000) -> list[dict[str, object]]:
    """tracker/entries.th of 10 M scalars, by a fresh daemon, beside torch.save of the same dict."""
    with bench.daemon() as (folder, process):
        run = noether_writer.open_run(folder, "r")
        values = dict(zip(KEYS, (0.5 * i for i in range(20)), strict=True))
        idle = bench.memory_kib(process.pid, "RssAnon")
        for update in range(1, updates + 1):
            run.log(values, update=update)
        run.flush(600)
        columns = bench.memory_kib(process.pid, "RssAnon") - idle
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        before = bench.memory_kib(process.pid, "VmHWM")
        start = time.perf_counter()
        run.finish()
        ours = time.perf_counter() - start
        peak = bench.memory_kib(process.pid, "VmHWM") - before + columns
        run.close()
        loaded = torch.load(folder / "r/tracker/entries.th", weights_only=True)
        expected = {key: dict.fromkeys(range(1, updates + 1), value) for key, value in values.items()}
        assert loaded == expected
        start = time.perf_counter()
        with (folder / "peer.th").open("wb") as file:
            torch.save(loaded, file)
            os.fsync(file.fileno())
        theirs = time.perf_counter() - start
    case = "entries.th of 10 M scalars"
    rows = [
        row(case, "noether-writer", "durable", [ours], "s"),
        row(case, "torch.save of the dict + fsync", "durable", [theirs], "s"),
        row(case, "noether-writer", "times as fast as torch.save", [theirs / ours], "", ">= 10"),
        row(case, "noether-writer", "peak memory, x the columns", [peak / columns], "", "<= 2"),
    ]
    bench.show(rows)
    return rows


_STARTED = """
import time
start = time.perf_counter()
from noether_writer import frames, daemon_launcher
imported = time.perf_counter()
with daemon_launcher.connect() as connected:
    hello = {"versions": frames.VERSIONS, "client": "bench"}
    connected.sendall(frames.pack_json(frames.HELLO, hello, 1))
    decoder = frames.FrameDecoder()
    while not decoder.feed(connected.recv(1 << 16)):
        pass
    print(time.perf_counter() - imported)
"""


def start_and_rest() -> list[dict[str, object]]:
    ready, welcome, wandb_init, resident = [], [], [], []
    daemon = os.environ["NOETHER_WRITER_DAEMON"]
    for _ in range(ROUNDS + 1):
        folder = Path(tempfile.mkdtemp())
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(folder / "notify"))
        settings = os.environ | {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "NOETHER_WRITER_SETTING_STATE_DIRECTORY": str(folder / "state"),
            "NOETHER_WRITER_SOCKET": str(folder / "socket"),
        }
        start = time.perf_counter()
        process = subprocess.Popen([daemon], env=settings, stderr=subprocess.DEVNULL)
        while b"READY=1" not in listener.recv(4096):
            pass
        ready.append((time.perf_counter() - start) * 1e3)
        time.sleep(0.3)
        resident.append(bench.memory_kib(process.pid, "VmRSS") / 1024)
        process.terminate()
        process.wait()
        # As with systemd's socket: it listens before there is a daemon, which the first connect starts.
        settings["NOETHER_WRITER_SOCKET"] = str(folder / "activated")
        del settings["NOTIFY_SOCKET"]
        passed = ["-E", "HOME", "-E", "NOETHER_WRITER_SETTING_STATE_DIRECTORY"]
        activate = subprocess.Popen(
            ["systemd-socket-activate", *passed, "-l", str(folder / "activated"), daemon],
            env=settings,
            stderr=subprocess.DEVNULL,
        )
        while not (folder / "activated").exists():
            time.sleep(0.002)
        time.sleep(0.05)
        welcome.append(float(subprocess.check_output([sys.executable, "-c", _STARTED], env=settings)) * 1e3)
        activate.terminate()
        activate.wait()
    code = "import time, wandb; s = time.perf_counter(); wandb.init(project='b'); print('T', time.perf_counter() - s)"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": tempfile.mkdtemp()}
    for _ in range(2):
        output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        wandb_init.append(float(output.split("T")[1]) * 1e3)
    case = "Starting and resting"
    rows = [
        row(case, "noether-writer", "daemon started, to READY=1", ready[1:], "ms", "<= 20"),
        row(case, "noether-writer", "first connect to welcome, with activation", welcome[1:], "ms", "<= 30"),
        row(case, "wandb, offline", "init", wandb_init, "ms"),
        row(case, "noether-writer", "resident, idle", resident[1:], "MiB", "<= 15"),
    ]
    bench.show(rows)
    return rows


def main() -> None:
    if sys.argv[1] == "--way":
        return time_one(sys.argv[2], Path(sys.argv[3]))
    rows = start_and_rest()
    with bench.daemon() as (folder, process):
        rows += intake(folder, process.pid)
    with bench.daemon() as (folder, _process):
        rows += caller(folder) + of_tensors(folder)
    rows += entries_file()
    bench.keep(rows, sys.argv[1])


if __name__ == "__main__":
    main()
