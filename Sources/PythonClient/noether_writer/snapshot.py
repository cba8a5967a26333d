"""Snapshots of objects: their storages, which are copied once, and their pickles.

The pickle is byte for byte what torch.save (2.13) makes: written by `tree` where the object is one of those that
checkpoints are made of, else by Python's pickler, with storages as persistent ids in the order in which it first met
them (torch/serialization.py, `_save`).
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

from . import tree
from .tensors import Unsupported

__all__ = ["Pickled", "Snapshot", "Unsupported", "take", "take_pickled"]


class Snapshot(Protocol):
    """One object. Its storages are torch.UntypedStorage, kept alive; `lengths` in bytes."""

    @property
    def storages(self) -> Sequence[Any]: ...
    @property
    def storage_ids(self) -> Sequence[int]:
        """Equal for two snapshots that need one copy only."""

    @property
    def addresses(self) -> Sequence[int]: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def pickle_room(self) -> int:
        """At most so many bytes has the pickle."""

    @property
    def on_cpu(self) -> bool:
        """All storages are; False where nobody has looked."""

    def describe(self) -> None:
        """Takes down what else may change until `encode`.

        Raises:
            Unsupported: `take_pickled` knows the object, this snapshot does not.
        """

    def versions(self, above: int) -> list[int] | None:
        """Counters of changes made in place, of tensors in storages above so many bytes; None: not known."""

    def encode(self) -> bytes:
        """The pickle; on any thread, once."""


def take(objects: Sequence[object]) -> Sequence[Snapshot]:
    """
    Raises:
        whatever pickling raises (as torch.save would): nothing has been sent then.
    """
    try:
        return tree.capture(objects)
    except Unsupported:
        return take_pickled(objects)


def take_pickled(objects: Sequence[object]) -> Sequence[Snapshot]:
    """By Python's pickler, now."""
    return [_pickled(item) for item in objects]


def explain(error: Exception, objects: Mapping[str, object]) -> None:
    """Adds to what pickling raised which part of which file it was, and that nothing was sent (Python 3.11)."""
    if not hasattr(error, "add_note"):
        return
    for file, obj in objects.items():
        if (path := _unpicklable(obj)) is not None:
            where = f": what can't be pickled is obj{path}" if path else ""
            error.add_note(f"noether-writer: {file} was not sent, and an older one stays as it is{where}")
            return


def _unpicklable(obj: object) -> str | None:
    """Which part of a tree of containers can't be pickled, as an expression behind `obj`; None: all of it can."""
    try:
        _pickle(obj)
    except Exception:
        pass
    else:
        return None
    children: list[tuple[str, object]] = []
    if isinstance(obj, dict):
        children = [(f"[{key!r}]", value) for key, value in obj.items()]
    elif isinstance(obj, list | tuple):
        children = [(f"[{index}]", value) for index, value in enumerate(obj)]
    elif hasattr(obj, "__dict__") and not isinstance(obj, type | FunctionType):
        children = [(f".{name}", value) for name, value in vars(obj).items()]
    for step, child in children:
        # One that holds itself can't be pickled by its depth: no end to look for.
        with contextlib.suppress(RecursionError):
            if (path := _unpicklable(child)) is not None:
                return step + path
    return ""


class Pickled:
    """What only Python's pickler could write: subclasses of tensors, sparse ones, numpy arrays, any object."""

    on_cpu = False

    def __init__(self, data: bytes, storages: list[Any]) -> None:
        self._pickle = data
        self.storages = storages
        self.storage_ids = [storage._cdata for storage in storages]
        self.addresses = [0 if storage.device.type == "meta" else storage.data_ptr() for storage in storages]
        self.lengths = [storage.nbytes() for storage in storages]
        self.pickle_room = len(data)

    def describe(self) -> None:
        pass

    def versions(self, above: int) -> None:
        return None

    def encode(self) -> bytes:
        return self._pickle


def _pickled(obj: object) -> Pickled:
    snapshot = _pickle(obj)
    # torch.load(weights_only=True) refuses numpy scalars; their bytes in the pickle give them away.
    if b"multiarray\nscalar\n" in snapshot.encode():
        snapshot = _pickle(_without_numpy_scalars(obj, {}))
    return snapshot


def _pickle(obj: object) -> Pickled:
    import torch
    from torch import serialization

    # Not typed in torch.
    normalize_storage_type: Any = serialization.normalize_storage_type
    location_tag = serialization.location_tag

    storages: list[Any] = []
    keys: dict[int, str] = {}
    dtypes: dict[int, torch.dtype] = {}
    typed_storage, is_storage = torch.storage.TypedStorage, torch.is_storage

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> tuple[str, Any, str, str, int] | None:
            storage: Any
            typed: Any = item
            if isinstance(item, typed_storage):
                storage, dtype = typed._untyped_storage, typed.dtype
                kind = getattr(torch, typed._pickle_storage_type())
                numel = typed._size()
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
    return Pickled(out.getvalue(), storages)


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
