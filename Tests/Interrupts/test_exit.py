# SPDX-License-Identifier: Apache-2.0
"""How a process ends, what it has still to deliver, and whether there is a daemon: it ends in time, and says the truth.

What was asked for arrives if the daemon is there. If it is not, NOETHER_WRITER_EXIT_TIMEOUT bounds the wait, and each
save and the number of updates that are lost are named.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import world

EXIT_SECONDS = 2
# How long a process may take from its last line on is not measured: this ends one that hangs.
WATCHDOG_SECONDS = 15 * EXIT_SECONDS

TRAINER = """
import os, sys, threading, time
output, before, ending, has_torch = sys.argv[1:]
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def ask(name="last"):
    # Says what was taken, as soon as it is.
    run.log({"loss": 7.0})
    say("logged", run.last_update)
    if has_torch:
        run.save("net", name, state)
        say("saved", f"net_cp={name}_model.th")
        run.save("net", f"{name}-overlap", state, snapshot="overlap")
        say("saved", f"net_cp={name}-overlap_model.th")
def open_another():
    try:
        with noether_writer.open_run(output, "other") as other:
            other.log({"loss": 1.0}, update=1)
    except noether_writer.NoetherWriterError as error:
        say("refused", type(error).__name__)
    else:
        say("another")
def keep_asking():
    for number in range(1_000_000):
        ask(f"n{number}")
exec(before)
import noether_writer
if has_torch:
    import torch
    state = {f"w{i}": torch.ones(16) for i in range(600)}
run = noether_writer.open_run(output, "run")
for update in range(1, 6):
    run.log({"loss": float(update)}, update=update)
while run.log_durable_update != 5:
    time.sleep(0.005)
say("ready")
sys.stdin.readline()
exec(ending)
"""

_WITH_HANDLER = "import signal; signal.signal(signal.SIGTERM, lambda *_: ({}, sys.exit(5))); "


@dataclass(frozen=True)
class Ending:
    """
    Args:
        code: the last of the trainer's script.
        before: what it does before it imports noether_writer.
        is_abrupt: nobody is asked: no promise about what was not acknowledged.
        status: of the process.
    """

    code: str
    before: str = ""
    is_abrupt: bool = False
    status: int = 0
    # torch.save in such a thread ends the process in the same way: Python before 3.14 ends a thread that wants its lock
    # back by unwinding it, and torch's C++ allows no exception there.
    torch_may_abort: bool = False


_AT_EXIT = "import atexit; atexit.register({})"
ENDINGS = {
    "normal": Ending("ask()"),
    "sys.exit": Ending("ask(); sys.exit(3)", status=3),
    "exception": Ending("ask(); raise ValueError('the training has failed')", status=1),
    "atexit-saves": Ending(_AT_EXIT.format("ask")),
    "atexit-saves-after-ours": Ending("", before=_AT_EXIT.format("lambda: ask()")),
    "atexit-opens": Ending(_AT_EXIT.format("open_another")),
    "atexit-opens-after-ours": Ending("", before=_AT_EXIT.format("lambda: open_another()")),
    "thread-outlives-main": Ending("threading.Thread(target=lambda: (threading.main_thread().join(), ask())).start()"),
    "daemon-thread-saves": Ending(
        "threading.Thread(target=keep_asking, daemon=True).start(); time.sleep(0.05)", torch_may_abort=True
    ),
    "os._exit": Ending("ask(); os._exit(4)", is_abrupt=True, status=4),
    "sigterm": Ending("ask(); os.kill(os.getpid(), 15); time.sleep(60)", is_abrupt=True, status=-signal.SIGTERM),
    "sigterm-exits": Ending(_WITH_HANDLER.format("0") + "ask(); os.kill(os.getpid(), 15); time.sleep(60)", status=5),
    "sigterm-saves": Ending(_WITH_HANDLER.format("ask()") + "os.kill(os.getpid(), 15); time.sleep(60)", status=5),
    "sigint": Ending("ask(); os.kill(os.getpid(), 2); time.sleep(60)", status=-signal.SIGINT),
}
DAEMONS = ("there", "away", "stopped")


def other_pythons() -> dict[str, str]:
    """Of other versions than this one, by version; without torch."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(10, 16):
        if minor != sys.version_info.minor:
            there = sorted(versions.glob(f"3.{minor}.*/bin/python3"))
            if python := there[-1] if there else shutil.which(f"python3.{minor}"):
                found[f"3.{minor}"] = str(python)
    return found


PYTHONS = {"torch": sys.executable, **other_pythons()}


@dataclass
class Outcome:
    """What was seen of a process."""

    status: int
    stderr: str
    #: Updates and files that the process was told to be taken.
    logged: set[int] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    #: Those that are on disk when the daemon, or the next one, has ended.
    updates: set[int] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    has_daemon_died: bool = False


def outcome_of(ending: Ending, daemon_is: str, python: str) -> Outcome:
    daemon = world.Daemon()
    command = [PYTHONS[python], "-X", "faulthandler", "-c", TRAINER]
    try:
        process = subprocess.Popen(
            [*command, str(daemon.output), ending.before, ending.code, "torch" if python == "torch" else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | daemon.environment | {"NOETHER_WRITER_EXIT_TIMEOUT": str(EXIT_SECONDS)},
        )
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() == "ready\n":
            if daemon_is == "away":
                daemon.kill()
            elif daemon_is == "stopped":
                daemon.hold()
        try:
            stdout, stderr = process.communicate("\n", timeout=WATCHDOG_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            stdout, stderr = process.communicate()
            stderr = f"it hangs\n{stderr}"
        found = Outcome(process.returncode, stderr)
        for line in stdout.splitlines():
            word, *rest = line.split(" ", 1)
            if word == "logged":
                found.logged.add(int(rest[0]))
            elif word == "saved":
                found.saved.add(rest[0])
            else:
                found.said.append(line)
        found.has_daemon_died = daemon.is_dead() and daemon_is != "away"
        if daemon.process.poll() is not None:
            daemon.start()
        daemon.release()
        # Of a run that was not finished, when its trainer is gone.
        entries = daemon.output / "run" / "tracker" / "entries.th"
        world.until(entries.exists, f"there is no log: {stderr}")
        daemon.drain()
        found.updates = set(torch.load(entries)["loss"])
        if (folder := daemon.output / "run" / "checkpoints").exists():
            found.files = {file.name for file in folder.iterdir() if world.numbers_in(file) == {1.0}}
        return found
    finally:
        daemon.end()


ROWS = [
    pytest.param(python, daemon, ending, id=f"{python}-{daemon}-{ending}")
    for python in PYTHONS
    for daemon in DAEMONS
    for ending in ENDINGS
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str, str], Future[Outcome]]]:
    """Of the rows that are to be tested, several at a time: most of them wait."""
    rows = [item.callspec.params for item in request.session.items if "ending" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(4) as pool:
        yield {
            (row["python"], row["daemon_is"], row["ending"]): pool.submit(
                outcome_of, ENDINGS[row["ending"]], row["daemon_is"], row["python"]
            )
            for row in rows
        }


@pytest.mark.parametrize("python, daemon_is, ending", ROWS)
def test_an_exiting_process_waits_a_bounded_time_and_reports_what_is_lost(
    python: str, daemon_is: str, ending: str, outcomes: dict[tuple[str, str, str], Future[Outcome]]
) -> None:
    found = outcomes[python, daemon_is, ending].result()
    how = ENDINGS[ending]
    is_torchs = how.torch_may_abort and "terminate called without an active exception" in found.stderr
    assert found.status == (-signal.SIGABRT if is_torchs else how.status), found.stderr
    assert not found.has_daemon_died
    # Acknowledged before the end began.
    assert found.updates >= {1, 2, 3, 4, 5}
    assert found.updates - {1, 2, 3, 4, 5} <= found.logged | {max(found.logged, default=5) + 1}
    assert is_torchs or "Fatal Python error" not in found.stderr, found.stderr
    assert "Exception ignored" not in found.stderr, found.stderr
    if "opens" in ending:
        # Refused or not: it has ended.
        assert found.said[-1:] == ["another"] if daemon_is == "there" else found.said, found.stderr
    if how.is_abrupt:
        assert "noether-writer" not in found.stderr
        return
    lost_updates, lost_files = found.logged - found.updates, found.saved - found.files
    if daemon_is == "there":
        assert (lost_updates, lost_files) == (set(), set()), found.stderr
        assert "noether-writer" not in found.stderr, found.stderr
        return
    assert "when it is back" not in found.stderr and "kept in this process" not in found.stderr, found.stderr
    assert not [name for name in lost_files if name not in found.stderr], found.stderr
    counts = [int(count or 1) for count in re.findall(r"the last (?:(\d+) )?updates? of the log", found.stderr)]
    if lost_updates:
        assert counts and max(counts) >= len(lost_updates), found.stderr
    if daemon_is == "away" and ending != "daemon-thread-saves":
        assert max(counts, default=0) == len(lost_updates), found.stderr


def test_who_does_not_want_to_wait_for_the_end_is_told_what_that_loses() -> None:
    interrupt = "lambda: (threading.main_thread().join(), time.sleep(0.3), os.kill(os.getpid(), 2))"
    ending = Ending(f"ask(); threading.Thread(target={interrupt}, daemon=True).start()")
    found = outcome_of(ending, "stopped", "torch")
    assert found.status == 0 and "KeyboardInterrupt" in found.stderr
    assert found.logged and found.saved
    assert "the last update of the log" in found.stderr
    assert not [name for name in found.saved if name not in found.stderr], found.stderr


_COUNTS_THREADS = """
import atexit, torch
torch.ones(1)
def more():
    return set(os.listdir("/proc/self/task")) - there
def look():
    # One that has let go of everything may still be on its way out.
    for _ in range(500):
        if not more():
            return say("alone")
        time.sleep(0.01)
    say("more", more())
atexit.register(look)
there = set(os.listdir("/proc/self/task"))
"""


@pytest.mark.parametrize("daemon_is", DAEMONS)
def test_none_of_this_librarys_threads_is_left_when_the_interpreter_ends(daemon_is: str) -> None:
    # It would end them in the middle of what they do, and the process with them if that is torch's C++.
    found = outcome_of(Ending("ask()", before=_COUNTS_THREADS), daemon_is, "torch")
    assert found.said == ["alone"], found.stderr


_LOGS_LATE = """
import builtins, sys, torch, noether_writer
run = noether_writer.open_run(sys.argv[1], "run")

class Late:
    def __init__(self, run):
        self.run = run
        self.values = {"tensor": torch.tensor(2.0), "parameter": torch.nn.Parameter(torch.tensor(3.0)), "number": 4.0}

    def __del__(self):
        print(sys.modules.get("torch"))
        for name, value in self.values.items():
            try:
                self.run.log({name: value})
            except noether_writer.errors.UnsupportedValue as error:
                print(error)

# The interpreter lets go of it after the modules.
builtins.late = Late(run)
"""


def test_a_tensor_in_a_finalizer_that_outlives_torch_is_refused_with_the_reason(
    trainer: Callable[..., str], daemon: world.Daemon
) -> None:
    why = "cannot be read any more, because torch is gone: this process ends"
    told, *refused = trainer(_LOGS_LATE).splitlines()
    assert told == "None" and len(refused) == 2
    for name, line in zip(("'tensor'", "'parameter'"), refused, strict=True):
        assert line.startswith(name) and why in line
    entries = daemon.output / "run/tracker/entries.th"
    world.until(lambda: entries.exists() and torch.load(entries) == {"number": {1: 4.0}}, "the number is not logged")
