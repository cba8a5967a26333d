# SPDX-License-Identifier: Apache-2.0
"""Kinds of objects that people put into checkpoints, for test_pickles.py: each with a function that makes it."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import pathlib
import random
import re
import tempfile
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import addict
import easydict
import ml_collections
import munch
import numpy
import omegaconf
import pydantic
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler, swa_utils


class Scalars(typing.NamedTuple):
    """How a table's entry makes its numbers: as numpy's, or as those that a file has in their places."""

    f64: Callable[[Any], Any]
    f32: Callable[[Any], Any]
    f16: Callable[[Any], Any]
    i64: Callable[[Any], Any]
    u8: Callable[[Any], Any]
    truth: Callable[[Any], Any]


NUMPY = Scalars(numpy.float64, numpy.float32, numpy.float16, numpy.int64, numpy.uint8, numpy.bool_)
PYTHON = Scalars(float, lambda x: float(numpy.float32(x)), lambda x: float(numpy.float16(x)), int, int, bool)


@dataclasses.dataclass
class Kind:
    make: Callable[[], Any]
    # The same with Python's numbers instead of numpy's: its bytes are what the file has.
    plain: Callable[[], Any] | None = None
    # Both saves happen in it.
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    # Not byte for byte: what is loaded is compared.
    only_values: bool = False


KINDS: dict[str, Kind] = {}


def kind(make: Callable[[], Any]) -> Callable[[], Any]:
    KINDS[make.__name__] = Kind(make)
    return make


def with_scalars(make: Callable[[Scalars], Any]) -> Callable[[Scalars], Any]:
    KINDS[make.__name__] = Kind(functools.partial(make, NUMPY), functools.partial(make, PYTHON))
    return make


def each(prefix: str, **makes: Callable[[], Any]) -> None:
    for name, make in makes.items():
        KINDS[f"{prefix}_{name}"] = Kind(make)


# Classes of users. They have to be found by their names.


class Plain(dict):  # type: ignore[type-arg]
    pass


class Attr(dict):  # type: ignore[type-arg]
    def __init__(self, *arguments: Any, **items: Any) -> None:
        super().__init__(*arguments, **items)
        self.__dict__ = self


class NeedsArgument(collections.OrderedDict):  # type: ignore[type-arg]
    def __init__(self, name: str, **items: Any) -> None:
        super().__init__(**items)
        self.name = name

    def __reduce__(self) -> Any:
        return (NeedsArgument, (self.name,), None, None, iter(self.items()))


class Items(list):  # type: ignore[type-arg]
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])

    def __reduce__(self) -> Any:
        return (Items, tuple(self))


class Pair(tuple):  # type: ignore[type-arg]
    __slots__ = ()

    def __new__(cls, left: Any, right: Any) -> Pair:
        return super().__new__(cls, (left, right))

    def __getnewargs__(self) -> Any:
        return tuple(self)


class Names(set):  # type: ignore[type-arg]
    pass


class Text(str):
    __slots__ = ("note",)


class Whole(int):
    pass


class Part(float):
    pass


class Raw(bytes):
    pass


class Point(typing.NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Settings:
    lr: Any = 0.1
    betas: Any = (0.9, 0.999)
    tensors: Any = dataclasses.field(default_factory=lambda: {"w": torch.ones(3)})


@dataclasses.dataclass(frozen=True)
class Frozen:
    lr: float = 0.1
    name: str = "x"


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, torch.ones(2)


class Mean:
    """Its code calls numpy's methods of its number."""

    def __init__(self) -> None:
        self.mean = numpy.float64(2.5)
        self.history = [numpy.float32(1.0)]

    def read(self) -> Any:
        return self.mean.item()


class Reduced:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return (Reduced, (self.value,))


class WithState:
    def __init__(self) -> None:
        self.kept, self.dropped = torch.arange(4), object

    def __getstate__(self) -> Any:
        return {"kept": self.kept, "of": self}

    def __setstate__(self, state: Any) -> None:
        self.kept = state["kept"]


class Unwilling:
    def __reduce__(self) -> Any:
        raise LookupError("this object does not want to be saved")


class Lying:
    def __reduce__(self) -> Any:
        return 3


class Changing:
    """Changes the dict that it is in while that is pickled."""

    def __init__(self, owner: dict[Any, Any]) -> None:
        self.owner = owner

    def __reduce__(self) -> Any:
        self.owner[len(self.owner)] = None
        return (int, ())


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Flags(enum.Flag):
    A = 1
    B = 2


class Marked(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
        return super().__torch_function__(func, kinds, arguments, named or {})


class Weight(torch.nn.Parameter):
    pass


class Wrapper(torch.Tensor):
    """A wrapper of another tensor, without a storage of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
        raise NotImplementedError(str(func))


class Validated(pydantic.BaseModel):
    lr: float = 0.1
    tags: list[str] = ["a", "b"]
    nested: dict[str, int] = {"x": 1}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
        self.scale = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))
        self.table = {"a": 1}

    def get_extra_state(self) -> Any:
        return {"table": self.table}

    def set_extra_state(self, state: Any) -> None:
        self.table = state["table"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return typing.cast(torch.Tensor, self.body(x)) * self.scale


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))


# Python's own.

each(
    "python",
    none=lambda: None,
    true=lambda: True,
    numbers=lambda: [0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(2**63)],
    big_numbers=lambda: {"big": [2**2047, 2**2048, -(2**4000), 1 << 20_000], -(2**100): "key"},
    floats=lambda: [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 5e-324, 1.1],
    float_keys=lambda: {0.5: 1, -0.0: 2, float("nan"): 3, float("inf"): 4},
    mixed_keys=lambda: {1: "a", "1": "b", (1, 2): "c", None: "d", b"1": "e", 2.5: "f", frozenset((1,)): "g"},
    complex=lambda: [1 + 2j, -0j, complex("nan")],
    text=lambda: ["", "a", "ä", "日本", "\0", "\ud800", "\U0001f600", "x" * 70_000, "cnumpy\nscalar\n"],
    bytes=lambda: [b"", b"\0\xff", b"x" * 70_000, bytearray(b"abc"), bytearray()],
    long_bytes=lambda: {"raw": bytes(range(256)) * 1024, "w": torch.ones(2)},
    empty=lambda: [{}, [], (), set(), frozenset(), "", b"", collections.OrderedDict(), {"a": {}, "b": []}],
    tuples=lambda: [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((),), ((1, (2, (3,))),)],
    sets=lambda: [{1, 2, 3}, {"a"}, frozenset((1, "x")), {(1, 2)}],
    ranges=lambda: [range(5), slice(1, None, 2), range(0, 10, 3)],
    ellipsis=lambda: [..., NotImplemented],
    thousand=lambda: {i: str(i) for i in range(1000)},
    thousand_and_one=lambda: {i: str(i) for i in range(1001)},
    two_thousand_items=lambda: [*range(2000), list(range(1001))],
    ordered_thousand=lambda: collections.OrderedDict((i, i) for i in range(1000)),
    ordered_thousand_and_one=lambda: collections.OrderedDict((str(i), i) for i in range(1001)),
    memo_of_many=lambda: {f"key {i}": [f"value {i}"] for i in range(400)},
    counter=lambda: collections.Counter("abracadabra"),
    defaultdict=lambda: collections.defaultdict(list, {"a": [1]}),
    chain_map=lambda: collections.ChainMap({"a": 1}, {"b": 2}),
    deque=lambda: collections.deque([1, torch.ones(2), "x"], maxlen=5),
    user_dict=lambda: collections.UserDict({"a": 1}),
    mapping_proxy=lambda: types.MappingProxyType({"a": 1}),
    namespace=lambda: types.SimpleNamespace(a=1, b=torch.ones(2)),
    named_tuple=lambda: Point(1, torch.ones(2)),
    dates=lambda: [
        datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        datetime.date(2026, 1, 2),
        datetime.timedelta(seconds=3),
    ],
    path=lambda: [pathlib.Path("/a/b"), pathlib.PurePosixPath("c")],
    exact=lambda: [decimal.Decimal("1.10"), fractions.Fraction(1, 3), uuid.UUID(int=5), ipaddress.ip_address("::1")],
    array=lambda: array.array("d", [1.0, 2.0]),
    expression=lambda: re.compile(r"a+b", re.IGNORECASE),
    random_state=random.getstate,
    random_object=lambda: random.Random(3),
    enums=lambda: {"e": Color.RED, Color.BLUE: 1, "i": Level.HIGH, "f": Flags.A | Flags.B},
    classes=lambda: [int, dict, torch.nn.Linear, Plain, Color, collections.OrderedDict],
    functions=lambda: [len, torch.relu, torch.nn.functional.gelu, net, "".join, dict.fromkeys],
    partial=lambda: functools.partial(torch.nn.functional.dropout, p=0.5),
    dataclass=Settings,
    frozen_dataclass=Frozen,
    slots=Slots,
    state=WithState,
    reduced=lambda: Reduced([1, torch.ones(2)]),
    exception=lambda: ValueError("what", 3),
    lambda_=lambda: {"f": lambda: None},
    generator=lambda: (x for x in ()),
    module=lambda: {"m": torch},
    file=lambda: {"f": io.BytesIO(b"x")},
    local_class=lambda: type("Local", (), {})(),
    unwilling=lambda: {"deep": [Unwilling()]},
    lying=Lying,
    many_plain_values=lambda: {"rows": [{"a": i, "b": float(i), "c": "x"} for i in range(5000)], "w": torch.ones(2)},
    mutable_keys=lambda: {Frozen(): 1},
)


@kind
def python_shared() -> Any:
    text, number, row, both = "".join(["sh", "ared"]), 2**70, [1], ("t", 1)
    again = "".join(["sh", "ared"])
    return {"a": text, text: number, "b": [number, text, again, "shared"], "c": row, "d": [row, both, both], "e": both}


@kind
def python_words_of_torch() -> Any:
    """Strings that torch's own pickling has as well, and that Python keeps once."""
    return {"storage": torch.ones(2), "cpu": ["storage", "cpu", "0"], "0": torch.zeros(2), "1": torch.ones(3)}


@kind
def python_loops() -> Any:
    around: list[Any] = [torch.ones(2)]
    around.append({"self": around, "tuple": (around,)})
    table: dict[str, Any] = {"w": torch.ones(2)}
    table["me"] = table
    ordered = collections.OrderedDict(a=1)
    ordered["me"] = ordered
    return [around, table, ordered]


@kind
def python_tuple_in_itself() -> Any:
    row: list[Any] = []
    row.append((row, torch.ones(2)))
    return row[0]


@kind
def python_changed_while_saved() -> Any:
    table: dict[Any, Any] = {}
    table["x"] = Changing(table)
    table["y"] = 1
    return table


@kind
def ordered_with_attributes() -> Any:
    state = collections.OrderedDict(w=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    state.owner = ["me", state["w"]]  # type: ignore[attr-defined]
    return {"state": state, "attributes": vars(state)}


@kind
def ordered_after_its_attributes() -> Any:
    state = collections.OrderedDict(w=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return {"attributes": vars(state), "state": state, "again": copy_of(state)}


def copy_of(state: Any) -> Any:
    again = collections.OrderedDict(state)
    again._metadata = state._metadata  # type: ignore[attr-defined]
    return again


each(
    "subclass",
    dict=lambda: Plain(a=1, w=torch.ones(2)),
    dict_with_attributes=lambda: Attr(a=1, w=torch.ones(2)),
    ordered=lambda: NeedsArgument("n", a=1),
    list=lambda: Items(1, torch.ones(2)),
    tuple=lambda: Pair(1, torch.ones(2)),
    set=lambda: Names({1, 2}),
    str=lambda: {Text("key"): Text("value"), "key2": Text("value")},
    int=lambda: {Whole(3): Whole(4), "x": [Whole(4), True, Level.LOW]},
    float=lambda: {Part(0.5): [Part(-0.0)]},
    bytes=lambda: [Raw(b"abc")],
    size=lambda: {"size": torch.ones(2, 3).size(), "key": {torch.Size([1]): 1}},
)


# numpy's.

each(
    "numpy",
    array=lambda: numpy.arange(6).reshape(2, 3),
    arrays=lambda: {"f": numpy.zeros(3, "f4"), "t": numpy.arange(6).reshape(2, 3).T, "e": numpy.empty((0, 2))},
    object_array=lambda: numpy.array([numpy.float64(1), "x", None], dtype=object),
    records=lambda: numpy.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    record=lambda: {"r": numpy.zeros(2, dtype=[("a", "i4"), ("b", "f8")])[0]},
    dtype=lambda: numpy.dtype("float32"),
    no_equal=lambda: [numpy.longdouble(0.1), numpy.datetime64("2026-01-01"), numpy.timedelta64(3, "s")],
    random=lambda: numpy.random.RandomState(3).get_state(legacy=False),
    random_legacy=lambda: numpy.random.RandomState(3).get_state(),
    generator=lambda: numpy.random.default_rng(3),
    in_the_state_of_an_object=lambda: {"mean": Mean(), "settings": Settings(lr=numpy.float64(0.1))},
    in_a_reduced_object=lambda: Reduced(numpy.float64(0.1)),
    memory_of_one_array_twice=lambda: dict(zip("ab", map(torch.from_numpy, [numpy.ones(4)] * 2), strict=True)),
)


@with_scalars
def scalars_of_each_type(n: Scalars) -> Any:
    numbers = [n.f64(0.1), n.f32(0.1), n.f16(0.1), n.i64(-(2**40)), n.u8(7), n.truth(True), n.truth(False)]
    return [*numbers, n.f64("nan"), n.f64("inf"), n.f64(-0.0), n.i64(-(2**63)), torch.ones(2)]


@with_scalars
def scalars_in_an_optimizer(n: Scalars) -> Any:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=n.f64(1e-3), betas=(n.f64(0.9), n.f64(0.999)), eps=n.f32(1e-8))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@with_scalars
def scalars_as_keys(n: Scalars) -> Any:
    return {
        n.i64(3): "a",
        n.f32(0.1): {n.truth(True): n.u8(3)},
        (n.i64(1), n.i64(2)): [torch.ones(2)],
        "set": {n.i64(5)},
    }


@with_scalars
def scalars_in_a_scheduler(n: Scalars) -> Any:
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0)
    return lr_scheduler.MultiStepLR(optimizer, milestones=[n.i64(2), n.i64(4), n.i64(4)], gamma=n.f64(0.1)).state_dict()


@with_scalars
def scalars_in_containers(n: Scalars) -> Any:
    one = n.f64(0.25)
    return {
        "counter": collections.Counter({n.i64(2): n.i64(1)}),
        "default": collections.defaultdict(float, {"a": one}),
        "deque": collections.deque([one], maxlen=3),
        "sets": [{n.i64(7)}, frozenset((n.i64(8),))],
        "tuple": (one, (one, one)),
        "same": [one, one],
    }


@with_scalars
def scalars_in_subclasses(n: Scalars) -> Any:
    plain = Plain(lr=n.f64(0.1))
    return {
        "plain": plain,
        "again": [plain, plain],
        "attr": Attr(lr=n.f64(0.1), n=3),
        "ordered": NeedsArgument("o", lr=n.f64(0.1)),
        "items": Items(n.f32(1.5), 2),
        "pair": Pair(n.i64(1), n.i64(2)),
        "point": Point(n.f64(0.5), [n.f64(1.5)]),
        "names": Names({n.i64(3)}),
    }


@with_scalars
def scalars_in_loops(n: Scalars) -> Any:
    table: dict[str, Any] = {"x": n.f64(1.0)}
    table["self"] = table
    row: list[Any] = [n.f64(2.0), table]
    row.append((row, n.i64(3)))
    return row


@with_scalars
def scalars_as_attributes(n: Scalars) -> Any:
    state = collections.OrderedDict(w=torch.ones(2))
    state._metadata = {"": {"version": n.i64(2)}}  # type: ignore[attr-defined]
    weight = torch.nn.Parameter(torch.ones(2))
    weight.lr_scale = n.f64(0.5)  # type: ignore[attr-defined]
    return {"state": state, "weight": weight}


@with_scalars
def scalars_beside_any_object(n: Scalars) -> Any:
    return {"lr": n.f64(0.1), "settings": Settings(), "array": numpy.ones(2)}


KINDS["scalars_of_text"] = Kind(
    lambda: {"s": numpy.str_("ä\0"), "b": [numpy.bytes_(b"\xff\0"), numpy.bytes_(b"")], numpy.str_("k"): 1},
    lambda: {"s": "ä\0", "b": [b"\xff\0", b""], "k": 1},
    only_values=True,
)
KINDS["scalars_complex"] = Kind(
    lambda: [numpy.complex64(1 + 2j), numpy.complex128(-0j)], lambda: [1 + 2j, -0j], only_values=True
)


# Tensors.


def of_dtype(name: str) -> Any:
    dtype = getattr(torch, name)
    if name.startswith(("q", "float4")) or not torch.empty(0, dtype=dtype).element_size():
        return {"t": torch.empty(4, dtype=dtype)}
    width = torch.empty(0, dtype=dtype).element_size()
    return {"t": (torch.arange(8 * width, dtype=torch.uint8) % 2).view(dtype), "other": torch.ones(2)}


DTYPES = sorted(name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype)
for dtype_name in DTYPES:
    KINDS[f"dtype_{dtype_name}"] = Kind(functools.partial(of_dtype, dtype_name))


def not_a_leaf() -> Any:
    weight = torch.ones(3, requires_grad=True)
    return {"product": weight * 2, "leaf": weight, "with_gradient": with_gradient()}


def with_gradient() -> torch.Tensor:
    weight = torch.nn.Parameter(torch.ones(3))
    (weight * 2).sum().backward()
    return weight


def with_hook(parameter: bool) -> Any:
    weight = torch.nn.Parameter(torch.ones(2)) if parameter else torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: gradient)
    return {"w": weight}


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = {"sharded": True, "lr": 0.1}  # type: ignore[attr-defined]
    return tensor


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return {"t": torch.ones(40_000), "small": torch.ones(2)}


def overlapping() -> Any:
    memory = numpy.arange(10, dtype="f4")
    return {
        "all": torch.from_numpy(memory),
        "part": torch.from_numpy(memory[2:5]),
        "begin": torch.from_numpy(memory[:3]),
    }


def freed() -> Any:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return {"t": tensor, "other": torch.ones(2)}


def loaded_with_mmap() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"w": torch.arange(100.0), "b": torch.ones(3)}, folder + "/file.th")
        return torch.load(folder + "/file.th", mmap=True)


def two_types() -> Any:
    words = torch.arange(4, dtype=torch.int32)
    return {"i": words, "f": words.view(torch.float32)}


def two_types_of_one_array() -> Any:
    memory = numpy.arange(4, dtype="i4")
    return {"i": torch.from_numpy(memory), "f": torch.from_numpy(memory.view("f4"))}


def fake() -> Any:
    with FakeTensorMode():
        return torch.nn.Linear(3, 4).state_dict()


base = torch.arange(24.0)
each(
    "tensor",
    alone=lambda: torch.arange(5),
    scalar=lambda: torch.tensor(3.5),
    empty=lambda: {"a": torch.empty(0), "b": torch.empty(0, 3), "c": torch.empty(2, 0), "d": base[5:5]},
    views=lambda: {"a": base[3:7], "b": base.view(4, 6).t(), "c": base[::2], "d": base.as_strided((2, 2), (0, 1), 3)},
    expanded=lambda: torch.ones(1, 3).expand(5, 3),
    channels_last=lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    many_dimensions=lambda: torch.ones([1] * 20),
    same_twice=lambda: [base, base, {"again": base}],
    overlapping_storages=overlapping,
    part_of_a_storage_in_bytes=lambda: torch.empty(0, dtype=torch.float32).set_(
        torch.ones(10, dtype=torch.uint8).untyped_storage()[:10], 0, (2,), (1,)
    ),
    detached=lambda: [base, base.detach(), base.data],
    conjugated=lambda: torch.tensor([1 + 2j, 3j]).conj(),
    negated=lambda: torch._neg_view(torch.ones(3)),
    imaginary_part_of_a_conjugate=lambda: torch.tensor([1 + 2j]).conj().imag,
    two_types=two_types,
    two_types_of_one_array=two_types_of_one_array,
    not_a_leaf=not_a_leaf,
    hook=lambda: with_hook(parameter=False),
    hook_of_a_parameter=lambda: with_hook(parameter=True),
    attributes=lambda: [with_attribute(torch.ones(2)), with_attribute(torch.nn.Parameter(torch.ones(2)))],
    frozen=lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False),
    integer_parameter=lambda: torch.nn.Parameter(torch.arange(3), requires_grad=False),
    buffer=lambda: torch.nn.Buffer(torch.ones(2)),
    buffer_not_kept=lambda: torch.nn.Buffer(torch.ones(2), persistent=False),
    uninitialized=lambda: torch.nn.UninitializedParameter(),
    uninitialized_buffer=lambda: torch.nn.parameter.UninitializedBuffer(),
    lazy_module=lambda: torch.nn.LazyLinear(3).state_dict(),
    parameter_subclass=lambda: Weight(torch.ones(2)),
    subclass=lambda: torch.ones(3).as_subclass(Marked),
    subclass_with_attributes=lambda: with_attribute(torch.ones(3).as_subclass(Marked)),
    wrapper=lambda: {"w": Wrapper(torch.ones(3))},
    shared_memory=lambda: torch.ones(5).share_memory_(),
    inference=in_inference_mode,
    freed=freed,
    loaded_with_mmap=loaded_with_mmap,
    sparse=lambda: [torch.eye(3).to_sparse(), torch.eye(4).to_sparse().coalesce()],
    sparse_rows=lambda: torch.eye(3).to_sparse_csr(),
    sparse_columns=lambda: torch.eye(3).to_sparse_csc(),
    sparse_blocks=lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    mkldnn=lambda: torch.ones(3).to_mkldnn(),
    nested=lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    jagged=lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    quantized=lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 3, torch.quint8),
    quantized_by_channel=lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
    zero=lambda: torch._efficientzerotensor(3),
    meta=lambda: {"m": torch.ones(3, device="meta"), "c": torch.ones(2)},
    meta_parameter=lambda: torch.nn.Linear(2, 3, device="meta").state_dict(),
    fake=fake,
    lazily_copied=lambda: [base, torch._lazy_clone(base)] if hasattr(torch, "_lazy_clone") else [base],
)
each(
    "storage",
    untyped=lambda: torch.ones(3).untyped_storage(),
    typed=lambda: torch.ones(3).storage(),
    beside_its_tensor=lambda: [base, base.untyped_storage()],
    typed_beside_its_tensor=lambda: [base, base.storage(), base.storage()],
    empty=lambda: torch.UntypedStorage(0),
    meta=lambda: torch.UntypedStorage(8, device="meta"),
    meta_of_no_bytes=lambda: torch.UntypedStorage(0, device="meta"),
    key=lambda: {torch.ones(2).untyped_storage(): 1},
)
each(
    "torch",
    dtypes=lambda: [torch.float32, torch.uint4, torch.float8_e4m3fn],
    device=lambda: {torch.device("cuda:1"): torch.device("cpu")},
    layout=lambda: torch.strided,
    memory_format=lambda: torch.channels_last,
    scheme=lambda: torch.per_tensor_affine,
    random_state=torch.get_rng_state,
    generator=lambda: torch.Generator().manual_seed(3).get_state(),
    generator_object=lambda: torch.Generator(),
    tensor_as_key=lambda: {torch.ones(2): 1},
    dataset=lambda: torch.utils.data.TensorDataset(torch.ones(3), torch.zeros(3)),
    distribution=lambda: torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
    script=lambda: {"s": torch.jit.script(torch.nn.Linear(2, 2))},
)


def skipping(materialize: bool) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: torch.serialization.skip_data(materialize)


KINDS["skip_data_fake"] = Kind(fake, context=skipping(True))
KINDS["skip_data_fake_not_materialized"] = Kind(fake, context=skipping(False))
KINDS["skip_data"] = Kind(
    lambda: {"a": torch.ones(20), "b": torch.ones(3), "e": torch.empty(0)}, context=skipping(False)
)
KINDS["skip_data_nothing"] = Kind(lambda: {"e": torch.empty(0)}, context=skipping(False))
KINDS["skip_data_quantized"] = Kind(KINDS["tensor_quantized"].make, context=skipping(False))
KINDS["skip_data_meta_storage"] = Kind(KINDS["storage_meta"].make, context=skipping(False))


class EveryCall(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
        return func(*arguments, **(named or {}))


KINDS["within_a_mode"] = Kind(lambda: {"t": torch.ones(2)}, context=EveryCall)
KINDS["within_a_device"] = Kind(lambda: {"t": torch.ones(2)}, context=lambda: torch.device("meta"))
KINDS["within_fake_mode"] = Kind(lambda: {"t": torch.ones(2)}, context=FakeTensorMode)


@contextlib.contextmanager
def own_place() -> Iterator[None]:
    registry = torch.serialization._package_registry
    before = list(registry)
    torch.serialization.register_package(
        5, lambda storage: "here" if storage.nbytes() == 8 else None, lambda storage, location: None
    )
    yield
    registry[:] = before


@contextlib.contextmanager
def own_reducer() -> Iterator[None]:
    import copyreg

    copyreg.pickle(torch.Tensor, lambda tensor: (torch.tensor, (tensor.tolist(),)))  # type: ignore[arg-type,return-value]
    yield
    del copyreg.dispatch_table[torch.Tensor]


KINDS["with_a_place_of_its_own"] = Kind(lambda: {"t": torch.ones(2), "u": torch.ones(3)}, context=own_place)
KINDS["with_a_reducer_of_its_own"] = Kind(lambda: {"t": torch.ones(2)}, context=own_reducer)


# Training.


def optimizer_of(name: str) -> Any:
    torch.manual_seed(0)
    model = (
        torch.nn.Embedding(4, 3, sparse=True) if name == "SparseAdam" else torch.nn.Linear(4, 3, bias=name != "Muon")
    )
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        given = torch.tensor([1, 2]) if name == "SparseAdam" else torch.ones(1, 4)
        loss = model(given).square().sum()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
)
for optimizer_name in OPTIMIZERS:
    KINDS[f"optimizer_{optimizer_name}"] = Kind(functools.partial(optimizer_of, optimizer_name))

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, len_of_epoch),
    "LambdaLR_of_an_object": lambda o: lr_scheduler.LambdaLR(o, Halving()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, len_of_epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]
    ),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=10),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "SWALR": lambda o: swa_utils.SWALR(o, 0.1),
}


def len_of_epoch(epoch: int) -> float:
    return 1 / (epoch + 1)


class Halving:
    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, epoch: int) -> float:
        return float(self.factor**epoch)


def scheduler_of(name: str, whole: bool) -> Any:
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.step()
    scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    return {"whole": scheduler} if whole else {"state": scheduler.state_dict(), "optimizer": optimizer.state_dict()}


for scheduler_name in SCHEDULERS:
    KINDS[f"scheduler_{scheduler_name}"] = Kind(functools.partial(scheduler_of, scheduler_name, False))
    KINDS[f"whole_scheduler_{scheduler_name}"] = Kind(functools.partial(scheduler_of, scheduler_name, True))


def distributed() -> Any:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return torch.nn.parallel.DistributedDataParallel(net())


def averaged() -> Any:
    model = net()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    return average.state_dict()


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=4.0).state_dict()  # type: ignore[attr-defined]


def tied() -> Any:
    embedding, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    return torch.nn.ModuleList([embedding, head]).state_dict()


def torchao_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    return model.state_dict()


def torchao_optimizer() -> Any:
    from torchao.optim import AdamW8bit

    model = torch.nn.Linear(256, 64)
    optimizer = AdamW8bit(model.parameters())
    return optimizer.state_dict()


each(
    "training",
    state_dict=lambda: Net().state_dict(),
    tied=tied,
    module=Net,
    module_of_torch=lambda: torch.nn.TransformerEncoderLayer(8, 2, 16),
    module_with_hook=lambda: hooked(Net()),
    parametrized=lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)).state_dict(),
    optimizer_object=lambda: torch.optim.Adam(net().parameters()),
    ddp_state=lambda: distributed().state_dict(),
    ddp_module=distributed,
    compiled_state=lambda: torch.compile(net()).state_dict(),
    compiled_module=lambda: torch.compile(net()),
    averaged=averaged,
    averaged_module=lambda: swa_utils.AveragedModel(net()),
    scaler=scaler,
    torchao_weights=torchao_weights,
    torchao_optimizer=torchao_optimizer,
    many=lambda: {f"layer.{i}": torch.full((7,), float(i)) for i in range(1500)},
    everything=lambda: {"model": Net().state_dict(), "optimizer": optimizer_of("AdamW"), "rng": random.getstate()},
)


def hooked(module: torch.nn.Module) -> torch.nn.Module:
    module.register_forward_hook(len_of_epoch)  # type: ignore[arg-type]
    return module


CONFIG = {"lr": 0.1, "betas": [0.9, 0.99], "model": {"name": "x", "depth": 3}}
each(
    "library",
    omegaconf=lambda: omegaconf.OmegaConf.create({**CONFIG, "again": "${model.name}"}),
    omegaconf_list=lambda: {"l": omegaconf.OmegaConf.create([1, {"a": 2}]), "w": torch.ones(2)},
    addict=lambda: addict.Dict(CONFIG),
    easydict=lambda: easydict.EasyDict(CONFIG),
    munch=lambda: munch.munchify(CONFIG),
    default_munch=lambda: munch.DefaultMunch.fromDict(CONFIG, None),
    ml_collections=lambda: ml_collections.ConfigDict(CONFIG),
    ml_collections_frozen=lambda: ml_collections.FrozenConfigDict(CONFIG),
    pydantic=Validated,
)


@with_scalars
def library_with_scalars(n: Scalars) -> Any:
    return {
        "addict": addict.Dict(lr=n.f64(0.1)),
        "easydict": easydict.EasyDict(lr=n.f64(0.1)),
        "munch": munch.Munch(lr=n.f64(0.1)),
    }
