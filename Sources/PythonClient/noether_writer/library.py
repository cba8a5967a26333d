"""Finds libnoether-writer-copy, what this client does in C: the copying of snapshots, the reading of many tensors.
Without it all of it works, more slowly."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from . import locate
from .errors import DaemonNotFound

NAME = "libnoether-writer-copy.so"


@functools.cache
def load(kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL | None:
    """In this package (the wheel), beside the daemon (a build), or in lib/ (an installation).

    Args:
        kind: CDLL lets go of the GIL in each call, PyDLL keeps it.
    """
    if os.environ.get("NOETHER_WRITER_COPY") == "python":
        return None
    folders = [Path(__file__).parent / "bin"]
    try:
        beside = Path(locate.daemon_executable()).resolve().parent
        folders += [beside, beside.parent / "lib" / "noether-writer"]
    except DaemonNotFound:
        pass
    for folder in folders:
        try:
            return kind(str(folder / NAME))
        except OSError:
            continue
    return None
