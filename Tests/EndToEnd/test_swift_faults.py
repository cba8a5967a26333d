# SPDX-License-Identifier: Apache-2.0
"""What a trainer in Swift meets when something goes wrong: no answer is silently wrong, and no wait is without an end.

Each test starts a case of Tests/SwiftTrainer/Faults.swift."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import daemon_of, until

TRAINER = Path(DAEMON).parent / "SwiftTrainer"
Start = Callable[[str], "Program"]


class Program:
    """A case that runs: it says what it meets, a line each."""

    def __init__(self, case: str, root: str | Path, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [TRAINER, "fault", case, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )

    def hears(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        assert line, self.process.stderr and self.process.stderr.read()
        return line

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> list[str]:
        """The lines that are left."""
        output, self.errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, self.errors
        return output.splitlines()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def start(case: str, root: str | Path | None = None) -> Program:
        programs.append(Program(case, tmp_path if root is None else root, tmp_path))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()


@pytest.fixture
def stopped(daemon: RunningDaemon) -> Iterator[RunningDaemon]:
    """A daemon that a test stops: it goes on at the end."""
    yield daemon
    daemon.process.send_signal(signal.SIGCONT)


def test_finish_is_repeatable_and_shares_one_result(start: Start, stopped: RunningDaemon, tmp_path: Path) -> None:
    program = start("finish")
    assert program.hears() == "stop"
    stopped.process.send_signal(signal.SIGSTOP)
    program.go_on()
    for call in ("first", "second"):
        late = "waitTimeout: the daemon has not answered within 0.1 s; it still works"
        assert program.hears() == f"{call}: {late}"
    assert program.hears() == "go on"
    stopped.process.send_signal(signal.SIGCONT)
    assert program.ends() == [f"true {tmp_path}/r/tracker/entries.th true"]


def test_what_is_logged_after_finish_is_in_the_log(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    program = start("again")
    assert program.hears() == "2"
    entries = tmp_path / "r/tracker/entries.th"
    assert torch.load(entries)["loss"] == {1: 1, 2: 2}
    program.go_on()
    assert program.ends() == []
    assert daemon.stop() == 0
    assert torch.load(entries)["loss"] == {1: 1, 2: 2, 3: 3}


def test_a_log_that_was_taken_over_is_not_taken_back(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also not by the reconnect to the next daemon. What was refused is said, and not kept for ever."""
    program = start("overtaken")
    for _ in range(2):
        said = program.hears()
        assert said.startswith("first: logTakenOver: ") and "othing of this update was logged" in said
        assert program.hears() == "next"
        daemon.crash()
        program.go_on()
    assert program.ends() == []
    assert "LOST" not in program.errors
    assert torch.load(tmp_path / "r/tracker/entries.th")["loss"] == {7: 7, 8: 8}
    assert torch.load(tmp_path / "r/tracker/entries.1.th")["loss"] == {1: 1}


def test_a_ticket_that_outlives_its_run_ends_with_the_truth(start: Start, daemon: RunningDaemon) -> None:
    assert start("outlive").ends() == ["left: done", "closed: done", "true true"]


def test_waits_are_cancelled_and_hold_no_thread_of_the_tasks(start: Start, stopped: RunningDaemon) -> None:
    program = start("cancel")
    assert program.hears() == "stop"
    stopped.process.send_signal(signal.SIGSTOP)
    program.go_on()
    assert program.hears() == "heartbeats"
    waits = ["ticket", "run", "finish", "values", "flush", "status", "next", "events"]
    found = [program.hears() for _ in range(4 * len(waits))]
    # A loop over a sequence whose task is cancelled ends as the sequence does.
    assert sorted(found) == sorted(f"{wait}: CancellationError" for wait in waits for _ in range(4))
    line = program.hears()
    assert line.startswith("time: waitTimeout: ") and "net_cp=t_model.th is not durable after 0.05 s" in line
    assert program.hears() == "go on"
    stopped.process.send_signal(signal.SIGCONT)
    assert program.ends() == ["later: done"]


def test_subscriptions_that_are_silent_hold_no_thread_each(start: Start, daemon: RunningDaemon) -> None:
    assert start("idle").ends() == ["true", "[2]"]


def test_no_wait_is_without_an_end_if_the_daemon_does_not_answer(start: Start, stopped: RunningDaemon) -> None:
    program = start("bounded")
    assert program.hears() == "stop"
    stopped.process.send_signal(signal.SIGSTOP)
    program.go_on()
    for line in [program.hears() for _ in range(3)]:
        assert line.partition(": ")[2] == (
            "daemonUnavailable: the daemon has not answered for 30 s; what is not durable is kept and sent again"
        )
    assert program.hears() == "go on"
    stopped.process.send_signal(signal.SIGCONT)
    assert program.ends() == ["later: done"]


def test_no_wait_is_without_an_end_if_storage_refuses(
    start: Start, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC", monkeypatch)
    program = start("bounded")
    assert program.hears() == "stop"
    program.go_on()
    for line in [program.hears() for _ in range(3)]:
        assert (
            ": checkpointStalled: " in line
            and "not durable yet: " in line
            and "No space left on device. The daemon keeps" in line
        )
        assert line.count("net_cp=t_model.th") <= 1
    assert program.hears() == "go on"
    daemon.process.kill()
    daemon.process.wait()
    RunningDaemon(daemon.socket)
    assert program.ends() == ["later: done"]
    os.kill(daemon_of(daemon.socket), signal.SIGTERM)


def test_what_the_wire_refuses_is_refused_in_the_call(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    lines = start("poison").ends()
    for count, line in zip((0, 256, 300), lines, strict=False):
        assert line == (
            f'{count}: unsupportedValue: "big" of update 11: an integer of {"more than 255" if count else "no"} bytes '
            "cannot be logged. Nothing of it was logged"
        )
    assert lines[3].startswith("smallest: unsupportedValue: ") and lines[4].startswith("key: unsupportedValue: ")
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert lines[5:] == [f"{tmp_path}/r/tracker/entries.th"]
    assert entries["loss"] == {update: update for update in range(1, 2001) if update != 11}
    assert list(entries) == ["loss", "big"] and list(entries["big"]) == [11]


def test_names_are_looked_at_before_anything_is_sent(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    program = start("names", "relative/./root")
    lines = program.ends()
    part = "it becomes one part of a path. Nothing was written; choose another"
    long = "l" * 64 + "..."
    assert lines == [
        f'run id: refusedName: runID "a/b" holds a slash; {part}',
        f'stage: refusedName: stageName ".." is a directory reference; {part}',
        'root: refusedName: outputRoot "a\\0b" holds a NUL; nothing was written',
        f'name: refusedName: the model name "../up" holds a slash; {part}',
        f'tag: refusedName: the tag "" is empty; {part}',
        f'info: refusedName: info "a\\nb" holds a control character; {part}',
        f'file: refusedName: the file name "{("net_cp=" + long)[:64]}..." has 266 bytes, and at most 255 are possible; '
        f"{part}",
        f'long: refusedName: the model name "{long}" has 300 bytes, and at most 255 are possible; {part}',
        "none: refusedName: one save writes 1 to 4 files, not 0",
        "twice: refusedName: two files of one save have the name net_cp=t_model.th",
        "size: unsupportedValue: net_cp=huge_model.th would have more than 1099511627776 bytes: save it in parts. "
        "Nothing was saved",
        "log: done",
        f"{tmp_path}/relative/root/r/checkpoints/net_cp=t_model.th",
        f"{tmp_path}/relative/root/r/checkpoints/net_cp=t_model.th",
    ]
    files = {path.name for path in (tmp_path / "relative").rglob("*") if path.is_file()}
    assert files == {"net_cp=t_model.th", "entries.th", "summary.yaml"}


def test_a_failed_save_is_told_once(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    # A directory that has a file's name is in its way for good.
    (tmp_path / "r/checkpoints/refused_cp=t_model.th/full").mkdir(parents=True)
    ticket, *others = start("told").ends()
    assert ticket.startswith("ticket: storage: ") and "refused_cp=t_model.th" in ticket
    assert others[:4] == ["true true", "log: done", "save: done", "finish: done"]
    assert others[4] == "log: done" and others[5].startswith("finish: storage: ") and others[6:] == ["finish: done"]
    assert torch.load(tmp_path / "r/tracker/entries.th")["a"] == {1: 1, 2: 1}


def test_an_exiting_process_reports_what_is_lost(
    start: Start, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_EXIT_TIMEOUT", "0.2")
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", "/bin/false")
    program = start("lost")
    assert program.hears() == "stop"
    daemon.process.kill()
    daemon.process.wait()
    program.go_on()
    assert program.ends() == []
    said = [line for line in program.errors.splitlines() if ": LOST" in line]
    assert sorted(said) == [
        "noether-writer: run let go: LOST with this process, the daemon is away: the last 2 updates of the log. Older "
        "files stay",
        "noether-writer: run r: LOST with this process, the daemon is away: net_cp=t_model.th, the last update of the "
        "log. Older files stay",
    ]


def test_cancelling_one_reader_leaves_the_others(start: Start, daemon: RunningDaemon) -> None:
    assert start("readers").ends() == ["row 1", "CancellationError", "[2, 3, 4, 5]"]


def test_many_tasks_over_many_daemons(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    program = start("storm")
    for turn in range(30):
        assert program.hears() == str(turn)
        if turn % 6 == 3:
            os.kill(daemon_of(daemon.socket), signal.SIGKILL)
            RunningDaemon(daemon.socket)
    assert program.ends() == [f"true 240 {tmp_path}/r/tracker/entries.th"]
    assert torch.load(tmp_path / "r/tracker/entries.th")["turn"] == {turn: turn for turn in range(30)}
    for task in range(8):
        state = torch.load(tmp_path / f"r/checkpoints/net{task}_cp=latest_model.th")
        assert state["turn"] == 29 and bool((state["w"] == task).all())
    os.kill(daemon_of(daemon.socket), signal.SIGTERM)


def test_progress_of_a_save_ends_with_it(start: Start, daemon: RunningDaemon) -> None:
    assert start("progress").ends() == ["true true true", "true"]


def test_waits_that_lose_a_race_leave_nothing_behind(start: Start, stopped: RunningDaemon) -> None:
    program = start("timeouts")
    assert program.hears() == "stop"
    stopped.hold()
    program.go_on()
    assert program.hears() == "true"
    stopped.process.send_signal(signal.SIGCONT)
    program.go_on()
    assert program.ends() == ["true"]


def test_more_tickets_than_descriptors_whose_run_is_gone(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    assert start("many").ends() == ["true"]
    numbers = {torch.load(file)["number"] for file in (tmp_path / "r/checkpoints").iterdir()}
    assert numbers == set(range(9_993, 10_000))


def test_a_state_may_have_as_many_levels_as_torch_loads(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    lines = start("deep").ends()
    deep = "unsupportedValue: the state is nested deeper than 1000 levels: nothing was saved"
    kinds = ("list", "tuple", "dict")
    assert lines == [f"1000 {kind}: done" for kind in kinds] + [
        f"{count} {kind}: {deep}" for count in (1001, 10_000, 200_000) for kind in kinds
    ]
    assert torch.load(tmp_path / "r/checkpoints/net_cp=list_model.th")


def test_a_run_that_is_let_go_of_while_tasks_use_it(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    assert start("let go").ends() == ["done"]
    for number in range(10):
        # The daemon writes it when it hears that the trainer is gone.
        entries = tmp_path / f"r{number}/tracker/entries.th"
        until(entries.exists)
        assert torch.load(entries)["a"]


def test_what_the_library_says_goes_to_the_program_s_logger(start: Start, daemon: RunningDaemon) -> None:
    program = start("logger")
    [line] = program.ends()
    assert line.endswith("this is rank 1, and rank 0 writes the log of run r: nothing is logged here")
    assert "warning trainer" in line and program.errors == ""


def test_a_logger_may_look_at_the_run_that_speaks_to_it(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    assert start("curious logger").ends() == ["it was said after update 11", "done"]
    assert torch.load(tmp_path / "r/tracker/entries.th")["warnings"] == {11: 1}


def test_words_that_nobody_reads_end_no_program(start: Start, daemon: RunningDaemon) -> None:
    program = start("nobody reads")
    assert program.hears() == "open"
    assert program.process.stderr is not None
    program.process.stderr.close()
    program.process.stderr = None
    program.go_on()
    assert program.ends() == ["done"]


def test_files_whose_names_look_the_same_are_told_apart(start: Start, daemon: RunningDaemon) -> None:
    assert start("two accents").ends() == ["true", "true", "true"]


def test_runs_that_wait_for_a_daemon_hold_up_no_task(start: Start, stopped: RunningDaemon) -> None:
    # A daemon that has been stopped is waited for, for a minute: what is said later than that comes too late.
    stopped.process.send_signal(signal.SIGSTOP)
    program = start("crowd")
    assert program.hears() == "the others go on"
    stopped.process.send_signal(signal.SIGCONT)
    assert program.ends() == ["100 are open"]


def test_a_connection_that_comes_to_nothing_leaves_nothing(
    start: Start, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_directory / "socket"))
        listener.listen(64)
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "socket"))
        program = start("no daemon")

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"220 mail.example.org ESMTP ready" * 4)

        threading.Thread(target=answer, daemon=True).start()
        first, *rest = program.ends()
        assert first.startswith("first: protocolError: ") and rest == ["done"]
        listener.shutdown(socket.SHUT_RDWR)
