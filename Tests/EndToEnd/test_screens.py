# SPDX-License-Identifier: Apache-2.0
"""What is drawn on a terminal: top, plot and bars, in tmux, which is one without a person."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from test_cli import CLI

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux")
SIZES = [(80, 24), (200, 50)]


class Screen:
    """A shell in a terminal of a size."""

    def __init__(self, directory: Path, columns: int, rows: int, **environment: str) -> None:
        self.socket = str(directory / "tmux")
        set_ = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
        size = ["-x", str(columns), "-y", str(rows)]
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, *set_, "env -u COLUMNS PS1=READY: LC_ALL=C.UTF-8 sh")
        self.wait(lambda text: "READY:" in text)

    def tmux(self, *arguments: str) -> str:
        return subprocess.run(
            ["tmux", "-S", self.socket, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout

    def type(self, text: str) -> None:
        self.tmux("send-keys", text, "Enter")

    def key(self, name: str) -> None:
        self.tmux("send-keys", name)

    def text(self, *options: str) -> str:
        return self.tmux("capture-pane", "-p", *options)

    def wait(self, holds: Callable[[str], object]) -> str:
        """tmux tells nobody that something was drawn: it is looked at until it holds."""
        deadline = time.monotonic() + 20
        while not holds(text := self.text()):
            assert time.monotonic() < deadline, f"not on the screen:\n{text}"
            time.sleep(0.02)
        return text

    def state(self, name: str) -> str:
        return self.tmux("display-message", "-p", f"#{{{name}}}").strip()

    def settings(self) -> str:
        """Of the terminal, by a program that runs beside the shell."""
        tty = self.state("pane_tty")
        return subprocess.run(["stty", "-F", tty, "-g"], capture_output=True, text=True, check=True).stdout

    def foreground(self) -> str:
        return self.state("pane_current_command")

    def child(self) -> int:
        """The process that the shell waits for."""
        shell = self.state("pane_pid")
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])


@pytest.fixture
def screens(short_directory: Path) -> Iterator[Callable[..., Screen]]:
    made: list[Screen] = []

    def make(columns: int, rows: int, **environment: str) -> Screen:
        directory = short_directory / str(len(made))
        directory.mkdir()
        made.append(Screen(directory, columns, rows, **environment))
        return made[-1]

    yield make
    for screen in made:
        screen.tmux("kill-server")


@pytest.fixture
def busy(daemon: RunningDaemon, tmp_path: Path) -> Iterator[None]:
    """A run that goes on, one that is over, and one that was interrupted."""
    with noether_writer.open_run(tmp_path, "2026-01-01_finished-with-a-long-name-that-differs-at-its-end-A") as over:
        for update in range(200):
            gap = 80 <= update < 120
            over.log({"loss": float("nan") if gap else 1 / (update + 1), "lr": 0.1}, update=update)
    run = noether_writer.open_run(tmp_path, "2026-01-01_finished-with-a-long-name-that-differs-at-its-end-B")
    run.log({"loss": 1.0}, update=7)
    run.wait(30)
    run.close()
    live = noether_writer.open_run(tmp_path, "live")
    stop = threading.Event()

    def train() -> None:
        update = 0
        while not stop.wait(0.005):
            update += 1
            live.log({"loss": 1 / update}, update=update)

    thread = threading.Thread(target=train)
    thread.start()
    yield
    stop.set()
    thread.join()
    live.close()


@pytest.fixture
def hung(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    """A daemon whose storage hangs: all of a checkpoint is with the file system, and not safe."""
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", "checkpoint.written=hang")
    running = RunningDaemon(str(short_directory / "d" / "socket"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", running.socket)
    monkeypatch.delenv("NOETHER_WRITER_FAULTS")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_top_fits_resizes_and_leaves_as_it_came(
    busy: None, screens: Callable[..., Screen], columns: int, rows: int
) -> None:
    screen = screens(columns, rows)
    before = screen.settings()
    screen.type(f"{CLI} top --interval 0.1")
    text = screen.wait(lambda text: re.search(r"^live +running +\d+ +[1-9]\d* ", text, re.M))
    lines = text.splitlines()
    assert len(lines) == rows and lines[0].startswith("noether-writerd ") and lines[-1] == "q quits"
    assert re.match(r"1 of 3 runs live +0 durable, none in flight", lines[1])
    assert re.match(r"(LOW )?disk: [\d.]+ .iB free of [\d.]+ .iB, /", lines[2])
    # Names that are too long keep their end.
    assert (
        sum(line.split()[0].endswith("end-A") or line.split()[0].endswith("end-B") for line in lines[4:] if line) == 2
    )
    assert screen.settings() != before and screen.state("alternate_on") == "1" and screen.state("cursor_flag") == "0"
    # It goes on.
    assert screen.wait(lambda now: now != text)
    screen.tmux("resize-window", "-x", "60", "-y", "12")
    # Whole: tmux shows what it has of a picture that is being drawn.
    text = screen.wait(
        lambda text: text.splitlines()[-1:] == ["q quits"] and len(text.splitlines()) == 12 and "running" in text
    )
    assert re.search(r"^live +running", text, re.M) and max(map(len, text.splitlines())) <= 60
    screen.key("q")
    screen.wait(lambda text: screen.state("alternate_on") == "0" and screen.foreground() == "sh")
    assert screen.settings() == before and screen.state("cursor_flag") == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGSEGV])
def test_the_terminal_comes_back_whatever_ends_top(
    busy: None, screens: Callable[..., Screen], number: signal.Signals
) -> None:
    screen = screens(80, 24)
    before = screen.settings()
    screen.type(f"{CLI} top --interval 0.1")
    screen.wait(lambda text: "q quits" in text)
    os.kill(screen.child(), number)
    screen.wait(lambda text: screen.state("alternate_on") == "0" and screen.foreground() == "sh")
    screen.wait(lambda _: screen.settings() == before)
    assert screen.state("cursor_flag") == "1"


def test_top_stops_and_goes_on(busy: None, screens: Callable[..., Screen]) -> None:
    screen = screens(80, 24)
    screen.type("bash --norc")
    screen.wait(lambda _: screen.foreground() == "bash")
    screen.type(f"{CLI} top --interval 0.1")
    screen.wait(lambda text: "q quits" in text)
    screen.key("C-z")
    screen.wait(lambda text: "Stopped" in text)
    assert screen.state("alternate_on") == "0" and screen.state("cursor_flag") == "1"
    screen.type("fg")
    screen.wait(lambda text: "q quits" in text and screen.state("alternate_on") == "1")
    screen.key("q")
    screen.wait(lambda _: screen.state("alternate_on") == "0")


def test_top_says_that_the_daemon_is_gone_and_finds_the_next(
    daemon: RunningDaemon, screens: Callable[..., Screen]
) -> None:
    screen = screens(80, 24)
    screen.type(f"{CLI} top --interval 0.1")
    screen.wait(lambda text: "no runs yet" in text)
    assert daemon.stop() == 0
    screen.wait(lambda text: "no daemon listens" in text)
    second = RunningDaemon(daemon.socket)
    screen.wait(lambda text: "no daemon listens" not in text and "no runs yet" in text)
    screen.key("q")
    screen.wait(lambda _: screen.state("alternate_on") == "0")
    assert second.stop() == 0


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_checkpoints_have_bars_while_storage_is_slow(
    hung: RunningDaemon, screens: Callable[..., Screen], tmp_path: Path, columns: int, rows: int
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.save("net", "latest", {"w": torch.ones(4_000_000)})
    screen = screens(columns, rows)
    screen.type(f"{CLI} top --interval 0.1")
    text = screen.wait(lambda text: re.search(r"[█░]{10,20} +\d+ %", text))
    [line] = [line for line in text.splitlines() if "%" in line]
    assert line.startswith("r ") and ("net_cp=latest_model.th" in line) == (columns > 80)
    assert "1 in flight" in text.splitlines()[1]
    screen.key("q")
    screen.wait(lambda _: screen.state("alternate_on") == "0")
    # Drawn over and over on one line, and out of time.
    screen.type(f"clear; {CLI} drain --timeout 1; echo CODE $?")
    screen.wait(lambda text: re.search(r"█{10,40} 15.3 of 15.3 MiB, 1 checkpoint", text))
    text = screen.wait(lambda text: "CODE 2" in text)
    assert "1 checkpoint still in flight" in text and "█" not in text
    hung.process.kill()
    hung.process.wait()
    run.close()


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_plot_fits(busy: None, screens: Callable[..., Screen], tmp_path: Path, columns: int, rows: int) -> None:
    screen = screens(columns, rows)
    run = tmp_path / "2026-01-01_finished-with-a-long-name-that-differs-at-its-end-A"
    screen.type(f"clear; {CLI} plot {run} loss --log; echo DONE")
    text = screen.wait(lambda text: re.search(r"^DONE", text, re.M))
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    [axis] = [line for line in lines if "└" in line]
    assert axis.count("\N{MULTIPLICATION SIGN}") >= columns // 10 and len(axis) == columns
    assert any("40 values not shown" in line for line in lines)
    # The chart takes the terminal but for what it must leave.
    assert lines.index("DONE") >= min(rows - 4, columns // 3 - 2)


def test_colours_only_for_terminals_that_support_them(busy: None, screens: Callable[..., Screen]) -> None:
    for environment, coloured in ("", True), ("NO_COLOR=1", False), ("TERM=dumb", False):
        screen = screens(100, 20)
        screen.type(f"export X=1 {environment}; clear; {CLI} runs; {CLI} plot live loss --height 10; echo DONE")
        screen.wait(lambda text: re.search(r"^DONE", text, re.M))
        assert ("\x1b[" in screen.text("-e")) == coloured, environment
        assert "running" in screen.text()
    # No terminal, no colour.
    piped = screens(100, 20)
    piped.type(f"clear; {CLI} runs | cat; echo DONE")
    piped.wait(lambda text: re.search(r"^DONE", text, re.M))
    assert "\x1b[" not in piped.text("-e")


def test_tail_breaks_lines_between_values(
    daemon: RunningDaemon, screens: Callable[..., Screen], tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({f"group/key{index}": index / 7 for index in range(12)}, update=1)
    run.flush(30)
    screen = screens(80, 24)
    screen.type(f"clear; {CLI} tail r --no-follow; echo DONE")
    text = screen.wait(lambda text: re.search(r"^DONE", text, re.M))
    lines = text[: text.index("DONE")].splitlines()
    assert len(lines) > 2 and all(line.startswith("    group/key") for line in lines[1:])
    assert len(re.findall(r"group/key\d+=[\d.]+", text)) == 12
    run.close()
