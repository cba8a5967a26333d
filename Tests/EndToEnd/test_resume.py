# SPDX-License-Identifier: Apache-2.0
"""A run is found again in its files: which checkpoints there are, which is newest, which is best; and a training that
was killed continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import RunningDaemon, faulty_daemon
from harness import until
from noether_writer import _checkpoints
from noether_writer.errors import RunInUse, UnknownRun
from test_cli import cli

TRAINING = """
import os, signal, sys, noether_writer, torch

root, updates, dies_at = sys.argv[1], 40, int(sys.argv[2])
torch.manual_seed(0)
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7)
with noether_writer.open_run(root, "killed", resume="auto") as run:
    if (last := noether_writer.latest(run.directory)) is not None:
        for part, state in zip((net, optimizer, scheduler), torch.load(last.path)["state"]):
            part.load_state_dict(state)
    for update in range((run.resumed_at or 0) + 1, updates + 1):
        torch.manual_seed(update)
        x = torch.randn(8, 4)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.log({"loss": loss}, update=update)
        if update == dies_at:
            run.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if update % 10 == 0:
            state = [net.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
            ticket = run.save("net", "latest", {"state": state})
            if dies_at:
                ticket.wait()
"""


def train(root: Path, dies_at: int) -> int:
    return subprocess.run([sys.executable, "-c", TRAINING, str(root), str(dies_at)], timeout=120).returncode


def test_a_killed_training_continues_bit_by_bit(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", 0) == 0
    for dies_at in (5, 13, 37):
        assert train(tmp_path / "parts", dies_at) == -signal.SIGKILL
    assert train(tmp_path / "parts", 0) == 0
    whole, parts = (tmp_path / name / "killed" for name in ("whole", "parts"))
    entries = [torch.load(run / "tracker" / "entries.th") for run in (whole, parts)]
    assert entries[0] == entries[1]
    assert list(entries[0]["loss"]) == list(range(1, 41))
    states = []
    for run in (whole, parts):
        last = noether_writer.latest(run)
        assert last is not None and last.update == 40
        states.append(torch.load(last.path)["state"])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def saved(root: Path, *updates: int, run_id: str = "r", kind: str = "model", **named: object) -> Path:
    """Saves a checkpoint at each update, after it was logged; closes the run."""
    with noether_writer.open_run(root, run_id, **named) as run:  # type: ignore[arg-type]
        for update in updates:
            run.log({"loss": 1 / update}, update=update)
            run.save("net", f"U{update}", {"update": update}, kind=kind).wait()  # type: ignore[arg-type]
    return Path(run.directory)


def test_members_of_a_checkpoint(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=3)
        run.save("a_cp=b", "E1_U200_S800", {"x": torch.ones(3)}, info="best").wait()
        run.save("net", "latest", {"x": 1}, kind="optim").wait()
        inside = {"training_iteration": {"epoch": 7, "update": 8, "sample": 9}}
        run.save("net", "E1_U2_S3", inside).wait()
        # Neither a checkpoint by its name, nor a file.
        (run.directory / "checkpoints" / "notes.th").write_bytes(b"")
        (run.directory / "checkpoints" / "net_cp=U9_model.th").mkdir()
    model, optim, noether = noether_writer.checkpoints(run.directory)
    assert model == noether_writer.Checkpoint(
        path=run.directory / "checkpoints" / "a_cp=b_best_cp=E1_U200_S800_model.th",
        name="a_cp=b",
        kind="model",
        info="best",
        tag="E1_U200_S800",
        update=200,
        epoch=1,
        sample=800,
        nbytes=model.path.stat().st_size,
        durable_at=model.path.stat().st_mtime_ns / 1e9,
    )
    assert (optim.name, optim.kind, optim.info, optim.tag) == ("net", "optim", None, "latest")
    # A tag that is no progress: the last update in the log.
    assert (optim.update, optim.epoch, optim.sample) == (3, None, None)
    # What the file holds counts more than its tag.
    assert (noether.update, noether.epoch, noether.sample) == (8, 7, 9)


def test_paths_are_absolute_and_need_no_daemon(
    tmp_path: Path, daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    daemon.stop()
    monkeypatch.chdir(tmp_path)
    last = noether_writer.latest("r")
    monkeypatch.chdir("/")
    assert last is not None and torch.load(last.path) == {"update": 2}
    best = noether_writer.best(tmp_path / "r", "loss")
    assert best is not None and best.update == 2


def test_a_run_without_checkpoints_lists_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "missing"):
        assert noether_writer.checkpoints(directory) == []
        assert noether_writer.latest(directory) is None
        assert noether_writer.best(directory, "loss") is None


def test_a_directory_without_a_run_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    saved(tmp_path, 1, stage_name="train")
    for wrong in (tmp_path, tmp_path / "r"):
        with pytest.raises(UnknownRun, match=r"not the directory of a run.*<stage_name>"):
            noether_writer.latest(wrong)
    with pytest.raises(UnknownRun, match="train below it"):
        noether_writer.checkpoints(tmp_path / "r")


def test_a_damaged_file_is_left_out_aloud(
    daemon: RunningDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(tmp_path, 1, 2, 3)
    newest = run / "checkpoints" / "net_cp=U3_model.th"
    whole = newest.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole.replace(b"update", b"updatf", 1)):
        newest.write_bytes(broken)
        caplog.clear()
        last = noether_writer.latest(run)
        assert last is not None and last.tag == "U2"
        assert "net_cp=U3_model.th is damaged" in caplog.text
        unverified = noether_writer.latest(run, verify=False)
        assert unverified is not None and unverified.path == newest
        # The log is cut to what can be loaded.
        with noether_writer.open_run(tmp_path, "r", resume="auto") as resumed:
            assert resumed.resumed_at == 2


def test_the_newest_was_written_last(daemon: RunningDaemon, tmp_path: Path) -> None:
    """A run that was set back saves a lower update last: that is where it is."""
    saved(tmp_path, 1, 2, 3)
    with noether_writer.open_run(tmp_path, "r", resume_at=1) as run:
        run.log({"loss": 0.5}, update=2)
        run.save("other", "U2", {"x": 1}).wait()
    last = noether_writer.latest(run.directory)
    assert last is not None and (last.name, last.update) == ("other", 2)


def test_among_copied_checkpoints_the_highest_update_is_the_newest(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = saved(tmp_path, 8, 9, 10)
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for age, tag in enumerate(("U10", "U8", "U9")):
        file = copy / "checkpoints" / f"net_cp={tag}_model.th"
        shutil.copyfile(run / "checkpoints" / file.name, file)
        os.utime(file, (age, age))
    assert [each.update for each in noether_writer.checkpoints(copy)] == [8, 9, 10]


def test_a_model_without_its_optimizer_is_not_resumed_from(daemon: RunningDaemon, tmp_path: Path) -> None:
    """A crash may come between the two files of a save."""
    with noether_writer.open_run(tmp_path, "r") as run:
        # A model that is never saved again holds nothing up.
        run.save("first", "U0", {"update": 0}).wait()
        for update in range(1, 5):
            run.log({"loss": 1.0}, update=update)
            run.save("net", f"U{update}", {"update": update}).wait()
            if update < 4:
                run.save("net", f"U{update}", {"update": update}, kind="optim").wait()
    with noether_writer.open_run(tmp_path, "r", resume="auto") as run:
        assert run.resumed_at == 3
        assert run.values("loss").updates == [1, 2, 3]
        for kind in ("model", "optim"):
            found = noether_writer.latest(run.directory, kind=kind, update=run.resumed_at)  # type: ignore[arg-type]
            assert found is not None and torch.load(found.path) == {"update": 3}


def test_infos_are_asked_for(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.save("net", "U1", {}).wait()
        run.save("net", "U2", {}, info="ema").wait()
    for info, tag in ((None, "U1"), ("ema", "U2")):
        found = noether_writer.latest(run.directory, "net", info=info)
        assert found is not None and found.tag == tag
    assert noether_writer.latest(run.directory, "net", info="swa") is None
    (run.directory / "checkpoints" / "net_cp=U1_model.th").unlink()
    found = noether_writer.latest(run.directory, "net")
    assert found is not None and found.info == "ema"


@pytest.mark.parametrize("is_alive", [True, False])
def test_the_best_value_of_a_key(is_alive: bool, daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for update, value in enumerate([5.0, 2.0, float("nan"), 3.0, 2.0, 9.0], 1):
        run.log({"loss": value}, update=update)
        run.save("net", f"U{update}", {"update": update})
    # Saved after the last value of the key: that value was the one of update 6.
    run.log({"other": 1.0}, update=7)
    run.save("net", "U7", {})
    run.wait()
    run.flush()
    if not is_alive:
        run.finish()
        run.close()
    found = [noether_writer.best(run.directory, "loss", mode) for mode in ("min", "max")]  # type: ignore[arg-type]
    assert [each and each.update for each in found] == [2, 6]
    with pytest.raises(KeyError, match="no key 'val'; it has 'loss', 'other'"):
        noether_writer.best(run.directory, "val")
    with pytest.raises(ValueError, match="min or max"):
        noether_writer.best(run.directory, "loss", "lowest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model, optim, trainer or sharded"):
        noether_writer.latest(run.directory, kind="optimizer")  # type: ignore[arg-type]
    # The best one is damaged: the next best.
    (run.directory / "checkpoints" / "net_cp=U2_model.th").write_bytes(b"no")
    second = noether_writer.best(run.directory, "loss")
    assert second is not None and second.update == 5
    run.close()


def test_an_evaluation_counts_for_the_next_checkpoint(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        for update in range(1, 21):
            run.log({"val": 1.0 if update == 12 else 2.0} if update % 4 == 0 else {"loss": 1.0}, update=update)
            if update % 5 == 0:
                run.save("net", f"U{update}", {}).wait()
                # The same state under a second name has the same value.
                run.save("net", "latest", {}).wait()
    best = noether_writer.best(run.directory, "val")
    assert best is not None and best.tag == "U15"


def test_nothing_in_a_file_is_executed(daemon: RunningDaemon, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    run = saved(tmp_path, 1)
    with zipfile.ZipFile(run / "checkpoints" / "net_cp=U2_model.th", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"training_iteration": {"update": 5}, "x": Runs()}))
    assert [each.update for each in noether_writer.checkpoints(run)] == [1, 5]
    assert not (tmp_path / "executed").exists()


def test_resume_waits_for_what_was_accepted(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=slow", monkeypatch)
    script = (
        "import os, sys, noether_writer as w; r = w.open_run(sys.argv[1], 'r'); r.log({'loss': 1.0}, update=7)\n"
        "t = r.save('net', 'latest', {'update': 7})\nwhile not t.accepted: pass\n"
        "assert not t.durable; os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -signal.SIGKILL
    with noether_writer.open_run(tmp_path, "r", resume="auto") as run:
        assert run.resumed_at == 7
    assert daemon.stop() == 0


def test_what_storage_refuses_is_named(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=ENOSPC", monkeypatch)
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=1)
        ticket = run.save("net", "U1", {})
        until(lambda: ticket.stalled)
        _checkpoints.wait_for_run("r", 0.0)
        assert "resumed at an older checkpoint" in caplog.text and "No space left" in caplog.text
        caplog.clear()
        # A run that the daemon does not know has nothing on its way.
        _checkpoints.wait_for_run("other", 5.0)
        assert not caplog.records
        daemon.process.kill()
        daemon.process.wait()
        # Neither has a daemon that is not there.
        _checkpoints.wait_for_run("r", 5.0)
        daemon = RunningDaemon(daemon.socket)
        ticket.wait()
    assert daemon.stop() == 0


def test_resume_without_checkpoints_begins_anew(daemon: RunningDaemon, tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with noether_writer.open_run(tmp_path, "r", resume="auto") as run:
            assert run.resumed_at is None
            run.log({"loss": loss}, update=1)
    assert (run.directory / "tracker" / "entries.1.th").exists()


def test_resume_without_an_update_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = saved(tmp_path, 5)
    copied = run / "checkpoints" / "net_cp=latest_model.th"
    shutil.copyfile(run / "checkpoints" / "net_cp=U5_model.th", copied)
    (run / "checkpoints" / "net_cp=U5_model.th").unlink()
    before = (run / "tracker" / "entries.th").read_bytes()
    with pytest.raises(ValueError, match=r"none of the checkpoints.*resume_at="):
        noether_writer.open_run(tmp_path, "r", resume="auto")
    assert (run / "tracker" / "entries.th").read_bytes() == before


def test_wrong_words_for_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"auto" or None'):
        noether_writer.open_run(tmp_path, "r", resume="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        noether_writer.open_run(tmp_path, "r", resume="auto", resume_at=3)
    assert not (tmp_path / "r").exists()


def test_a_living_run_is_still_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    script = (
        "import sys, noether_writer as w; r = w.open_run(sys.argv[1], 'r'); print('open', flush=True); sys.stdin.read()"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "open\n"
    with pytest.raises(RunInUse):
        noether_writer.open_run(tmp_path, "r", resume="auto")
    trainer.communicate()


# The command line tool, which follows the same rules


def path_of(found: noether_writer.Checkpoint | None) -> str:
    return "" if found is None else f"{found.path}\n"


def test_the_command_line_names_the_same_files(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        for update, loss in enumerate([3.0, 1.0, float("nan"), 2.0], 1):
            run.log({"loss": loss, "word": "x"}, update=update)
            run.save("net", f"U{update}", {"update": update}).wait()
            run.save("net", f"U{update}", {"update": update}, kind="optim").wait()
        run.save("net", "latest", {"training_iteration": {"epoch": 1, "update": 9, "sample": 5}}, info="ema").wait()
    run_directory = str(run.directory)
    for arguments, named in (
        ([], {}),
        (["--kind", "optim"], {"kind": "optim"}),
        (["--kind", "any", "--update", "2"], {"kind": None, "update": 2}),
        (["--name", "net", "--info", "ema"], {"name": "net", "info": "ema"}),
    ):
        shown = cli("latest", run_directory, *arguments)
        assert (shown.returncode, shown.stdout) == (0, path_of(noether_writer.latest(run_directory, **named)))
    for arguments, mode in (([], "min"), (["--max"], "max")):
        shown = cli("best", run_directory, "loss", *arguments)
        assert shown.stdout == path_of(noether_writer.best(run_directory, "loss", mode))  # type: ignore[arg-type]
    told = json.loads(cli("latest", run_directory, "--info", "ema", "--json").stdout)
    assert {key: told[key] for key in ("name", "info", "tag", "update", "epoch", "sample")} == {
        "name": "net",
        "info": "ema",
        "tag": "latest",
        "update": 9,
        "epoch": 1,
        "sample": 5,
    }
    listed = json.loads(cli("checkpoints", run_directory, "--json").stdout)
    assert {row["path"] for row in listed} == {str(each.path) for each in noether_writer.checkpoints(run_directory)}


def test_the_command_line_says_what_is_missing(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    newest = run / "checkpoints" / "net_cp=U2_model.th"
    newest.write_bytes(newest.read_bytes()[:-5])
    shown = cli("latest", str(run))
    assert shown.stdout == path_of(noether_writer.latest(run)) and "net_cp=U2_model.th is damaged" in shown.stderr
    assert cli("latest", str(run), "--no-verify").stdout == f"{newest}\n"
    for arguments, words in (
        (["latest", str(run), "--kind", "trainer"], "no such checkpoint"),
        (["best", str(run), "val"], "no key val; it has loss"),
    ):
        shown = cli(*arguments)
        assert (shown.returncode, shown.stdout) == (4, "") and words in shown.stderr
    assert cli("latest", str(run), "--kind", "modell").returncode == 64
