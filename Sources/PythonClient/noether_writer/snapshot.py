# SPDX-License-Identifier: Apache-2.0
"""Snapshots of objects: their storages, which are copied once, and their pickles.

The pickle is byte for byte what torch.save (2.13) makes: written by `tree` if the object is one of those that
checkpoints are made of, else by Python's pickler, with storages as persistent ids in the order in which it first met
them (torch/serialization.py, `_save`).

There is one exception. torch.load(weights_only=True), the default, refuses numpy's scalars, and they get into a
checkpoint unseen: a learning rate, a milestone, a metric. A numpy scalar that is a key or an item of a container (a
dict, list, tuple, set, frozenset, deque, or a subclass of one), or an attribute of a tensor, a Parameter or an
OrderedDict, is therefore written as Python's bool, int, float, complex, str or bytes. The bytes are then those that
torch.save makes of the same object with Python's scalars in these places; but str, bytes and complex get no place in
the pickle's memo. Nothing is rebuilt for this: the containers are pickled themselves, with their types, identities,
constructors and cycles.

A numpy scalar anywhere else stays numpy's, with torch.save's bytes: in the state of any other object its class may ask
for `.dtype` or call `.mean()`, and weights_only=True refuses that class as well. The same holds for scalars without an
equal in Python: longdouble, datetime64, timedelta64, records.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import mmap
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any, Protocol

from . import numpy_scalars, tree
from .frames import shown
from .tensors import Unsupported

__all__ = ["Pickled", "Snapshot", "Unsupported", "capture", "capture_pickled", "explain"]

# Python's own immutable scalars: nothing is inside.
_ATOMS = frozenset((str, int, float, bool, complex, bytes, type(None)))
# How many of the objects that a pickler met last are kept: what it could not pickle is one of these, or made by one.
_TRAIL = 64
# How many objects are looked through for the one that can't be pickled.
_LOOKED_THROUGH = 1_000_000


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
        """All storages are; False if nobody has looked."""

    def describe(self) -> None:
        """Takes down what else may change until `encode`. Once that is done, further calls do nothing; a call that was
        interrupted can be made again.

        Raises:
            Unsupported: `capture_pickled` knows the object, this snapshot does not.
        """

    def counted(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Of these storages, those whose changes torch counts, each with a tensor that has the counter."""

    def names(self, numbers: Collection[int]) -> list[str]:
        """The tensors in these storages, as far as they have names."""

    def encode(self) -> bytes:
        """The pickle, after `describe`: on any thread, any number of times, the same bytes."""


def capture(objects: Sequence[object]) -> Sequence[Snapshot]:
    """
    Raises:
        whatever pickling raises (as torch.save would): nothing has been sent then.
    """
    try:
        return tree.capture(objects)
    except (Unsupported, RecursionError):
        pass
    return capture_pickled(objects)


def capture_pickled(objects: Sequence[object]) -> Sequence[Snapshot]:
    """By Python's pickler, now."""
    try:
        return [_pickle(item) for item in objects]
    except RecursionError as error:
        # There are a few more frames below this one than below torch.save, and an object may need just these.
        with contextlib.suppress(RecursionError):
            return _pickle_on_a_new_stack(objects)
        raise error


def explain(error: Exception, objects: Mapping[str, object]) -> None:
    """Adds to what pickling raised which part of which file it was, and that nothing was sent (Python 3.11). Each
    object is pickled once more at most."""
    if not hasattr(error, "add_note"):
        return
    for file, obj in objects.items():
        if (path := _unpicklable(obj)) is not None:
            where = f": what can't be pickled is obj{path}" if path else ""
            error.add_note(f"noether-writer: {file} was not sent, and an older one stays as it is{where}")
            return


def _unpicklable(obj: object) -> str | None:
    """Which part of an object can't be pickled, as an expression after `obj`, or "" if it is not found; None: all of it
    can."""
    pickler = _TracingPickler()
    try:
        pickler.dump(obj)
    except RecursionError:
        # It is too deep as a whole, and so would be the expression.
        return ""
    except Exception:
        return _path(obj, pickler.trail)
    return None


def _path(root: object, trail: Sequence[object]) -> str:
    """The way from `root` to the last one of `trail` that is a part of it, in breadth first."""
    wanted = {id(item): rank for rank, item in enumerate(trail) if type(item) not in _ATOMS}
    best, path = -1, ""
    # An object, its parent's place in this list, and the step from there.
    queue: list[tuple[object, int, str]] = [(root, -1, "")]
    seen = {id(root)}
    for place in itertools.count():
        if place >= len(queue) or place >= _LOOKED_THROUGH:
            return path
        item = queue[place][0]
        if wanted.get(id(item), -1) > best:
            best, steps, at = wanted[id(item)], list[str](), place
            while at >= 0:
                _, parent, step = queue[at]
                steps.append(step)
                at = parent
            path = "".join(reversed(steps))
        for step, child in _children(item):
            if type(child) not in _ATOMS and id(child) not in seen:
                seen.add(id(child))
                queue.append((child, place, step))
    raise AssertionError("itertools.count has no end")


def _children(item: object) -> Iterator[tuple[str, object]]:
    if isinstance(item, dict):
        for key, value in list(dict.items(item)):
            if type(value) not in _ATOMS:
                yield f"[{shown(key)}]", value
    elif isinstance(item, list):
        for index, value in enumerate(list.__iter__(item)):
            yield f"[{index}]", value
    elif isinstance(item, tuple):
        for index, value in enumerate(tuple.__iter__(item)):
            yield f"[{index}]", value
    if not _is_named(item):
        try:
            attributes = vars(item)
        except TypeError:
            return
        for name, value in list(attributes.items()):
            yield f".{name}", value


def _is_named(item: object) -> bool:
    """Pickled by its name: what is inside is not pickled."""
    return isinstance(item, type | FunctionType | ModuleType)


class Pickled:
    """What only Python's pickler could write: subclasses of tensors, sparse ones, numpy arrays, any object."""

    on_cpu = False

    def __init__(self, data: bytes, storages: list[Any]) -> None:
        self._pickle = data
        self.storages = storages
        self.storage_ids = [storage._cdata for storage in storages]
        self.lengths = [int(storage.nbytes()) for storage in storages]
        self.pickle_room = len(data)
        if tree.skips_data():
            # torch.save leaves their places empty, which reads as zeros.
            self.storages, self.addresses = _zeros(self.lengths)
            return
        for storage in storages:
            if storage.device.type == "meta":
                # Has no data: torch.save fails here too, with these words.
                storage.cpu()
        self.addresses = [storage.data_ptr() for storage in storages]

    def describe(self) -> None:
        pass

    def counted(self, numbers: Sequence[int]) -> dict[int, Any]:
        return {}

    def names(self, numbers: Collection[int]) -> list[str]:
        return []

    def encode(self) -> bytes:
        return self._pickle


def _zeros(lengths: Sequence[int]) -> tuple[list[Any], list[int]]:
    """Storages of zeros in no memory: pages that are only read are all the kernel's one page of zeros."""
    import torch

    if not (longest := max(lengths, default=0)):
        return [torch.empty(0).untyped_storage() for _ in lengths], [0] * len(lengths)
    pages = mmap.mmap(-1, longest, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    zeros = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    return [zeros] * len(lengths), [zeros.data_ptr()] * len(lengths)


def _pickle(obj: object) -> Pickled:
    out = io.BytesIO()
    numbers = _Numbers(obj)
    pickler = _Pickler(out, numbers.marks)
    pickler.dump(obj)
    return Pickled(numbers.put_into(out.getvalue()), pickler.storages)


class _Pickler(pickle.Pickler):
    """Python's pickler as torch.save sets it up. No class or function is made for each of them, as torch.save does:
    those are cycles, and would keep the storages until the garbage collector finds them, which may be never."""

    def __init__(self, out: Any, marks: Mapping[int, int]) -> None:
        """
        Args:
            marks: persistent ids of objects, by their id().
        """
        import torch
        from torch import serialization

        super().__init__(out, protocol=2)
        self.storages: list[Any] = []
        self._keys: dict[int, str] = {}
        self._dtypes: dict[int, Any] = {}
        self._marks = marks
        self._typed_storage = torch.storage.TypedStorage
        self._is_storage = torch.is_storage
        self._location_tag = serialization.location_tag

    def persistent_id(self, item: Any) -> Any:
        if isinstance(item, self._typed_storage) or self._is_storage(item):
            return self._storage(item)
        return self._marks.get(id(item)) if self._marks else None

    def _storage(self, item: Any) -> tuple[str, Any, str, str, int]:
        import torch
        from torch import serialization

        storage: Any
        if isinstance(item, self._typed_storage):
            typed: Any = item
            storage, dtype = typed._untyped_storage, typed.dtype
            kind = getattr(torch, typed._pickle_storage_type())
            numel = typed._size()
        else:
            storage, dtype = item, torch.uint8
            kind = serialization.normalize_storage_type(type(item))  # type: ignore[no-untyped-call]
            numel = storage.nbytes()
        address = 0 if storage.device.type == "meta" else storage.data_ptr()
        if address != 0 and self._dtypes.setdefault(address, dtype) != dtype:
            raise RuntimeError("Cannot save multiple tensors or storages that view the same data as different types")
        if (key := self._keys.get(storage._cdata)) is None:
            key = self._keys[storage._cdata] = str(len(self.storages))
            self.storages.append(storage)
        fake = getattr(item, "_fake_device", None)
        location = str(fake) if fake is not None else self._location_tag(storage)
        return ("storage", kind, key, location, numel)


class _TracingPickler(_Pickler):
    """Writes nothing, and knows what it met last."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), {})
        self.trail: collections.deque[object] = collections.deque(maxlen=_TRAIL)

    def persistent_id(self, item: Any) -> Any:
        self.trail.append(item)
        return super().persistent_id(item)


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def _pickle_on_a_new_stack(objects: Sequence[object]) -> list[Pickled]:
    """
    Raises:
        RecursionError: that is not enough, or can't be.
    """
    import torch

    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        raise RecursionError("nested too deep; modes of torch are in force for this thread, and not for another")
    here = tree.thread_settings()
    settings = {} if here is None else dict(vars(here))

    def work() -> list[Pickled]:
        if here is not None:
            vars(here).update(settings)
        return [_pickle(item) for item in objects]

    return tree.on_a_new_stack(work)


class _Numbers:
    """The numpy scalars in an object's containers, which are written as Python's own.

    The pickler, which is in C, can't be told to write a number in an object's place. So each gets a persistent id: an
    integer, which needs no place in the memo, made of random bytes that occur in no object, and of its index. The
    opcodes that say so are then replaced by those of the number.
    """

    def __init__(self, obj: object) -> None:
        self.marks: dict[int, int] = {}
        self._items: list[Any] = []
        if not (kinds := numpy_scalars.kinds()):
            return
        # Positive, and always of the same length.
        self._nonce = os.urandom(15) + b"\x55"
        nonce = int.from_bytes(self._nonce, "little") << 64
        for item in _scalars(obj, kinds):
            if id(item) not in self.marks:
                self.marks[id(item)] = nonce | len(self._items)
                self._items.append(item)

    def put_into(self, data: bytes) -> bytes:
        if not self._items:
            return data
        kinds, items = numpy_scalars.kinds(), self._items

        def number(match: re.Match[bytes]) -> bytes:
            item = items[int.from_bytes(match[1], "little")]
            return numpy_scalars.opcodes(kinds[type(item)](item))

        return re.sub(b"\x8a\x18(.{8})" + re.escape(self._nonce) + b"Q", number, data, flags=re.DOTALL)


def _scalars(root: object, kinds: Mapping[type, object]) -> Iterator[Any]:
    """Those in containers, however deep."""
    import torch

    with_attributes = (collections.OrderedDict, torch.Tensor, torch.nn.Parameter)
    leaves = _ATOMS | {torch.Size}
    todo: list[Any] = [root]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind in kinds:
            yield item
            continue
        if kind in leaves or id(item) in seen:
            continue
        parts: list[Any] = []
        if issubclass(kind, dict):
            parts = [*dict.keys(item), *dict.values(item)]
        elif issubclass(kind, list):
            parts = [*list.__iter__(item)]
        elif issubclass(kind, tuple):
            parts = [*tuple.__iter__(item)]
        elif issubclass(kind, set):
            parts = [*set.__iter__(item)]
        elif issubclass(kind, frozenset):
            parts = [*frozenset.__iter__(item)]
        elif issubclass(kind, collections.deque):
            parts = [*collections.deque.__iter__(item)]
        elif kind not in with_attributes:
            continue
        if kind in with_attributes and (attributes := vars(item)):
            parts.append(attributes)
        seen.add(id(item))
        if not set(map(type, parts)) <= leaves:
            todo += parts
