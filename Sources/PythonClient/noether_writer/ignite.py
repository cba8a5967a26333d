# SPDX-License-Identifier: Apache-2.0
"""For PyTorch-Ignite: `SaveHandler`, in the place of `ignite.handlers.DiskSaver`.

from ignite.handlers import Checkpoint
from noether_writer.ignite import SaveHandler

handler = Checkpoint(to_save, SaveHandler("models"), n_saved=2)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.handlers.checkpoint import BaseSaveHandler

from . import _files

__all__ = ["SaveHandler"]


class SaveHandler(BaseSaveHandler):
    """Saves checkpoints through the daemon. A save returns after one memory copy.

    Ignite removes the oldest checkpoint before it saves the newest. Here the file goes only after the new one is
    durable: there is never a moment without a checkpoint.

    Args:
        dirname: of the files; it is made if it is missing.
        require_empty: whether files that end with `.pt` may not be there yet, as for DiskSaver.
        save_on_rank: the rank that saves.
        snapshot: `copy` or `overlap`, as for `noether_writer.save`.

    Raises:
        ValueError: there are such files, and `require_empty` is set.
    """

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        *,
        require_empty: bool = True,
        save_on_rank: int = 0,
        snapshot: str | None = None,
    ) -> None:
        self.dirname = Path(dirname).expanduser()
        self.save_on_rank = save_on_rank
        self._snapshot = snapshot
        self._removed: list[Path] = []
        if idist.get_rank() != save_on_rank:
            return
        self.dirname.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in self.dirname.iterdir() if path.suffix == ".pt")
        if require_empty and found:
            raise ValueError(
                f"{self.dirname} holds {', '.join(found[:3])} already: choose another directory, or pass "
                "require_empty=False"
            )

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves `checkpoint` as `dirname/filename`."""
        if idist.get_rank() != self.save_on_rank:
            return
        place = self.dirname / filename
        _files.save(checkpoint, place, self._snapshot)
        removed, self._removed = self._removed, []
        for path in removed:
            if path != place:
                _files.remove(path, after=[place])

    def remove(self, filename: str) -> None:
        """Removes `dirname/filename` after the next checkpoint is durable."""
        if idist.get_rank() == self.save_on_rank:
            self._removed.append(self.dirname / filename)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything is durable, and raises what failed."""
        _files.wait(timeout)
