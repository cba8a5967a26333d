# SPDX-License-Identifier: Apache-2.0
"""Puts the drop-ins into the Noether framework; its users change no code."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def patch_noether() -> None:
    """Replaces `CheckpointWriter` and `LogWriter` in every module of Noether, also in those that are imported already.

    Raises:
        ImportError: Noether (PyPI: emmiai-noether) is not installed.
    """
    patch_writers(importlib.import_module("noether.core.writers"))


def patch_writers(writers: ModuleType) -> None:
    from .checkpoint_writer import CheckpointWriter
    from .log_writer import LogWriter

    for name, ours in (("CheckpointWriter", CheckpointWriter), ("LogWriter", LogWriter)):
        theirs = getattr(writers, name)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("noether.") and (vars(module).get(name) is theirs):
                setattr(module, name, ours)
