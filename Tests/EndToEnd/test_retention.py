# SPDX-License-Identifier: Apache-2.0
"""Older checkpoints go by a rule that is set, and only once a newer one is durable and has been read back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import daemon_of, until
from noether_writer import Target
from noether_writer.run import Run

Start = Callable[..., RunningDaemon]


@pytest.fixture
def start(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts daemons with settings."""
    socket = str(short_directory / "d/socket")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", socket)
    started: list[RunningDaemon] = []

    def start(last: int, every: int = 0, faults: str = "") -> RunningDaemon:
        monkeypatch.setenv("NOETHER_WRITER_SETTING_KEEP_LAST", str(last))
        monkeypatch.setenv("NOETHER_WRITER_SETTING_KEEP_EVERY", str(every))
        monkeypatch.setenv("NOETHER_WRITER_FAULTS", faults)
        started.append(RunningDaemon(socket))
        monkeypatch.delenv("NOETHER_WRITER_FAULTS")
        return started[-1]

    yield start
    for run in list(noether_writer.run._open_runs):
        run._session.end()
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.stop()


def names(root: Path) -> set[str]:
    return {p.name for p in (root / "r/checkpoints").iterdir()}


def save(run: Run, *tags: str, name: str = "net", kind: str = "model", info: str | None = None) -> None:
    for tag in tags:
        run.save(name, tag, {"tag": tag}, kind, info).wait(20)  # type: ignore[arg-type]
    # What follows a save on the run's queue is done when the next one is durable.
    run.save("fence", "fence", {}).wait(20)


def model(*tags: str) -> set[str]:
    return {f"net_cp={tag}_model.th" for tag in tags} | {"fence_cp=fence_model.th"}


def test_all_checkpoints_are_kept_by_default(start: Start, tmp_path: Path) -> None:
    start(0)
    run = noether_writer.open_run(tmp_path, "r")
    tags = [f"E{i}_U{10 * i}_S{40 * i}" for i in range(1, 8)]
    save(run, *tags)
    assert names(tmp_path) == model(*tags)


def test_the_newest_and_every_kth_and_named_ones_stay(start: Start, tmp_path: Path) -> None:
    daemon = start(2, 30)
    run = noether_writer.open_run(tmp_path, "r")
    save(run, "best", "latest", "E", "E1_U5_S20_x", "U05", "x_E1")
    save(run, *[f"E{i}_U{10 * i}_S{40 * i}" for i in range(1, 12)])
    stay = ["best", "latest", "E", "E1_U5_S20_x", "U05", "x_E1"]
    newest = ["E10_U100_S400", "E11_U110_S440", "E3_U30_S120", "E6_U60_S240", "E9_U90_S360"]
    assert names(tmp_path) == model(*stay, *newest)
    for name in names(tmp_path):
        torch.load(tmp_path / "r/checkpoints" / name)
    run.close()
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    lines = daemon.process.stderr.read()
    assert lines.count(": removed ") == 6 and "net_cp=E1_U10_S40_model.th, by keep_last: net_cp=E3" in lines


@pytest.mark.parametrize("letters", ["E", "U", "S", "EU", "ES", "US", "EUS"])
def test_any_part_of_a_tag_of_progress(letters: str, start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r")
    # 9, 10, 11: by their number, not by their letters.
    tags = ["_".join(f"{letter}{i}" for letter in letters) for i in (9, 10, 11)]
    save(run, *tags)
    assert names(tmp_path) == model(tags[-1])


@pytest.mark.parametrize(
    "scheme",
    ["step-{}", "epoch=1-step={}", "epoch={}-step=7", "ckpt_{:04}", "{}", "global_step{}", "loss0.5_step{}", "U{}_x"],
)
def test_any_scheme_with_a_number(scheme: str, start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r")
    # Retention orders them by their number, not by their letters.
    tags = [scheme.format(i) for i in (9, 10, 11)]
    save(run, *tags)
    assert names(tmp_path) == model(tags[-1])


def test_measured_values_and_model_names_in_tags_are_not_progress(start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r")
    save(
        run, "loss0.7_step1", "loss0.5_step2", "loss0.9_step3", "fold1_step5", "fold2_step4", "lr1e-05_U8", "lr1e-04_U7"
    )
    assert names(tmp_path) == model("loss0.9_step3", "fold1_step5", "fold2_step4", "lr1e-05_U8", "lr1e-04_U7")


def test_a_tag_without_a_number_is_said_once(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    daemon = start(0)
    run = noether_writer.open_run(tmp_path, "r", keep_last=1)
    save(run, "first", "second", "latest", "best", "U1", "U2")
    assert names(tmp_path) == model("first", "second", "latest", "best", "U2")
    assert caplog.text.count("the tag 'first' has no number") == 1 == caplog.text.count("has no number")
    run.close()
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    assert daemon.process.stderr.read().count('the tag "first" has no number') == 1


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_stay(mode: Literal["min", "max"], start: Start, tmp_path: Path) -> None:
    start(0)
    run = noether_writer.open_run(tmp_path, "r", keep_last=2, keep_best=("loss/val", mode, 2))
    values = [5.0, 1.0, 4.0, float("nan"), 2.0, 9.0, 8.0, 3.0, 6.0]
    sign = 1 if mode == "min" else -1
    for update, value in enumerate(values, 1):
        run.log({"loss": {"val": torch.tensor(value)}, "other": update}, update=update)
        run.save_as([Target("net", f"U{update}", {"u": update}), Target("net", f"U{update}", {"u": update}, "optim")])
        save(run)
        known = [at for at in range(1, update + 1) if values[at - 1] == values[at - 1]]
        best = sorted(known, key=lambda at: sign * values[at - 1])[:2]
        tags = {f"U{at}" for at in {*best, update, max(1, update - 1)}}
        assert names(tmp_path) == model(*tags) | {f"net_cp={tag}_optim.th" for tag in tags}, update
    last = noether_writer.best(run.directory, "loss/val", mode)
    assert last is not None and last.tag == f"U{best[0]}"


def test_an_evaluation_after_the_save_counts(start: Start, tmp_path: Path) -> None:
    start(0)
    run = noether_writer.open_run(tmp_path, "r", keep_best=("acc", "max", 1))
    for update, value in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        run.log({"loss": 1.0}, update=update)
        run.save("net", f"step-{update}", {})
        run.log({"acc": value}, update=update)
    save(run)
    assert names(tmp_path) == model("step-2", "step-4")


def test_the_best_stay_over_a_resume_and_a_killed_daemon(start: Start, tmp_path: Path) -> None:
    daemon = start(0)
    with noether_writer.open_run(tmp_path, "r", keep_best=("loss", "min", 1)) as run:
        for update, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
            run.log({"loss": value}, update=update)
            save(run, f"U{update}")
    assert names(tmp_path) == model("U2", "U3")
    run = noether_writer.open_run(tmp_path, "r", resume="auto", keep_best=("loss", "min", 1))
    assert run.resumed_at == 3
    run.log({"loss": 5.0}, update=4)
    save(run, "U4")
    assert names(tmp_path) == model("U2", "U4")
    daemon.process.kill()
    daemon.process.wait()
    run.log({"loss": 6.0}, update=5)
    ticket = run.save("net", "U5", {})
    start(0)
    ticket.wait(30)
    save(run)
    assert names(tmp_path) == model("U2", "U5")


def test_quick_saves_leave_the_best(start: Start, tmp_path: Path) -> None:
    """Most of them are on their way at once."""
    start(0)
    run = noether_writer.open_run(tmp_path, "r", keep_last=1, keep_best=("loss", "min", 3))
    order = [(number * 37) % 101 for number in range(1, 101)]
    for update, value in enumerate(order, 1):
        run.log({"loss": value}, update=update)
        run.save("net", f"U{update}", {"u": update})
    run.wait(60)
    save(run)
    best = [order.index(value) + 1 for value in (1, 2, 3)]
    assert names(tmp_path) == model(*{f"U{update}" for update in (*best, 100)})


def test_a_best_checkpoint_that_was_never_written_counts_for_nothing(start: Start, tmp_path: Path) -> None:
    start(0)
    run = noether_writer.open_run(tmp_path, "r", keep_best=("loss", "min", 1))
    for update, value in ((1, 2.0), (2, 1.0), (3, 4.0)):
        run.log({"loss": value}, update=update)
        save(run, f"U{update}")
    (tmp_path / "r/checkpoints/net_cp=U2_model.th").unlink()
    run.log({"loss": 3.0}, update=4)
    save(run, "U4")
    run.log({"loss": 5.0}, update=5)
    save(run, "U5")
    assert names(tmp_path) == model("U4", "U5")


def test_a_rank_that_does_not_log_removes_nothing(start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r", rank=1, keep_best=("loss", "min", 1))
    save(run, "U1", "U2", "U3")
    assert names(tmp_path) == model("U1", "U2", "U3")


@pytest.mark.parametrize(
    "wrong", ["loss", ("loss", "least", 1), ("loss", "min", 0), ("loss", "min"), (1, "min", 1), ("loss", "min", True)]
)
def test_what_keep_best_needs_is_said(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="keep_best"):
        noether_writer.open_run(tmp_path, "r", keep_best=wrong)
    assert list(tmp_path.iterdir()) == []


def test_only_its_own_kind_name_info_and_letters(start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r")
    save(run, "U1")
    save(run, "U1", kind="optim")
    save(run, "U1", name="net_b")
    save(run, "U1", info="ema")
    save(run, "E1_U1", "U5_S9")
    other = noether_writer.open_run(tmp_path, "other")
    other.save("net", "U1", {}).wait(20)
    before = names(tmp_path)
    others = {"net_cp=U1_optim.th", "net_b_cp=U1_model.th", "net_ema_cp=U1_model.th"}
    assert before == model("U1", "E1_U1", "U5_S9") | others
    save(run, "U2")
    assert names(tmp_path) == before - {"net_cp=U1_model.th"} | {"net_cp=U2_model.th"}
    assert [p.name for p in (tmp_path / "other/checkpoints").iterdir()] == ["net_cp=U1_model.th"]


def test_retention_keeps_checkpoints_with_a_higher_update(start: Start, tmp_path: Path) -> None:
    """A run that goes on from an earlier point finds files of the first time."""
    start(0)
    run = noether_writer.open_run(tmp_path, "r")
    save(run, "U10", "U20", "U30")
    run.close()
    noether_writer.run._open_runs.clear()
    # Another daemon, with the rule.
    os.kill(daemon_of(os.environ["NOETHER_WRITER_SOCKET"]), signal.SIGKILL)
    start(1)
    run = noether_writer.open_run(tmp_path, "r", resume_at=10)
    save(run, "U15")
    assert names(tmp_path) == model("U15", "U20", "U30")


@pytest.mark.parametrize("targets", [("{}",), ("{}", "latest"), ("latest", "{}")], ids=" ".join)
def test_many_quick_saves_leave_those_that_are_kept(
    targets: tuple[str, ...], short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon has no room for most of them at first: these come again later, when newer ones are durable."""
    # A daemon that says more than a pipe holds, and is therefore started by its trainer.
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "d/socket"))
    run = noether_writer.open_run(tmp_path, "r", keep_last=3)
    tickets = [
        run.save_as([Target("net", tag.format(f"E1_U{number}_S{number}"), {"number": number}) for tag in targets])
        for number in range(1, 401)
    ]
    for ticket in tickets:
        ticket.wait(120)
    save(run)
    kept = [f"E1_U{number}_S{number}" for number in (398, 399, 400)]
    assert names(tmp_path) == model(*kept, *(tag for tag in targets if tag == "latest"))
    for number, tag in zip((398, 399, 400), kept, strict=True):
        assert torch.load(tmp_path / f"r/checkpoints/net_cp={tag}_model.th") == {"number": number}
    run.close()
    assert subprocess.run([Path(DAEMON).with_name("noether-writer"), "stop"], timeout=60).returncode == 0


def test_a_run_that_goes_back_keeps_what_it_saves_then(start: Start, tmp_path: Path) -> None:
    """Without a new run object: what it saved before is ahead, and no reason to remove what it saves now."""
    start(2)
    run = noether_writer.open_run(tmp_path, "r")
    save(run, "U10", "U20", "U30")
    save(run, "U15", "U16")
    assert names(tmp_path) == model("U15", "U16", "U20", "U30")
    save(run, "U17")
    assert names(tmp_path) == model("U16", "U17", "U20", "U30")


@pytest.mark.parametrize("point", ["retention.verified", "retention.removed", "checkpoint.durable"])
def test_a_crash_between_durable_and_removing(point: str, start: Start, tmp_path: Path) -> None:
    first = start(1, faults=f"{point}=kill@{2 if point == 'checkpoint.durable' else 1}")
    run = noether_writer.open_run(tmp_path, "r")
    run.save("net", "U1", {"tag": "U1"}).wait(20)
    ticket = run.save("net", "U2", {"tag": "U2"})
    assert first.process.wait(20) == -signal.SIGKILL
    left = names(tmp_path)
    # The successor is whole; what it succeeds may be there still.
    assert "net_cp=U2_model.th" in left
    assert torch.load(tmp_path / "r/checkpoints/net_cp=U2_model.th") == {"tag": "U2"}
    start(1)
    ticket.wait(30)
    save(run, "U3")
    assert names(tmp_path) == model("U3")


def test_a_successor_that_does_not_verify_removes_nothing(start: Start, tmp_path: Path) -> None:
    """Its bytes change between durable and reading back, as on a disk that lies."""
    daemon = start(1, faults="retention.verify=slow")
    run = noether_writer.open_run(tmp_path, "r")
    weights = torch.arange(1 << 18)
    run.save("net", "U1", {"w": weights}).wait(20)
    run.save("net", "U2", {"w": weights})
    path = tmp_path / "r/checkpoints/net_cp=U2_model.th"
    until(path.exists)
    with path.open("r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))
    run.save("fence", "fence", {}).wait(20)
    assert names(tmp_path) == model("U1", "U2")
    assert torch.equal(torch.load(tmp_path / "r/checkpoints/net_cp=U1_model.th")["w"], weights)
    run.close()
    assert daemon.stop() == 0
    assert daemon.process.stderr is not None
    assert "net_cp=U2_model.th does not verify (net_cp=U2_model/data/0" in daemon.process.stderr.read()


def test_retention_leaves_links_and_directories_alone(start: Start, tmp_path: Path) -> None:
    start(1)
    run = noether_writer.open_run(tmp_path, "r")
    folder = tmp_path / "r/checkpoints"
    (tmp_path / "elsewhere").write_text("not yours")
    (folder / "net_cp=U1_model.th").symlink_to(tmp_path / "elsewhere")
    (folder / "net_cp=U2_model.th").mkdir()
    os.mkfifo(folder / "net_cp=U3_model.th")
    save(run, "U4", "U5")
    assert names(tmp_path) == model("U1", "U2", "U3", "U5")
    assert (tmp_path / "elsewhere").read_text() == "not yours"


def test_wrong_numbers_are_named(start: Start, short_directory: Path) -> None:
    environment = os.environ | {"NOETHER_WRITER_SETTING_KEEP_LAST": "-1"}
    result = subprocess.run(
        [os.environ["NOETHER_WRITER_DAEMON"], "--socket", str(short_directory / "s")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode != 0 and "NOETHER_WRITER_SETTING_KEEP_LAST" in result.stderr
