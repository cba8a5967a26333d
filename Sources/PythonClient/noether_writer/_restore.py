# SPDX-License-Identifier: Apache-2.0
"""Files from memory: the daemon keeps an image of the newest ones that it has written, and hands a descriptor of it to
whoever loads such a file on the same node."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any

from . import ending, frames
from ._conversation import Conversation
from .errors import NoetherWriterError
from .session import ANSWER_SECONDS

# The daemon has no images of smaller files.
_LEAST_BYTES = 1 << 20


def image_of(file: int) -> int | None:
    """Returns a descriptor of the image of an open file, which the caller closes, or None if the daemon has none, is
    too old, or does not run.

    The daemon gives only the image of this very file, unchanged since it was written. It cannot be changed.
    """
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size < _LEAST_BYTES:
        return None
    # The file is there: whatever is wrong with the daemon, it can be read.
    with contextlib.suppress(NoetherWriterError, OSError), Conversation() as daemon:
        if "restore" not in daemon.welcome.get("capabilities", ()):
            return None
        image = daemon.ask_for_descriptor(frames.RESTORE, _stamp(found), ending.within(ANSWER_SECONDS))
        if image is not None and not _is_whole(image, found.st_size):
            os.close(image)
            return None
        return image
    return None


def _stamp(found: os.stat_result) -> dict[str, Any]:
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "modified_ns": found.st_mtime_ns,
        "changed_ns": found.st_ctime_ns,
    }


def _is_whole(image: int, size: int) -> bool:
    found = os.fstat(image)
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def path_of(image: int) -> str:
    """For whoever opens files by their names."""
    return f"/proc/self/fd/{image}"
