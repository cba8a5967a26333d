# SPDX-License-Identifier: Apache-2.0
"""Runs that are let go of, and objects of the trainer whose code runs in the middle of a call: `__del__`, `item()`."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import noether_writer
import pytest
import torch
import world
from torch.overrides import TorchFunctionMode
from world import LIMIT_SECONDS, Daemon, Record


@pytest.fixture(autouse=True)
def one_run_before(daemon: Daemon) -> None:
    """What a process makes once is made."""
    with noether_writer.open_run(daemon.output, "before") as run:
        run.log({"loss": 1.0}, update=1)
        run.save("net", "first", world.state(1.0, 10), snapshot="overlap")
    # What a test finds is then its own.
    world.until(lambda: "anon_inode:[eventfd]" not in world.descriptors(), "the run before holds a descriptor")


def settles(record: Record, before: world.Held) -> None:
    """What was logged and saved arrives, and nothing of the run stays."""

    def wrong() -> list[str]:
        gc.collect()
        return record.wrong() + [f"{more} more: {what}" for what, more in (world.held() - before).items()]

    try:
        world.until(lambda: not wrong(), "it does not settle")
    except TimeoutError:
        assert wrong() == []


def write(record: Record, run: noether_writer.Run) -> None:
    for update in range(1, 6):
        record.log(run, update, "loss", "lr")
    record.save(run, "copy", count=600)
    record.save(run, "overlap", count=600, snapshot="overlap")


def test_a_run_that_is_forgotten_delivers_what_it_has_and_leaves_nothing(daemon: Daemon) -> None:
    before, record = world.held(), Record(daemon.output, "run")
    run = record.open()
    write(record, run)
    record.forget_tickets()
    del run
    settles(record, before)


def test_a_run_that_is_forgotten_while_its_daemon_is_stopped_delivers_later(daemon: Daemon) -> None:
    before, record = world.held(), Record(daemon.output, "run")
    run = record.open()
    daemon.hold()
    write(record, run)
    record.forget_tickets()
    del run
    gc.collect()
    daemon.release()
    settles(record, before)


def test_a_run_in_a_cycle_of_references_is_let_go_of_by_the_garbage_collector(daemon: Daemon) -> None:
    before, record = world.held(), Record(daemon.output, "run")

    class Trainer:
        def __init__(self) -> None:
            self.run = record.open()
            self.ticket: Any = None
            self.itself = self

        def __del__(self) -> None:
            # As trainers do it: the last words come from the garbage collector.
            record.log(self.run, 100, "last")
            self.ticket = record.save(self.run, "last")

    trainer = Trainer()
    write(record, trainer.run)
    record.forget_tickets()
    del trainer
    gc.collect()
    record.forget_tickets()
    settles(record, before)


def test_a_ticket_that_outlives_its_run_keeps_no_descriptor_and_no_thread(daemon: Daemon) -> None:
    before, record = world.held(), Record(daemon.output, "run")
    run = record.open()
    ticket = record.save(run, "kept")
    run.finish(LIMIT_SECONDS)
    run.close()
    del run
    settles(record, before)
    assert ticket.durable and "durable" in repr(ticket)


def test_finalizers_on_any_thread_log_and_save_while_the_loop_does(daemon: Daemon) -> None:
    record = Record(daemon.output, "run")
    run = record.open()
    finalized: list[int] = []

    class Odd:
        def __init__(self, number: int) -> None:
            self.number, self.itself = number, self

        def __del__(self) -> None:
            # Its update may be the loop's: the same update again adds to its row.
            run.log({f"odd{self.number % 7}": float(self.number)}, update=run.last_update)
            if self.number % 20 == 0:
                record.save(run, f"odd{self.number}")
            finalized.append(self.number)

    def collects() -> None:
        while not is_over.is_set():
            gc.collect(0)

    is_over = threading.Event()
    run.log({"loss": 0.0}, update=1)
    collectors = [threading.Thread(target=collects) for _ in range(3)]
    for collector in collectors:
        collector.start()
    logged: dict[int, float] = {1: 0.0}
    for step in range(2, 400):
        Odd(step)
        while True:
            try:
                run.log({"loss": float(step)})
                break
            except noether_writer.errors.UpdateOrderError:
                continue
        logged[step] = float(step)
        if step % 10 == 0:
            record.save(run, "loop", snapshot="overlap" if step % 20 else "copy")
    is_over.set()
    for collector in collectors:
        collector.join()
    gc.collect()
    run.finish(LIMIT_SECONDS)
    run.close()
    assert sorted(finalized) == list(range(2, 400))
    entries = torch.load(daemon.output / "run/tracker/entries.th")
    assert entries["loss"] == logged
    assert record._wrong_files() == []


class Odd(torch.Tensor):
    """One element; `item` is the trainer's."""

    action: Callable[[], float]

    def item(self) -> float:  # type: ignore[override]
        return type(self).action()


def odd(action: Callable[[], float]) -> torch.Tensor:
    kind = type("OddOfOne", (Odd,), {"action": staticmethod(action)})
    return torch.ones(1).as_subclass(kind)


@pytest.mark.parametrize("ends", ["finishes", "closes"])
def test_a_value_that_ends_the_run_is_logged_whole_or_refused(ends: str, daemon: Daemon) -> None:
    run = noether_writer.open_run(daemon.output, "run")
    run.log({"loss": 1.0}, update=1)

    def action() -> float:
        run.finish(LIMIT_SECONDS) if ends == "finishes" else run.close()
        return 2.0

    taken = {1: 1.0}
    try:
        run.log({"loss": odd(action)}, update=2)
        taken[2] = 2.0
    except noether_writer.NoetherWriterError:
        pass
    try:
        run.finish(LIMIT_SECONDS)
    except noether_writer.NoetherWriterError:
        assert ends == "closes"
    run.close()
    entries = daemon.output / "run/tracker/entries.th"
    world.until(lambda: entries.exists() and torch.load(entries)["loss"] == taken, "the log is not as it was taken")


def test_a_value_that_logs_and_saves_comes_into_its_own_row(daemon: Daemon) -> None:
    record = Record(daemon.output, "run")
    run = record.open()

    def action() -> float:
        record.log(run, record.next_update(run), "inner")
        record.save(run, "inner", "latest")
        return 7.0

    for update in (10, 20, 30):
        run.log({"first": float(update), "loss": odd(action), "last": odd(action)}, update=update)
        record._asked[update] = {"first": float(update), "loss": 7.0, "last": 7.0}
        record._logged.add(update)
    run.finish(LIMIT_SECONDS)
    run.close()
    assert record.wrong() == []


class Calls(TorchFunctionMode):
    """Under this mode the trainer's code runs when the number of any tensor is read."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self.action = action

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            with torch._C.DisableTorchFunction():
                self.action()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", ["clear", "grow", "replace", "collect"])
def test_a_dict_that_changes_while_its_tensors_are_read_is_logged_as_it_was(change: str, daemon: Daemon) -> None:
    run = noether_writer.open_run(daemon.output, "run")
    expected: dict[str, dict[int, Any]] = {"loss": {1: 0.5}}
    run.log({"loss": torch.tensor(0.5)}, update=1)
    numbers = itertools.count()
    for update in range(2, 10):
        # New keys and new values: nobody but the dict holds them.
        row: dict[str, Any] = {f"{change}/{update}/{i}": torch.tensor(float(next(numbers))) for i in range(70)}
        row |= {f"text/{update}": f"a text of update {update}", f"none/{update}": None, "loss": torch.tensor(0.5)}
        for key, value in row.items():
            expected.setdefault(key, {})[update] = value.item() if isinstance(value, torch.Tensor) else value

        def action(row: dict[str, Any] = row) -> None:
            if change == "clear":
                row.clear()
            elif change == "grow":
                row |= {f"more/{next(numbers)}": torch.zeros(()) for _ in range(10)}
            elif change == "replace":
                for key in row:
                    row[key] = torch.tensor(-1.0)
            gc.collect(0)

        with Calls(action):
            run.log(row, update=update)
    run.finish(LIMIT_SECONDS)
    run.close()
    assert torch.load(daemon.output / "run/tracker/entries.th") == expected


def test_a_tensor_whose_reading_logs_and_saves_comes_into_its_own_row(daemon: Daemon) -> None:
    """Both rows bring keys that the run does not have yet."""
    record = Record(daemon.output, "run")
    run = record.open()
    record.log(run, 1, "loss", as_tensors=True)
    calls = itertools.count()

    def action() -> None:
        record.log(run, record.next_update(run), f"inner/{next(calls)}")
        record.save(run, "inner", "latest")

    for update in (100, 200, 300):
        with Calls(action):
            run.log({f"{update}/{i}": torch.tensor(float(i)) for i in range(5)}, update=update)
        record._asked[update] = {f"{update}/{i}": float(i) for i in range(5)}
        record._logged.add(update)
    run.finish(LIMIT_SECONDS)
    run.close()
    assert record.wrong() == []


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
def test_what_is_raised_while_a_tensor_is_read_reaches_the_trainer(error: type[BaseException], daemon: Daemon) -> None:
    run = noether_writer.open_run(daemon.output, "run")

    def action() -> None:
        raise error("of the trainer")

    run.log({"loss": torch.tensor(1.0)}, update=1)
    with pytest.raises(error, match="of the trainer"), Calls(action):
        run.log({"new": 1.0, "loss": torch.tensor(2.0)}, update=2)
    run.log({"loss": torch.tensor(3.0)}, update=3)
    run.finish(LIMIT_SECONDS)
    run.close()
    assert torch.load(daemon.output / "run/tracker/entries.th") == {"loss": {1: 1.0, 3: 3.0}}


def test_tensors_are_logged_whole_beside_threads_that_log_other_keys(daemon: Daemon) -> None:
    run = noether_writer.open_run(daemon.output, "run")
    run.log({"loss": torch.tensor(0.0)})
    threads, updates = 4, 100

    def logs(thread: int) -> None:
        for i in range(updates):
            # Each key comes twice: as a new one, and as one that is known.
            run.log({f"{thread}/{key}/{i // 2}": torch.tensor(float(thread * updates + i)) for key in range(10)})

    loggers = [threading.Thread(target=logs, args=(thread,)) for thread in range(threads)]
    for logger in loggers:
        logger.start()
    for logger in loggers:
        logger.join()
    run.finish(LIMIT_SECONDS)
    run.close()
    entries = torch.load(daemon.output / "run/tracker/entries.th")
    assert entries.pop("loss") == {1: 0.0}
    rows: dict[int, set[tuple[str, float]]] = {}
    for key, values in entries.items():
        for update, value in values.items():
            rows.setdefault(update, set()).add((key, value))
    expected = [
        {(f"{thread}/{key}/{i // 2}", float(thread * updates + i)) for key in range(10)}
        for thread in range(threads)
        for i in range(updates)
    ]
    assert sorted(map(sorted, rows.values())) == sorted(map(sorted, expected))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_value_that_raises_is_heard_and_nothing_of_its_row_is_logged(
    error: type[BaseException], daemon: Daemon
) -> None:
    run = noether_writer.open_run(daemon.output, "run")

    def action() -> float:
        raise error("of the trainer")

    run.log({"loss": 1.0}, update=1)
    # What pickling or a value raises is the trainer's; a library error that has it as its cause says the same.
    with pytest.raises((error, noether_writer.errors.UnsupportedValue)) as raised:
        run.log({"new": 1.0, "loss": odd(action)}, update=2)
    if not issubclass(error, Exception):
        assert type(raised.value) is error
    run.log({"loss": 3.0}, update=3)
    run.finish(LIMIT_SECONDS)
    run.close()
    assert torch.load(daemon.output / "run/tracker/entries.th") == {"loss": {1: 1.0, 3: 3.0}}


def test_repr_says_what_a_run_and_a_ticket_are_in_every_state(daemon: Daemon) -> None:
    run = noether_writer.open_run(daemon.output, "its-name")
    assert "its-name" in repr(run)
    run.log({"loss": 1.0}, update=17)
    assert "17" in repr(run)
    daemon.hold()
    ticket = run.save("net", "t", world.state(1.0, 10))
    assert "net_cp=t_model.th" in repr(ticket) and "durable" not in repr(ticket)
    daemon.release()
    ticket.wait(LIMIT_SECONDS)
    assert "durable" in repr(ticket)
    run.close()
    assert "its-name" in repr(run) and "closed" in repr(run)
    del ticket
    with noether_writer.open_run(daemon.output, "another") as another:
        daemon.kill()
        world.until(lambda: "away" in repr(another), repr(another))
        daemon.start()


def test_deepcopy_of_an_object_that_holds_a_run_shares_the_run(daemon: Daemon) -> None:
    """An average of a model is a deep copy of it, with all of its attributes."""
    record = Record(daemon.output, "run")
    run = record.open()
    model = torch.nn.Linear(2, 2)
    model.run = run  # type: ignore[assignment]
    model.tickets = [record.save(run, "t")]  # type: ignore[assignment]
    average = torch.optim.swa_utils.AveragedModel(model)
    assert average.module.run is run and average.module.tickets[0] is model.tickets[0]  # type: ignore[index]
    assert copy.copy(run) is run
    for what, words in ((model, "a run cannot be pickled"), (model.tickets[0], "a ticket cannot be pickled")):
        with pytest.raises(TypeError, match=words):
            run.save("net", "whole", what)
    record.log(average.module.run, 1, "loss")  # type: ignore[arg-type]
    run.finish(LIMIT_SECONDS)
    run.close()
    assert record.wrong() == []


def test_an_object_that_saves_or_logs_while_it_is_pickled_is_saved_whole(daemon: Daemon) -> None:
    record = Record(daemon.output, "run")
    run = record.open()

    class Nested:
        def __reduce__(self) -> Any:
            record.log(run, record.next_update(run), "inner")
            record.save(run, "inner")
            return (dict, ())

    for snapshot in ("copy", "overlap"):
        state = {**world.state(5.0, 10), "odd": Nested()}
        run.save("net", f"outer-{snapshot}", state, snapshot=snapshot).wait(LIMIT_SECONDS)
        assert world.numbers_in(record.directory / f"checkpoints/net_cp=outer-{snapshot}_model.th") == {5.0}
        (record.directory / f"checkpoints/net_cp=outer-{snapshot}_model.th").unlink()
    run.finish(LIMIT_SECONDS)
    run.close()
    assert record.wrong() == []
