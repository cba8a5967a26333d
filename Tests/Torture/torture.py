# SPDX-License-Identifier: Apache-2.0
"""Crash loops: trainers with checkpoints and logs, and SIGKILL of the daemon, of trainers, of both, at random moments
and at each named point of the write path; daemons and trainers that are stopped for a while, daemons that are told to
leave and are replaced (as an upgrade does it), and directories that somebody removes meanwhile. After each round the
invariants of `invariants.py` must hold.

    make torture ROUNDS=1000 [SEED=...]

The plan of a round (what is trained, what is killed, when) follows from the seed and the round's number; `--round N`
runs that one alone. Moments are times, so a round that failed need not fail again, but its plan is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trainer
from invariants import Counts, check
from manager import Manager
from trainer import Plan

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]
VERIFY = str(Path(DAEMON).parent / "noether-writer")
RUNS = 4
SOURCES = Path(__file__).parents[2] / "Sources"
# A name is made of its caller's first part and the step (DurableFile).
_CALLERS = ("checkpoint", "file", "journal")


def fault_points() -> list[str]:
    """Every point that the sources name: one that is added is tortured from then on."""
    points: set[str] = set()
    for path in SOURCES.rglob("*.swift"):
        for name in re.findall(r'Faults\.(?:reach|pass)\("([^"]+)"\)', path.read_text()):
            points |= {name.replace("\\(faults)", caller) for caller in _CALLERS} if "\\(" in name else {name}
    # Not of the write path: `noether-writer status`.
    return sorted(points - {"status"})


@dataclass(frozen=True)
class Kill:
    """At `after_s` of a round: the daemon, some trainers, or both at once; the trainers come back where `again`.

    `how`: `kill`; `stop`, for `stopped_s`; `replace` the daemon; `remove` the checkpoints of these trainers' runs.
    """

    after_s: float
    daemon: bool
    trainers: tuple[int, ...]
    again: bool
    how: str = "kill"
    stopped_s: float = 0.0


@dataclass(frozen=True)
class Round:
    seed: int
    number: int
    store: bool
    plans: tuple[Plan, ...]
    lives: tuple[str, ...]
    kills: tuple[Kill, ...]

    @staticmethod
    def make(seed: int, number: int, points: list[str]) -> Round:
        chance = random.Random(f"{seed}/{number}")
        plans = tuple(
            Plan(
                seed=chance.getrandbits(32),
                run=run,
                updates=chance.randint(10, 60),
                every=chance.choice((3, 7, 10, 20)),
                # 24 bytes to 5 MiB: less than a page, and more than the chunk that O_DIRECT needs.
                count=chance.choice((3, 3, 1000, 60_000, 60_000, 650_000)),
                pause_s=chance.choice((0.0, 0.001, 0.005)),
            )
            for run in range(RUNS)
        )
        # Every point has its turn, the rest is chance: at a point, at a moment, or both.
        lives: list[str] = []
        if number % 3 != 2:
            for index in range(chance.choice((1, 1, 2, 3))):
                point = points[number % len(points)] if index == 0 else chance.choice(points)
                lives.append(f"{point}=kill@{chance.choice((1, 1, 2, 3, 5, 9))}")
        kills = []
        for _ in range(chance.choice((0, 1, 1, 2)) if lives else chance.choice((1, 2, 3))):
            what = chance.choice(("daemon", "daemon", "trainers", "both"))
            chosen = tuple(sorted(chance.sample(range(RUNS), chance.randint(1, RUNS)))) if what != "daemon" else ()
            kills.append(
                Kill(
                    after_s=chance.random() ** 2 * 0.5,
                    daemon=what != "trainers",
                    trainers=chosen,
                    again=chance.random() < 0.5,
                )
            )
        store = chance.random() < 0.7
        # After all that was drawn before these were there, so that a seed keeps its plan but for them.
        for _ in range(chance.choice((0, 0, 1, 2))):
            how = chance.choice(("stop", "stop", "replace", "remove"))
            chosen = tuple(sorted(chance.sample(range(RUNS), chance.randint(1, RUNS))))
            with_daemon = how == "replace" or (how == "stop" and chance.random() < 0.7)
            moment, seconds = chance.random() ** 2 * 0.5, chance.random() * 0.5
            kills.append(Kill(moment, with_daemon, () if how == "replace" else chosen, False, how, seconds))
        kills.sort(key=lambda kill: kill.after_s)
        return Round(seed, number, store, plans, tuple(lives), tuple(kills))


def until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what()}")
        time.sleep(0.004)


def left_behind(folder: Path) -> list[str]:
    """Files that only a write on its way has."""
    paths = [path for path in (folder / "runs").rglob("*") if path.name.endswith((".tmp", ".journal"))]
    return [f"{path} is left behind" for path in [*paths, *(folder / "state").rglob("run-*")]]


def memory(manager: Manager) -> list[str]:
    """Checkpoint memory that the daemon, or the store for it, still holds."""
    state = manager.ask("state")
    return [f"the daemon holds {link}" for link in open_in(state["pid"]) if "memfd" in link] + [
        f"the fd store holds {name}" for name in state["kept"]
    ]


def open_in(pid: int) -> list[str]:
    """What a daemon has open, but for the images of durable files: those it is to keep."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(link))
    return [link for link in links if "noether-writer-image" not in link]


class Playing:
    """One round on the way."""

    def __init__(self, round_: Round, folder: Path) -> None:
        self.round, self.folder = round_, folder
        self.root = folder / "runs"
        self.records = folder / "records"
        self.records.mkdir()
        os.environ["NOETHER_WRITER_SOCKET"] = str(folder / "socket")
        os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = str(folder / "state")
        self.manager = Manager(DAEMON, folder / "socket", store=round_.store, log=folder / "daemon.log")
        self.children: dict[int, int] = {}
        self.ended: dict[int, int] = {}

    def play(self, counts: Counts, kills: dict[str, int]) -> list[str]:
        lives = list(self.round.lives)
        self.manager.ask("start", lives=lives)
        until(self.ready, lambda: "the first daemon does not serve")
        before = self.descriptors()
        start = time.monotonic()
        for run in range(RUNS):
            self.begin(run)
        for kill in self.round.kills:
            while time.monotonic() - start < kill.after_s and self.children:
                time.sleep(0.001)
                self.reap()
            self.kill(kill, kills)
        until(self.all_ended, lambda: f"trainers that do not end: {self.children}")
        wrong = [
            f"run{run}: its trainer ended with {status}" for run, status in self.ended.items() if status not in (0, -9)
        ]
        # Points that nobody has reached are reached no more.
        self.manager.ask("lives", lives=[])
        self.settle()
        deaths = self.manager.ask("state")["deaths"]
        kills["daemons"] = kills.get("daemons", 0) + deaths
        for plan in self.round.plans:
            wrong += check(
                plan,
                self.root,
                self.records / plan.name,
                daemon_died=deaths > 0,
                store=self.round.store,
                counts=counts,
                verify=VERIFY,
            )
        return wrong + self.pinned(before)

    def begin(self, run: int) -> None:
        plan = self.round.plans[run]
        child = os.fork()
        if child == 0:
            trainer.main(plan, self.root, self.records / plan.name)
        self.children[run] = child

    def reap(self) -> None:
        for run, child in list(self.children.items()):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                del self.children[run]
                self.ended[run] = os.waitstatus_to_exitcode(status)

    def all_ended(self) -> bool:
        self.reap()
        return not self.children

    def kill(self, kill: Kill, kills: dict[str, int]) -> None:
        if kill.how != "kill":
            kills[kill.how] = kills.get(kill.how, 0) + 1
        match kill.how:
            case "stop":
                return self.stop(kill)
            case "replace":
                self.manager.ask("replace")
                return None
            case "remove":
                return self.remove(kill)
        if kill.daemon:
            self.manager.ask("kill")
        killed = [run for run in kill.trainers if run in self.children]
        for run in killed:
            os.kill(self.children[run], signal.SIGKILL)
        for run in killed:
            self.ended[run] = os.waitstatus_to_exitcode(os.waitpid(self.children.pop(run), 0)[1])
            if kill.again:
                self.begin(run)
        kills["trainers"] = kills.get("trainers", 0) + len(killed)

    def stop(self, kill: Kill) -> None:
        pids = [self.children[run] for run in kill.trainers if run in self.children]
        if kill.daemon:
            pids.append(self.manager.ask("state")["pid"])
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                # It may have ended meanwhile, and 0 would be this process's group.
                if pid > 0:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            if number == signal.SIGSTOP:
                time.sleep(kill.stopped_s)

    def remove(self, kill: Kill) -> None:
        for run in kill.trainers:
            plan = self.round.plans[run]
            path = self.root / plan.name / "checkpoints"
            if not path.exists():
                continue
            # Written down when it is over: what is saved after that is there in the end.
            shutil.rmtree(path, ignore_errors=True)
            trainer.Record(self.records / plan.name).write("removed")

    def ready(self) -> bool:
        # A daemon without a store says nothing; its socket answers when it has recovered.
        return subprocess.run([VERIFY, "status"], capture_output=True).returncode == 0

    def settle(self) -> None:
        """Returns when every run has ended and all that was accepted is on the disk, or says what is in the way."""

        def quiet() -> bool:
            result = subprocess.run([VERIFY, "status", "--json"], capture_output=True, text=True)
            if result.returncode != 0:
                return False
            report = json.loads(result.stdout)
            return all(r["state"] != "running" and not r["checkpoints"]["in_flight"] for r in report["runs"])

        until(quiet, lambda: subprocess.run([VERIFY, "status"], capture_output=True, text=True).stdout)
        subprocess.run([VERIFY, "wait", "--timeout", "60"], capture_output=True, check=True)
        # What comes a moment after the last file: the journal goes, memory is let go of. The checks look at what stays.
        with contextlib.suppress(TimeoutError):
            until(lambda: not left_behind(self.folder) and not memory(self.manager), lambda: "", 5)

    def descriptors(self) -> int:
        return len(open_in(self.manager.ask("state")["pid"]))

    def pinned(self, before: int) -> list[str]:
        wrong = memory(self.manager) + left_behind(self.folder)
        try:
            until(lambda: self.descriptors() <= before, lambda: "", 5)
        except TimeoutError:
            links = open_in(self.manager.ask("state")["pid"])
            wrong.append(f"the daemon has {len(links)} descriptors, {before} before the round: {links}")
        return wrong

    def close(self) -> None:
        for child in self.children.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.manager.close()


def run_round(round_: Round, counts: Counts, kills: dict[str, int]) -> tuple[list[str], Path]:
    folder = Path(tempfile.mkdtemp(prefix="nw-torture-"))
    playing = Playing(round_, folder)
    try:
        return playing.play(counts, kills), folder
    except (TimeoutError, subprocess.CalledProcessError) as error:
        return [str(error)], folder
    finally:
        playing.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Crash loops with a check of what must survive")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, help="at most so long")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--json", type=Path, help="where the counts go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = fault_points()
    print(f"SEED={options.seed}, {len(points)} points: {', '.join(points)}", flush=True)
    counts = Counts()
    kills: dict[str, int] = {}
    failed: list[int] = []
    start = time.monotonic()
    numbers = range(options.rounds) if options.round is None else [options.round]
    done = 0
    for number in numbers:
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            break
        round_ = Round.make(options.seed, number, points)
        wrong, folder = run_round(round_, counts, kills)
        done += 1
        if wrong:
            failed.append(number)
            print(f"round {number} of seed {options.seed} FAILED, kept in {folder}\n  {round_}", flush=True)
            for words in wrong:
                print(f"  {words}", flush=True)
        else:
            shutil.rmtree(folder)
        if done % 50 == 0:
            print(f"{done} rounds, {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)
    seconds = time.monotonic() - start
    result: dict[str, Any] = {"seed": options.seed, "rounds": done, "failed": failed, "seconds": round(seconds, 1)}
    result |= {f"killed_{name}": number for name, number in kills.items()} | vars(counts)
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    # A round that kills nobody and sees nothing acknowledged shows nothing.
    if done >= 20 and not (kills.get("daemons") and kills.get("trainers") and counts.durable_saves and counts.scalars):
        print("nothing was killed, or nothing was acknowledged: this proves nothing")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
