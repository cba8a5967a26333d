# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and scalar logs of PyTorch training, written outside the trainer by noether-writerd."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    # In a form that an older Python can read.
    raise ImportError("noether_writer needs Python 3.10 or newer; this is " + sys.version.split()[0])

from ._checkpoints import Checkpoint, best, checkpoints, latest
from ._files import load, remove, save, wait
from .checkpoint_writer import CheckpointWriter
from .errors import NoetherWriterError
from .log_writer import LogWriter
from .noether import patch_noether
from .run import Run, Series, log_update, open_run
from .saves import Target, Ticket
from .subscription import Subscription, subscribe

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "LogWriter",
    "NoetherWriterError",
    "Run",
    "Series",
    "Subscription",
    "Target",
    "Ticket",
    "best",
    "checkpoints",
    "latest",
    "load",
    "log_update",
    "open_run",
    "patch_noether",
    "remove",
    "save",
    "subscribe",
    "wait",
]


def __getattr__(name: str) -> object:
    if name == "Values":
        import warnings

        warnings.warn("noether_writer.Values is named Series now", DeprecationWarning, stacklevel=2)
        return Series
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
