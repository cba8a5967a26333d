# SPDX-License-Identifier: Apache-2.0
"""Checks names that become parts of paths, before anything is sent. The daemon refuses the same ones."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

from .errors import RefusedName
from .frames import kind_of

NAME_BYTES = 255


def component(name: Any, what: str) -> str:
    """Returns `name` if it can be one component of a path.

    Raises:
        RefusedName: the message says what is wrong with the name.
    """
    if not isinstance(name, str):
        raise RefusedName(f"{what} is {kind_of(name)}, and must be a text; nothing was written")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise _refused(name, what, "holds half of a surrogate pair") from None
    if size > NAME_BYTES:  # guard: client-names-length (never)
        raise _refused(name, what, f"has {size} bytes, and at most {NAME_BYTES} are possible")
    if not name:
        raise _refused(name, what, "is empty")
    if name in (".", ".."):  # guard: client-names-dots (never)
        raise _refused(name, what, "is a directory reference")
    if "/" in name:  # guard: client-names-slash (never)
        raise _refused(name, what, "holds a slash")
    # guard: client-names-control (never)
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise _refused(name, what, "holds a control character")
    # For a member of a text enumeration, str() would give the name of the member, not its text.
    return str.__str__(name)


def path(where: Any, what: str) -> str:
    """`where` as an absolute path.

    Raises:
        RefusedName: the path, or the working directory that it is relative to, cannot be sent.
    """
    try:
        text: str | bytes = os.fspath(where)
    except TypeError:
        raise RefusedName(f"{what} is {kind_of(where)}, and must be a path; nothing was written") from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    absolute = text if "\0" in text else str(Path(text).absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise RefusedName(
            f"{what} {absolute!a} is not UTF-8, and paths must be: choose another directory, or a symbolic link to it; "
            "nothing was written"
        ) from None
    if "\0" in text:
        raise RefusedName(f"{what} {text!r} holds a NUL; nothing was written")
    return absolute


def _refused(name: str, what: str, reason: str) -> RefusedName:
    shown = repr(name if len(name) <= 64 else name[:64] + "...")
    return RefusedName(f"{what} {shown} {reason}; it becomes one part of a path. Nothing was written; choose another")
