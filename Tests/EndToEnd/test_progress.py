# SPDX-License-Identifier: Apache-2.0
"""How far a save is: on its ticket, and as a bar on a terminal. The disk is slow by a second each 4 MiB."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from hostile import Raw, memfd, save_payload, target
from noether_writer import errors, progress

# Five chunks.
COUNT = 5 << 20


def slow(short_directory: Path, monkeypatch: pytest.MonkeyPatch, faults: str) -> RunningDaemon:
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", faults)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    daemon = RunningDaemon(str(short_directory / "s"))
    monkeypatch.delenv("NOETHER_WRITER_FAULTS")
    return daemon


@pytest.fixture
def slow_daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    daemon = slow(short_directory, monkeypatch, "checkpoint.chunk=slow")
    yield daemon
    for run in list(noether_writer.run._open_runs):
        run._session.end()
    assert daemon.stop() == 0


class OnlyWrites:
    """As programs put in the place of standard error, to have it in a file of theirs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class LiesAboutTheTerminal(OnlyWrites):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, object(), OnlyWrites(), LiesAboutTheTerminal()])
def test_a_wait_ends_normally_whatever_standard_error_is(
    stream: Any, slow_daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    ticket = run.save("net", "t", {"w": torch.ones(COUNT)})
    ticket.wait(30)
    run.log({"loss": 1.0}, update=1)
    run.save("net", "u", {"w": torch.ones(3)})
    run.finish(30)
    run.close()
    assert torch.equal(torch.load(ticket.paths[0])["w"], torch.ones(COUNT))


def test_a_ticket_says_how_far_it_is(slow_daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    ticket = run.save("net", "t", {"w": torch.ones(COUNT)})
    seen: list[int] = []
    while not ticket.done:
        if not seen or ticket.bytes_done != seen[-1]:
            seen.append(ticket.bytes_done)
        time.sleep(0.01)
    ticket.wait(10)
    size = Path(ticket.paths[0]).stat().st_size
    assert ticket.bytes_total == ticket.bytes_done == size
    assert seen == sorted(seen) and len([done for done in seen if 0 < done < size]) >= 3
    run.close()


def test_several_files_are_one_sum(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        state = {"w": torch.ones(1000)}
        targets = [noether_writer.saves.Target("net", tag, state) for tag in ("t", "latest")]
        targets.append(noether_writer.saves.Target("net", "t", {"lr": torch.ones(5)}, "optim"))
        ticket = run.save_as(targets)
        ticket.wait(30)
        sizes = [Path(path).stat().st_size for path in ticket.paths]
        assert len(sizes) == 3 and ticket.bytes_total == ticket.bytes_done == sum(sizes)


def test_a_client_that_did_not_ask_gets_no_progress(slow_daemon: RunningDaemon, tmp_path: Path) -> None:
    """A client of before: its `open_run` does not say that it knows such events."""
    raw = Raw(slow_daemon.socket)
    raw.open_run(tmp_path)
    length = COUNT * 4
    payload = save_payload([length], length, [target(pickle_offset=length, pickle_length=5)])
    events = raw.save(payload, [memfd(length + 4096)])
    assert [event["event"] for event in events] == ["accepted", "written", "durable", "released"]
    raw.close()


WAITS = """
import sys, time, noether_writer, torch
run = noether_writer.open_run(sys.argv[1], "r")
run.log({"loss": 1.0}, update=1)
ticket = run.save("net", "t", {"w": torch.ones(int(sys.argv[2]))})
{"ticket": ticket.wait, "run": run.wait, "finish": run.finish}[sys.argv[3]](eval(sys.argv[4]))
print("waited", flush=True)
run.close()
"""


def terminal(
    root: Path, count: int, what: str, timeout: str = "None", status: int = 0, **environment: str
) -> tuple[str, str]:
    """What a trainer that waits writes on a terminal of 100 columns, as it comes, and on standard output."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(root), str(count), what, timeout],
        stdout=subprocess.PIPE,
        stderr=child,
        env=os.environ | environment,
        text=True,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait(30) == status, shown
    return shown.decode(), output


@pytest.mark.parametrize("what", ["ticket", "run", "finish"])
def test_a_terminal_shows_a_bar_and_is_clean_behind_it(what: str, slow_daemon: RunningDaemon, tmp_path: Path) -> None:
    shown, output = terminal(tmp_path, COUNT, what)
    assert output == "waited\n"
    lines = [line for line in shown.split("\r\x1b[K") if line]
    assert len(lines) > 5 and all(re.fullmatch(r"net_cp=t_model\.th:[ \d]+%\|[█ ]+\| .*/.* \[.*/s\]", s) for s in lines)
    assert all(len(line) < 100 for line in lines)
    percents = [int(found) for line in lines for found in re.findall(r"(\d+)%", line)]
    assert percents == sorted(percents) and len(set(percents)) >= 3 and 0 < percents[len(percents) // 2] < 100
    assert "/21.0MB [00:0" in lines[-1]
    # Drawn over, and empty at the end.
    assert shown.startswith("\r\x1b[K") and shown.endswith("\r\x1b[K") and "\n" not in shown


@pytest.mark.parametrize(("count", "environment"), [(COUNT, {"NOETHER_WRITER_PROGRESS": "0"}), (1, {})])
def test_no_bar_where_it_is_off_or_the_wait_is_short(
    count: int, environment: dict[str, str], short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = slow(short_directory, monkeypatch, "checkpoint.chunk=slow" if count > 1 else "none=slow")
    assert terminal(tmp_path, count, "finish", **environment) == ("", "waited\n")
    assert daemon.stop() == 0


def test_no_bar_where_there_is_no_terminal(slow_daemon: RunningDaemon, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS, str(tmp_path), str(COUNT), "run", "None"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_wait_that_fails_leaves_a_clean_terminal(slow_daemon: RunningDaemon, tmp_path: Path) -> None:
    shown, output = terminal(tmp_path, COUNT, "ticket", "2.5", status=1)
    assert output == "" and "%|" in shown
    assert re.search(r"\r\x1b\[KTraceback", shown) and errors.WaitTimeout.__name__ in shown


def ticket(bytes_done: int, bytes_total: int, done: bool = False, stalled: str = "", name: str = "net.th") -> Any:
    return SimpleNamespace(bytes_done=bytes_done, bytes_total=bytes_total, done=done, stalled=stalled, names=[name])


@pytest.mark.parametrize("width", [1, 10, 40, 79, 80, 300])
def test_the_bar_fits(width: int) -> None:
    cases = [
        [ticket(0, 0)],
        [ticket(5, 10**13, name="n" * 200)],
        [ticket(10, 10, done=True), ticket(3, 10), ticket(3, 10)],
        [ticket(3, 10, stalled="write /x: No space left on device")],
    ]
    for tickets in cases:
        for blocks in (True, False):
            assert len(progress.line(tickets, 3.0, 0, width, blocks)) < max(width, 1)
    if width == 300:
        several = progress.line(cases[2], 2.0, 0, width, False)
        assert several == "2 checkpoints:  53%|" + "#" * 21 + " " * 19 + "| 16B/30B [00:02<00:01, 8B/s]"
        assert progress.line(cases[3], 2.0, 0, width, True).endswith(
            "/s] storage refuses: write /x: No space left on device"
        )


def test_a_finish_that_outlasts_its_checkpoints_still_names_them() -> None:
    """The log's file is written behind them."""
    one, two = ticket(10, 10, done=True, name="net_cp=t_model.th"), ticket(20, 20, done=True)
    full = "█" * 40
    assert progress.line([one], 2.0, 0, 120, True) == f"net_cp=t_model.th: 100%|{full}| 10B/10B [00:02<00:00, 5B/s]"
    assert progress.line([one, two], 2.0, 0, 120, True).startswith("2 checkpoints: 100%|")
