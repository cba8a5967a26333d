# SPDX-License-Identifier: Apache-2.0
"""Processes that a trainer makes while a run is open, by fork, forkserver and spawn, also among threads.

A child never holds its parent's sockets, opens runs of its own, and disturbs nothing of the parent's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import noether_writer
import pytest
import torch
import world

CHILDREN = """
import multiprocessing, os, sys
sys.path.insert(0, sys.argv[4])
import noether_writer, world
output, how, leaves = sys.argv[1:4]

def child(inherited):
    # Not one of the parent's sockets is open here.
    assert not (open_here := world.sockets() & inherited), open_here
    with noether_writer.open_run(output, "child") as run:
        run.log({"loss": 2.0}, update=1)
        run.save("net", "child", world.state(2.0, 10)).wait(30)
    if leaves == "os._exit":
        os._exit(0)
    if leaves == "exception":
        sys.excepthook = lambda *_: None
        raise ValueError

def main():
    before = world.sockets()
    run = noether_writer.open_run(output, "parent")
    run.log({"loss": 1.0}, update=1)
    run.save("net", "before", world.state(1.0, 600), snapshot="overlap")
    inherited = world.sockets() - before
    assert inherited
    if how == "os.fork":
        if (pid := os.fork()) == 0:
            child(inherited)
            sys.exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        process = multiprocessing.get_context(how).Process(target=child, args=(inherited,))
        process.start()
        process.join()
        status = process.exitcode
    assert status == (1 if leaves == "exception" else 0), status
    run.log({"loss": 1.0}, update=2)
    run.save("net", "after", world.state(1.0, 600), snapshot="overlap").wait(30)
    assert list(run.values("loss")) == [1.0, 1.0]
    run.finish(30)
    run.close()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("leaves", ["normally", "os._exit", "exception"])
@pytest.mark.parametrize("how", ["os.fork", "fork", "forkserver", "spawn"])
def test_a_forked_child_opens_its_own_run_and_leaves_its_parents_alone(
    how: str, leaves: str, daemon: world.Daemon
) -> None:
    script = daemon.directory / "children.py"
    # A file: forkserver and spawn import the main module.
    script.write_text(CHILDREN)
    command = [sys.executable, str(script), str(daemon.output), how, leaves, os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "noether-writer" not in result.stderr, result.stderr
    assert torch.load(daemon.output / "parent/tracker/entries.th")["loss"] == {1: 1.0, 2: 1.0}
    assert torch.load(daemon.output / "child/tracker/entries.th")["loss"] == {1: 2.0}
    for name, number in (("before", 1.0), ("after", 1.0)):
        assert world.numbers_in(daemon.output / f"parent/checkpoints/net_cp={name}_model.th") == {number}
    assert world.numbers_in(daemon.output / "child/checkpoints/net_cp=child_model.th") == {2.0}


PROGRAMS = """
import os, subprocess, sys
import noether_writer
run = noether_writer.open_run(sys.argv[1], "parent")
run.log({"loss": 1.0}, update=1)
held = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1]))"
ways = (
    lambda: subprocess.run([sys.executable, "-c", held], capture_output=True, text=True, close_fds=False).stdout,
    lambda: os.popen(f'{sys.executable} -c "{held}"').read(),
)
for way in ways:
    assert "memfd:noether-writer" not in (seen := way()) and "socket:" not in seen and "eventfd" not in seen, seen
run.finish(30)
run.close()
"""


def test_a_program_that_a_trainer_starts_inherits_nothing(trainer: Callable[..., str]) -> None:
    trainer(PROGRAMS)


LEAVES_A_CHILD = """
import os, sys, time
import noether_writer
run = noether_writer.open_run(sys.argv[1], "run")
child = os.fork()
if child == 0:
    time.sleep(600)
for update in range(1, 101):
    run.log({"loss": float(update)}, update=update)
while run.log_durable_update != 100:
    time.sleep(0.005)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_trainer_lets_go_of_its_run_although_its_child_lives_on(daemon: world.Daemon) -> None:
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(daemon.output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        # Not to its end, which the child holds too.
        child = int(killed.stdout.readline())
        assert killed.wait(60) == -signal.SIGKILL
    try:
        # The daemon ends the run when it sees the end of the connection.
        world.until((daemon.output / "run/tracker/entries.th").exists, "the run is not ended: its child holds it")
        with noether_writer.open_run(daemon.output, "run", resume_at=100) as run:
            assert run.entry_count == 100
        assert os.path.exists(f"/proc/{child}")
    finally:
        os.kill(child, signal.SIGKILL)


AMONG_THREADS = """
import faulthandler, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
import noether_writer, world
output, count = sys.argv[1], int(sys.argv[2])
run = noether_writer.open_run(output, "run")
logged = saved = 0
is_over = False

def keep_writing():
    global logged, saved
    while not is_over:
        logged += 1
        run.log({"loss": float(logged), f"key{logged % 100}": 1.0}, update=logged)
        if logged % 50 == 0:
            saved += 1
            run.save("net", f"U{saved % 10}", world.state(float(saved), 10), snapshot=("copy", "overlap")[saved % 2])

def child(number):
    faulthandler.dump_traceback_later(20, exit=True)
    for call in (lambda: run.log({"loss": 0.0}), lambda: run.save("net", "child", {}), run.wait, run.finish):
        try:
            call()
        except noether_writer.NoetherWriterError:
            pass
        else:
            os._exit(2)
    repr(run)
    run.close()
    if number % 50 == 0:
        with noether_writer.open_run(output, f"child{number}") as own:
            own.log({"loss": 1.0}, update=1)
            own.save("net", "own", world.state(1.0, 10))
    if number % 20 == 0:
        # Slow, with torch.
        sys.exit(0)
    os._exit(0)

# What torch sets up at its first use, a child that is forked in the middle of it waits for without end.
for mode in ("copy", "overlap"):
    run.save("net", "first", world.state(0.0, 10), snapshot=mode).wait()
writer = threading.Thread(target=keep_writing, daemon=True)
writer.start()
for number in range(count):
    pid = os.fork()
    if pid == 0:
        child(number)
    # A child that hangs ends itself, with its stack.
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (number, status)
is_over = True
writer.join()
run.finish(30)
run.close()
print(logged, saved)
"""


def test_a_fork_while_another_thread_writes_never_blocks_the_child_or_the_parent(
    trainer: Callable[..., str], daemon: world.Daemon
) -> None:
    count = 500
    logged, saved = map(int, trainer(AMONG_THREADS, str(count), os.path.dirname(__file__), seconds=300).split())
    assert torch.load(daemon.output / "run/tracker/entries.th")["loss"] == {n: float(n) for n in range(1, logged + 1)}
    files = {file.name: world.numbers_in(file) for file in (daemon.output / "run/checkpoints").iterdir()}
    newest = {f"net_cp=U{number % 10}_model.th": {float(number)} for number in range(1, saved + 1)}
    newest["net_cp=first_model.th"] = {0.0}
    assert files == newest
    for number in range(0, count, 50):
        assert torch.load(daemon.output / f"child{number}/tracker/entries.th")["loss"] == {1: 1.0}
        assert world.numbers_in(daemon.output / f"child{number}/checkpoints/net_cp=own_model.th") == {1.0}


WAITS_IN_CHILD = """
import faulthandler, os, signal, sys
sys.path.insert(0, sys.argv[4])
import noether_writer, world
output, daemon, call = sys.argv[1:4]
run = noether_writer.open_run(output, "run")
os.kill(int(daemon), signal.SIGSTOP)
ticket = run.save("net", "t", world.state(1.0, 600), snapshot="overlap")
if (pid := os.fork()) == 0:
    # It ends at once, by an error or not: nothing of the parent's comes to it.
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        eval(call)
    except noether_writer.NoetherWriterError:
        pass
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
os.kill(int(daemon), signal.SIGCONT)
ticket.wait(30)
assert status == 0, status
"""


@pytest.mark.parametrize(
    "call",
    ["run.wait()", "run.wait(60)", "ticket.wait()", "ticket.wait(60)", "ticket.wait_snapshot()", "run.values('a')"],
)
def test_a_forked_child_does_not_wait_for_its_parents_saves(
    call: str, trainer: Callable[..., str], daemon: world.Daemon
) -> None:
    trainer(WAITS_IN_CHILD, str(daemon.process.pid), call, os.path.dirname(__file__))


LOADER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import noether_writer, world

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 200
    def __getitem__(self, index):
        return torch.full((8,), float(index))

run = noether_writer.open_run(sys.argv[1], "run")
step = 0
for epoch in range(3):
    for batch in torch.utils.data.DataLoader(Numbers(), 10, num_workers=2, multiprocessing_context="fork"):
        step += 1
        run.log({"loss": batch.mean()}, update=step)
        if step % 5 == 0:
            run.save("net", f"U{step}", world.state(float(step), 600), snapshot=("copy", "overlap")[step % 2])
run.finish(60)
run.close()
"""


def test_the_workers_of_a_data_loader_disturb_nothing(trainer: Callable[..., str], daemon: world.Daemon) -> None:
    trainer(LOADER, os.path.dirname(__file__))
    assert len(torch.load(daemon.output / "run/tracker/entries.th")["loss"]) == 60
    for step in range(5, 61, 5):
        assert world.numbers_in(daemon.output / f"run/checkpoints/net_cp=U{step}_model.th") == {float(step)}
