# SPDX-License-Identifier: Apache-2.0
"""The n-th bytecode: for each call of the public interface, n = 1, 2, ... until a run is untouched.

At the n-th opcode that a call executes in the client's own code a KeyboardInterrupt is raised, or a handler runs that
logs, saves, does both, finishes or closes, as a signal handler would. After each the exception must have reached the
caller, and the handler's calls must have worked; a further log, save, `wait`, `finish` and `close` must work and end;
no file is a mixture of two saves, what was logged and saved is in the files, nothing is called durable that is not
there; and the process has the threads and descriptors of before.

    make interrupts                                     all points
    interrupts.py --every 40 --seed 1                   each fortieth, from a random one on: what `make test` does
    interrupts.py --scenario finish --action logs --from 12 --to 12       one of them, as a failure is told

A failure poisons its process (a lock that is held for ever), so the next point is tried in a fresh one.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count as counted
from typing import IO, Any

import noether_writer
import torch
import world
from noether_writer import NoetherWriterError
from probe import Interrupt, Probe
from scenarios import FURTHER, KEYS, SCENARIOS, Scenario, Stage, begin
from world import LIMIT_SECONDS, Daemon, Record

# A point takes a few hundredths of a second.
HANG_SECONDS = 2 * LIMIT_SECONDS
# The process lets go of threads and descriptors, and the daemon ends the log of a run that was not finished.
_SETTLE_SECONDS = 5
_HANGS = 2
# Buffers that the pool may keep beyond those of a run that nobody touched.
_BUFFERS = 2


def _handler_run(stage: Stage) -> tuple[Record, noether_writer.Run]:
    if stage.run is not None:
        return stage.record, stage.run
    assert stage.other_record is not None and stage.other is not None
    return stage.other_record, stage.other


def _logs(stage: Stage) -> None:
    record, run = _handler_run(stage)
    record.log(run, record.next_update(run), "loss", "handler")


def _saves(stage: Stage) -> None:
    record, run = _handler_run(stage)
    record.save(run, "handler", "handler-latest")


def _does_both(stage: Stage) -> None:
    _logs(stage)
    _saves(stage)


def _finishes(stage: Stage) -> None:
    _handler_run(stage)[1].finish(LIMIT_SECONDS)


def _closes(stage: Stage) -> None:
    _handler_run(stage)[1].close()


HANDLERS: dict[str, Callable[[Stage], None]] = {
    "logs": _logs,
    "saves": _saves,
    "logs-and-saves": _does_both,
    "finishes": _finishes,
    "closes": _closes,
}
ACTIONS = ("raises", *HANDLERS)
_ENDING = ("finishes", "closes")


@dataclass
class Sweep:
    """One call, and what happens in the middle of it."""

    name: str
    action: str
    daemon: Daemon
    deep: bool
    scenario: Scenario = field(init=False)

    def __post_init__(self) -> None:
        self.scenario = SCENARIOS[self.name]
        self._runs = counted()
        self.is_refusal_fine = self.scenario.ends or self.action in _ENDING

    def point(self, number: int, *, is_first: bool = False) -> tuple[Probe, list[str]]:
        """
        Args:
            is_first: what a process makes once, a pool's buffers and its threads, may be made.

        Returns:
            where it was, and what is wrong.
        """
        before, buffers_before = world.held(), world.buffers()
        stage = begin(self.scenario, self.daemon, f"{self.name}-{os.getpid()}-{next(self._runs)}")
        wrong: list[str] = []
        interrupt = Interrupt(f"at opcode {number}")

        def handle() -> None:
            try:
                HANDLERS[self.action](stage)
            except BaseException as error:
                if not (self.is_refusal_fine and isinstance(error, NoetherWriterError)):
                    wrong.append(f"the handler that {self.action} met {error!r}")

        def raise_it() -> None:
            raise interrupt

        if self.scenario.holds and self.action not in _ENDING:
            self.daemon.hold()
        probe = Probe(number, raise_it if self.action == "raises" else handle, self.deep)
        error = probe.run(lambda: self.scenario.call(stage))
        if self.action == "raises" and probe.place is not None:
            if error is not interrupt:
                wrong.append(f"the caller met {error!r}, and not the interrupt")
        elif error is not None and not (self.is_refusal_fine and isinstance(error, NoetherWriterError)):
            wrong.append(f"the caller met {error!r}")
        # A traceback holds everything that is below it.
        del error
        interrupt.__traceback__ = None
        wrong += stage.record.wrong_if_durable()
        records = [stage.record]
        if stage.other_record is not None:
            records.append(stage.other_record)
        try:
            self._further(stage, records)
        except BaseException as error:
            # Its run is not ended then, and what is left of it says nothing more.
            wrong.append(f"afterwards, {_line(error)}: {error!r}")
        else:
            del stage
            for record in records:
                record.forget_tickets()
            wrong += self._settled(records, None if is_first else before)
            if not is_first and (more := world.buffers() - buffers_before) > _BUFFERS:
                wrong.append(f"{more} buffers more than before")
        finally:
            self.daemon.release()
        if self.daemon.is_dead():
            wrong.append("the daemon has died")
        for record in records:
            shutil.rmtree(record.directory, ignore_errors=True)
        return probe, wrong

    def _further(self, stage: Stage, records: list[Record]) -> None:
        """The process goes on after the call: with the same run, or, if that has ended, with another one."""
        for helper in stage.helpers:
            helper.join()
        if stage.other is not None:
            self._close(stage.other)
            stage.other = None
        if self.name in ("close", "with-block"):
            if stage.run is not None and self.name == "close":
                stage.run.close()
            stage.run = None
        record = stage.record
        if stage.run is None and self.name != "open-run":
            record = self._another(records, "further")
        run = record.open() if stage.run is None else stage.run
        stage.run = None
        try:
            self._log_and_save(record, run)
        except NoetherWriterError:
            if not self.is_refusal_fine:
                raise
            self._close(run)
            record = self._another(records, "anew")
            run = record.open()
            self._log_and_save(record, run)
        self.daemon.release()
        run.wait(LIMIT_SECONDS)
        noether_writer.wait(LIMIT_SECONDS)
        if wrong := record.wrong_if_durable():
            raise AssertionError("; ".join(wrong))
        run.finish(LIMIT_SECONDS)
        if wrong := record.wrong():
            raise AssertionError("after finish, " + "; ".join(wrong))
        run.close()

    def _another(self, records: list[Record], name: str) -> Record:
        records.append(Record(self.daemon.output, f"{records[0].run_id}-{name}"))
        return records[-1]

    def _log_and_save(self, record: Record, run: noether_writer.Run) -> None:
        record.log(run, FURTHER, *KEYS, "further")
        record.save(run, "further", count=self.scenario.count, snapshot=self.scenario.snapshot)

    def _close(self, run: noether_writer.Run) -> None:
        self.daemon.release()
        run.close()

    def _settled(self, records: list[Record], before: world.Held | None) -> list[str]:
        """What is wrong still when everything has had its time."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            wrong = [words for record in records for words in record.wrong()]
            if before is not None:
                wrong += [f"{more} more: {what}" for what, more in (world.held() - before).items()]
            if not wrong or time.monotonic() > deadline:
                return wrong
            gc.collect()
            time.sleep(0.005)


def _line(error: BaseException) -> str:
    """Where in the client, or here, it was raised."""
    trace = error.__traceback__
    found = ""
    while trace is not None:
        found = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def work(sweep: Sweep, numbers: list[int], out: IO[str]) -> None:
    """In a process of its own: each point is told before and after it; without any the places that there are."""

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    for is_first in (True, True, False):
        probe, wrong = sweep.point(0, is_first=is_first)
        if wrong:
            return tell(broken=wrong)
    gc.collect()
    gc.freeze()
    if not numbers:
        tell(places=[str(place) for place in probe.places])
    for number in numbers:
        tell(begins=number)
        probe, wrong = sweep.point(number)
        tell(ended=number, place=probe.place and str(probe.place), wrong=wrong)
        if wrong:
            return


def worker(sweep: Sweep, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """A forked process that takes points, one after another, until one fails.

    Returns:
        what it says; as the last one `hangs`, with the stack, if it hangs, and `died` if it dies.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as stacks, os.fdopen(read, "rb", 0) as said:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                faulthandler.enable(stacks)
                with os.fdopen(write, "w") as out:
                    work(sweep, numbers, out)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        os.close(write)
        try:
            begun = b""
            while is_alive := bool(select.select([said], [], [], HANG_SECONDS)[0]):
                if not (data := said.read(1 << 16)):
                    break
                *lines, begun = (begun + data).split(b"\n")
                yield from map(json.loads, lines)
            if not is_alive:
                os.kill(pid, signal.SIGABRT)
            _, status = os.waitpid(pid, 0)
            pid = 0
            if status:
                stacks.seek(0)
                yield {"died" if is_alive else "hangs": _main_stack(stacks.read()) or f"status {status}"}
        finally:
            # Who listens has heard enough.
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            sweep.daemon.release()
            sweep.daemon.start_if_dead()


def _main_stack(text: str) -> str:
    """The innermost frames of the thread that was to end, from what faulthandler prints."""
    for block in text.split("\n\n"):
        if "interrupts.py" in block:
            frames = re.findall(r'File ".*?([^/"]+)", line (\d+) in (\S+)', block)
            return " < ".join(f"{file}:{line} {function}" for file, line, function in frames[:6])
    return ""


def chosen(places: list[str], options: argparse.Namespace) -> list[int]:
    """The numbers of the points to take."""
    chance = random.Random(options.seed)
    numbers = list(range(1, len(places) + 1))
    if options.visits:
        # Of a loop's many visits to one place the first, the last, and some in between.
        visits: dict[str, list[int]] = {}
        for number in numbers:
            visits.setdefault(places[number - 1], []).append(number)
        numbers = []
        for first, *middle in visits.values():
            last = [middle.pop()] if middle else []
            numbers += [first, *chance.sample(middle, min(len(middle), max(0, options.visits - 2))), *last]
        numbers.sort()
    if options.every > 1:
        numbers = numbers[chance.randrange(min(options.every, len(numbers))) :: options.every]
    elif options.last is None:
        # A wait may be longer than when it was counted: on, until a run is untouched.
        numbers += range(len(places) + 1, 2 * len(places) + 100)
    return [number for number in numbers if options.first <= number <= (options.last or number)]


def run_sweep(sweep: Sweep, options: argparse.Namespace) -> tuple[int, int]:
    """
    Returns:
        how many points were taken, and how many of them failed.
    """
    started = time.monotonic()
    head = f"{sweep.name:19} {sweep.action:14}"
    message = next(worker(sweep, []))
    if "places" not in message:
        print(f"{head} fails when nobody interrupts it: {message}", flush=True)
        return 0, 1
    places: list[str] = message["places"]
    numbers = chosen(places, options)
    taken = failed = hangs = at = 0
    is_over = False
    told: list[str] = []
    while not is_over and at < len(numbers) and failed < options.failures and hangs < _HANGS:
        for message in worker(sweep, numbers[at:]):
            if "begins" in message:
                continue
            number = numbers[at]
            place, wrong = message.get("place"), message.get("wrong", [])
            if "ended" not in message:
                hangs += "hangs" in message
                place = places[number - 1] if number <= len(places) else None
                wrong = [f"it {kind}: {words}" for kind, words in message.items()]
            at += 1
            if place is None and not wrong:
                is_over = number > len(places)
                if is_over:
                    break
                continue
            taken += 1
            if wrong:
                failed += 1
                told += [f"  {place}", *(f"    {words}" for words in wrong), f"    {_command(sweep, number, options)}"]
                break
        else:
            is_over = True
    is_cut = not is_over and at < len(numbers)
    print(
        f"{head} {len(places):6} opcodes {taken:6} points {failed:4} failed{' and more' if is_cut else ''}"
        f"  {time.monotonic() - started:.0f} s",
        *told,
        sep="\n",
        flush=True,
    )
    return taken, failed


def _command(sweep: Sweep, number: int, options: argparse.Namespace) -> str:
    deep = " --deep" if options.deep else ""
    return f"{sys.argv[0]} --scenario {sweep.name} --action {sweep.action}{deep} --from {number} --to {number}"


def main() -> int:
    parser = argparse.ArgumentParser(description="A call is interrupted at its n-th bytecode")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--action", choices=ACTIONS, action="append")
    parser.add_argument("--every", type=int, default=1, help="each so many-th point only, from a random one on")
    parser.add_argument("--visits", type=int, default=0, help="of each place in the source only so many visits; 0: all")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="N")
    parser.add_argument("--to", type=int, dest="last", metavar="N")
    parser.add_argument("--failures", type=int, default=10, help="of one sweep, which ends with the last of them")
    parser.add_argument("--deep", action="store_true", help="also in the standard library, where signals arrive")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"SEED={options.seed}", flush=True)
    daemon = Daemon()
    os.environ.update(daemon.environment)
    taken = failed = 0
    try:
        for name in options.scenario or SCENARIOS:
            for action in options.action or ACTIONS:
                of_sweep = run_sweep(Sweep(name, action, daemon, options.deep), options)
                taken, failed = taken + of_sweep[0], failed + of_sweep[1]
    finally:
        daemon.end()
    print(f"{taken} points, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
