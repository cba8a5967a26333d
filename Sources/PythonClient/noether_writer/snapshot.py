"""A snapshot of an object: its pickle, and its storages copied once into a buffer.

The pickle is byte for byte what torch.save (2.13) makes: protocol 2, storages as persistent ids in the order in which
the pickler first met them (torch/serialization.py, `_save`).
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

_CHUNK_BYTES = 16 << 20
_PARALLEL_BYTES = 8 << 20
_copiers: ThreadPoolExecutor | None = None
_PLAIN = frozenset(
    (
        str,
        int,
        float,
        bool,
        bytes,
        type(None),
        tuple,
        list,
        dict,
        set,
        type,
        FunctionType,
        BuiltinFunctionType,
        OrderedDict,
    )
)


@dataclass
class Snapshot:
    """`storages` are torch.UntypedStorage, kept alive until they are copied."""

    pickle: bytes
    storages: list[Any]

    @property
    def storage_lengths(self) -> list[int]:
        return [storage.nbytes() for storage in self.storages]

    @property
    def storage_ids(self) -> list[int]:
        """Equal for two snapshots that need one copy only."""
        return [storage._cdata for storage in self.storages]


def take(obj: object) -> Snapshot:
    """Pickles `obj`.

    Raises:
        whatever pickling raises (as torch.save would): nothing has been sent then.
    """
    snapshot = _pickle(obj)
    # torch.load(weights_only=True) refuses numpy scalars; their bytes in the pickle give them away.
    if b"multiarray\nscalar\n" in snapshot.pickle:
        snapshot = _pickle(_without_numpy_scalars(obj, {}))
    return snapshot


def _pickle(obj: object) -> Snapshot:
    import torch
    from torch import serialization

    # Not typed in torch.
    normalize_storage_type: Any = serialization.normalize_storage_type
    location_tag = serialization.location_tag

    storages: list[Any] = []
    keys: dict[int, str] = {}
    dtypes: dict[int, torch.dtype] = {}
    element_bytes: dict[torch.dtype, int] = {}
    typed_storage, is_storage = torch.storage.TypedStorage, torch.is_storage

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> tuple[str, Any, str, str, int] | None:
            # Asked of every object there is, some twenty for each tensor.
            if type(item) in _PLAIN:
                return None
            storage: Any
            typed: Any = item
            if isinstance(item, typed_storage):
                storage = typed._untyped_storage
                dtype = typed.dtype
                kind = getattr(torch, typed._pickle_storage_type())
                # `typed._size()`, without asking torch for the size of an element each time.
                if (unit := element_bytes.get(dtype)) is None:
                    unit = element_bytes[dtype] = typed._element_size()
                numel = storage.nbytes() // unit
            elif is_storage(item):
                storage, dtype = item, torch.uint8
                kind = normalize_storage_type(type(item))
                numel = storage.nbytes()
            else:
                return None
            address = 0 if storage.device.type == "meta" else storage.data_ptr()
            if address != 0 and dtypes.setdefault(address, dtype) != dtype:
                raise RuntimeError(
                    "Cannot save multiple tensors or storages that view the same data as different types"
                )
            if (key := keys.get(storage._cdata)) is None:
                key = keys[storage._cdata] = str(len(storages))
                storages.append(storage)
            fake = getattr(item, "_fake_device", None)
            location = str(fake) if fake is not None else location_tag(storage)
            return ("storage", kind, key, location, numel)

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(obj)
    return Snapshot(out.getvalue(), storages)


def _without_numpy_scalars(item: Any, seen: dict[int, Any]) -> Any:
    """The same tree with numpy scalars as Python's; containers that hold none stay themselves."""
    import numpy

    if isinstance(item, numpy.generic):
        plain = item.item()
        return plain if isinstance(plain, bool | int | float | complex | str | bytes) else item
    if id(item) in seen:
        return seen[id(item)]
    result = item
    if isinstance(item, dict):
        pairs = [(_without_numpy_scalars(k, seen), _without_numpy_scalars(v, seen)) for k, v in item.items()]
        if any(k is not a or v is not b for (k, v), (a, b) in zip(pairs, item.items(), strict=True)):
            result = item.copy()
            result.clear()
            result.update(pairs)
            # A state_dict's _metadata lives beside its items.
            for name, value in getattr(item, "__dict__", {}).items():
                setattr(result, name, value)
    elif type(item) is list or isinstance(item, tuple):
        values = [_without_numpy_scalars(value, seen) for value in item]
        if any(a is not b for a, b in zip(values, item, strict=True)):
            if type(item) is list:
                result = values
            elif hasattr(item, "_fields"):
                result = type(item)(*values)
            else:
                result = tuple(values)
    seen[id(item)] = result
    return result


def copy(storages: Sequence[Any], offsets: Sequence[int], buffer: Any, address: int) -> None:
    """Copies each storage to its offset in `buffer` (a writable mapping that starts at `address`)."""
    pieces: list[tuple[int, int, int]] = []
    total = 0
    for storage, offset in zip(storages, offsets, strict=True):
        size = storage.nbytes()
        if size == 0:
            continue
        if storage.device.type != "cpu":
            _copy_from_device(storage, offset, size, buffer)
            continue
        total += size
        source = storage.data_ptr()
        for start in range(0, size, _CHUNK_BYTES):
            pieces.append((address + offset + start, source + start, min(_CHUNK_BYTES, size - start)))
    if total < _PARALLEL_BYTES:
        _move(pieces)
        return
    global _copiers
    if _copiers is None:
        _copiers = ThreadPoolExecutor(1, thread_name_prefix="noether-writer-copy")
    half, moved = 0, 0
    while moved < total // 2:
        moved += pieces[half][2]
        half += 1
    other = _copiers.submit(_move, pieces[half:])
    _move(pieces[:half])
    other.result()


def _move(pieces: Sequence[tuple[int, int, int]]) -> None:
    # memmove through ctypes releases the GIL.
    for target, source, size in pieces:
        ctypes.memmove(target, source, size)


def _copy_from_device(storage: Any, offset: int, size: int, buffer: Any) -> None:
    import torch

    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=offset).copy_(source[:size])
