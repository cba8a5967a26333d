# SPDX-License-Identifier: Apache-2.0
"""The command line with odd numbers, names that hide, readers that leave, a full disk, and a daemon that is stopped."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon

CLI = Path(DAEMON).parent / "noether-writer"
EDGES = [
    0.0,
    -0.0,
    5e-324,
    1e-320,
    2.2250738585072014e-308,
    1e-5,
    0.1,
    1.0,
    1e15,
    2**53 + 2.0,
    1.7e308,
    1.7976931348623157e308,
]
ODD = [float("nan"), float("inf"), -float("inf")]


def run_of(folder: Path, entries: dict[str, dict[int, object]]) -> str:
    (folder / "tracker").mkdir(parents=True)
    torch.save(entries, folder / "tracker/entries.th")
    return str(folder)


def cli(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NOETHER_WRITER_SOCKET": "/nonexistent/socket"}
    return subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


def commands(run: str, folder: Path) -> list[list[str]]:
    plots = [[], ["--log"], ["--smooth", "0.9"], ["--json"], ["--width", "30", "--height", "8"]]
    plots += [["--out", str(folder / f"c.{kind}"), *log] for kind in ("svg", "png") for log in ([], ["--log"])]
    return [
        ["show", run],
        ["show", run, "--json"],
        ["show", run, "--keys=-1"],
        ["tail", run, "--no-follow"],
        ["tail", run, "--json", "-n", "9223372036854775807"],
        *(["export", run, "--format", kind] for kind in ("csv", "json", "long")),
        *(["plot", run, "a", *more] for more in plots),
    ]


def check(entries: dict[str, dict[int, object]], folder: Path) -> None:
    run = run_of(folder, entries)
    for command in commands(run, folder):
        result = cli(*command)
        # 4: no value that could be shown.
        assert result.returncode in ((0, 4) if command[0] == "plot" else (0,)), (entries, command, result.stderr)
        if "--json" in command and result.returncode == 0:
            for line in result.stdout.splitlines():
                json.loads(line)


@pytest.mark.parametrize("updates", [(1, 2), (-(2**63), 2**63 - 1), (2**63 - 2, 2**63 - 1)], ids=str)
def test_numbers_at_the_edges(updates: tuple[int, int], tmp_path: Path) -> None:
    values = [*EDGES, *(-value for value in EDGES), *ODD]
    random.seed(str(updates))
    pairs = random.sample(list(itertools.product(values, values)), 12)
    for number, (first, second) in enumerate(pairs):
        check({"a": {updates[0]: first, updates[1]: second}}, tmp_path / str(number))
    for number, value in enumerate(random.sample(values, 6)):
        check({"a": {updates[0]: value}}, tmp_path / f"alone{number}")


@pytest.mark.parametrize("seed", range(12))
def test_any_numbers_are_exported_and_plotted(seed: int, tmp_path: Path) -> None:
    random.seed(seed)

    def number() -> object:
        match random.randrange(6):
            case 0:
                return random.choice(EDGES + ODD)
            case 1:
                return random.randrange(-(2**63), 2**63)
            case 2:
                return random.choice([True, None, "text", 2**80, -(2**90)])
            case _:
                return struct.unpack("<d", random.randbytes(8))[0]

    updates = sorted({random.randrange(-(2**63), 2**63) >> random.randrange(63) for _ in range(40)})
    check({"a": {update: number() for update in updates}, "b": {updates[0]: number()}}, tmp_path / "r")


def test_impossible_screen_sizes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"a": {1: 1.0, 2: 2.0}})
    for option in ("--width", "--height"):
        for size in ("0", "-5", "100000000", "9223372036854775807"):
            assert cli("plot", run, "a", option, size).returncode == 64
        assert cli("plot", run, "a", option, "1").returncode == 0


def test_names_that_hide_are_shown_by_their_numbers(tmp_path: Path) -> None:
    hidden = {"a\u202eb": {1: 1.0}, "a\u200bb": {1: "x\u2066y"}, "heart \u2764\ufe0f": {1: 2.0}, "c\x1bd": {1: 1.0}}
    run = run_of(tmp_path / "r", hidden)
    for command in (["show", run], ["tail", run], ["plot", run, "a\u202eb"]):
        shown = cli(*command).stdout
        assert not {"\u202e", "\u200b", "\u2066", "\x1b"} & set(shown)
        assert "a\\u{202e}b" in shown
    assert "a\\u{200b}b" in shown or "a\\u{200b}b" in cli("show", run).stdout
    assert "\u2764\ufe0f" in cli("show", run).stdout
    # What is for programs is as it is.
    assert set(json.loads(cli("export", run, "--json").stdout)) == set(hidden)


def test_a_key_that_is_named_update_has_a_column_of_another_name(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"update": {1: 7.0}, "update.1": {1: 8.0}, "loss": {1: 9.0}})
    assert cli("export", run).stdout == "update,update.2,update.1,loss\n1,7.0,8.0,9.0\n"


@pytest.fixture
def long_run(tmp_path: Path) -> str:
    return run_of(tmp_path / "long", {f"key{key}": {update: 0.5 for update in range(3000)} for key in range(40)})


LONG: list[list[str]] = [["export"], ["export", "--json"], ["tail", "-n", "3000"], ["show", "--keys", "40"]]


@pytest.mark.parametrize("command", LONG, ids=str)
def test_a_reader_that_leaves_is_no_error(command: Sequence[str], long_run: str) -> None:
    process = subprocess.Popen(
        [CLI, command[0], long_run, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


@pytest.mark.parametrize("command", [*LONG, ["plot", "key1"], ["plot", "key1", "--json"], ["checkpoints"]], ids=str)
def test_output_to_a_full_disk_is_an_error(command: Sequence[str], long_run: str) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [CLI, command[0], long_run, *command[1:]], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert result.returncode == 1 and "No space left on device" in result.stderr, result


@pytest.mark.parametrize("command", [["wait"], ["wait", "r"], ["drain"]], ids=str)
def test_a_daemon_that_is_stopped_has_its_time_and_no_more(
    command: Sequence[str], daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        result = subprocess.run([CLI, *command, "--timeout", "1"], capture_output=True, text=True, timeout=60)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    # What is left of the second is in the message.
    assert result.returncode == 2 and re.search(r"has not answered within (1\.\d|0\.\d) s", result.stderr)
    for odd in ("nan", "-1", "1e300"):
        assert subprocess.run([CLI, *command, f"--timeout={odd}"], capture_output=True).returncode == 64
    run.close()
