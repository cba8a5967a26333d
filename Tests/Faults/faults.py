# SPDX-License-Identifier: Apache-2.0
"""The n-th syscall fails: for each function and error, n = 1, 2, ... until a run passes untouched.

Each time a daemon runs with `failing.c` before its libc, and one small scenario: a run that logs, saves twice with
`latest`, and finishes. Whatever fails, the trainer must not hang and not die of anything but the library's own errors
or an OSError; once the fault has passed, everything arrives; files are whole, and nothing is left behind.

    make faults                      all of them
    faults.py --every 7 --seed 1     each seventh n, from a random one on: what `make test` does
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "Torture"))
import noether_writer
import torch
import trainer
from invariants import Counts, check
from manager import Manager
from torture import left_behind, memory, until
from trainer import Plan, Record

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]
VERIFY = str(Path(DAEMON).parent / "noether-writer")
LIBRARY = Path(DAEMON).parent / "libnoether-writer-failing.so"
TRAINER_SECONDS = 60

# What each function can come to, as its man page has it.
FAULTS: dict[str, tuple[str, ...]] = {
    "open": ("ENFILE", "EACCES"),
    "openat2": ("ENFILE", "EIO", "ENOSPC"),
    "mkdirat": ("ENOSPC", "EIO"),
    "pwrite": ("short", "EINTR", "ENOSPC", "EIO", "EDQUOT"),
    "write": ("short", "EINTR", "ENOSPC"),
    "pread": ("short", "EINTR", "EIO"),
    "fallocate": ("ENOSPC", "EDQUOT", "EOPNOTSUPP", "EIO"),
    "ftruncate": ("EIO", "EINTR"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "fsync": ("EIO", "ENOSPC"),
    "renameat": ("EIO", "ENOSPC", "EROFS"),
    "unlinkat": ("EIO", "EROFS"),
    "flock": ("EINTR", "ENOLCK"),
    "mmap": ("ENOMEM",),
    "memfd_create": ("ENFILE", "ENOMEM"),
    "sendmsg": ("short", "EINTR", "EAGAIN", "ENOBUFS", "EPIPE"),
    "recvmsg": ("EINTR", "ECONNRESET", "ENOMEM"),
    "accept4": ("EMFILE", "ENFILE", "ECONNABORTED"),
}
# The trainer's own calls, from where it opens its run.
CLIENT_FAULTS: dict[str, tuple[str, ...]] = {
    "memfd_create": ("ENFILE", "ENOMEM"),
    "ftruncate": ("EIO",),
    "mmap": ("ENOMEM",),
    "sendmsg": ("short", "EINTR", "EAGAIN", "EPIPE"),
}


def failing(function: str, how: str, number: int) -> str:
    return f"{function}:{how if how == 'short' else getattr(errno, how)}:{number}"


class PatientTrainer(trainer.Trainer):
    """A save that is refused at once is tried again: nothing of it was sent."""

    def save(self, update: int) -> None:
        for attempt in range(5):
            try:
                return super().save(update)
            except (noether_writer.NoetherWriterError, OSError) as error:
                self.record.write("refused", repr(error))
                if attempt == 4:
                    raise


def scenario(plan: Plan, root: Path, record: Path) -> None:
    """As a trainer would be written by someone who knows that things fail: what can be tried again is."""
    seen = Record(record)
    status = 1
    try:
        deadline = time.monotonic() + TRAINER_SECONDS / 2
        while True:
            try:
                life = PatientTrainer(plan, root, seen)
                break
            except (noether_writer.NoetherWriterError, OSError) as error:
                # An open that is refused says so; a moment later it may be taken.
                seen.write("refused", repr(error))
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        life.train()
        status = 0
    except BaseException as error:
        seen.write("died", repr(error))
    finally:
        os._exit(status)


class Case:
    def __init__(self, function: str, how: str, number: int, *, in_client: bool, store: bool) -> None:
        self.function, self.how, self.number, self.in_client, self.store = function, how, number, in_client, store

    def __str__(self) -> str:
        where = "trainer" if self.in_client else "daemon"
        return f"{where}: {self.function} {self.how} at call {self.number}{' with a store' if self.store else ''}"

    def run(self, counts: Counts) -> tuple[bool, list[str], Path]:
        """
        Returns:
            whether the call was reached, what is wrong, and where it is.
        """
        folder = Path(tempfile.mkdtemp(prefix="nw-faults-"))
        report = folder / "reached"
        fault = {"LD_PRELOAD": str(LIBRARY), "FAILING_REPORT": str(report)}
        fault["FAILING"] = failing(self.function, self.how, self.number)
        os.environ["NOETHER_WRITER_SOCKET"] = str(folder / "socket")
        os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = str(folder / "state")
        manager = Manager(DAEMON, folder / "socket", store=self.store, log=folder / "daemon.log")
        plan = Plan(seed=1, run=0, updates=12, every=6, count=600_000, pause_s=0.001)
        wrong: list[str] = []
        try:
            # A daemon that the fault lets die is started again, without it.
            manager.ask("start", lives=[], environment={} if self.in_client else fault)
            child = self.trainer(plan, folder, fault if self.in_client else {})
            status = self.end_of(child)
            if status != 0:
                wrong.append(f"the trainer ended with {status}")
            died = manager.ask("state")["deaths"] > 0
            wrong += self.settle(manager, folder)
            wrong += check(
                plan, folder / "runs", folder / "record", daemon_died=died, store=False, counts=counts, verify=VERIFY
            )
            return report.exists(), wrong, folder
        finally:
            manager.close()

    def trainer(self, plan: Plan, folder: Path, fault: dict[str, str]) -> int:
        child = os.fork()
        if child == 0:
            if not fault:
                scenario(plan, folder / "runs", folder / "record")
            # A library is loaded before a program's libc at its start only.
            os.execve(
                sys.executable,
                [sys.executable, __file__, "--scenario", str(folder)],
                os.environ | fault,
            )
        return child

    def end_of(self, child: int) -> int:
        deadline = time.monotonic() + TRAINER_SECONDS + 30
        while time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise TimeoutError("the trainer hangs")

    def settle(self, manager: Manager, folder: Path) -> list[str]:
        def quiet() -> bool:
            result = subprocess.run([VERIFY, "status", "--json"], capture_output=True, text=True)
            if result.returncode != 0:
                return False
            runs = json.loads(result.stdout)["runs"]
            return all(run["state"] != "running" and not run["checkpoints"]["in_flight"] for run in runs)

        try:
            until(quiet, lambda: subprocess.run([VERIFY, "status"], capture_output=True, text=True).stdout, 60)
            until(lambda: not left_behind(folder) and not memory(manager), lambda: "", 15)
        except TimeoutError:
            return [*left_behind(folder), *memory(manager)] or ["the daemon does not come to rest"]
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description="The n-th syscall fails")
    parser.add_argument("--every", type=int, default=1, help="each so many-th n only")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--seconds", type=float, help="at most so long")
    parser.add_argument("--only", help="of one function")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scenario", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.scenario:
        plan = Plan(seed=1, run=0, updates=12, every=6, count=600_000, pause_s=0.001)
        scenario(plan, options.scenario / "runs", options.scenario / "record")
    chance = random.Random(options.seed)
    print(f"SEED={options.seed}", flush=True)
    counts = Counts()
    start = time.monotonic()
    ran = reached_count = 0
    failed: list[str] = []
    calls: dict[str, int] = {}
    kinds = [(f, how, False) for f, hows in FAULTS.items() for how in hows]
    kinds += [(f, how, True) for f, hows in CLIENT_FAULTS.items() for how in hows]
    if options.every > 1:
        chance.shuffle(kinds)
    for function, how, in_client in kinds:
        if options.only and function != options.only:
            continue
        number = 1 if options.every == 1 else chance.randint(1, options.every)
        while options.seconds is None or time.monotonic() - start < options.seconds:
            # With a store there is more to fail: the notes, and what systemd is told.
            case = Case(function, how, number, in_client=in_client, store=number % 2 == 0)
            try:
                reached, wrong, folder = case.run(counts)
            except TimeoutError as error:
                reached, wrong, folder = True, [str(error)], Path()
            ran += 1
            reached_count += reached
            if wrong:
                failed.append(str(case))
                print(f"{case} FAILED, kept in {folder}", flush=True)
                for words in wrong:
                    print(f"  {words}", flush=True)
            else:
                shutil.rmtree(folder)
            if not reached:
                break
            key = f"{'trainer ' if in_client else ''}{function} {how}"
            calls[key] = number
            number += options.every
        print(f"{'trainer' if in_client else 'daemon'} {function} {how}: {number}", flush=True)
    result = {
        "seed": options.seed,
        "cases": ran,
        "reached": reached_count,
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
        "calls": calls,
    }
    print(json.dumps(result | vars(counts)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if not reached_count:
        print("no call was reached: this proves nothing")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
