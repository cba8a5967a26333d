# SPDX-License-Identifier: Apache-2.0
"""For DeepSpeed: `CheckpointEngine`, set on an engine after `deepspeed.initialize`.

engine, *_ = deepspeed.initialize(model=model, config=config)
engine.checkpoint_engine = noether_writer.deepspeed.CheckpointEngine()
"""

from __future__ import annotations

import os
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine as _CheckpointEngine

from . import _files

__all__ = ["CheckpointEngine"]


class CheckpointEngine(_CheckpointEngine):  # type: ignore[misc]
    """Saves the files of a checkpoint through the daemon, at the same time. `save_checkpoint` returns when all files of
    this rank are durable, because DeepSpeed names the checkpoint in `latest` at once then.

    Args:
        config_params: as DeepSpeed passes it; nothing of it is used.
        snapshot: `copy` or `overlap`, as for `noether_writer.save`.
    """

    def __init__(self, config_params: Any = None, snapshot: str | None = None) -> None:
        super().__init__(config_params)
        self.name = "NoetherWriterCheckpointEngine"
        self._snapshot = snapshot

    def create(self, info: CheckpointCommitInfo) -> None:
        """Does nothing: a file takes its name when it is durable."""

    def save(self, state_dict: Any, path: str | os.PathLike[str]) -> None:
        """Saves as `noether_writer.save` does."""
        _files.save(state_dict, path, self._snapshot)

    def load(self, path: str | os.PathLike[str], map_location: Any = None) -> Any:
        """Waits for a save of that path that is on its way, then loads it."""
        return _files.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Returns True when all files of this rank are durable; raises what failed."""
        _files.wait()
        return True
