# SPDX-License-Identifier: Apache-2.0
"""`rm` and `prune`: what goes, and all that stays."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, logging_trainer

CLI = str(Path(DAEMON).parent / "noether-writer")


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CLI, *map(str, arguments)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


def asked(answer: str, *arguments: str | Path) -> tuple[int, str]:
    """With a terminal to answer on."""
    leader, terminal = pty.openpty()
    try:
        os.write(leader, answer.encode())
        result = subprocess.run([CLI, *map(str, arguments)], stdin=terminal, capture_output=True, text=True, timeout=60)
    finally:
        os.close(leader)
        os.close(terminal)
    return result.returncode, result.stdout + result.stderr


def record(root: Path, name: str, *tags: str, **more: Any) -> Path:
    """An ended run with models and optimizers of these tags; its loss is better in the middle."""
    with noether_writer.open_run(root, name, **more) as run:
        for place, tag in enumerate(tags):
            run.log({"loss": abs(place - len(tags) // 2) + 0.5}, update=10 * (place + 1))
            run.save("net", tag, {"w": torch.ones(10)})
            run.save("net", tag, {"w": torch.ones(20)}, "optim").wait(30)
    return run.directory


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def models(*tags: str) -> set[str]:
    return {f"net_cp={tag}_{kind}.th" for tag in tags for kind in ("model", "optim")}


# rm


def test_a_run_goes_with_all_that_is_in_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    run, other = record(tmp_path, "a", "U1", "U2"), record(tmp_path, "b", "U1")
    (run / "notes.txt").write_text("of the user")
    result = cli("rm", "a", "--yes")
    assert result.returncode == 0 and result.stdout == f"removed {run}\n" and "7 files" in result.stderr
    assert "with what is no part of the run: notes.txt" in result.stderr
    assert not run.exists() and other.exists()
    # It is not known by its id any more, and may be opened anew.
    assert daemon.stop() == 0
    gone = cli("show", "a")
    assert gone.returncode == 4 and "not the directory of a run any more" in gone.stderr


def test_it_asks(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2", "U3")
    for command in (["rm", run], ["prune", run, "--keep-last", "1"]):
        # Nobody is there, or says no, or nothing.
        nobody = cli(*command)
        assert nobody.returncode == 1 and "--yes" in nobody.stderr and nobody.stdout == ""
        for answer in ("n\n", "\n", "\x04", "yes please\n"):
            code, words = asked(answer, *command)
            assert code == 1 and "[y/N]" in words and "nothing was removed" in words
    assert names(run) == models("U1", "U2", "U3")
    code, words = asked("y\n", "prune", run, "--keep-last", "1")
    assert code == 0 and "net_cp=U1_model.th" in words and names(run) == models("U3")
    code, words = asked("YES\n", "rm", run)
    assert code == 0 and str(run) in words and not run.exists()


def test_what_is_live_stays(daemon: RunningDaemon, tmp_path: Path) -> None:
    ended = record(tmp_path, "ended", "U1")
    run = noether_writer.open_run(tmp_path, "live", stage_name="train")
    ticket = run.save("net", "U1", {"w": torch.ones(10)})
    ticket.wait(30)
    [file] = ticket.paths
    for target in (str(run.directory), "live", str(tmp_path / "live/../live/train"), str(file)):
        refused = cli("rm", ended, target, "--yes")
        assert refused.returncode == 1 and "live" in refused.stderr, target
    # By the lock alone: another daemon, or none that can be asked.
    alone = cli("rm", run.directory, "--yes", "--socket", "/nonexistent/socket")
    assert alone.returncode == 1 and "is a live run" in alone.stderr
    # A run around a live one, as a stage has it.
    (tmp_path / "live/tracker").mkdir()
    assert cli("rm", tmp_path / "live", "--yes").returncode == 1
    assert Path(file).exists() and ended.exists() and (tmp_path / "live/tracker").exists()
    run.close()
    daemon.stop()
    assert cli("rm", tmp_path / "live", "--yes").returncode == 0 and not (tmp_path / "live").exists()


def test_a_trainer_waits_for_what_is_being_removed(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The run is locked while a person is asked."""
    run = record(tmp_path, "a", "U1")
    leader, terminal = pty.openpty()
    with subprocess.Popen(
        [CLI, "rm", run], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as removing:
        assert removing.stderr is not None
        removing.stderr.readline()
        with pytest.raises(noether_writer.errors.RunInUse):
            noether_writer.open_run(tmp_path, "a")
        os.write(leader, b"y\n")
        assert removing.wait(30) == 0
    os.close(leader)
    os.close(terminal)
    assert not run.exists()
    record(tmp_path, "a", "U2")
    assert names(run) == models("U2")


def test_links_are_not_followed(daemon: RunningDaemon, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "checkpoints").mkdir(parents=True)
    (precious / "checkpoints/net_cp=U1_model.th").write_text("mine")
    (precious / "tracker").mkdir()
    run = record(tmp_path, "a", "U1")
    (run / "link").symlink_to(precious)
    (run / "checkpoints/net_cp=U0_model.th").symlink_to(precious / "checkpoints/net_cp=U1_model.th")
    # The link itself is no checkpoint, and none of its names leads anywhere.
    assert cli("rm", run / "checkpoints/net_cp=U0_model.th", "--yes").returncode == 1
    assert cli("prune", run, "--keep-last", "1", "--yes").returncode == 0
    (tmp_path / "alias").symlink_to(precious)
    named = cli("rm", tmp_path / "alias", "--yes")
    assert named.returncode == 1 and "symbolic link" in named.stderr
    (tmp_path / "odd/tracker").mkdir(parents=True)
    (tmp_path / "odd/checkpoints").symlink_to(precious / "checkpoints")
    for command in (["rm", "odd/checkpoints/net_cp=U1_model.th"], ["prune", "odd", "--keep-last", "1"]):
        refused = subprocess.run([CLI, *command, "--yes"], cwd=tmp_path, capture_output=True, text=True)
        assert refused.returncode == 1 and "symbolic link" in refused.stderr
    assert cli("rm", run, tmp_path / "odd", "--yes").returncode == 0
    assert not run.exists() and not (tmp_path / "odd").exists()
    assert (precious / "checkpoints/net_cp=U1_model.th").read_text() == "mine" and (precious / "tracker").exists()


def test_a_checkpoint_goes_alone_or_with_its_tag(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2", "U3")
    file = run / "checkpoints/net_cp=U1_model.th"
    one = cli("rm", file, "--yes")
    assert one.returncode == 0 and "1 other file of its tag stays (--companions)" in one.stderr
    assert names(run) == models("U2", "U3") | {"net_cp=U1_optim.th"}
    both = cli("rm", run / "checkpoints/net_cp=U2_optim.th", "--companions", "--yes", "--json")
    assert both.returncode == 0 and names(run) == models("U3") | {"net_cp=U1_optim.th"}
    [removed] = json.loads(both.stdout)
    assert removed["files"] == 2 and removed["path"].endswith("net_cp=U2_optim.th")
    # Several of one run, one of them twice.
    rest = [run / "checkpoints" / name for name in sorted(names(run))]
    assert cli("rm", *rest, rest[0], "--yes").returncode == 0 and names(run) == set()
    assert cli("show", run).returncode == 0


def test_what_is_no_checkpoint(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1")
    (run / "checkpoints/notes.txt").write_text("mine")
    missing = cli("rm", run / "checkpoints/net_cp=U9_model.th", "--yes")
    assert missing.returncode == 4 and "there is no file" in missing.stderr
    assert cli("rm", run / "checkpoints/notes.txt", "--yes").returncode == 1
    for no_run in (run / "tracker/entries.th", run / "checkpoints", tmp_path, tmp_path / "nothing", "/"):
        assert cli("rm", no_run, "--yes").returncode == 4, no_run
    # A project with checkpoints of its own is no run.
    (tmp_path / "project/checkpoints").mkdir(parents=True)
    (tmp_path / "project/train.py").write_text("mine")
    project = cli("rm", tmp_path / "project", "--yes")
    assert project.returncode == 1 and "no directory tracker" in project.stderr
    assert (tmp_path / "project/train.py").exists()
    # Nothing goes if one of them is refused.
    assert cli("rm", run, tmp_path / "nothing", "--yes").returncode == 4
    assert names(run) == models("U1") | {"notes.txt"} and (run / "tracker/entries.th").exists()


def test_a_sharded_checkpoint_is_a_directory(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1")
    (run / "checkpoints/sharded/deep").mkdir(parents=True)
    (run / "checkpoints/sharded/deep/__0_0.distcp").write_bytes(b"x" * 1000)
    result = cli("rm", run / "checkpoints/sharded", "--yes")
    assert result.returncode == 0 and "1 file, 1000 B" in result.stderr and names(run) == models("U1")


def test_a_log_that_is_only_in_a_journal_is_said(daemon: RunningDaemon, tmp_path: Path) -> None:
    with logging_trainer(tmp_path):
        daemon.process.kill()
        daemon.process.wait()
    result = cli("rm", tmp_path / "r", "--yes")
    assert result.returncode == 0 and "its log is in a journal" in result.stderr
    # The next daemon finds nothing, and says nothing.
    daemon.process = RunningDaemon(daemon.socket).process
    assert daemon.stop() == 0 and not (tmp_path / "r").exists()


# prune


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-last", "2"], ("U4", "U5")),
        (["--keep-last", "1", "--keep-every", "2"], ("U2", "U4", "U5")),
        (["--keep-last", "9"], ("U1", "U2", "U3", "U4", "U5")),
        # The loss is lowest at the third.
        (["--keep-best", "loss"], ("U3", "U5")),
        (["--keep-best", "loss", "--best", "2"], ("U2", "U3", "U5")),
        (["--keep-best", "loss", "--mode", "max", "--keep-last", "2"], ("U1", "U4", "U5")),
    ],
    ids=str,
)
def test_what_stays(daemon: RunningDaemon, tmp_path: Path, options: list[str], kept: tuple[str, ...]) -> None:
    tags = ("U1", "U2", "U3", "U4", "U5")
    run = record(tmp_path, "a", *tags)
    shutil.copy(run / "checkpoints/net_cp=U1_model.th", run / "checkpoints/net_cp=latest_model.th")
    everything = names(run)
    stays = models(*kept) | {"net_cp=latest_model.th"}
    dry = cli("prune", run, *options, "--dry-run", "--json")
    [plan] = json.loads(dry.stdout)
    assert dry.returncode == 0 and names(run) == everything
    assert set(plan["removed"]) == everything - stays and plan["kept"] == len(stays)
    assert plan["bytes"] == sum((run / "checkpoints" / name).stat().st_size for name in everything - stays)
    done = cli("prune", run, *options, "--yes", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == [plan] and names(run) == stays
    again = cli("prune", run, *options, "--yes")
    assert again.stdout == f"0 checkpoints, 0 B, were removed; {len(stays)} stay\n"


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_as_a_run_that_says_it_itself(
    daemon: RunningDaemon, tmp_path: Path, mode: Literal["min", "max"], count: int
) -> None:
    """One rule: what keep_last and keep_best of open_run leave is what prune leaves."""
    tags = [f"E{u // 4}_U{u}_S{3 * u}" for u in range(10, 90, 10)] + ["step-7", "step-0009", "final", "loss0.5-ep3"]
    for name, more in (("own", {"keep_last": 2, "keep_every": 30, "keep_best": ("loss", mode, count)}), ("all", {})):
        record(tmp_path, name, *tags, **more)
    command = ["--keep-last", "2", "--keep-every", "30", "--keep-best", "loss", "--mode", mode, "--best", str(count)]
    assert len(names(tmp_path / "all")) == 2 * len(tags)
    assert cli("prune", "all", *command, "--yes").returncode == 0
    assert cli("prune", "own", *command, "--yes").returncode == 0
    assert names(tmp_path / "all") == names(tmp_path / "own")


def test_a_sweep_with_live_and_other_runs(daemon: RunningDaemon, tmp_path: Path) -> None:
    ended = [record(tmp_path, f"r{number}", "U1", "U2") for number in range(3)]
    (tmp_path / "bare/tracker").mkdir(parents=True)
    live = noether_writer.open_run(tmp_path, "live")
    for tag in ("U1", "U2"):
        live.save("net", tag, {"w": torch.ones(3)}).wait(30)
    result = cli("prune", tmp_path, "--keep-last", "1", "--yes")
    assert result.returncode == 0 and "live is a live run" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("6 checkpoints, ")
    assert all(names(run) == models("U2") for run in ended)
    assert names(live.directory) == {"net_cp=U1_model.th", "net_cp=U2_model.th"}
    # By itself, it is an error.
    assert cli("prune", "live", "--keep-last", "1", "--yes").returncode == 1
    live.close()


def test_what_comes_while_a_person_is_asked_is_not_removed_unseen(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2")
    leader, terminal = pty.openpty()
    command = [CLI, "prune", run, "--keep-last", "1"]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as removing:
        assert removing.stderr is not None
        shown = removing.stderr.readline()
        assert "net_cp=U1_model.th" in shown and "U2" not in shown
        shutil.copy(run / "checkpoints/net_cp=U2_model.th", run / "checkpoints/net_cp=U3_model.th")
        os.write(leader, b"y\n")
        words = removing.stderr.read()
        assert removing.wait(30) == 1 and "changed meanwhile" in words
    os.close(leader)
    os.close(terminal)
    assert names(run) == models("U1", "U2") | {"net_cp=U3_model.th"}


def test_the_newest_must_be_whole(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2", "U3")
    file = run / "checkpoints/net_cp=U3_model.th"
    data = bytearray(file.read_bytes())
    data[data.index(b"\0\0\x80\x3f" * 10)] ^= 1
    file.write_bytes(data)
    result = cli("prune", run, "--keep-last", "1", "--yes", "--json")
    assert result.returncode == 1 and "net_cp=U3_model.th does not verify" in result.stderr
    # Another kind has its own newest one.
    assert names(run) == models("U3") | {"net_cp=U1_model.th", "net_cp=U2_model.th"}
    [plan] = json.loads(result.stdout)
    assert sorted(plan["removed"]) == ["net_cp=U1_optim.th", "net_cp=U2_optim.th"] and plan["kept"] == 4
    assert "does not verify" in plan["problem"]


def test_a_key_that_is_not_there_removes_nothing(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2")
    result = cli("prune", run, "--keep-best", "los", "--yes")
    assert result.returncode == 1 and "close to it: loss" in result.stderr and names(run) == models("U1", "U2")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "r/checkpoints").mkdir(parents=True)
    for options in ([], ["--keep-last", "0"], ["--keep-last", "-1"], ["--keep-best", "loss", "--best", "0"]):
        assert cli("prune", tmp_path / "r", *options).returncode == 64
    assert cli("prune", tmp_path / "nothing", "--keep-last", "1").returncode == 4
    (tmp_path / "empty").mkdir()
    assert cli("prune", tmp_path / "empty", "--keep-last", "1").returncode == 4
    assert cli("rm").returncode == 64


def test_odd_names_and_outputs(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1")
    odd = run / "checkpoints/net\x1b[31m_cp=U1_model.th"
    shutil.copy(run / "checkpoints/net_cp=U1_model.th", odd)
    shutil.copy(odd, str(odd).replace("U1", "U2"))
    shown = cli("prune", run, "--keep-last", "1", "--dry-run")
    assert shown.returncode == 0 and "\x1b" not in shown.stdout + shown.stderr and "would remove" in shown.stdout
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [CLI, "prune", run, "--keep-last", "1", "--dry-run"], stdout=full, stderr=subprocess.PIPE, text=True
        )
        assert result.returncode == 1 and "No space left" in result.stderr
    assert cli("prune", run, "--keep-last", "1", "--yes").returncode == 0
    assert names(run) == models("U1") | {"net\x1b[31m_cp=U2_model.th"}


def test_thousands_of_checkpoints(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1")
    for number in range(2, 3000):
        os.link(run / "checkpoints/net_cp=U1_model.th", run / f"checkpoints/net_cp=U{number}_model.th")
    assert cli("prune", run, "--keep-last", "3", "--keep-best", "loss", "--yes").returncode == 0
    left = {f"net_cp=U{number}_model.th" for number in (2997, 2998, 2999)}
    assert left <= names(run) <= left | models("U1")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_what_may_not_be_removed(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = record(tmp_path, "a", "U1", "U2")
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055)
        if path.parent.parent == path.parent:
            break
    for command in (["rm", run], ["prune", run, "--keep-last", "1"], ["rm", run / "checkpoints/net_cp=U1_model.th"]):
        other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CLI, *map(str, command), "--yes"]
        result = subprocess.run(other, capture_output=True, text=True, env={**os.environ, "HOME": "/"})
        assert result.returncode == 1 and names(run) == models("U1", "U2"), result
