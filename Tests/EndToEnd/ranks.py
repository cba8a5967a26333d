# SPDX-License-Identifier: Apache-2.0
"""Ranks of jobs, as forked processes: torch is imported once. Reads jobs from standard input, one JSON a line, and
writes what has become of each rank. For tests of sharded state; each job meets in a file."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint.state_dict_saver
from noether_writer import _files, dcp, partials, saves
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

# Where a rank can be killed: a function, and whether before or after it.
POINTS: dict[str, tuple[Any, str, bool]] = {
    "stage.before": (dcp, "stage", False),
    "stage.after": (dcp, "stage", True),
    "plan.local": (dcp.StorageWriter, "prepare_local_plan", True),
    "partial.locked": (partials.fcntl, "lockf", True),
    "partial.made": (partials.Partial, "__init__", True),
    "plan.global": (dcp.StorageWriter, "prepare_global_plan", True),
    "composed": (dcp.Shard, "compose", True),
    "sent": (_files, "save_buffer", True),
    "accepted": (saves.Ticket, "wait_accepted", True),
    "written": (dcp.StorageWriter, "write_data", True),
    "finish.before": (dcp.StorageWriter, "finish", False),
    "metadata.sent": (_files, "save_bytes", True),
    "commit.before": (_files, "commit", False),
    "commit.sent": (_files, "commit", True),
    "commit.accepted": (dcp.StorageWriter, "_commit", True),
    "commit.durable": (partials.Partial, "committed", False),
    "finish.after": (dcp.StorageWriter, "finish", True),
}


def full(step: int) -> torch.Tensor:
    return torch.arange(130.0).view(65, 2) + 1000 * step


def state(step: int, mesh: Any, world: int) -> dict[str, Any]:
    return {
        "sharded": distribute_tensor(full(step), mesh, [Shard(0)]),
        "replicated": distribute_tensor(full(step) + 1, mesh, [Replicate()]),
        "plain": torch.full((1000,), float(step)),
        "step": step,
        **{f"of{rank}": torch.full((20000,), float(step)) for rank in range(world) if rank == dist.get_rank()},
    }


@contextlib.contextmanager
def killed_at(point: str, kill: Callable[[], None]) -> Iterator[None]:
    owner, name, is_after = POINTS[point]
    real = getattr(owner, name)

    def with_point(*arguments: Any, **named: Any) -> Any:
        if not is_after:
            kill()
        found = real(*arguments, **named)
        if is_after:
            kill()
        return found

    setattr(owner, name, with_point)
    yield
    setattr(owner, name, real)


def pattern(name: str, shape: Any) -> torch.Tensor:
    """The values that a tensor of this name has."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator)


def model_state(kind: str, world: int, fill: Callable[[str, Any], torch.Tensor]) -> dict[str, Any]:
    """The state of a model and its optimizer: FSDP2, with replicas (HSDP), tensor parallel, or both (2D)."""
    model = torch.nn.Sequential(torch.nn.Linear(65, 130), torch.nn.ReLU(), torch.nn.Linear(130, 7))
    layers = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        parallelize_module(model, init_device_mesh("cpu", (world,)), layers)
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], layers)
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    made = {"model": of_model, "optimizer": of_optimizer}
    for name, value in tensors(made):
        whole = fill(name, value.shape).to(value.dtype)
        if isinstance(value, DTensor):
            whole = distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None)
        value.detach().copy_(whole)
    return made


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from tensors(each, f"{name}.{key}")
    elif isinstance(value, list):
        for key, each in enumerate(value):
            yield from tensors(each, f"{name}.{key}")
    elif isinstance(value, torch.Tensor):
        yield name, value


def save_model(job: dict[str, Any]) -> None:
    for step in range(3):  # The later ones have a cached plan, and replace the checkpoint.
        made = model_state(job["kind"], job["world"], pattern)
        made |= {"step": step, "plain": torch.arange(5) + step, f"of{dist.get_rank()}": b"bytes"}
        dcp.save(made, job["path"]).wait()


def load_model(job: dict[str, Any]) -> None:
    for by in (dcp.load, lambda state, path: torch_dcp.load(state, checkpoint_id=path)):
        found = model_state(job["kind"], job["world"], lambda name, shape: torch.zeros(tuple(shape)))
        found |= {"step": 0, "plain": torch.zeros(5, dtype=torch.int64), "of0": b""}
        by(found, job["path"])
        assert found["step"] == 2 and torch.equal(found["plain"], torch.arange(5) + 2) and found["of0"] == b"bytes"
        for name, value in tensors({"model": found["model"], "optimizer": found["optimizer"]}):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(whole, pattern(name, whole.shape)), name


class Raising(torch_dcp.DefaultSavePlanner):
    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def create_local_plan(self) -> Any:
        if self._at == "local_plan":
            raise ValueError("the planner has failed")
        return super().create_local_plan()

    def resolve_data(self, write_item: Any) -> Any:
        if self._at == "resolve":
            raise ValueError("the planner has failed")
        if self._at == "interrupted":
            raise KeyboardInterrupt
        return super().resolve_data(write_item)


def raises(job: dict[str, Any]) -> None:
    made = state(9, init_device_mesh("cpu", (job["world"],)), job["world"])
    is_it = dist.get_rank() == job["rank"]
    if is_it and job["at"] == "copy":
        made["lock"] = threading.Lock()
    planner = Raising(job["at"]) if is_it else torch_dcp.DefaultSavePlanner()
    try:
        ticket = dcp.save(made, job["path"], planner=planner)
    except TypeError:
        # A program that continues tells the others.
        dcp._saving.shutdown()
        raise
    ticket.wait()


def in_a_process(job: dict[str, Any]) -> None:
    # The process starts anew, and asks for these.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    kind = torch_dcp.state_dict_saver.AsyncCheckpointerType.PROCESS
    for step in (1, 2):
        made = {"w": torch.full((1000,), float(step)), "step": step}
        writer = dcp.StorageWriter(job["path"])
        future: Any = torch_dcp.async_save(made, storage_writer=writer, async_checkpointer_type=kind)
        made["w"].zero_()
        future.result()


def run(rank: int, job: dict[str, Any], ranks: list[int]) -> None:
    os.environ["NOETHER_WRITER_SOCKET"] = job["sockets"][rank % len(job["sockets"])]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['meet']}",
        rank=rank,
        world_size=job["world"],
        timeout=datetime.timedelta(seconds=60),
    )

    def kill() -> None:
        if job.get("kill") in (rank, "all"):
            for pid in ranks if job["kill"] == "all" else []:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    point = killed_at(job["point"], kill) if job.get("point") else contextlib.nullcontext()
    with point:
        if job["what"] in globals():
            globals()[job["what"]](job)
            return
        path = job["path"]
        made = state(job["step"], init_device_mesh("cpu", (job["world"],)), job["world"])
        if job["what"] == "save":
            dcp.save(made, path).wait()
        elif job["what"] == "dcp.save":
            torch_dcp.save(made, storage_writer=dcp.StorageWriter(path))
        else:
            future: Any = torch_dcp.async_save(made, storage_writer=dcp.StorageWriter(path))
            future.result()


def fork(job: dict[str, Any]) -> list[Any]:
    """What each rank has ended with: None, or words."""
    # Each has the process ids of those before it; the first one waits until all are there, and so do the others.
    gate = os.pipe()
    said = [os.pipe() for _ in range(job["world"])]
    ranks: list[int] = []
    for rank in range(job["world"]):
        if (pid := os.fork()) == 0:
            os.close(gate[1])
            known = os.read(gate[0], 4096)
            code = 1
            try:
                run(rank, job, json.loads(known.split(b"\n")[0]))
                code = 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error))[-1500:]
                os.write(said[rank][1], text.encode())
            os._exit(code)
        ranks.append(pid)
    for _ in ranks:
        os.write(gate[1], (json.dumps(ranks) + "\n").ljust(4096).encode())
    Path(job["pids"]).write_text(json.dumps(ranks))
    found: list[Any] = []
    for pid, (reader, writer) in zip(ranks, said, strict=True):
        _, status = os.waitpid(pid, 0)
        os.close(writer)
        text = os.read(reader, 65536).decode()
        os.close(reader)
        code = os.waitstatus_to_exitcode(status)
        found.append(None if code == 0 else text or f"signal {-code}")
    os.close(gate[0])
    os.close(gate[1])
    return found


class Server:
    """Runs jobs, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rounds = 0
        # The tests start the daemons, also those after one that has died: a rank that finds none waits for that.
        waiting = directory / "waits"
        waiting.write_text("#!/bin/sh\nexit 0\n")
        waiting.chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "NOETHER_WRITER_EXIT_TIMEOUT": "1", "NOETHER_WRITER_DAEMON": str(waiting)},
        )

    @property
    def pids(self) -> Path:
        """The file that has the numbers of the ranks' processes."""
        return self.directory / "pids"

    def run(self, what: str, path: Path, world: int, sockets: list[str], **more: Any) -> list[Any]:
        """What each rank has ended with: None, `signal 9`, or the words of an exception."""
        self.rounds += 1
        meet = self.directory / f"meet{self.rounds}"
        job = {"what": what, "world": world, "path": str(path), "meet": str(meet), "sockets": sockets}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job | {"pids": str(self.pids)} | more) + "\n")
        self.process.stdin.flush()
        found: list[Any] = json.loads(self.process.stdout.readline())
        meet.unlink(missing_ok=True)
        return found

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
