# SPDX-License-Identifier: Apache-2.0
"""Names that become path components, looked at before anything is sent: the daemon refuses the same ones."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

from .errors import RefusedName
from .frames import kind_of

NAME_BYTES = 255


def component(name: Any, what: str) -> str:
    """`name`, where it can be one component of a path.

    Raises:
        RefusedName: with words for what is wrong with it.
    """
    if not isinstance(name, str):
        raise RefusedName(f"{what} is {kind_of(name)}, and a text is wanted; nothing was written")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise _refused(name, what, "holds half of a surrogate pair") from None
    if size > NAME_BYTES:
        raise _refused(name, what, f"has {size} bytes; at most {NAME_BYTES}")
    if not name:
        raise _refused(name, what, "is empty")
    if name in (".", ".."):
        raise _refused(name, what, "is a directory reference")
    if "/" in name:
        raise _refused(name, what, "holds a slash")
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise _refused(name, what, "holds a control character")
    return name


def path(where: Any, what: str) -> str:
    """`where` as an absolute path.

    Raises:
        RefusedName: it, or the working directory that it begins at, can't be sent.
    """
    try:
        text: str | bytes = os.fspath(where)
    except TypeError:
        raise RefusedName(f"{what} is {kind_of(where)}, and a path is wanted; nothing was written") from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    absolute = text if "\0" in text else str(Path(text).absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise RefusedName(
            f"{what} {absolute!a} is not UTF-8, and the protocol's paths are: choose another directory, or a "
            "symbolic link to it; nothing was written"
        ) from None
    if "\0" in text:
        raise RefusedName(f"{what} {text!r} holds a NUL; nothing was written")
    return absolute


def _refused(name: str, what: str, reason: str) -> RefusedName:
    shown = repr(name if len(name) <= 64 else name[:64] + "...")
    return RefusedName(f"{what} {shown} {reason}; it becomes one part of a path, and nothing was written")
