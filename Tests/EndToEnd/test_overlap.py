# SPDX-License-Identifier: Apache-2.0
"""Overlap mode: `save` returns before the copy has ended, and the file holds what the tensors held then, whatever the
trainer does next. The tensors are large enough that the copy is far from done when they are changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import numpy
import pytest
import torch
from conftest import RunningDaemon
from noether_writer import _core, copying, saves
from noether_writer.errors import SnapshotChanged

ELEMENTS = 32 << 20


@pytest.fixture(params=["pages", "counters"], autouse=True)
def tracking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How changes are found out: by the kernel, and as if it could not."""
    how: str = request.param
    if how == "counters":
        monkeypatch.setattr(copying, "watch", lambda *_: None)
    elif copying.watch([(probe := torch.ones(1 << 20)).data_ptr()], [probe.nbytes]) is None:
        pytest.skip("this kernel can't say which pages were written")
    return how


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set no other thread than the trainer's copies: what does not wait for it comes before the copy."""
    gate = threading.Event()
    frame = saves.Save.frame

    def late(self: saves.Save) -> Any:
        if threading.current_thread() is not threading.main_thread():
            gate.wait()
        return frame(self)

    monkeypatch.setattr(saves.Save, "frame", late)
    yield gate
    gate.set()


class Training:
    def __init__(self, make: Callable[..., Any], **settings: Any) -> None:
        torch.manual_seed(1)
        self.net = torch.nn.Linear(1, ELEMENTS)
        self.optimizer = make(self.net.parameters(), **settings)
        self.backward()
        self.optimizer.step()
        self.backward()

    def backward(self) -> None:
        for parameter in self.net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


def copied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
        (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    ],
)
def test_an_optimizers_step_waits_for_the_copy(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event, make: Callable[..., Any], settings: dict[str, Any]
) -> None:
    run = noether_writer.open_run(tmp_path, "r", snapshot="overlap")
    training = Training(make, **settings)
    before = copied(training.state())
    ticket = run.save("net", "a", training.state())
    training.optimizer.step()
    assert not same(before, training.state())
    held.set()
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "ema", "data", "another optimizer"])
def test_other_changes_wait_for_the_snapshot(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event, how: str
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    training = Training(torch.optim.SGD, lr=0.1)
    before = copied(training.state())
    ticket = run.save("net", "a", training.state(), snapshot="overlap")
    weight = training.net.weight
    if how == "another optimizer":
        # Any optimizer's step waits: what it changes may be shared.
        other = torch.optim.SGD([weight], lr=1.0)
        other.step()
    else:
        ticket.wait_snapshot()
    with torch.no_grad():
        if how == "in place":
            weight.zero_()
        elif how == "load_state_dict":
            training.net.load_state_dict({key: value + 1 for key, value in training.net.state_dict().items()})
        elif how == "ema":
            weight.lerp_(torch.ones_like(weight), 0.1)
        elif how == "data":
            weight.data.add_(1.0)
    assert not same(before, training.state())
    held.set()
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


def test_running_statistics_are_copied_before_the_call_returns(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    net = torch.nn.Sequential(torch.nn.Linear(8, 4 << 20, bias=False), torch.nn.BatchNorm1d(64))
    before = copied(net.state_dict())
    ticket = run.save("net", "a", net.state_dict(), snapshot="overlap")
    net[1](torch.randn(16, 64))
    assert not same(before, net.state_dict())
    # torch counts the change; that it came after the copy of these is known.
    held.set()
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


def test_a_tensor_changed_before_its_copy_fails_the_save_and_damages_no_file(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    weight = torch.zeros(ELEMENTS)
    state = {"net": {"bias": torch.zeros(ELEMENTS), "weights": [torch.ones(3), weight]}}
    run.save("net", "a", state, snapshot="copy").wait(60)
    ticket = run.save("net", "a", state, snapshot="overlap")
    weight.add_(1)
    held.set()
    with pytest.raises(SnapshotChanged, match=r"^net\.weights\.1 changed while net_cp=a_model.th .*wait_snapshot"):
        ticket.wait(60)
    loaded = torch.load(tmp_path / "r/checkpoints/net_cp=a_model.th")
    assert torch.equal(loaded["net"]["weights"][1], torch.zeros(ELEMENTS))
    # Said once: the next save is done.
    run.save("net", "b", state).wait(60)
    run.close()


def _of_file(tmp_path: Path) -> torch.Tensor:
    torch.save({"w": torch.randn(ELEMENTS)}, tmp_path / "other.th")
    loaded: torch.Tensor = torch.load(tmp_path / "other.th", mmap=True)["w"]
    return loaded


def _made_in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(ELEMENTS)


def _in_another_thread(change: Callable[[], object]) -> None:
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


_flat = torch.zeros(0)


def _view_of_flat() -> torch.Tensor:
    global _flat
    _flat = torch.randn(2 * ELEMENTS)
    return torch.nn.Parameter(_flat[:ELEMENTS])


def _change_in_inference_mode(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.zero_()


# What is saved, how it is changed with no word to anyone, and what becomes of the save by pages and by counters. The
# two that no counter shows are named in the docstring of Run.save.
_UNSEEN: dict[str, tuple[Callable[[Path], torch.Tensor], Callable[[torch.Tensor], object], str, str]] = {
    "data": (lambda _: torch.randn(ELEMENTS), lambda t: t.data.zero_(), "refused", "unseen"),
    "numpy": (lambda _: torch.randn(ELEMENTS), lambda t: t.numpy().fill(0), "refused", "unseen"),
    "flat": (lambda _: _view_of_flat(), lambda _: _flat.zero_(), "refused", "right"),
    "from_numpy": (
        lambda _: torch.from_numpy(numpy.ones(ELEMENTS, "f4")), lambda t: t.numpy().fill(0), "refused", "right",
    ),
    "mmap": (_of_file, lambda t: t.data.zero_(), "right", "right"),
    "shared": (lambda _: torch.randn(ELEMENTS).share_memory_(), lambda t: t.data.zero_(), "right", "right"),
    "inference": (lambda _: _made_in_inference_mode(), _change_in_inference_mode, "refused", "right"),
    "freed": (lambda _: torch.randn(ELEMENTS), lambda t: t.untyped_storage().resize_(0), "refused", "refused"),
    "moved": (
        lambda _: torch.randn(ELEMENTS), lambda t: t.untyped_storage().resize_(8 * ELEMENTS), "refused", "refused",
    ),
    "thread": (
        lambda _: torch.randn(ELEMENTS), lambda t: _in_another_thread(lambda: t.zero_()), "refused", "refused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", _UNSEEN)
def test_an_unnoticed_tensor_change_damages_no_file(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event, tracking: str, how: str
) -> None:
    make, change, by_pages, by_counters = _UNSEEN[how]
    expected = by_pages if tracking == "pages" else by_counters
    if expected == "unseen":
        pytest.skip("no counter shows it: the docstring of Run.save names it")
    tensor = make(tmp_path)
    before = tensor.detach().clone()
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "a", {"w": tensor}, snapshot="overlap")
        change(tensor)
        held.set()
        if expected == "refused":
            with pytest.raises(SnapshotChanged, match=r"^w changed"):
                ticket.wait(60)
            assert not list((tmp_path / "r/checkpoints").glob("*.th"))
        else:
            ticket.wait(60)
            assert torch.equal(torch.load(ticket.paths[0], weights_only=True)["w"], before)


def test_an_operation_that_is_under_way_when_the_copy_ends(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        for tag in range(3):
            state = {"large": torch.zeros(2 * ELEMENTS), "head": torch.zeros(ELEMENTS)}
            ticket = run.save("net", str(tag), state, snapshot="overlap")
            # Its counter moves when it is done.
            state["head"].normal_()
            try:
                ticket.wait(60)
            except SnapshotChanged:
                continue
            assert not torch.load(ticket.paths[0])["head"].any()


@pytest.mark.parametrize("waits", [True, False])
def test_two_saves_of_the_same_tensors_at_once(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event, waits: bool
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    state = {"w": torch.randn(ELEMENTS)}
    before = copied(state)
    tickets = [run.save(name, "a", state, snapshot="overlap") for name in ("one", "other")]
    if waits:
        for ticket in tickets:
            ticket.wait_snapshot()
    state["w"].add_(1)
    held.set()
    for ticket in tickets:
        if waits:
            ticket.wait(60)
            assert same(before, torch.load(ticket.paths[0], weights_only=True))
        else:
            with pytest.raises(SnapshotChanged):
                ticket.wait(60)
    run.close()


def test_tensors_that_are_let_go_of_are_saved(daemon: RunningDaemon, tmp_path: Path, held: threading.Event) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.randn(ELEMENTS)}
        before = copied(state)
        ticket = run.save("net", "a", state, snapshot="overlap")
        del state
        # Memory that was free would be this one's.
        other = torch.zeros(ELEMENTS)
        held.set()
        ticket.wait(60)
        assert same(before, torch.load(ticket.paths[0], weights_only=True)) and not other.any()


def test_memory_that_was_never_written_is_saved(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "a", {"w": torch.empty(ELEMENTS)}, snapshot="overlap")
        ticket.wait(60)
        assert torch.load(ticket.paths[0])["w"].shape == (ELEMENTS,)


def test_a_fork_during_the_copy(daemon: RunningDaemon, tmp_path: Path, held: threading.Event) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.randn(ELEMENTS)}
        before = copied(state)
        ticket = run.save("net", "a", state, snapshot="overlap")
        child = os.fork()
        if child == 0:
            try:
                # Nothing is copied there, and its memory is its own.
                ticket.wait_snapshot()
                # No more than that: torch's threads are not in this process.
                state["w"].data[0] = 0
                del ticket
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        held.set()
        ticket.wait(60)
        assert same(before, torch.load(ticket.paths[0], weights_only=True))


def test_page_watching_ends_when_the_snapshot_is_taken(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event
) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.randn(ELEMENTS)}
        ticket = run.save("net", "a", state, snapshot="overlap")
        ticket.wait_snapshot()
        assert "uffd" not in _descriptors() and not ticket._saves[0]._changed["here"]
        held.set()
        ticket.wait(60)


def _descriptors() -> str:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return " ".join(found).replace("userfaultfd", "uffd")


def test_where_memory_can_not_be_read_safely_it_is_copied_first(
    daemon: RunningDaemon, tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "can_guard", lambda: False)
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.randn(ELEMENTS)}
        before = copied(state)
        ticket = run.save("net", "a", state, snapshot="overlap")
        state["w"].zero_()
        ticket.wait(60)
        assert same(before, torch.load(ticket.paths[0], weights_only=True))


def test_another_thread_than_the_main_one_saves(daemon: RunningDaemon, tmp_path: Path, held: threading.Event) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.randn(ELEMENTS)}
        before = copied(state)
        tickets: list[Any] = []
        # By counters that is a copy before the call returns, whose frame that thread makes.
        held.set()
        _in_another_thread(lambda: tickets.append(run.save("net", "a", state, snapshot="overlap")))
        tickets[0].wait_snapshot()
        state["w"].zero_()
        tickets[0].wait(60)
        assert same(before, torch.load(tickets[0].paths[0], weights_only=True))


@pytest.mark.parametrize("changes", [True, False])
def test_a_main_thread_that_blocks_in_one_call(
    daemon: RunningDaemon,
    tmp_path: Path,
    held: threading.Event,
    tracking: str,
    changes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy is compared with the memory then."""
    if tracking == "pages":
        pytest.skip("it is not asked then")
    monkeypatch.setattr(copying, "_MAIN_THREAD_SECONDS", 0.0)
    run = noether_writer.open_run(tmp_path, "r")
    state = {"w": torch.randn(ELEMENTS)}
    ticket = run.save("net", "a", state, snapshot="overlap")
    ticket._saves[0]._making[0].finish()  # type: ignore[index]
    if changes:
        # As one that is under way: no counter has moved.
        state["w"].data[-1] += 1
    held.set()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            ticket.wait(60)
        except SnapshotChanged as error:
            raised.append(error)

    _in_another_thread(wait)
    assert bool(raised) == changes
    run.close()


def test_what_the_main_thread_is_asked_for_it_does_between_its_steps() -> None:
    seen: list[int] = []
    answers: list[bool] = []

    def ask(callable: Callable[[], object]) -> None:
        answers.append(_core.on_main_thread(callable, 60))

    thread = threading.Thread(target=ask, args=(lambda: seen.append(threading.get_ident()),))
    thread.start()
    while not answers:
        pass
    thread.join()
    assert seen == [threading.main_thread().ident] and answers == [True]

    def interrupt() -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=ask, args=(interrupt,))
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        while len(answers) == 1:
            pass
    thread.join()
    assert answers == [True, False]
