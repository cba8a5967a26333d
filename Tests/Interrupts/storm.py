# SPDX-License-Identifier: Apache-2.0
"""A storm of real signals, at random moments of a loop that logs, saves (both ways) and waits.

The handler raises, logs, saves, or does both, by chance. After each round, a run of a second or so, the same must be
true as after a bytecode of `interrupts.py`.

    storm.py --seconds 60 --seed 1
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import noether_writer
import torch
import world
from probe import Interrupt
from world import LIMIT_SECONDS, Daemon, Record

_ROUND_SECONDS = 1.0
# Between two signals; a call takes from some microseconds to some milliseconds.
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.0002, 0.005
_SETTLE_SECONDS = 5
_BUFFERS = 4


class Weather:
    """The signals of one round, and what their handler does."""

    def __init__(self, record: Record, run: noether_writer.Run, chance: random.Random) -> None:
        self._record, self._run, self._chance = record, run, chance
        self._is_in_call = self._is_handling = False
        self.raised = self.handled = 0
        self.wrong: list[str] = []

    def call(self, what: Callable[[], object]) -> None:
        """Signals come while this lasts. Exactly an exception that a handler has raised is met here, or none."""
        before = self.raised
        try:
            try:
                self._is_in_call = True
                self._next()
                what()
            finally:
                self._is_in_call = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            if self.raised == before:
                self.wrong.append("an interrupt was met that nobody raised")
        except BaseException as error:
            self.wrong.append(f"the loop met {error!r}")
        else:
            if self.raised > before:
                self.wrong.append("an interrupt was raised, and nobody met it")

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_in_call or self._is_handling:
            return
        self._is_handling = True
        try:
            action = self._chance.choice(("raises", "logs", "saves", "does both"))
            if action == "raises":
                # The last of this call: an exception on its way is not replaced by another one.
                self._is_in_call = False
                self.raised += 1
                raise Interrupt
            self.handled += 1
            try:
                if action != "saves":
                    self._record.log(self._run, self._record.next_update(self._run), "loss", "handler")
                if action != "logs":
                    self._record.save(self._run, "handler", "latest", snapshot=self._chance.choice(("copy", "overlap")))
            except BaseException as error:
                self.wrong.append(f"a handler met {error!r}")
            self._next()
        finally:
            self._is_handling = False

    def forget_run(self) -> None:
        del self._run

    def _next(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(_SHORTEST_SECONDS, _LONGEST_SECONDS))


def one_round(daemon: Daemon, name: str, chance: random.Random, *, is_first: bool) -> Weather:
    """
    Args:
        is_first: what a process makes once may be made.
    """
    before, buffers_before = world.held(), world.buffers()
    record = Record(daemon.output, name)
    run = record.open()
    weather = Weather(record, run, chance)
    signal.signal(signal.SIGALRM, weather.on_signal)
    end = time.monotonic() + _ROUND_SECONDS
    step = 0
    while time.monotonic() < end:
        step += 1
        # A handler's updates lie between those of the loop.
        update = step * 1000
        keys = ["loss", *(f"key{chance.randrange(step)}" for _ in range(3))]
        weather.call(lambda update=update, keys=keys: record.log(run, update, *dict.fromkeys(keys)))
        if step % 5 == 0:
            count, snapshot = chance.choice((10, 600)), chance.choice(("copy", "overlap"))
            tags = (f"U{step}", "latest")[: chance.choice((1, 2))]
            weather.call(lambda tags=tags, c=count, s=snapshot: record.save(run, *tags, count=c, snapshot=s))
        if step % 20 == 0:
            weather.call(lambda: run.wait(LIMIT_SECONDS))
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        record.log(run, (step + 1) * 1000, "loss", "further")
        record.save(run, "further")
        run.finish(LIMIT_SECONDS)
        weather.wrong += record.wrong()
        run.close()
    except BaseException as error:
        weather.wrong.append(f"afterwards: {error!r}")
    else:
        del run
        weather.forget_run()
        record.forget_tickets()
        if not is_first:
            weather.wrong += left_behind(before, buffers_before)
    shutil.rmtree(record.directory, ignore_errors=True)
    return weather


def left_behind(before: world.Held, buffers_before: int) -> list[str]:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (more := world.held() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    wrong = [f"{count} more: {what}" for what, count in more.items()]
    if (count := world.buffers() - buffers_before) > _BUFFERS:
        wrong.append(f"{count} buffers more than before")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="A storm of signals")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"SEED={options.seed}", flush=True)
    chance = random.Random(options.seed)
    daemon = Daemon()
    os.environ.update(daemon.environment)
    raised = handled = rounds = 0
    wrong: list[str] = []
    try:
        end = time.monotonic() + options.seconds
        while not wrong and (rounds == 0 or time.monotonic() < end):
            # A hang ends the process, with the stacks of all threads.
            faulthandler.dump_traceback_later(_ROUND_SECONDS + 4 * LIMIT_SECONDS, exit=True)
            weather = one_round(daemon, f"round{rounds}", chance, is_first=rounds == 0)
            raised, handled, rounds = raised + weather.raised, handled + weather.handled, rounds + 1
            wrong = weather.wrong
            faulthandler.cancel_dump_traceback_later()
    finally:
        daemon.end()
    print(f"{rounds} rounds, {raised} interrupts and {handled} handlers; wrong: {len(wrong)}", *wrong[:10], sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
