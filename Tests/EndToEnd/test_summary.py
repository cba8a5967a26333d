# SPDX-License-Identifier: Apache-2.0
"""tracker/summary.yaml and tracker/config.yaml are what Noether's BaseTracker writes: compared with what its own code
wrote for the same logs (`record_summaries.py` says how that was recorded)."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import yaml
from conftest import DAEMON, RunningDaemon, faulty_daemon
from noether_writer import config_file
from record_summaries import CONFIG, FOLDER, LOGS
from test_recovery import stop_successor, until

NAN, INF = float("nan"), float("inf")


def write(root: Path, log: dict[str, dict[int, Any]], **arguments: Any) -> Path:
    """Logs row by row; returns the tracker's directory."""
    with noether_writer.open_run(root, "r", **arguments) as run:
        for update in sorted({update for values in log.values() for update in values}):
            run.log({key: values[update] for key, values in log.items() if update in values}, update=update)
    return root / "r/tracker"


@pytest.mark.parametrize("case", LOGS)
def test_the_summary_is_noethers(case: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    text = (write(tmp_path, LOGS[case]) / "summary.yaml").read_text()
    recorded = (FOLDER / f"{case}.yaml").read_text()
    if case != "looks":
        assert text == recorded
    ours, theirs = yaml.safe_load(text), yaml.safe_load(recorded)
    assert ours == theirs and list(ours) == list(theirs)
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]


def test_nan_and_infinities_are_never_best(daemon: RunningDaemon, tmp_path: Path) -> None:
    log = {
        "loss/first": {1: NAN, 2: 2.0, 3: 3.0},
        "loss/last": {1: 1.0, 2: 2.0, 3: NAN},
        "accuracy": {1: 0.5, 2: INF, 3: NAN},
        "error": {1: -INF, 2: 0.5},
        "loss/nothing_else": {1: NAN, 2: INF},
        # Values that have no order: BaseTracker raises, and leaves no summary at all.
        "mixed": {1: 1, 2: "two"},
        "sometimes": {1: 1, 2: None, 3: 2},
    }
    summary = yaml.safe_load((write(tmp_path, log) / "summary.yaml").read_text())
    assert math.isnan(summary.pop("loss/last/last")) and math.isnan(summary.pop("accuracy/last"))
    assert summary == {
        "loss/first/min": 2.0,
        "loss/first/last": 3.0,
        "loss/last/min": 1.0,
        "accuracy/max": 0.5,
        "error/min": 0.5,
        "error/last": 0.5,
        "loss/nothing_else/last": INF,
        "mixed/last": "two",
        "sometimes/last": 2,
    }


def test_a_killed_trainer_has_its_summary(daemon: RunningDaemon, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time, noether_writer\n"
        "run = noether_writer.open_run(sys.argv[1], 'r')\n"
        "run.log({'loss': 0.5}, update=1); run.log({'loss': 0.75}, update=2)\n"
        "while run.log_durable_update != 2: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -signal.SIGKILL
    summary = tmp_path / "r/tracker/summary.yaml"
    deadline = time.monotonic() + 10
    while not summary.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert yaml.safe_load(summary.read_text()) == {"loss/min": 0.5, "loss/last": 0.75}


@pytest.mark.parametrize("point", ["summary.created", "summary.written", "summary.renamed", "summary.durable"])
def test_killed_while_the_summary_is_written(
    point: str, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = str(short_directory / "s")
    first = faulty_daemon(socket, f"{point}=kill@1", monkeypatch)
    with ThreadPoolExecutor(1) as pool, noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 0.5}, update=1)
        finishing = pool.submit(run.finish, 30)
        assert first.process.wait(20) == -signal.SIGKILL
        RunningDaemon(socket)
        finishing.result(40)
    stop_successor(socket)
    assert {p.name for p in (tmp_path / "r/tracker").iterdir()} == {"entries.th", "summary.yaml"}
    assert yaml.safe_load((tmp_path / "r/tracker/summary.yaml").read_text()) == {"loss/min": 0.5, "loss/last": 0.5}


def test_a_summary_that_can_not_be_written_costs_no_log(daemon: RunningDaemon, tmp_path: Path) -> None:
    (tmp_path / "r/tracker/summary.yaml").mkdir(parents=True)
    tracker = write(tmp_path, {"loss": {1: 0.5}})
    assert (tracker / "entries.th").exists()
    until(lambda: not (tracker / "entries.journal").exists())
    # Said to who asks, and in the daemon's log.
    waited = subprocess.run([Path(DAEMON).parent / "noether-writer", "wait"], capture_output=True, text=True)
    assert waited.returncode == 1 and "summary.yaml" in waited.stdout
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None and "summary.yaml" in daemon.process.stderr.read()


@pytest.mark.parametrize("has_yaml", [True, False])
def test_the_config_is_noethers(
    has_yaml: bool, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file.platform, "node", lambda: yaml.safe_load(recorded)["dist/hostname"])
    recorded = (FOLDER / "config.yaml").read_text()
    before = repr(CONFIG)
    if not has_yaml:
        monkeypatch.setitem(sys.modules, "yaml", None)
    tracker = write(tmp_path, {"loss": {1: 0.5}}, config=CONFIG, stage_name="train")
    monkeypatch.undo()
    text = (tracker.parent / "train/tracker/config.yaml").read_text()
    ours, theirs = yaml.safe_load(text), yaml.safe_load(recorded)
    assert ours == theirs and list(ours) == list(theirs) and list(ours["hp"]) == list(theirs["hp"])
    assert repr(CONFIG) == before
    if has_yaml:
        assert text == recorded


VALUES: list[Any] = [
    *(0, -1, 2**70, 1.0, 1e-5, 1e22, -2.5e-9, INF, -INF, True, False, None),
    *("", " ", "plain", "two words", "it's", 'say "so"', "1", "1.5", "1e3", "0x1F", "null", "~", "NO", "- a", "a: b"),
    *("#a", "a #b", "{a}", "[1]", "2001-01-01", "=", "<<", "@x", "%x", "tab\t", "new\nline", "\u00fc", "\U0001f600"),
    *("\x07", "\x7f", "\x85", "\u2028", "\ufeff", "12:30", "1_000", "path/to", "a\\b"),
    *([], {}, [1, [2, [3, {}]], {"a": [1], "b": {"c": []}}], {"": {"x y": [{}]}}, (1, 2)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_without_pyyaml_the_same_is_read(value: Any) -> None:
    lines: Callable[[Any], list[str]] = config_file._lines
    text = "\n".join(lines({"key": value, "next": [value, {"deep": value}], str(value): 1}))
    wanted = list(value) if isinstance(value, tuple) else value
    assert yaml.safe_load(text) == {"key": wanted, "next": [wanted, {"deep": wanted}], str(value): 1}


def test_nan_in_a_config() -> None:
    assert math.isnan(yaml.safe_load("\n".join(config_file._lines({"x": NAN})))["x"])
