# SPDX-License-Identifier: Apache-2.0
"""Each row once, in order, with its step and time, whoever dies."""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import noether_writer
import pytest
from conftest import Bridge, Point, Store
from harness import Daemon, until
from noether_writer.subscription import Row


def values_at(update: int) -> dict[str, float]:
    return {"loss": 1 / update, "acc/val": update * 0.5}


def train(run: Any, first: int, last: int) -> None:
    for update in range(first, last + 1):
        run.log(values_at(update), update=update)


def notes(run: Any, store: Store) -> Path:
    """It is there when a bridge follows the run."""
    return Path(run.directory) / f"tracker/bridges/{store.tracker}.sqlite"


def has_begun(bridge: Bridge, run: Any, store: Store) -> bool:
    """Whether this bridge, and no earlier one, follows the run."""
    lock = notes(run, store).with_suffix(".lock")
    return lock.exists() and lock.read_text() == str(bridge.process.pid)


def sent_and_kept(run: Any, store: Store) -> tuple[int, int]:
    try:
        database = sqlite3.connect(f"file:{notes(run, store)}?mode=ro", uri=True)
        [[sent]] = database.execute("SELECT count(*) FROM rows")
        kept = database.execute("SELECT value FROM facts WHERE name = 'kept'").fetchall()
    except sqlite3.OperationalError:
        # It is not there yet.
        return 0, 0
    database.close()
    return sent, int(kept[0][0]) if kept else 0


def check(points: list[Point], last: int, times: dict[int, float] | None = None) -> None:
    """Each value of each update is there, once, and the updates are in order."""
    assert len(points) == 2 * last, f"{len(points)} points of {2 * last}"
    assert [step for step, *_ in points] == sorted(step for step, *_ in points)
    assert {(step, key): value for step, key, value, _ in points} == {
        (update, key): value for update in range(1, last + 1) for key, value in values_at(update).items()
    }
    if times is not None:
        # MLflow has whole milliseconds.
        assert all(abs(seconds - times[step]) < 0.001 for step, _, _, seconds in points)


def test_ten_thousand_updates_arrive_once_and_in_order(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        bridge = store.bridge(run.directory)
        until(lambda: notes(run, store).exists())
        follower = noether_writer.subscribe("r")
        for update in range(1, 10_001):
            run.log(values_at(update), update=update)
            if update % 2000 == 0:
                run.flush(60)
        times = {row.update: row.wall_time for row in (next(follower) for _ in range(10_000)) if isinstance(row, Row)}
        assert len(set(times.values())) > 10
    assert "the tracker has all of its 10000 rows" in bridge.wait()
    check(store.runs()["r"], 10_000, times)
    # Again: nothing is new.
    store.bridge(run.directory).wait()
    check(store.runs()["r"], 10_000, times)


def test_kills_of_the_bridge_lose_and_double_nothing(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    dice = random.Random(18)
    run = noether_writer.open_run(tmp_path / "runs", "r")
    last = 0
    found = []
    for number in range(20):
        before, _ = sent_and_kept(run, store)
        bridge = store.bridge(run.directory)
        until(lambda bridge=bridge: has_begun(bridge, run, store))
        train(run, last + 1, last + 50)
        last += 50
        # Some die before they have sent anything, some in the middle of a batch, some between batches.
        if number % 4:
            until(lambda before=before: sent_and_kept(run, store)[0] > before, what=bridge.said)
        deadline = time.monotonic() + dice.uniform(0, 1.5)
        while time.monotonic() < deadline:
            train(run, last + 1, last + 50)
            last += 50
            time.sleep(0.05)
        bridge.kill()
        found.append(sent_and_kept(run, store))
    print("rows that were sent, and kept for certain, at each kill:", found)
    assert len({sent for sent, _ in found}) > 10
    bridge = store.bridge(run.directory)
    run.finish()
    run.close()
    bridge.wait()
    assert list(store.runs()) == ["r"]
    check(store.runs()["r"], last)


@pytest.mark.parametrize("store", ["trackio", "mlflow"], indirect=True)
def test_what_is_added_to_a_row_that_was_sent(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """The last row is sent when nothing was added to it for a while; what is added later follows alone."""
    run = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(run.directory)
    run.log({"a": 1.0, "b": 1.0}, update=1)
    until(lambda: sent_and_kept(run, store) == (1, 1), what=bridge.said)
    run.log({"c": 3.0}, update=1)
    until(lambda: len(store.runs()["r"]) == 3, what=bridge.said)
    bridge.kill()
    # To another process, which has not sent the row itself.
    run.log({"d": 4.0}, update=1)
    bridge = store.bridge(run.directory)
    until(lambda: len(store.runs()["r"]) == 4, what=bridge.said)
    run.log({"a": 2.0}, update=2)
    run.finish()
    run.close()
    bridge.wait()
    assert [(step, key, value) for step, key, value, _ in sorted(store.runs()["r"])] == [
        (1, "a", 1.0),
        (1, "b", 1.0),
        (1, "c", 3.0),
        (1, "d", 4.0),
        (2, "a", 2.0),
    ]
