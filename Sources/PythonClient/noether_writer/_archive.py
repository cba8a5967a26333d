# SPDX-License-Identifier: Apache-2.0
"""What torch.save writes around the bytes of one tensor, for files in which many such archives follow one another.

The bytes are those that torch.save (2.13) writes into a stream, but for the 40 digits of the serialization id, which
torch.load only logs. They depend on the type, the shape and the checksum of the tensor alone.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from typing import Any

from . import _core

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_DATA, _ID = "data/0", ".data/serialization_id"
_NAMES = ("data.pkl", ".format_version", ".storage_alignment", "byteorder", _DATA, "version", _ID)
_FIXED = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little", "version": b"3\n"}
_ID_BYTES = 40


class Archive:
    """The archive of a tensor of one type and shape, which lies in memory without gaps.

    Attributes:
        head: what comes before the bytes of the tensor; it fills whole 64 bytes.
        nbytes: how many bytes the tensor has.
        length: of the whole.
    """

    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        self.nbytes: int = math.prod(shape) * dtype.itemsize
        content = {"data.pkl": _pickle(dtype, shape, self.nbytes), **_FIXED, _ID: bytes(_ID_BYTES)}
        sizes = {name: len(content[name]) if name in content else self.nbytes for name in _NAMES}
        head, tail = bytearray(), bytearray()
        # Where in the tail the checksums of the tensor and of the id are.
        places: dict[str, list[int]] = {_DATA: [], _ID: []}
        offsets: dict[str, int] = {}
        out = head
        for name, size in sizes.items():
            offset = offsets[name] = len(head) + (self.nbytes + len(tail) if out is tail else 0)
            out += _local_header(name, size, offset)
            if name == _DATA:
                out = tail
            elif name == _ID:
                self._id_at = len(out)
            out += content.get(name, b"")
            if name in places and size:
                places[name].append(len(out) + 4)
            out += _descriptor(size, zlib.crc32(content.get(name, b"")), _is_zip64(size, offset))
        start = len(head) + self.nbytes + len(tail)
        for name, size in sizes.items():
            if name in places:
                places[name].append(len(tail) + 16)
            tail += _central_entry(name, size, offsets[name], zlib.crc32(content.get(name, b"")))
        tail += _end(len(sizes), start, len(head) + self.nbytes + len(tail) - start)
        self.head, self._tail = bytes(head), bytes(tail)
        self._sums, self._ids = places[_DATA], places[_ID]
        self.length: int = len(head) + self.nbytes + len(tail)
        self._head_sum = zlib.crc32(head)

    def tail(self, crc: int) -> bytes:
        """What comes after the bytes of the tensor, if this is their checksum."""
        tail = bytearray(self._tail)
        digits = b"%020d%020d" % (self._head_sum, crc)
        tail[self._id_at : self._id_at + _ID_BYTES] = digits
        digits_crc = zlib.crc32(digits)
        for place in self._sums:
            struct.pack_into("<I", tail, place, crc)
        for place in self._ids:
            struct.pack_into("<I", tail, place, digits_crc)
        return bytes(tail)

    def checksum(self, crc: int, tail: bytes) -> int:
        """Of the whole, from the checksum of the tensor's bytes and from what comes after them."""
        both = _core.crc32_combine(self._head_sum, crc, self.nbytes)
        return _core.crc32_combine(both, zlib.crc32(tail), len(tail))


@functools.lru_cache(maxsize=8192)
def archive_of(dtype: Any, shape: tuple[int, ...]) -> Archive:
    return Archive(dtype, shape)


class _Storage:
    """Stands for the tensor's storage, of which the pickle only says what it is."""


class _Tensor:
    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


class _Pickler(pickle.Pickler):
    def __init__(self, out: Any, kind: Any, numel: int) -> None:
        super().__init__(out, protocol=2)
        self._id = ("storage", kind, "0", "cpu", numel)

    def persistent_id(self, item: Any) -> Any:
        return self._id if type(item) is _Storage else None


def _pickle(dtype: Any, shape: tuple[int, ...], nbytes: int) -> bytes:
    import torch

    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    hooks: OrderedDict[Any, Any] = OrderedDict()
    common = (_Storage(), 0, shape, tuple(reversed(strides)), False, hooks)
    kinds: Any = torch.storage._dtype_to_storage_type_map()
    utils: Any = torch._utils
    if dtype in kinds:
        kind, numel = getattr(torch, kinds[dtype]), nbytes // dtype.itemsize
        tensor = _Tensor(utils._rebuild_tensor_v2, common)
    else:
        kind, numel = torch.UntypedStorage, nbytes
        tensor = _Tensor(utils._rebuild_tensor_v3, (*common, dtype))
    out = io.BytesIO()
    _Pickler(out, kind, numel).dump(tensor)
    return out.getvalue()


# The zip archive, as torch's writer lays it out.


def _is_zip64(size: int, offset: int) -> bool:
    return size >= _LIMIT or offset >= _LIMIT


def _local_extra(size: int, offset: int) -> bytes:
    if not _is_zip64(size, offset):
        return b""
    extra = (struct.pack("<QQ", size, 0) if size >= _LIMIT else b"") + (
        struct.pack("<Q", offset) if offset >= _LIMIT else b""
    )
    return struct.pack("<HH", 1, len(extra)) + extra


def _local_header(record: str, size: int, offset: int) -> bytes:
    name = f"archive/{record}".encode()
    extra = _local_extra(size, offset)
    start = offset + 30 + len(name) + len(extra) + 4
    padding = -start % _ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    flags = 0x0808 if size else 0x0800
    return struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _descriptor(size: int, crc: int, is_zip64: bool) -> bytes:
    if not size:
        return b""
    return struct.pack("<IIQQ" if is_zip64 else "<IIII", 0x08074B50, crc, size, size)


def _central_entry(record: str, size: int, offset: int, crc: int) -> bytes:
    name = f"archive/{record}".encode()
    extra = b""
    if _is_zip64(size, offset):
        extra = (struct.pack("<QQ", size, size) if size >= _LIMIT else b"") + (
            struct.pack("<Q", offset) if offset >= _LIMIT else b""
        )
        extra = struct.pack("<HH", 1, len(extra)) + extra
    shown, flags = min(size, _LIMIT), 0x0808 if size else 0x0800
    fixed = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(0x02014B50, 0, 0, flags, 0, 0, 0, crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, min(offset, _LIMIT)),
    )
    return fixed + name + extra


def _end(count: int, start: int, length: int) -> bytes:
    return (
        struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 0x002D, 0, 0, count, count, length, start)
        + struct.pack("<IIQI", 0x07064B50, 0, start + length, 1)
        + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, min(length, _LIMIT), min(start, _LIMIT), 0)
    )
