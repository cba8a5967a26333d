# SPDX-License-Identifier: Apache-2.0
"""The file of one rank in a sharded checkpoint: torch.save archives of single tensors, one after the other.

A tensor is copied once, from its device or from host memory, to its place in the memory that the daemon reads; what
torch.save writes around it is put there afterwards. If the state is staged (`dcp.async_save`), its tensors are given a
place before it is known which of them this rank writes: a place that is not used is closed, or stays as zeros.
"""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.tensor import DTensor

from . import _archive, _core
from .buffers import Buffer, memory_of, pin, pool
from .copying import TWO_THREADS_BYTES

_ALIGNMENT = 64
# Room for each value of a staged state that is no tensor; what does not fit goes into a second file.
_VALUE_BYTES = 2048
# Unused places up to this share of the file stay in it: to close them costs a copy.
_GAPS_SHARE = 16
_NAMES = (
    "float64 float32 float16 bfloat16 complex128 complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
# Not those of less than a byte.
_DTYPES = frozenset(dtype for name in _NAMES.split(" ") if (dtype := getattr(torch, name, None)) is not None)


@dataclass
class _Place:
    """An archive's place in the memory. One that was used is no tensor's any more."""

    start: int
    archive: _archive.Archive
    tensor: Any
    is_used: bool = False

    @property
    def data(self) -> int:
        return self.start + len(self.archive.head)

    @property
    def end(self) -> int:
        return self.start + self.archive.length


@dataclass(frozen=True)
class Item:
    """A tensor's archive, or bytes, in a finished file."""

    offset: int
    length: int
    crc32: int


def is_known(dtype: Any) -> bool:
    return dtype in _DTYPES


def is_plain(tensor: Any) -> bool:
    """Whether its elements are all that torch.save would write of it."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and tensor.device.type != "meta"
    )


def saved_by_torch(tensor: Any) -> bytes:
    """What DCP's own writer makes of a tensor: of one that is not plain, or has no elements."""
    here = tensor.detach().cpu()
    if here.untyped_storage().size() != here.nbytes:
        here = here.clone()
    out = io.BytesIO()
    torch.save(here, out)
    return out.getvalue()


class Shard:
    """Memory of the pool with a place for each of some plain tensors, which are copied there on return.

    Args:
        room: how many bytes more it shall have.
    """

    def __init__(self, tensors: Sequence[Any], room: int = 0) -> None:
        at = 0
        self._places: list[_Place] = []
        for tensor in tensors:
            archive = _archive.archive_of(tensor.dtype, tuple(tensor.shape))
            self._places.append(_Place(at, archive, None))
            at += archive.length + -archive.length % _ALIGNMENT
        self._end = at
        self.buffer: Buffer = pool().reserve(max(1, at + room))
        self._memory = memory_of(self.buffer)
        self._by_address: dict[int, _Place] = {}
        self._copy(tensors)

    def _copy(self, tensors: Sequence[Any]) -> None:
        offsets, addresses, lengths, held = list[int](), list[int](), list[int](), list[Any]()
        devices: dict[Any, None] = {}
        waiting: list[tuple[Any, Any]] = []
        for place, tensor in zip(self._places, tensors, strict=True):
            nbytes = place.archive.nbytes
            if not nbytes:
                place.tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                continue
            there = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=place.data)
            place.tensor = there.view(tensor.dtype).view(tensor.shape)
            self._by_address[place.tensor.data_ptr()] = place
            if tensor.device.type != "cpu":
                devices[tensor.device] = None
                waiting.append((place.tensor, tensor))
            elif tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
                offsets.append(place.data)
                addresses.append(tensor.data_ptr())
                lengths.append(nbytes)
                held.append(tensor)
            else:
                waiting.append((place.tensor, tensor))
        if any(device.type == "cuda" for device in devices):
            pin(self.buffer)
        with torch.no_grad():
            for target, source in waiting:
                target.copy_(source.detach(), non_blocking=True)
        if offsets:
            host = _core.Copy(self.buffer, held, offsets, addresses, lengths)
            if host.now_bytes >= TWO_THREADS_BYTES:
                host.start()
            host.finish()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors have."""
        return sum(place.archive.nbytes for place in self._places)

    @property
    def places(self) -> list[_Place]:
        return list(self._places)

    @property
    def tensors(self) -> list[Any]:
        """The copies."""
        return [place.tensor for place in self._places]

    @property
    def room(self) -> int:
        """For what has no place yet."""
        return int(self.buffer.capacity) - self._end

    def place_of(self, tensor: Any) -> _Place | None:
        """The place whose bytes the tensor is, if nothing else has asked for it before."""
        if not is_plain(tensor):
            return None
        place = self._by_address.get(tensor.data_ptr())
        if (
            place is None
            or place.is_used
            or not tensor.is_contiguous()
            or _archive.archive_of(tensor.dtype, tuple(tensor.shape)) is not place.archive
        ):
            return None
        place.is_used = True
        return place

    def compose(self, places: Sequence[_Place], values: Sequence[bytes | memoryview]) -> tuple[list[Item], int, int]:
        """Makes the file of these places and of these bytes, which fit into the room.

        Returns:
            an item for each, in this order; the length of the file and its checksum.
        """
        whole, at = 0, 0
        base = self.buffer.address
        items: dict[int, Item] = {}
        with memoryview(self._memory) as memory, memory.cast("B") as view:

            def close_gap(until: int) -> None:
                nonlocal whole
                view[at:until] = bytes(until - at)
                whole = _core.crc32_combine(whole, _core.crc32(base + at, until - at), until - at)

            for place in self._compacted(places):
                archive = place.archive
                close_gap(place.start)
                view[place.start : place.data] = archive.head
                crc = _core.crc32(base + place.data, archive.nbytes)
                tail = archive.tail(crc)
                view[place.end - len(tail) : place.end] = tail
                crc = archive.checksum(crc, tail)
                items[id(place)] = Item(place.start, archive.length, crc)
                whole = _core.crc32_combine(whole, crc, archive.length)
                at = place.end
            found = [items[id(place)] for place in places]
            for value in values:
                view[at : at + len(value)] = value
                crc = _core.crc32(base + at, len(value))
                found.append(Item(at, len(value), crc))
                whole = _core.crc32_combine(whole, crc, len(value))
                at += len(value)
        return found, at, whole

    def _compacted(self, places: Sequence[_Place]) -> list[_Place]:
        """In the order of the file. If too much of it would be unused, what comes later is moved to the front."""
        ordered = sorted(places, key=lambda place: place.start)
        used = sum(place.archive.length for place in ordered)
        if ordered and (ordered[-1].end - used) * _GAPS_SHARE > used + (len(ordered) * _ALIGNMENT * _GAPS_SHARE):
            at = 0
            for place in ordered:
                if place.start != at:
                    head = len(place.archive.head)
                    ctypes.memmove(
                        self.buffer.address + at + head, self.buffer.address + place.data, place.archive.nbytes
                    )
                    place.start = at
                at = place.end + -place.end % _ALIGNMENT
        self._end = ordered[-1].end if ordered else 0
        return ordered


# Staging


def stage(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Shard]:
    """A copy of a state dict, and the memory in which its tensors are.

    As DCP's own stager does: containers become plain ones, and what is neither a container nor a tensor is copied by
    copy.deepcopy.
    """
    stager = _Stager()
    make = stager.note(state_dict)
    shard = Shard(stager.found, _VALUE_BYTES * stager.values)
    return make(iter(shard.tensors)), shard


# Makes the copy of a part of the state from the copies of its tensors, which come in the order of `_Stager.found`.
_Maker = Callable[[Iterator[Any]], Any]


class _Stager:
    def __init__(self) -> None:
        self.found: list[Any] = []
        #: How many values are no tensors.
        self.values = 0

    def note(self, value: Any) -> _Maker:
        if isinstance(value, dict):
            parts = [(key, self.note(each)) for key, each in value.items()]
            return lambda copies: {key: make(copies) for key, make in parts}
        if isinstance(value, list | tuple):
            kind: Any = tuple if isinstance(value, tuple) else list
            makers = [self.note(each) for each in value]
            return lambda copies: kind([make(copies) for make in makers])
        if isinstance(value, DTensor):
            return self._note_dtensor(value)
        if is_plain(value):
            return self._note_tensor(value)
        made: Any = value
        if isinstance(value, ShardedTensor):
            there: Any = _create_cpu_state_dict({"": value})
            made = _copy_state_dict({"": value}, there)[""]
        elif isinstance(value, torch.Tensor):
            made = value.detach().clone()
        else:
            self.values += 1
            if not isinstance(value, int | float | str | bytes | None):
                made = copy.deepcopy(value)
        return lambda _: made

    def _note_tensor(self, tensor: Any) -> _Maker:
        self.found.append(tensor.detach())
        return next

    def _note_dtensor(self, value: Any) -> _Maker:
        # `from_local` would move it to the mesh's device.
        kind: Any = DTensor
        local, spec = value._local_tensor, value._spec
        if is_plain(local):
            make = self._note_tensor(local)
            return lambda copies: kind(make(copies), spec, requires_grad=False)
        clone = kind(local.detach().clone(), spec, requires_grad=False)
        return lambda _: clone
