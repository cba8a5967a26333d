# SPDX-License-Identifier: Apache-2.0
"""What is saved here is what torch.save saves: each kind of object of objects.py by both, compared record by record, or
refused by both in the same words. Then what a snapshot promises its caller: no cycles, and calls that can be repeated.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import threading
import types
import warnings
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import numpy
import objects
import pytest
import torch
from conftest import RunningDaemon
from noether_writer import snapshot
from noether_writer.errors import RefusedName
from objects import KINDS, Kind

# Each is a test of its own below, so that one that fails is named; they share a daemon and a run.
MODES: tuple[Any, ...] = ("copy", "overlap")
TOO_DEEP = 50_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[noether_writer.Run]:
    folder = tmp_path_factory.mktemp("pickles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOETHER_WRITER_SETTING_STATE_DIRECTORY", str(folder / "state"))
        daemon = RunningDaemon(str(folder / "socket"))
        patch.setenv("NOETHER_WRITER_SOCKET", daemon.socket)
        run = noether_writer.open_run(folder / "runs", "r")
        yield run
        run.close()
        assert daemon.stop() == 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def records(path: Path) -> dict[str, bytes]:
    """In order; without the checksums, which torch leaves out under skip_data."""
    found: dict[str, bytes] = {}
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            names = data[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + int.from_bytes(names[:2], "little") + int.from_bytes(names[2:], "little")
            found[info.filename] = data[start : start + info.file_size]
    last = next(reversed(found))
    assert last.endswith("/.data/serialization_id") and len(found[last]) == 40
    del found[last]
    return found


class Outcome:
    """Of a save: the warnings that came, and the error or the file."""

    def __init__(self, kind: Kind, save: Callable[[], Path]) -> None:
        self.error: Exception | None = None
        self.path: Path | None = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with kind.context():
                    self.path = save()
            except Exception as error:
                self.error = error
        self.warnings = sorted({str(warning.message) for warning in said})


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_object_is_saved_as_torch_saves_it(
    name: str, run: noether_writer.Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = KINDS[name]
    obj = kind.make()
    expected_obj = obj if kind.plain is None else kind.plain()
    theirs = tmp_path / f"net_cp={name}_model.th"

    def by_torch() -> Path:
        torch.save(expected_obj, theirs)
        return theirs

    expected = Outcome(kind, by_torch)
    for mode in MODES:

        def by_us(mode: Any = mode) -> Path:
            ticket = run.save("net", name, obj, snapshot=mode)
            ticket.wait(60)
            return Path(ticket.paths[0])

        outcome = Outcome(kind, by_us)
        assert type(outcome.error) is type(expected.error), outcome.error or expected.error
        assert str(outcome.error) == str(expected.error)
        assert outcome.warnings == expected.warnings
        if expected.path is None:
            assert not (run.directory / "checkpoints" / theirs.name).exists()
            continue
        assert outcome.path is not None
        ours = records(outcome.path)
        assert [*ours] == [*records(theirs)]
        if not kind.only_values:
            assert ours == records(theirs)
        if kind.plain is not None:
            loaded = torch.load(outcome.path, weights_only=False)
            assert repr(loaded) == repr(torch.load(theirs, weights_only=False))


def test_the_table_is_as_large_as_it_has_to_be() -> None:
    schedulers = {
        name
        for name, found in vars(torch.optim.lr_scheduler).items()
        if isinstance(found, type)
        and issubclass(found, torch.optim.lr_scheduler.LRScheduler)
        and "LRScheduler" not in name
    }
    assert schedulers <= set(objects.SCHEDULERS)
    assert len(objects.OPTIMIZERS) >= 14
    assert len(KINDS) >= 300


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.plain and "subclass" not in name])
def test_numpy_scalars_do_not_keep_a_file_from_weights_only(name: str, run: noether_writer.Run, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.plain is not None
    torch.save(kind.plain(), tmp_path / "plain.th")
    ticket = run.save("net", name, kind.make())
    ticket.wait(60)
    try:
        expected = torch.load(tmp_path / "plain.th", weights_only=True)
    except Exception as error:
        if "bytes" in str(error):
            # torch refuses its own empty bytes; ours are written in another way.
            expected = kind.plain()
        else:
            # Something else in it is refused, whatever the numbers are.
            with pytest.raises(type(error)):
                torch.load(ticket.paths[0], weights_only=True)
            return
    assert repr(torch.load(ticket.paths[0], weights_only=True)) == repr(expected)


def test_a_numpy_scalar_stays_numpys_in_the_state_of_an_object(run: noether_writer.Run) -> None:
    ticket = run.save("net", "mean", {"mean": objects.Mean(), "lr": numpy.float64(0.1)})
    ticket.wait(60)
    loaded = torch.load(ticket.paths[0], weights_only=False)
    assert loaded["mean"].read() == 2.5
    assert type(loaded["lr"]) is float and type(loaded["mean"].history[0]) is numpy.float32


def test_an_object_is_pickled_once(run: noether_writer.Run) -> None:
    """What it does while it is pickled happens once, also with numpy's scalars around it."""
    calls: list[int] = []
    obj = {"lr": numpy.float64(0.1), "w": torch.ones(2), "o": Counting(calls)}
    run.save("net", "once", obj).wait(60)
    assert len(calls) == 1


class Counting:
    def __init__(self, calls: list[int], error: type[Exception] | None = None) -> None:
        self.calls, self.error = calls, error

    def __reduce__(self) -> Any:
        self.calls.append(1)
        if self.error is not None:
            raise self.error("no")
        return (list, ())


# Names of records, which depend on the path.


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs", "net"),
        ("runs", "n\u00e9t"),
        ("l\u00e4ufe", "net"),
        ("runs", "a\\b.c"),
        ("runs", ".a."),
        ("a\\b.c", "net"),
    ],
)
def test_records_are_named_as_torch_names_them_for_this_path(
    folder: str, name: str, run: noether_writer.Run, tmp_path: Path
) -> None:
    obj = {"w": torch.ones(3), "x": 1}
    with noether_writer.open_run(tmp_path / folder, "r") as other:
        # The second shares blocks with the first, if the file system can.
        ticket = other.save_as([noether_writer.Target(name, "t", obj), noether_writer.Target(name, "latest", obj)])
        ticket.wait(60)
        other.log({"loss": 0.5}, update=1)
    for path in map(Path, ticket.paths):
        ours, size = records(path), path.stat().st_size
        torch.save(obj, path)
        assert [*ours.items()] == [*records(path).items()]
        assert path.stat().st_size == size
    entries = tmp_path / folder / "r/tracker/entries.th"
    ours = records(entries)
    torch.save(torch.load(entries), entries)
    assert [*ours] == [*records(entries)]


def test_a_directory_that_can_not_be_sent_is_a_refused_name(
    run: noether_writer.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/runs\xff")
    os.mkdir(odd)
    for path in (odd, os.fsencode(odd), str(tmp_path / "half\ud800")):
        with pytest.raises(
            RefusedName, match=r"output_root .*/(runs.udcff|half.ud800)' is not UTF-8.* nothing was written"
        ):
            noether_writer.open_run(path, "r")
    monkeypatch.chdir(odd)
    with pytest.raises(RefusedName, match="is not UTF-8"):
        noether_writer.open_run("here", "r")
    # As the message advises.
    (tmp_path / "link").symlink_to(odd)
    with noether_writer.open_run(tmp_path / "link", "r") as other:
        other.save("net", "t", {"w": torch.ones(2)}).wait(60)
    assert Path(odd, "r/checkpoints/net_cp=t_model.th").exists()


# As deep as torch.save.


def nested(shape: str, depth: int) -> Any:
    item: Any = torch.ones(2)
    for _ in range(depth):
        if shape == "dict":
            item = {"x": item}
        elif shape == "list":
            item = [item, 1]
        elif shape == "tuple":
            item = (item, 1)
        elif shape == "ordered":
            item = OrderedDict(x=item)
        else:
            item = types.SimpleNamespace(x=item)
    return item


@pytest.mark.parametrize("shape", ["dict", "list", "tuple", "ordered", "objects"])
def test_nesting_as_deep_as_torch_takes_is_taken(shape: str, run: noether_writer.Run, tmp_path: Path) -> None:
    taken, refused = 1, TOO_DEEP
    while refused - taken > 1:
        depth = (taken + refused) // 2
        try:
            torch.save(nested(shape, depth), io.BytesIO())
            taken = depth
        except RecursionError:
            refused = depth
    # Around the depth up to which C or Python does it, too.
    for depth in (taken, 38, 39, 40, 41, 42):
        path = tmp_path / f"net_cp={shape}_model.th"
        obj = nested(shape, depth)
        torch.save(obj, path)
        for mode in MODES:
            ticket = run.save("net", shape, obj, snapshot=mode)
            ticket.wait(60)
            assert records(Path(ticket.paths[0])) == records(path)
    with pytest.raises(RecursionError):
        run.save("net", shape, nested(shape, TOO_DEEP))


# What is said of an error.


def test_an_object_that_fails_is_pickled_twice_at_most(run: noether_writer.Run) -> None:
    """Once more, to find which part it is: not once more for each container around it."""
    calls: list[int] = []
    obj: Any = Counting(calls, ZeroDivisionError)
    for _ in range(50):
        obj = {"in": [obj, torch.ones(2)]}
    with pytest.raises(ZeroDivisionError) as raised:
        run.save("net", "fails", {"fine": 1, "bad": obj})
    assert len(calls) == 2
    if sys.version_info >= (3, 11):
        [note] = raised.value.__notes__
        assert "net_cp=fails_model.th was not sent" in note
        assert note.endswith("obj['bad']" + "['in'][0]" * 50)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("python_lambda_", "obj['f']"),
        ("python_unwilling", "obj['deep'][0]"),
        ("tensor_two_types", "obj['f']"),
        ("dtype_uint4", "obj['t']"),
        ("python_lying", "stays as it is"),
    ],
)
def test_what_can_not_be_pickled_is_named(name: str, where: str, run: noether_writer.Run) -> None:
    with pytest.raises(Exception) as raised:
        run.save("net", name, KINDS[name].make())
    [note] = raised.value.__notes__
    assert note.endswith(where)


def test_a_key_whose_repr_fails_does_not_hide_the_error(run: noether_writer.Run) -> None:
    with pytest.raises(LookupError, match="does not want") as raised:
        run.save("net", "key", {Shy(): objects.Unwilling()})
    assert isinstance(raised.value, LookupError)


class Shy:
    def __repr__(self) -> str:
        raise ZeroDivisionError


# Nothing is kept.


def kinds_of_snapshots() -> dict[str, Callable[[], Any]]:
    def looped() -> Any:
        weight = torch.ones(3)
        row: list[Any] = [weight]
        # A weak reference, so that the cycle is not the object's own.
        return {"row": row, "again": row, "tuple": ((row,),)}

    return {
        "tree": lambda: {"w": torch.ones(3), "n": [1, "x"]},
        "state": lambda: torch.nn.Linear(3, 3).state_dict(),
        "any object": lambda: {"w": torch.ones(3), "raw": b"1", "p": Path("/")},
        "numpy": lambda: {"w": torch.ones(3), "raw": b"1", "lr": numpy.float64(1)},
        "twice": looped,
        "deep": lambda: nested("dict", 450),
        "fails": lambda: {"w": torch.ones(3), "f": objects.Unwilling()},
    }


@pytest.mark.parametrize("name", kinds_of_snapshots())
def test_no_cycle_keeps_a_snapshot_when_the_garbage_collector_is_off(name: str) -> None:
    # Caches are filled.
    kept_alive(kinds_of_snapshots()[name]())
    gc.collect()
    gc.disable()
    try:
        obj = kinds_of_snapshots()[name]()
        dead = kept_alive(obj)
        del obj
        assert [reference() for reference in dead] == [None] * len(dead)
        assert gc.collect() == 0
    finally:
        gc.enable()


def kept_alive(obj: Any) -> list[weakref.ref[Any]]:
    found = []
    try:
        [shot] = snapshot.capture([obj])
        shot.describe()
        shot.encode()
        found = [weakref.ref(shot)]
    except LookupError as error:
        snapshot.explain(error, {"file": obj})
    return [*found, *map(weakref.ref, tensors_in(obj))]


def tensors_in(obj: Any) -> list[Any]:
    while isinstance(obj, dict):
        values = list(obj.values())
        if any(isinstance(value, torch.Tensor) for value in values):
            # Those of a state_dict are made for it.
            return [value for value in values if isinstance(value, torch.Tensor)]
        obj = values[0]
    return [obj] if isinstance(obj, torch.Tensor) else [value for value in obj if isinstance(value, torch.Tensor)]


# Calls that can be repeated.


def described() -> Any:
    base = torch.arange(10.0)
    state = {"a": base[2:4], "b": torch.nn.Parameter(torch.ones(2, 3)), "c": [1, "x", {"d": base, "e": torch.empty(0)}]}
    [shot] = snapshot.capture([state])
    return shot


@pytest.mark.parametrize("step", ["describe", "encode"])
def test_a_call_that_was_interrupted_anywhere_can_be_repeated(step: str) -> None:
    shot = described()
    shot.describe()
    expected = shot.encode()
    assert shot.encode() == expected
    interrupted = 0
    for opcode in range(1, 100_000, 5):
        shot = described()
        if step == "encode":
            shot.describe()
        if not interrupt_at(opcode, getattr(shot, step)):
            break
        interrupted += 1
        # As often as anybody likes.
        for _ in range(2):
            shot.describe()
            assert shot.encode() == expected
    assert interrupted > 10


def interrupt_at(opcode: int, call: Callable[[], object]) -> bool:
    """Raises KeyboardInterrupt before the n-th opcode of this library in `call`; False if there are fewer."""
    left = opcode
    folder = str(Path(noether_writer.__file__).parent)

    def trace(frame: types.FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_snapshot_is_described_once() -> None:
    weight = torch.ones(2, 3)
    [shot] = snapshot.capture([{"w": weight}])
    shot.describe()
    expected = shot.encode()
    weight.t_()
    shot.describe()
    assert shot.encode() == expected


def test_pickles_are_the_same_on_any_thread() -> None:
    shots = []
    for count in (1, 50, 400, 1200):
        [shot] = snapshot.capture([{f"t{i}": [torch.ones(1), i, f"text {i}"] for i in range(count)}])
        shot.describe()
        shots.append(shot)
    expected = [shot.encode() for shot in shots]
    snapshot.tree._puts = ()
    wrong: list[int] = []
    begin = threading.Barrier(8)

    def work(first: int) -> None:
        begin.wait()
        for turn in range(4):
            at = (first + turn) % 4
            if shots[at].encode() != expected[at]:
                wrong.append(at)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_two_storages_that_begin_at_one_place_are_two(run: noether_writer.Run, tmp_path: Path) -> None:
    memory = numpy.arange(1000.0)
    whole, part = {"x": torch.from_numpy(memory)}, {"x": torch.from_numpy(memory[:10])}
    targets = [noether_writer.Target("two", "t", whole), noether_writer.Target("two", "latest", part)]
    ticket = run.save_as(targets)
    ticket.wait(60)
    for path, target in zip(map(Path, ticket.paths), targets, strict=True):
        torch.save(target.obj, tmp_path / path.name)
        assert records(path) == records(tmp_path / path.name)


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
@pytest.mark.parametrize("mode", MODES)
def test_a_reduction_that_somebody_has_replaced_is_used(
    kind: type, mode: Any, run: noether_writer.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = kind.__reduce_ex__, []

    def reduce(self: Any, protocol: Any) -> Any:
        calls.append(self)
        return usual(self, protocol)

    monkeypatch.setattr(kind, "__reduce_ex__", reduce)
    state = {"w": kind(torch.ones(3))}
    run.save("net", f"reduced-{kind.__name__}-{mode}", state, snapshot=mode).wait(60)
    assert calls
