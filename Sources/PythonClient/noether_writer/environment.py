# SPDX-License-Identifier: Apache-2.0
"""Reads the variables that tune this library. The error for a mistyped one says what is expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TypeVar

Number = TypeVar("Number", int, float)


def seconds(name: str, default: float) -> float:
    """
    Raises:
        ValueError: the variable is not a number.
    """
    return _number(name, default, float, "a number of seconds")


def count(name: str, default: int, what: str = "a number of bytes, in digits") -> int:
    """
    Raises:
        ValueError: the variable is not a whole number.
    """
    return _number(name, default, int, what)


def choice(name: str, default: str, known: Collection[str]) -> str:
    """
    Raises:
        ValueError: the variable is not one of `known`.
    """
    text = os.environ.get(name) or default
    if text not in known:
        raise ValueError(f"{name} must be {' or '.join(known)}, not {text!r}")
    return text


def _number(name: str, default: Number, read: Callable[[str], Number], what: str) -> Number:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = read(text)
    except ValueError:
        value = read("-1")
    if not value >= 0:
        raise ValueError(f"{name} must be {what}, not {text!r}")
    return value
