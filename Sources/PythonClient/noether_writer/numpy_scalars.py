# SPDX-License-Identifier: Apache-2.0
"""numpy's scalars as Python's, and their opcodes in a pickle of protocol 2. numpy itself is never imported here."""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any


def kinds() -> Mapping[type, Callable[[Any], Any]]:
    """How each type of numpy's scalars that has an equal in Python becomes it; empty as long as nobody has imported
    numpy. Not among them: longdouble (it would lose digits), dates, records, and subclasses of users."""
    return _kinds() if "numpy" in sys.modules else {}


@functools.cache
def _kinds() -> Mapping[type, Callable[[Any], Any]]:
    import numpy

    found: dict[type, Callable[[Any], Any]] = {numpy.bool_: bool, numpy.str_: str.__str__, numpy.bytes_: _bytes}
    for kind in numpy.sctypeDict.values():
        if issubclass(kind, numpy.longdouble | numpy.clongdouble | numpy.timedelta64):
            continue
        if issubclass(kind, numpy.integer):
            found[kind] = int
        elif issubclass(kind, numpy.floating):
            found[kind] = float
        elif issubclass(kind, numpy.complexfloating):
            found[kind] = complex
    return found


def _bytes(value: bytes) -> bytes:
    # numpy's own way to Python takes zeros at the end for padding.
    return bytes.__getitem__(value, slice(None))


def opcodes(value: bool | int | float | complex | str | bytes) -> bytes:
    """What puts one of Python's own scalars on the stack, without a place in the memo."""
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, complex):
        return b"c__builtin__\ncomplex\n" + opcodes(value.real) + opcodes(value.imag) + b"\x86R"
    if isinstance(value, str):
        return text(value)
    return b"c_codecs\nencode\n" + text(value.decode("latin1")) + text("latin1") + b"\x86R"


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    data = value.to_bytes(size, "little", signed=True)
    # The shortest one: -2**63 needs no sign byte of its own.
    if value < 0 and size > 1 and data[-1] == 0xFF and data[-2] & 0x80:
        data = data[:-1]
    return (b"\x8a" + bytes((len(data),)) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data
