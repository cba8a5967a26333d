# SPDX-License-Identifier: Apache-2.0
"""How much memory the job of this process may still take. Buffers are charged to the job (the control group) of the
trainer that touches them first, and a job that passes its limit is killed.

Sources: cgroups(7), and the kernel's admin-guide: cgroup-v2 ("Memory Interface Files"), cgroup-v1/memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

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


def _room(folder: str, version: int) -> int | None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (_number(f"{folder}/{name}") for name in names)
    if limit is None or used is None or limit >= _NONE_BYTES:
        return None
    return max(0, limit - max(0, used - _reclaimable(f"{folder}/memory.stat", "" if version == 2 else "total_")))


def _reclaimable(path: str, prefix: str) -> int:
    """The page cache of files. Shared memory is not on these lists: nothing can be given back of it."""
    wanted = (f"{prefix}active_file", f"{prefix}inactive_file")
    return sum(int(line.split()[1]) for line in _lines("", path) if line.split()[0] in wanted)


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
