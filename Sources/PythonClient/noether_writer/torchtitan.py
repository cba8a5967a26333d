# SPDX-License-Identifier: Apache-2.0
"""For torchtitan: `CheckpointManager`, by its configuration.

from noether_writer.torchtitan import CheckpointManager
config.checkpoint = CheckpointManager.Config(enable=True, interval=500, async_mode="async")

The files, their names, and what is loaded at the start are torchtitan's. A checkpoint has its name when it is durable
on every rank, and an older one is removed after that. Exports for Hugging Face stay torchtitan's own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.components.checkpointer.dcp import CheckpointManager as _CheckpointManager

from . import _files, dcp

__all__ = ["CheckpointManager"]

_STEP = re.compile(r"step-(\d+)")


class CheckpointManager(_CheckpointManager):  # type: ignore[misc]
    """torchtitan's CheckpointManager. In both modes that are asynchronous, the state is copied once, into memory that
    the daemon reads, before the call returns, and no process is started."""

    @dataclass(kw_only=True, slots=True)
    class Config(_CheckpointManager.Config):  # type: ignore[misc]
        """torchtitan's; `keep_latest_k` counts checkpoints that are durable."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        if self.enable:
            # In the place of one that would keep a second copy of the state in pinned memory.
            self.stager = _NoStager()

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        if to_hf:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        os.makedirs(os.path.dirname(os.path.abspath(checkpoint_id)), exist_ok=True)
        writer = dcp.StorageWriter(checkpoint_id)
        if async_mode == AsyncMode.DISABLED:
            state_dict_saver.save(state_dict, storage_writer=writer)
            return None
        future: Any = state_dict_saver.async_save(state_dict, storage_writer=writer, process_group=self.pg)
        if async_mode == AsyncMode.ASYNC:
            return future
        staged: Any = type(future)()
        staged.set_result(None)
        return AsyncSaveResponse(staging_completion=staged, upload_completion=future)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        dcp.load(state_dict, checkpoint_id)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        """Without directories in which a checkpoint is made."""
        found = _steps(folder or self.folder)
        return max((step for step, path in found if _is_complete(path)), default=-1)

    def _purge_stale_checkpoints(self) -> None:
        """The daemon removes them, in the order of the saves before."""
        if not (self.keep_latest_k > 0 and dist.get_rank() == 0):
            return
        complete = sorted((step, path) for step, path in _steps(self.folder) if _is_complete(path))
        for _, path in complete[: -self.keep_latest_k]:
            _files.remove(path, recursive=True)


class _NoStager:
    def close(self) -> None:
        pass


def _steps(folder: str) -> list[tuple[int, str]]:
    if not os.path.isdir(folder):
        return []
    return [
        (int(match[1]), os.path.join(folder, name))
        for name in os.listdir(folder)
        if not name.startswith(".") and (match := _STEP.search(name)) is not None
    ]


def _is_complete(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in (".metadata", "model.safetensors.index.json"))
