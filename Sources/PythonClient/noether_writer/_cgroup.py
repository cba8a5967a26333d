# SPDX-License-Identifier: Apache-2.0
"""How much memory the job of this process may still take. Buffers are charged to the job (the control group) of the
trainer that touches them first, and a job that passes its limit is killed.

Sources: cgroups(7), and the kernel's admin-guide: cgroup-v2 ("Memory Interface Files"), cgroup-v1/memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

# How long one process waits for another one of its job to take what it has found free.
_TURN_SECONDS = 10.0
_TURN_LOOK_SECONDS = 0.002
# In cgroup v1, a group without a limit reports the highest possible number of pages, which is above this.
_NONE_BYTES = 1 << 60


def room(root: str = "/") -> int | None:
    """Returns the bytes that this process's control groups leave free, or None if none of them has a limit.

    What the kernel could give back at once (the page cache of files) counts as free. Each group above counts too.

    Args:
        root: below which /proc and the mount points are looked for.
    """
    rooms = [found for folder, version in _folders(root) if (found := _room(folder, version)) is not None]
    return min(rooms, default=None)


def shared(root: str = "/") -> int:
    """Returns the bytes of shared memory in the outermost group that has a limit: other processes of the job may give
    some of them back."""
    limited = _limited(root)
    if not limited:
        return 0
    folder, version = limited[-1]
    name = "shmem" if version == 2 else "total_shmem"
    return _sum(f"{folder}/memory.stat", (name,))


@contextlib.contextmanager
def one_at_a_time(root: str = "/") -> Iterator[None]:
    """While one process of the job looks at what is free and takes of it, the others wait, but not for ever: one that
    was stopped must not hold them up."""
    limited = _limited(root)
    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError):
            if limited:
                # A lock on the group's own file goes with its process, and leaves nothing behind.
                file = files.enter_context(open(f"{limited[-1][0]}/{_LIMITS[limited[-1][1]][0]}"))
                _lock(file.fileno(), time.monotonic() + _TURN_SECONDS)
        yield


def _lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_TURN_LOOK_SECONDS)


def _limited(root: str) -> list[tuple[str, int]]:
    return [(folder, version) for folder, version in _folders(root) if _limit(folder, version) is not None]


def _folders(root: str) -> Iterator[tuple[str, int]]:
    """The directories of this process's memory groups, from its own up to the highest that can be seen, and the
    version of their files."""
    for hierarchy, path in _groups(root):
        for mount, mounted, is_ours in _mounts(root, hierarchy):
            if not is_ours:
                continue
            below = path[len(mounted) :] if mounted != "/" and path.startswith(mounted) else path
            folder = root.rstrip("/") + mount
            # From inside of a namespace, the path of a group that lies outside cannot be followed.
            inner = "" if "/.." in below or not os.path.isdir(folder + below) else below.rstrip("/")
            while True:
                yield folder + inner, 2 if hierarchy == "" else 1
                if not inner:
                    break
                inner = inner.rpartition("/")[0]
            break


def _groups(root: str) -> Iterator[tuple[str, str]]:
    """("" for version 2 or "memory" for version 1, the path of the group)."""
    for line in _lines(root, "/proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield "memory", path
        elif number == "0" and not controllers:
            yield "", path


def _mounts(root: str, hierarchy: str) -> Iterator[tuple[str, str, bool]]:
    """(where it is mounted, which part of the hierarchy, whether it is this hierarchy)."""
    for line in _lines(root, "/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        part, mount = fields.split(" ")[3:5]
        if hierarchy == "":
            yield mount, part, kind == "cgroup2"
        else:
            yield mount, part, kind == "cgroup" and hierarchy in options.split(" ")[-1].split(",")


# What a group may have, and what it has.
_LIMITS = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


def _limit(folder: str, version: int) -> int | None:
    limit = _number(f"{folder}/{_LIMITS[version][0]}")
    return limit if limit is not None and limit < _NONE_BYTES else None


def _room(folder: str, version: int) -> int | None:
    limit, used = _limit(folder, version), _number(f"{folder}/{_LIMITS[version][1]}")
    if limit is None or used is None:
        return None
    return max(0, limit - max(0, used - _reclaimable(f"{folder}/memory.stat", "" if version == 2 else "total_")))


def _reclaimable(path: str, prefix: str) -> int:
    """The page cache of files. Shared memory is not on these lists: nothing can be given back of it."""
    return _sum(path, (f"{prefix}active_file", f"{prefix}inactive_file"))


def _sum(path: str, names: tuple[str, ...]) -> int:
    return sum(int(line.split()[1]) for line in _lines("", path) if line.split()[0] in names)


def _number(path: str) -> int | None:
    """None: there is no such file, or it says "max"."""
    text = next(iter(_lines("", path)), "")
    return int(text) if text.isdecimal() else None


def _lines(root: str, path: str) -> list[str]:
    try:
        with open(root.rstrip("/") + path) as file:
            return file.read().splitlines()
    except OSError:
        return []
