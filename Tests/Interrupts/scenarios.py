# SPDX-License-Identifier: Apache-2.0
"""The calls of the public interface that are interrupted, each with what comes before it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import noether_writer
from world import LIMIT_SECONDS, Daemon, Record

KEYS = ("loss", "lr", "norm")
# Updates of the calls; between them there is room for those of a handler.
_BEFORE, _CALL, FURTHER = 10, 1000, 2000


@dataclass
class Stage:
    """One run in which one call is interrupted once. A handler uses `other` as long as there is no run."""

    daemon: Daemon
    record: Record
    run: noether_writer.Run | None = None
    other_record: Record | None = None
    other: noether_writer.Run | None = None
    ticket: noether_writer.Ticket | None = None
    helpers: list[threading.Thread] = field(default_factory=list)

    def opened(self) -> noether_writer.Run:
        assert self.run is not None
        return self.run

    def release_soon(self) -> None:
        """The daemon does nothing, and continues while the call waits for it."""
        daemon = self.daemon.process.pid

        def release() -> None:
            time.sleep(0.01)
            os.kill(daemon, signal.SIGCONT)

        self.daemon.hold()
        self.helpers.append(threading.Thread(target=release))
        self.helpers[-1].start()


@dataclass(frozen=True)
class Scenario:
    """
    Args:
        call: what is interrupted.
        prepare: what comes before it, once the run is open.
        opens: the call opens the run.
        ends: the call may end the run: what is asked of it then may be refused, by an error of the library.
        holds: the daemon does nothing during the call, so that it reads a buffer only after the next save.
        count, snapshot: of the saves.
    """

    call: Callable[[Stage], Any]
    prepare: Callable[[Stage], Any] = lambda stage: None
    opens: bool = False
    ends: bool = False
    holds: bool = False
    count: int = 10
    snapshot: Literal["copy", "overlap"] = "copy"


def _open(stage: Stage) -> None:
    stage.run = stage.record.open()


def _log(*keys: str, as_tensors: bool = False) -> Scenario:
    return Scenario(lambda stage: stage.record.log(stage.opened(), _CALL, *keys, as_tensors=as_tensors), holds=True)


def _save(*tags: str, count: int = 10, snapshot: Literal["copy", "overlap"] = "copy") -> Scenario:
    def call(stage: Stage) -> None:
        stage.ticket = stage.record.save(stage.opened(), *tags, count=count, snapshot=snapshot)

    return Scenario(call, holds=True, count=count, snapshot=snapshot)


def _save_file(count: int = 10, snapshot: Literal["copy", "overlap"] = "copy") -> Scenario:
    def call(stage: Stage) -> None:
        stage.ticket = stage.record.save_file("file", count=count, snapshot=snapshot)

    return Scenario(call, holds=True, count=count, snapshot=snapshot)


def _two_saves(stage: Stage) -> None:
    stage.record.save(stage.opened(), "first")
    stage.ticket = stage.record.save(stage.opened(), "second", snapshot="overlap")


def _wait_for_ticket(stage: Stage) -> None:
    assert stage.ticket is not None
    stage.ticket.wait(LIMIT_SECONDS)
    assert stage.ticket.durable, "wait returned, and the save is not durable"


def _two_saves_under_way(stage: Stage) -> None:
    _two_saves(stage)
    stage.release_soon()


def _block(stage: Stage) -> None:
    with stage.record.open() as run:
        # For a handler.
        stage.run = run
        stage.record.log(run, _CALL, *KEYS)
        stage.record.save(run, "block")


def _values(stage: Stage) -> None:
    # A handler may log more of them.
    assert stage.opened().values("loss")[0] == _BEFORE * 100.0


SCENARIOS: dict[str, Scenario] = {
    "open-run": Scenario(_open, opens=True),
    "log-known-keys": _log(*KEYS),
    "log-new-keys": _log("loss", "new", "newer"),
    "log-tensors": _log(*KEYS, as_tensors=True),
    "save-copy-10": _save("call"),
    "save-copy-600": _save("call", count=600),
    "save-overlap-10": _save("call", snapshot="overlap"),
    "save-overlap-600": _save("call", count=600, snapshot="overlap"),
    "save-tag-and-latest": _save("call", "latest"),
    "save-file-10": _save_file(),
    "save-file-overlap-600": _save_file(600, "overlap"),
    "ticket-wait": Scenario(_wait_for_ticket, _two_saves_under_way),
    "run-wait": Scenario(lambda stage: stage.opened().wait(LIMIT_SECONDS), _two_saves_under_way),
    "flush": Scenario(lambda stage: stage.opened().flush(LIMIT_SECONDS), _two_saves_under_way),
    "finish": Scenario(lambda stage: stage.opened().finish(LIMIT_SECONDS), _two_saves, ends=True),
    "close": Scenario(lambda stage: stage.opened().close(), _two_saves, ends=True),
    "with-block": Scenario(_block, opens=True, ends=True),
    "values": Scenario(_values),
}


def begin(scenario: Scenario, daemon: Daemon, run_id: str) -> Stage:
    """All that comes before the call."""
    stage = Stage(daemon, Record(daemon.output, run_id))
    if scenario.opens:
        stage.other_record = Record(daemon.output, f"{run_id}-other")
        stage.other = stage.other_record.open()
    else:
        stage.run = stage.record.open()
        stage.record.log(stage.run, _BEFORE, *KEYS)
        scenario.prepare(stage)
    return stage
