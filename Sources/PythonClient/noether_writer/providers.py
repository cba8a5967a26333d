# SPDX-License-Identifier: Apache-2.0
"""What the drop-ins ask Noether's objects: where a run's files go, and which rank this process is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .run import Run, distributed_place


def is_rank0(module: str) -> bool:
    """Whether this is rank 0 for Noether: its own function decides if Noether is there, or else torch.distributed if a
    job is set up.

    Args:
        module: the module of the class of Noether that asks: `checkpoint_writer` or `log_writer`.
    """
    asked = getattr(sys.modules.get(f"noether.core.writers.{module}"), "is_rank0", None)
    if asked is not None:
        return bool(asked())
    return (distributed_place() or (0, 1))[0] == 0


def open_provided(path_provider: Any, *, log: bool) -> Run:
    """Opens a run in the directory that a PathProvider of Noether, or an object like it, names."""
    run_id = path_provider.run_id
    root = getattr(path_provider, "output_root", None)
    if root is not None:
        stage = getattr(path_provider, "stage_name", None)
        return Run(root, run_id, stage, bool(getattr(path_provider, "debug", False)), log=log, rank=0)
    if log and hasattr(path_provider, "basetracker_entries_uri"):
        directory = Path(path_provider.basetracker_entries_uri).parent.parent
    else:
        directory = Path(path_provider.checkpoint_path).parent
    if directory.name == run_id:
        return Run(directory.parent, run_id, log=log, rank=0)
    if directory.parent.name == run_id:
        return Run(directory.parent.parent, run_id, directory.name, log=log, rank=0)
    raise ValueError(f"the path provider must have output_root, or paths below a folder named {run_id}")
