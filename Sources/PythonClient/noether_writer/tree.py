# SPDX-License-Identifier: Apache-2.0
"""The pickle of a tree of tensors, in two steps: `capture` takes down what could change, in a microsecond or so a
tensor; `Tree.encode` writes the pickle from that, later and on any thread.

The bytes are those that torch.save (2.13) has Python's pickler make (protocol 2), down to the memo's numbers, which the
tests compare. torch's own way costs some 16 microseconds a tensor: for 5,000 tensors longer than copying them. Only
what is met in checkpoints is written here: plain containers and values, and plain tensors and parameters. `capture`
refuses anything else, and the caller lets torch pickle it: also what is nested so deep that the functions here, which
call themselves, could come to an end before Python's pickler does, and what holds itself, whose copy would be a cycle.
"""

from __future__ import annotations

import copyreg
import itertools
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from . import numpy_scalars
from .numpy_scalars import integer as _integer
from .numpy_scalars import text as _text
from .tensors import DIMENSIONS, Columns, Tensors, Unsupported

_Result = TypeVar("_Result")
_ATOMS = frozenset((str, int, float, bool, type(None)))
_BATCH = 1000
# Containers in containers: far more than checkpoints have, and few of the frames that a thread has.
_DEPTH = 40
# Far more plain values than the tensors of a checkpoint come with (an optimizer has about ten for each) are pickled by
# Python's pickler, in C.
_ITEMS, _ITEMS_PER_TENSOR = 20_000, 20
# Above what any of these can take in a pickle: a tensor with its sizes and strides, a string's frame, an item.
_TENSOR_BYTES, _DIMENSION_BYTES, _STRING_BYTES, _ITEM_BYTES = 256, 24, 10, 16


class Tree:
    """A copy of a tree's containers, with its tensors apart."""

    def __init__(self, root: Any, tensors: Tensors, text_bytes: int, items: int) -> None:
        """
        Args:
            text_bytes: of all strings, in characters; items: all keys, values and containers.
        """
        self._root = root
        self.tensors = tensors
        self._items = items
        self._other_bytes = 4096 + text_bytes * 4 + items * _ITEM_BYTES

    @property
    def storages(self) -> list[Any]:
        return self.tensors.storages

    @property
    def storage_ids(self) -> list[int]:
        return self.tensors.storage_ids

    @property
    def addresses(self) -> list[int]:
        return self.tensors.addresses

    @property
    def lengths(self) -> list[int]:
        return self.tensors.lengths

    @property
    def on_cpu(self) -> bool:
        return self.tensors.on_cpu

    def counted(self, numbers: Sequence[int]) -> dict[int, Any]:
        return self.tensors.counted(numbers)

    def names(self, numbers: Collection[int]) -> list[str]:
        rows = {id(tensor): number for tensor, number in zip(self.tensors.tensors, self.tensors.numbers, strict=True)}
        found: dict[int, str] = {}
        # Containers, and how one comes to them.
        todo: list[tuple[Any, str]] = [(self._root, "")]
        seen: set[int] = set()
        while todo:
            item, path = todo.pop()
            if (number := rows.get(id(item))) is not None:
                if number in numbers:
                    found.setdefault(number, path or "the tensor")
            elif isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                pairs = item.items() if isinstance(item, dict) else enumerate(item)
                todo += reversed([(value, f"{path}.{key}" if path else str(key)) for key, value in pairs])
        return list(found.values())

    @property
    def pickle_room(self) -> int:
        """Before the tensors are described; `describe` sees to it that the pickle fits."""
        each = _TENSOR_BYTES + 2 * _DIMENSION_BYTES * DIMENSIONS
        return self._other_bytes + len(self.tensors.tensors) * each

    def describe(self) -> None:
        self.tensors.describe()

    def encode(self) -> bytes:
        try:
            return _Writer(self).write(self._root)
        except RecursionError:
            # The caller is near the end of its stack.
            return on_a_new_stack(lambda: _Writer(self).write(self._root))


def on_a_new_stack(work: Callable[[], _Result]) -> _Result:
    """What `work` returns or raises on a thread of its own.

    Raises:
        RecursionError: too deep there too, or no thread can be started (by the system, or at the interpreter's exit).
    """
    found: list[_Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="noether-writer-pickle", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise RecursionError("nested too deep for what is left of this thread's stack") from error
    thread.join()
    if raised:
        raise raised.pop()
    return found.pop()


def capture(roots: Iterable[object]) -> list[Tree]:
    """Raises:
    Unsupported: nothing of them was taken.
    """
    if not _pickled_as_usual():
        raise Unsupported
    trees: list[Tree] = []
    tensors: Tensors | None = None
    found: list[int] = []
    for root in roots:
        walk = _Walk()
        copy = walk.copy(root)
        # A tag and `latest`: other words around the same tensors.
        if tensors is None or found != list(walk.tensors):
            tensors = Tensors(walk.tensors)
            found = list(walk.tensors)
        trees.append(Tree(copy, tensors, walk.text_bytes, walk.items))
    return trees


def thread_settings() -> Any:
    """What torch.save reads of this thread (skip_data and others); None before torch 2.6, which has no settings."""
    from torch import serialization

    return getattr(serialization, "_serialization_tls", None)


def skips_data() -> bool:
    """Under torch.serialization.skip_data."""
    return bool(getattr(thread_settings(), "skip_data", False))


def _pickled_as_usual() -> bool:
    """No setting of this process or thread has torch.save pickle plain objects in another way than by itself."""
    import torch
    from torch import serialization
    from torch.utils._device import DeviceContext

    settings: Any = serialization
    if skips_data() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        # What torch.set_default_device sets: it says where new tensors are made, and is left out below.
        if not all(type(mode) is DeviceContext for mode in modes):
            return False
    # What says where a storage is, in order: torch's own for the CPU is the first, and for CUDA the next.
    taggers = [tagger for _, tagger, _ in settings._package_registry[:2]]
    if taggers[0] is not settings._cpu_tag or getattr(taggers[1], "func", None) is not settings._backend_tag:
        return False
    for kind, module in ((torch.Tensor, torch._tensor), (torch.nn.Parameter, torch.nn.parameter)):
        if getattr(getattr(kind.__reduce_ex__, "__code__", None), "co_filename", None) != module.__file__:
            # Somebody has put another one in its place.
            return False
    return copyreg.dispatch_table.keys().isdisjoint((torch.Tensor, torch.nn.Parameter, OrderedDict))


class _Walk:
    """Copies containers, so that they may change; values that can't change, and tensors, stay themselves."""

    def __init__(self) -> None:
        import torch

        self.kinds = frozenset((torch.Tensor, torch.nn.Parameter))
        self.numbers = numpy_scalars.kinds()
        self.tensors: dict[int, Any] = {}
        self.seen: dict[int, Any] = {}
        # Their ids must stay theirs.
        self.held: list[Any] = []
        self.depth = 0
        self.text_bytes = 0
        self.items = 0

    def copy(self, item: Any) -> Any:
        kind = type(item)
        if kind in _ATOMS:
            if kind is str:
                self.text_bytes += len(item) + _STRING_BYTES
            elif kind is int:
                self.text_bytes += item.bit_length() // 8
            self.items += 1
            return item
        if kind in self.kinds:
            self.tensors[id(item)] = item
            self.items += 1
            return item
        if (seen := self.seen.get(id(item))) is not None:
            if seen is _BEING_COPIED:
                raise Unsupported
            self.items += 1
            return seen
        if (plain := self.numbers.get(kind)) is not None:
            number = plain(item)
            if type(number) not in _NUMBERS:
                raise Unsupported
            return self.copy(number)
        if self.depth == _DEPTH or self.items > _ITEMS + _ITEMS_PER_TENSOR * len(self.tensors):
            raise Unsupported
        self.depth += 1
        self.seen[id(item)] = _BEING_COPIED
        self.held.append(item)
        copy: Any
        if kind is dict or kind is OrderedDict:
            copy = self._dict(kind, item)
        elif kind is list:
            copy = [self.copy(value) for value in item.copy()]
        elif kind is tuple:
            copy = tuple([self.copy(value) for value in item])
        else:
            raise Unsupported
        self.depth -= 1
        self.seen[id(item)] = copy
        self.items += 1
        return copy

    def _dict(self, kind: Any, item: dict[Any, Any]) -> Any:
        # At one moment: no other thread runs in between.
        copy = kind(item)
        values = copy.values()
        if set(map(type, values)) <= self.kinds and set(map(type, copy)) <= {str}:
            # A state_dict: no loop in Python.
            self.tensors.update(zip(map(id, values), values, strict=True))
            self.text_bytes += sum(map(len, copy)) + _STRING_BYTES * len(copy)
            self.items += len(copy)
        else:
            pairs = [(self.copy(key), self.copy(value)) for key, value in copy.items()]
            copy.clear()
            copy.update(pairs)
            if len(copy) != len(pairs):
                raise Unsupported
        if kind is OrderedDict and (state := vars(item)):
            # A state_dict's _metadata.
            copy.__dict__ = self.copy(state)
        return copy


_BEING_COPIED: Any = object()
_NUMBERS = frozenset((bool, int, float))


def _put(number: int) -> bytes:
    return b"q" + bytes((number,)) if number < 256 else b"r" + struct.pack("<I", number)


def _get(number: int) -> bytes:
    return b"h" + bytes((number,)) if number < 256 else b"j" + struct.pack("<I", number)


def _numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers, without its place in the memo; () has none."""
    ends = (b")", b"\x85", b"\x86", b"\x87")
    body = b"".join(map(_integer, values))
    return body + ends[len(values)] if len(values) <= 3 else b"(" + body + b"t"


_ORDERED = b"ccollections\nOrderedDict\n"
_REBUILD_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_REBUILD_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
# Replaced by a longer one, never changed: threads share it.
_puts: tuple[bytes, ...] = ()


def _first_puts(count: int) -> tuple[bytes, ...]:
    global _puts
    if len(_puts) < count:
        _puts = tuple(map(_put, range(count)))
    return _puts


class _Writer:
    """Python's pickler, protocol 2, as far as a `Tree` needs it. The memo knows an object by its identity, as there;
    what is defined by name (classes, functions) by the name."""

    def __init__(self, tree: Tree) -> None:
        import torch

        self.parameter = torch.nn.Parameter
        self.columns: Columns = tree.tensors.columns()
        self.out: list[bytes] = [b"\x80\x02"]
        self.memo: dict[Any, int] = {}
        self.count = 0
        self.rows = dict(zip(map(id, tree.tensors.tensors), itertools.count()))
        self.sizes: dict[tuple[int, ...], bytes] = {}
        self.heads: dict[Any, tuple[bytes, bytes]] = {}
        self.ordered_get = b""
        self.puts = _first_puts(64 + 12 * len(tree.tensors.tensors) + 2 * tree._items)

    def write(self, root: Any) -> bytes:
        self.save(root)
        self.out.append(b".")
        return b"".join(self.out)

    def remember(self, key: Any) -> bytes:
        number = self.memo[key] = self.count
        self.count += 1
        return self.puts[number]

    def once(self, key: Any, definition: bytes) -> bytes:
        """The first time what defines it, afterwards where the memo has it."""
        if (number := self.memo.get(key)) is not None:
            return _get(number)
        return definition + self.remember(key)

    def text(self, value: str) -> bytes:
        return self.once(id(value), _text(value))

    def save(self, item: Any) -> None:
        out = self.out
        kind = type(item)
        if kind is str:
            out.append(self.text(item))
        elif kind is int:
            out.append(_integer(item))
        elif kind is float:
            out.append(b"G" + struct.pack(">d", item))
        elif kind is bool:
            out.append(b"\x88" if item else b"\x89")
        elif item is None:
            out.append(b"N")
        elif (number := self.memo.get(id(item))) is not None:
            out.append(_get(number))
        elif (row := self.rows.get(id(item))) is not None:
            self.tensor(item, row)
        elif kind is tuple:
            self.elements(item)
        elif kind is list:
            out.append(b"]" + self.remember(id(item)))
            self.list(item)
        elif kind is dict:
            out.append(b"}" + self.remember(id(item)))
            self.dict(item)
        else:
            out.append(self.once("OrderedDict", _ORDERED) + b")R" + self.remember(id(item)))
            self.ordered(item)
            if state := vars(item):
                self.save(state)
                out.append(b"b")

    def elements(self, item: tuple[Any, ...]) -> None:
        if not item:
            self.out.append(b")")
            return
        if len(item) > 3:
            self.out.append(b"(")
        for value in item:
            self.save(value)
        self.out.append((b"\x85", b"\x86", b"\x87", b"t")[min(len(item), 4) - 1] + self.remember(id(item)))

    def list(self, item: list[Any]) -> None:
        if len(item) == 1:
            self.save(item[0])
            self.out.append(b"a")
            return
        for start in range(0, len(item), _BATCH):
            self.out.append(b"(")
            for value in item[start : start + _BATCH]:
                self.save(value)
            self.out.append(b"e")

    def dict(self, item: dict[Any, Any]) -> None:
        if len(item) == 1:
            self.pairs(item.items())
            self.out.append(b"s")
            return
        pairs = iter(item.items())
        for start in range(0, len(item), _BATCH):
            self.out.append(b"(")
            self.pairs(itertools.islice(pairs, _BATCH))
            self.out.append(b"u")
            # Python's pickler looks for more only after it has opened the next batch.
            if start + _BATCH == len(item):
                self.out.append(b"(u")

    def ordered(self, item: OrderedDict[Any, Any]) -> None:
        # Taken from an iterator, of which the pickler looks at one item before it opens a batch.
        pairs = iter(item.items())
        for start in range(0, len(item), _BATCH):
            single = len(item) - start == 1
            if not single:
                self.out.append(b"(")
            self.pairs(itertools.islice(pairs, _BATCH))
            self.out.append(b"s" if single else b"u")

    def pairs(self, items: Iterable[tuple[Any, Any]]) -> None:
        save, rows, memo = self.save, self.rows, self.memo
        for key, value in items:
            save(key)
            if (row := rows.get(id(value))) is not None and id(value) not in memo:
                self.tensor(value, row)
            else:
                save(value)

    def tensor(self, item: Any, row: int) -> None:
        requires_grad = b"\x88" if self.columns.requires_grad[row] else b"\x89"
        if type(item) is self.parameter:
            self.out.append(self.once("parameter", _REBUILD_PARAMETER))
            self.plain(row, b"\x89")
            at, puts = self.count, self.puts
            self.out += (requires_grad, self.ordered_get, b")R", puts[at], b"\x87", puts[at + 1], b"R", puts[at + 2])
            self.count = at + 3
        else:
            self.plain(row, requires_grad)
        self.memo[id(item)] = self.count - 1

    def plain(self, row: int, requires_grad: bytes) -> None:
        """A call of _rebuild_tensor_v2; the last place that it takes in the memo is the tensor's."""
        columns = self.columns
        number, dtype = columns.numbers[row], columns.dtypes[row]
        if (known := self.heads.get(dtype)) is not None:
            head, place = known
        else:
            head = self.head(dtype)
            place = b""
        # A storage's name is the same object each time that the storage is met. One digit is, in some versions of
        # Python, the same object as any such string of the process.
        name = str(number)
        known_as = id(name) if number < 10 and _DIGITS_ARE_SHARED else ("key", number)
        if (at := self.memo.get(known_as)) is not None:
            key = _get(at)
        else:
            key = b"X" + _LENGTHS[len(name)] + name.encode() + self.remember(known_as)
        if not place or columns.devices is not None:
            place = self.location(row)
        shape, stride, sizes, puts, at = columns.shapes[row], columns.strides[row], self.sizes, self.puts, self.count
        if (size := sizes.get(shape)) is None:
            size = sizes[tuple(shape)] = _numbers(tuple(shape))
        if (step := sizes.get(stride)) is None:
            step = sizes[stride] = _numbers(stride)
        elements = _integer(columns.lengths[number] // dtype.itemsize)
        offset = columns.offsets[row]
        start = _integer(offset) if offset else b"K\0"
        if shape:
            self.out += (
                head,
                key,
                place,
                elements,
                b"t",
                puts[at],
                b"Q",
                start,
                size,
                puts[at + 1],
                step,
                puts[at + 2],
            )
            at += 3
        else:
            self.out += (head, key, place, elements, b"t", puts[at], b"Q", start, size, step)
            at += 1
        if known is None:
            self.count = at
            self.out += (requires_grad, self.once("OrderedDict", _ORDERED))
            # All of it is in the memo now: the same bytes from here on.
            self.heads[dtype] = self.head(dtype), self.once("cpu", b"") if columns.devices is None else b""
            self.ordered_get = self.once("OrderedDict", b"")
            at = self.count
        else:
            self.out += (requires_grad, self.ordered_get)
        self.out += (b")R", puts[at], b"t", puts[at + 1], b"R", puts[at + 2])
        self.count = at + 3

    def head(self, dtype: Any) -> bytes:
        import torch

        kind: str = torch.storage._dtype_to_storage_type_map()[dtype]
        head = self.once("tensor", _REBUILD_TENSOR) + b"((" + self.text(sys.intern("storage"))
        return head + self.once(kind, b"ctorch\n" + kind.encode() + b"\n")

    def location(self, row: int) -> bytes:
        device = None if self.columns.devices is None else self.columns.devices[row]
        if device is not None and device.type != "cpu":
            # torch makes the name anew each time.
            self.count += 1
            return _text(f"{device.type}:{device.index}") + self.puts[self.count - 1]
        text = self.text(sys.intern("cpu"))
        self.memo["cpu"] = self.memo[id(sys.intern("cpu"))]
        return text


_LENGTHS = [struct.pack("<I", length) for length in range(24)]
_two_digits = [str(number) for number in (7, 7)]
_DIGITS_ARE_SHARED = _two_digits[0] is _two_digits[1]
