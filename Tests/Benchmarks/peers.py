# SPDX-License-Identifier: Apache-2.0
"""What people use otherwise, each in the way its documentation shows, made durable: a file that was not fsynced
is no checkpoint. Each takes a state dict, on the CPU or on a device, and a path.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class TorchSave:
    name = "torch.save + fsync"
    # Whether a save may begin while the one before is not durable.
    queues = False
    # What does not work with each torch is measured where it does.
    may_fail = False

    def begin(self, state: State, path: Path) -> Callable[[], object]:
        """Returns when the trainer may go on; what it returns waits until the checkpoint is durable."""
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def clear(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def save(self, state: State, path: Path) -> tuple[float, float]:
        """(seconds that the trainer stood still, seconds until durable)"""
        self.clear(path)
        start = time.perf_counter()
        wait = self.begin(state, path)
        stall = time.perf_counter() - start
        wait()
        return stall, time.perf_counter() - start

    def load(self, state: State, path: Path) -> State:
        loaded: State = torch.load(path, weights_only=True, mmap=True)
        return loaded

    def close(self) -> None:
        pass


class CloneAndThread(TorchSave):
    name = "clone + torch.save in a thread"

    def begin(self, state: State, path: Path) -> Callable[[], object]:
        clone = {key: value.detach().to("cpu", copy=True) for key, value in state.items()}
        thread = threading.Thread(target=super().begin, args=(clone, path))
        thread.start()
        return thread.join


class Safetensors(TorchSave):
    name = "safetensors + fsync"

    def begin(self, state: State, path: Path) -> Callable[[], object]:
        from safetensors.torch import save_file

        save_file(state, path)
        _sync(path)
        return lambda: None

    def load(self, state: State, path: Path) -> State:
        from safetensors.torch import load_file

        loaded: State = load_file(path)
        return loaded


class DistributedCheckpoint(TorchSave):
    """torch.distributed.checkpoint.async_save, its stager kept and used again."""

    def __init__(self, *, process: bool, pinned: bool = False) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.name = "DCP async_save, process, shared memory" if process else "DCP async_save, thread"
        if pinned:
            self.name = "DCP async_save, pinned staging"
        self.may_fail = pinned
        if not dist.is_initialized():
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            store = dist.HashStore() if not process else dist.TCPStore("127.0.0.1", 0, is_master=True)
            if process:
                os.environ["MASTER_PORT"] = str(store.port)
            dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        # Made by the first save, which may find that this torch cannot.
        self._make_stager = lambda: DefaultStager(StagingOptions(pinned, process, pinned, pinned))
        self._stager: DefaultStager | None = None

    def clear(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def begin(self, state: State, path: Path) -> Callable[[], object]:
        import torch.distributed.checkpoint as dcp

        if self._stager is None:
            self._stager = self._make_stager()
        future: Any = dcp.async_save(
            state, checkpoint_id=str(path), async_checkpointer_type=self._type, async_stager=self._stager
        )
        if hasattr(future, "staging_completion"):
            future.staging_completion.result()
            future = future.upload_completion
        wait: Callable[[], object] = future.result
        return wait

    def load(self, state: State, path: Path) -> State:
        import torch.distributed.checkpoint as dcp

        loaded = {key: torch.zeros_like(value) for key, value in state.items()}
        dcp.load(loaded, checkpoint_id=str(path))
        return loaded

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


def device_peers() -> list[TorchSave]:
    return [
        TorchSave(),
        CloneAndThread(),
        DistributedCheckpoint(process=False),
        DistributedCheckpoint(process=False, pinned=True),
    ]


def all_peers() -> list[TorchSave]:
    return [
        TorchSave(),
        CloneAndThread(),
        Safetensors(),
        DistributedCheckpoint(process=True),
        DistributedCheckpoint(process=False),
    ]
