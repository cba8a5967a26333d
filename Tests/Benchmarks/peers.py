# SPDX-License-Identifier: Apache-2.0
"""What people use otherwise, each in the way its documentation shows, made durable: a file that was not fsynced
is no checkpoint. Each takes a state dict and a path, and returns (seconds that the trainer stood still, seconds until
durable).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
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

    def save(self, state: State, path: Path) -> tuple[float, float]:
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        taken = time.perf_counter() - start
        return taken, taken

    def load(self, state: State, path: Path) -> State:
        loaded: State = torch.load(path, weights_only=True, mmap=True)
        return loaded

    def close(self) -> None:
        pass


class CloneAndThread(TorchSave):
    name = "clone + torch.save in a thread"

    def save(self, state: State, path: Path) -> tuple[float, float]:
        start = time.perf_counter()
        clone = {key: value.clone() for key, value in state.items()}
        thread = threading.Thread(target=super().save, args=(clone, path))
        thread.start()
        stall = time.perf_counter() - start
        thread.join()
        return stall, time.perf_counter() - start


class Safetensors(TorchSave):
    name = "safetensors + fsync"

    def save(self, state: State, path: Path) -> tuple[float, float]:
        from safetensors.torch import save_file

        path.unlink(missing_ok=True)
        start = time.perf_counter()
        save_file(state, path)
        _sync(path)
        taken = time.perf_counter() - start
        return taken, taken

    def load(self, state: State, path: Path) -> State:
        from safetensors.torch import load_file

        loaded: State = load_file(path)
        return loaded


class DistributedCheckpoint(TorchSave):
    """torch.distributed.checkpoint.async_save, its stager kept and used again."""

    def __init__(self, *, process: bool) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.name = "DCP async_save, process, shared memory" if process else "DCP async_save, thread"
        if not dist.is_initialized():
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            store = dist.HashStore() if not process else dist.TCPStore("127.0.0.1", 0, is_master=True)
            if process:
                os.environ["MASTER_PORT"] = str(store.port)
            dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self._stager = DefaultStager(StagingOptions(False, process, False, False))

    def save(self, state: State, path: Path) -> tuple[float, float]:
        import torch.distributed.checkpoint as dcp

        shutil.rmtree(path, ignore_errors=True)
        start = time.perf_counter()
        future: Any = dcp.async_save(
            state, checkpoint_id=str(path), async_checkpointer_type=self._type, async_stager=self._stager
        )
        if hasattr(future, "staging_completion"):
            future.staging_completion.result()
            stall = time.perf_counter() - start
            future.upload_completion.result()
        else:
            stall = time.perf_counter() - start
            future.result()
        return stall, time.perf_counter() - start

    def load(self, state: State, path: Path) -> State:
        import torch.distributed.checkpoint as dcp

        loaded = {key: torch.zeros_like(value) for key, value in state.items()}
        dcp.load(loaded, checkpoint_id=str(path))
        return loaded

    def close(self) -> None:
        self._stager.close()


def all_peers() -> list[TorchSave]:
    return [
        TorchSave(),
        CloneAndThread(),
        Safetensors(),
        DistributedCheckpoint(process=True),
        DistributedCheckpoint(process=False),
    ]
