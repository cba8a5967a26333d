# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, read by TensorBoard's own EventAccumulator: at once and while they grow."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import daemon_of, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from test_recovery import running, stop_successor
from torch.utils.tensorboard import SummaryWriter

ALL = {"scalars": 0, "tensors": 0}
logging.getLogger("tensorboard").setLevel(logging.ERROR)


class Shown:
    """What TensorBoard shows of a run. `again` reads on, as its page does."""

    def __init__(self, run: Path) -> None:
        self._events = EventAccumulator(str(run), size_guidance=ALL)
        self.again()

    def again(self) -> Shown:
        self._events.Reload()
        return self

    @property
    def tags(self) -> set[str]:
        return set(self._events.Tags()["scalars"])

    def scalars(self, tag: str) -> list[Any]:
        return list(self._events.Scalars(tag)) if tag in self.tags else []

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self.scalars(tag)]

    def texts(self, tag: str) -> list[tuple[int, str]]:
        if f"{tag}/text_summary" not in self._events.Tags()["tensors"]:
            return []
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in self._events.Tensors(f"{tag}/text_summary")]


def files(run: Path) -> list[Path]:
    return sorted(run.glob("events.out.tfevents.*"))


def shows(run: Path, steps: range, tag: str = "loss") -> Callable[[], bool]:
    return lambda: bool(files(run)) and Shown(run).steps(tag) == list(steps)


def log(run: Any, steps: range, factor: float = 1.0) -> None:
    for step in steps:
        run.log({"loss": factor / (step + 1)}, update=step, epoch=step // 10)


def test_event_files_grow_with_the_log_and_are_complete_at_the_end(daemon: RunningDaemon, tmp_path: Path) -> None:
    values = {"nan": math.nan, "inf": -math.inf, "int": 3, "flag": True, "big": 2**70, "none": None, "a/b c": 1.5}
    begun = time.time()
    with noether_writer.open_run(tmp_path, "r", tensorboard=True, config={"lr": 1e-5}) as run:
        log(run, range(1, 101))
        run.log({"loss": 0.25, "note": "warm *up*", **values}, update=101)
        # While the run is open.
        until(shows(run.directory, range(1, 102)))
        live = Shown(run.directory)
        assert live.tags == {"loss", "epoch", *values} - {"none"}
        assert [event.value for event in live.scalars("loss")][:2] == [0.5, pytest.approx(1 / 3)]
        assert begun - 1 < live.scalars("loss")[0].wall_time <= live.scalars("loss")[-1].wall_time < time.time() + 1
        assert math.isnan(live.scalars("nan")[0].value) and live.scalars("inf")[0].value == -math.inf
        assert [live.scalars(tag)[0].value for tag in ("int", "flag", "big", "a/b c")] == [3, 1, 2.0**70, 1.5]
        assert live.texts("note") == [(101, "warm *up*")]
        [(step, text)] = live.texts("hyperparameters")
        assert step == 0 and text == f"```yaml\n{(run.directory / 'tracker/config.yaml').read_text()}```"
        assert not live.texts("summary")
        run.log({"loss": 0.125}, update=102)
        until(lambda: live.again().steps("loss")[-1] == 102)
    until(lambda: live.again().texts("summary"))
    assert live.texts("summary") == [(102, f"```yaml\n{(run.directory / 'tracker/summary.yaml').read_text()}```")]
    assert len(files(run.directory)) == 1


def test_it_is_what_torch_writes(daemon: RunningDaemon, tmp_path: Path) -> None:
    theirs = SummaryWriter(str(tmp_path / "torch"))
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        for step in range(-3, 50):
            values = {"x": math.sin(step), "y/z": 1e-30 * step, "n": step**5}
            run.log({**values, "t": f"step {step} \u00fc"}, update=step)
            for tag, value in values.items():
                theirs.add_scalar(tag, value, step)
            theirs.add_text("t", f"step {step} \u00fc", step)
    theirs.close()
    until(shows(run.directory, range(-3, 50), "x"))
    a, b = Shown(run.directory), Shown(tmp_path / "torch")
    assert a.tags == b.tags == {"x", "y/z", "n"}
    for tag in a.tags:
        assert [(e.step, e.value) for e in a.scalars(tag)] == [(e.step, e.value) for e in b.scalars(tag)]
    # The messages themselves, with their metadata, but for their times.
    for name in a._events.Tags()["tensors"]:
        if name == "t/text_summary":
            assert a._events.Tensors(name)[5].tensor_proto == b._events.Tensors(name)[5].tensor_proto
            assert a._events.SummaryMetadata(name) == b._events.SummaryMetadata(name)


def test_a_resumed_run_shows_no_stale_points(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r", tensorboard=True)
    log(run, range(1, 101))
    run.log({"loss": 1.0, "only_before": 1.0}, update=101)
    until(shows(run.directory, range(1, 102)))
    live = Shown(run.directory)
    first = live.scalars("loss")[0].wall_time
    run.close()
    with noether_writer.open_run(tmp_path, "r", tensorboard=True, resume_at=60) as run:
        # Taken back before anything is logged.
        until(lambda: live.again().steps("loss") == list(range(1, 61)))
        assert Shown(run.directory).steps("loss") == list(range(1, 61)) and not live.steps("only_before")
        log(run, range(61, 81), factor=-1)
        for shown in (live, Shown(run.directory)):
            until(lambda shown=shown: shown.again().steps("loss") == list(range(1, 81)))
            assert [event.value > 0 for event in shown.scalars("loss")] == [True] * 60 + [False] * 20
            assert shown.scalars("loss")[0].wall_time == first
            assert not shown.steps("only_before")
        # Nor do readers show some that take nothing back: no file has them.
        raw = [event.step for path in files(run.directory) for event in LegacyEventFileLoader(str(path)).Load()]
        assert sorted(step for step in raw if step > 0) == [*range(1, 61), 61, *range(61, 81)]


def test_a_run_resumed_from_its_files_keeps_its_times(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The daemon has no log of it any more: the client sends again what is shown already."""
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        log(run, range(1, 101))
    until(shows(run.directory, range(1, 101)))
    before = Shown(run.directory).scalars("loss")
    assert daemon.stop() == 0
    RunningDaemon(daemon.socket)
    # Sent by hand, a part of them when the file has been begun.
    (run.directory / "tracker/entries.th").unlink()
    with noether_writer.open_run(tmp_path, "r", tensorboard=True, resume_at=50) as run:
        log(run, range(1, 31))
        until(lambda: len(files(run.directory)) == 2)
        log(run, range(31, 61))
    until(shows(run.directory, range(1, 61)))
    assert Shown(run.directory).scalars("loss")[:50] == before[:50]
    with noether_writer.open_run(tmp_path, "r", tensorboard=True, resume_at=55) as run:
        log(run, range(56, 58))
    until(shows(run.directory, range(1, 58)))
    assert Shown(run.directory).scalars("loss")[:50] == before[:50]
    stop_successor(daemon.socket)


def test_a_run_that_begins_anew_shows_nothing_of_before(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        log(run, range(1, 101))
    until(shows(run.directory, range(1, 101)))
    live = Shown(run.directory)
    until(lambda: live.again().texts("summary"))
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        run.log({"other": 1.0}, update=5)
        until(lambda: live.again().steps("other") == [5])
        # Of texts its reader forgets none while it runs.
        assert not live.steps("loss")
        until(shows(run.directory, range(5, 6), "other"))
        fresh = Shown(run.directory)
        assert not fresh.steps("loss") and not fresh.texts("summary")
    # However often that happens before a reader looks again.
    for _ in range(3):
        with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
            run.log({"again": 1.0}, update=1)
            until(shows(run.directory, range(1, 2), "again"))
    until(lambda: live.again().steps("again") == [1])
    assert not live.steps("other") and not live.steps("loss")


def test_files_of_before_are_emptied_and_go_later(daemon: RunningDaemon, tmp_path: Path) -> None:
    directory = tmp_path / "r"
    directory.mkdir()
    times = [1000000000, 1000000001, int(time.time()) - 20, int(time.time()) - 10]
    old = [directory / f"events.out.tfevents.{seconds}.host.1.noether-writer" for seconds in times]
    for path in old:
        path.touch()
    old[1].write_bytes(bytes(100))
    foreign = directory / "events.out.tfevents.1000000000.host.1.0"
    foreign.write_bytes(b"theirs")
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        run.log({"loss": 1.0}, update=1)
        until(shows(run.directory, range(1, 2)))
    # The first was left long ago. The others may be read just now.
    assert [path.stat().st_size if path.exists() else None for path in old] == [None, 0, 0, 0]
    assert foreign.read_bytes() == b"theirs"


@pytest.mark.parametrize("torn", [False, True])
def test_killed_daemons_leave_no_hole_and_nothing_twice(torn: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r", tensorboard=True)
    end = 1
    for _ in range(3):
        log(run, range(end, end + 50))
        end += 50
        until(shows(run.directory, range(1, end)))
        log(run, range(end, end + 20))
        end += 20
        until(lambda: run._core.kept_rows == 0)
        # Whichever serves: the client may have been faster to start one.
        pid = daemon_of(daemon.socket)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not running(pid))
        if torn:
            newest = files(run.directory)[-1]
            os.truncate(newest, newest.stat().st_size - 7)
        RunningDaemon(daemon.socket)
    run.finish(30)
    until(shows(run.directory, range(1, end)))
    run.close()
    stop_successor(daemon.socket)


def test_a_killed_trainer_is_shown_to_its_end(daemon: RunningDaemon, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time, noether_writer\n"
        "run = noether_writer.open_run(sys.argv[1], 'r')\n"
        "for step in range(1, 1001): run.log({'loss': 1 / step}, update=step)\n"
        "while run._core.kept_rows: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"NOETHER_WRITER_TENSORBOARD": "1"}
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment)
    assert result.returncode == -signal.SIGKILL
    until(lambda: files(tmp_path / "r") and Shown(tmp_path / "r").texts("summary"))
    assert Shown(tmp_path / "r").steps("loss") == list(range(1, 1001))


@pytest.mark.parametrize("when", ["on-request", "always", "never", None])
def test_who_has_files(
    when: str | None, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when:
        monkeypatch.setenv("NOETHER_WRITER_SETTING_TENSORBOARD", when)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    daemon = RunningDaemon(str(short_directory / "s"))
    for name, asked in (("yes", True), ("no", False), ("unsaid", None)):
        with noether_writer.open_run(tmp_path, name, tensorboard=asked) as run:
            run.log({"loss": 1.0}, update=1)
    # A run that logs nothing leaves no file.
    noether_writer.open_run(tmp_path, "empty", tensorboard=True).close()
    # What is shown is shown before the daemon is gone.
    assert daemon.stop() == 0
    expected = {"always": {"yes", "unsaid"}, "never": set()}.get(when or "", {"yes"})
    assert {path.name for path in tmp_path.iterdir() if files(path)} == expected


def test_a_wrong_setting_is_named(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_TENSORBOARD", "sometimes")
    result = subprocess.run([DAEMON, "--socket", str(short_directory / "s")], capture_output=True, text=True)
    assert result.returncode == 64 and "on-request, always or never" in result.stderr


@pytest.fixture
def faulty(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], RunningDaemon]]:
    def start(faults: str) -> RunningDaemon:
        monkeypatch.setenv("NOETHER_WRITER_FAULTS", faults)
        monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
        daemon = RunningDaemon(str(short_directory / "s"))
        monkeypatch.delenv("NOETHER_WRITER_FAULTS")
        return daemon

    yield start
    for run in list(noether_writer.run._open_runs):
        run._session.end()


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses_once_is_asked_again(
    error: str, faulty: Callable[[str], RunningDaemon], tmp_path: Path
) -> None:
    daemon = faulty(f"tensorboard.write={error}@1")
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        log(run, range(1, 51))
        until(shows(run.directory, range(1, 51)))
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    assert daemon.process.stderr.read().count("TensorBoard's event file is late") == 1
    assert Shown(run.directory).steps("loss") == list(range(1, 51))


@pytest.mark.parametrize("fault", ["ENOSPC", "hang"])
def test_a_disk_that_refuses_or_hangs_stops_nothing(
    fault: str, faulty: Callable[[str], RunningDaemon], tmp_path: Path
) -> None:
    daemon = faulty(f"tensorboard.write={fault}")
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        log(run, range(1, 51))
        until(lambda: files(run.directory))
    assert noether_writer.open_run(tmp_path, "r2").directory.exists()
    # Waits for it a few seconds, not for ever.
    assert daemon.stop() == 0
    assert len(torch.load(run.directory / "tracker/entries.th")["loss"]) == 50


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_damaged_event_file_is_repaired(harm: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        log(run, range(1, 51))
        until(shows(run.directory, range(1, 51)))
        [file] = files(run.directory)
        if harm == "removed":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
        log(run, range(51, 61))
        until(shows(run.directory, range(1, 61)))


def test_many_updates_at_once_are_all_in_the_event_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r", tensorboard=True) as run:
        for step in range(20_000):
            run.log({f"k{key}": float(step) for key in range(10)}, update=step)
    assert daemon.stop() == 0
    shown = Shown(run.directory)
    assert shown.steps("k9") == list(range(20_000)) and len(shown.tags) == 10
    assert [event.value for event in shown.scalars("k0")] == list(range(20_000))


class Page:
    """TensorBoard itself, as a browser asks it."""

    def __init__(self, root: Path) -> None:
        where = ["--logdir", str(root), "--host", "127.0.0.1", "--port", "0"]
        command = [sys.executable, "-m", "tensorboard.main", *where]
        log = root.parent / f"{root.name}.log"
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        found: list[str] = []
        until(lambda: found.extend(re.findall(r"http://127\.0\.0\.1:\d+/", log.read_text())) or found, 60)
        self._url = found[0]

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(f"{self._url}data/{path}", data, {"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            # Nothing is loaded yet.
            return None


def test_the_page_has_plain_names_and_hyperparameters(daemon: RunningDaemon, tmp_path: Path) -> None:
    for name, lr in (("a", 0.5), ("b", 0.25)):
        config = {"lr": lr, "model": {"name": f"m\u00fc {name}", "deep": name == "a"}, "n": 3, "none": None}
        with noether_writer.open_run(tmp_path, name, "train", config=config, tensorboard=True) as run:
            run.log({"loss": lr, "acc": 1 - lr}, update=1)
            run.log({"loss": lr / 2}, update=2)
            until(shows(run.directory, range(1, 3)))
    with noether_writer.open_run(tmp_path, "plain", tensorboard=True) as run:
        run.log({"loss": 1.0}, update=1)
        until(shows(run.directory, range(1, 2)))
    question = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    with Page(tmp_path) as page:
        until(lambda: set(page.ask("runs") or ()) >= {"a/train", "b/train", "plain"}, 60)
        assert set(page.ask("runs")) == {"a/train", "b/train", "plain"}
        until(lambda: (page.ask("plugin/hparams/experiment", {"experimentName": ""}) or {}).get("hparamInfos"), 60)
        groups: dict[str, Any] = {}

        def loaded() -> bool:
            answer = page.ask("plugin/hparams/session_groups", question) or {}
            groups.update({each["name"]: each for each in answer.get("sessionGroups", ())})
            return len(groups) == 2 and all(len(each.get("metricValues", ())) >= 2 for each in groups.values())

        until(loaded, 60)
        # A run that has no config is no session.
        assert set(groups) == {"a/train", "b/train"}
        for name, lr in (("a", 0.5), ("b", 0.25)):
            group = groups[f"{name}/train"]
            assert group["hparams"] == {
                "lr": lr,
                "model.name": f"m\u00fc {name}",
                "model.deep": name == "a",
                "n": 3.0,
                "none": "None",
            }
            metrics = {each["name"]["tag"]: each["value"] for each in group["metricValues"]}
            assert metrics["loss"] == lr / 2 and metrics["acc"] == 1 - lr


def test_hyperparameters_that_cannot_be_read_are_a_text_only(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r", tensorboard=True)
    (run.directory / "tracker/config.yaml").write_text("hp: [1, 2\n")
    run.log({"loss": 1.0}, update=1)
    until(shows(run.directory, range(1, 2)))
    shown = Shown(run.directory)
    assert shown.texts("hyperparameters") and "_hparams_/session_start_info" not in shown._events.Tags()["tensors"]
    run.close()
