"""The pickle of a tree of tensors, in two steps: `capture` takes down what could change, in a microsecond or so a
tensor; `Tree.encode` writes the pickle from that, later and on any thread.

The bytes are those that torch.save (2.13) has Python's pickler make (protocol 2), down to the memo's numbers, which the
tests compare. torch's own way costs some 16 microseconds a tensor: for 5,000 tensors longer than copying them. Only
what is met in checkpoints is written here: plain containers and values, and plain tensors and parameters. `capture`
refuses anything else, and the caller lets torch pickle it.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from .tensors import DIMENSIONS, Tensors, Unsupported

_ATOMS = frozenset((str, int, float, bool, type(None)))
_BATCH = 1000
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

    def versions(self, above: int) -> list[int]:
        return self.tensors.versions(above)

    @property
    def pickle_room(self) -> int:
        """Before the tensors are described; `describe` sees to it that the pickle fits."""
        each = _TENSOR_BYTES + 2 * _DIMENSION_BYTES * DIMENSIONS
        return self._other_bytes + len(self.tensors.tensors) * each

    def describe(self) -> None:
        self.tensors.describe()

    def encode(self) -> bytes:
        self.tensors.complete()
        return _Writer(self).write(self._root)


def capture(roots: Iterable[object]) -> list[Tree]:
    """Raises:
    Unsupported: nothing of them was taken.
    """
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


class _Walk:
    """Copies containers, so that they may change; values that can't change, and tensors, stay themselves."""

    def __init__(self) -> None:
        import torch

        self.kinds = frozenset((torch.Tensor, torch.nn.Parameter))
        self.known = self.kinds | _ATOMS
        self.tensors: dict[int, Any] = {}
        self.seen: dict[int, Any] = {}
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
            return item
        if (seen := self.seen.get(id(item))) is not None:
            if seen is _BEING_COPIED:
                raise Unsupported
            return seen
        copy: Any
        if kind is dict or kind is OrderedDict:
            copy = self.seen[id(item)] = kind()
            self._fill(copy, item)
            if kind is OrderedDict and (state := vars(item)):
                # A state_dict's _metadata.
                vars(copy).update({key: self.copy(value) for key, value in state.items()})
                self.items += len(state)
                self.text_bytes += sum(map(len, state)) + _STRING_BYTES * len(state)
        elif kind is list:
            copy = self.seen[id(item)] = []
            copy.extend(map(self.copy, item))
        elif kind is tuple:
            # One that holds itself, by way of a list: the memo works differently then.
            self.seen[id(item)] = _BEING_COPIED
            copy = tuple(map(self.copy, item))
            self.seen[id(item)] = copy
        else:
            raise Unsupported
        self.items += 1
        return copy

    def _fill(self, copy: dict[Any, Any], item: dict[Any, Any]) -> None:
        values = item.values()
        kinds = set(map(type, values))
        if kinds <= self.kinds and set(map(type, item)) <= {str}:
            # A state_dict: no loop in Python.
            self.tensors.update(zip(map(id, values), values, strict=True))
            self.text_bytes += sum(map(len, item)) + _STRING_BYTES * len(item)
            self.items += len(item)
            copy.update(item)
        else:
            for key, value in item.items():
                copy[self.copy(key)] = self.copy(value)


_BEING_COPIED: Any = object()


def _put(number: int) -> bytes:
    return b"q" + bytes((number,)) if number < 256 else b"r" + struct.pack("<I", number)


def _get(number: int) -> bytes:
    return b"h" + bytes((number,)) if number < 256 else b"j" + struct.pack("<I", number)


def _integer(value: int) -> bytes:
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


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers, without its place in the memo; () has none."""
    ends = (b")", b"\x85", b"\x86", b"\x87")
    body = b"".join(map(_integer, values))
    return body + ends[len(values)] if len(values) <= 3 else b"(" + body + b"t"


_ORDERED = b"ccollections\nOrderedDict\n"
_REBUILD_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_REBUILD_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
_puts: list[bytes] = []


class _Writer:
    """Python's pickler, protocol 2, as far as a `Tree` needs it. The memo knows an object by its identity, as there;
    what is defined by name (classes, functions) by the name."""

    def __init__(self, tree: Tree) -> None:
        import torch

        self.parameter = torch.nn.Parameter
        self.columns = tree.tensors
        self.out: list[bytes] = [b"\x80\x02"]
        self.memo: dict[Any, int] = {}
        self.count = 0
        self.rows = dict(zip(map(id, tree.tensors.tensors), itertools.count()))
        self.sizes: dict[tuple[int, ...], bytes] = {}
        self.heads: dict[Any, tuple[bytes, bytes]] = {}
        self.ordered_get = b""
        while len(_puts) < 64 + 12 * len(tree.tensors.tensors) + 2 * tree._items:
            _puts.append(_put(len(_puts)))

    def write(self, root: Any) -> bytes:
        self.save(root)
        self.out.append(b".")
        return b"".join(self.out)

    def remember(self, key: Any) -> bytes:
        number = self.memo[key] = self.count
        self.count += 1
        return _puts[number]

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
                out.append(b"}" + self.remember(id(state)))
                self.dict(state)
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
            at = self.count
            self.out += (requires_grad, self.ordered_get, b")R", _puts[at], b"\x87", _puts[at + 1], b"R", _puts[at + 2])
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
        # A storage's name is the same object each time that the storage is met.
        if (at := self.memo.get(("key", number))) is not None:
            key = _get(at)
        else:
            name = str(number)
            key = b"X" + _LENGTHS[len(name)] + name.encode() + self.remember(("key", number))
        if not place or columns.devices is not None:
            place = self.location(row)
        shape, stride, sizes, puts, at = columns.shapes[row], columns.strides[row], self.sizes, _puts, self.count
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
            return _text(f"{device.type}:{device.index}") + _puts[self.count - 1]
        text = self.text(sys.intern("cpu"))
        self.memo["cpu"] = self.memo[id(sys.intern("cpu"))]
        return text


_LENGTHS = [struct.pack("<I", length) for length in range(24)]
