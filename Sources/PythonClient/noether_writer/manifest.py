# SPDX-License-Identifier: Apache-2.0
"""The manifest of a sharded checkpoint: the length and the checksum of each of its files, and of each item in them.
Nothing here needs torch."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path
from typing import Any

from . import _core

NAME = ".noether_writer_manifest.json"
METADATA = ".metadata"
_PART = 1 << 20
_TRAILING_NUMBER = re.compile(r"(.*?)(\d+)", re.DOTALL)


def encoded(files: dict[str, Any]) -> bytes:
    return json.dumps({"version": 1, "checksum": "crc32", "files": files}).encode()


def decoded(text: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not what `encoded` makes.
    """
    files: dict[str, Any] = json.loads(text)["files"]
    for entry in files.values():
        numbers = [entry["length"], entry["crc32"], *(number for item in entry["items"] for number in item)]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("something in it is not a number")
    return files


def damage(directory: Path) -> str | None:
    """What is wrong with a sharded checkpoint, in words; None: nothing. All of it is read, and made durable. One that
    another writer has made has no manifest: of that, nothing is known to be wrong.

    Raises:
        FileNotFoundError: it is not there.
    """
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            with open(os.open(NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=opened), "rb") as file:
                files = decoded(file.read())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{NAME} cannot be read: {error}"
        memory = bytearray(_PART)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for name, entry in files.items():
            crc, length = 0, 0
            try:
                with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=opened), "rb", buffering=0) as part:
                    while count := part.readinto(memory):
                        crc = _core.crc32(address, count, crc)
                        length += count
                    os.fsync(part.fileno())
            except FileNotFoundError:
                return f"{name} is missing"
            if (length, crc) != (entry["length"], entry["crc32"]):
                return f"{name} is not what was saved"
        os.fsync(opened)
        return None
    finally:
        os.close(opened)


def series(name: str) -> tuple[str, int | None]:
    """What the names of checkpoints of one training have in common, and the number that they have not: `step-` and 500
    of `step-500`."""
    match = _TRAILING_NUMBER.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def older(place: str, keep: int) -> list[str]:
    """The complete checkpoints beside this one, of the same series and with smaller numbers, without the newest
    `keep - 1` of these."""
    parent, name = os.path.split(place)
    start, number = series(name)
    if number is None:
        return []
    found = []
    for other in os.listdir(parent):
        others_start, others = series(other)
        path = os.path.join(parent, other)
        if others_start == start and others is not None and others < number and is_sharded(path):
            found.append((others, path))
    found.sort()
    return [path for _, path in found[: max(0, len(found) - (keep - 1))]]


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether it is a sharded checkpoint, and not the directory in which one is made."""
    return not os.path.basename(path).startswith(".") and os.path.isfile(os.path.join(path, METADATA))
