# SPDX-License-Identifier: Apache-2.0
"""A trainer sees another file system than its daemon (a container, PrivateTmp, Slurm's job_container): its files are
where it looks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import until
from hostile import SESSION, Raw
from noether_writer import frames

HAS_NAMESPACES = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0
pytestmark = pytest.mark.skipif(not HAS_NAMESPACES, reason="mount namespaces need root here")

TRAINER = """
import os, sys, torch, noether_writer
output = sys.argv[1]
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
run = noether_writer.open_run(output, "r")
run.log({"loss": 1.0}, update=1)
run.save("net", "first", {"w": torch.ones(3)}).wait(30)
run.flush(30)
say("saved")
sys.stdin.readline()
run.log({"loss": 2.0}, update=2)
run.save("net", "second", {"w": torch.ones(3)}).wait(30)
run.finish(30)
run.close()
say(*sorted(str(file.relative_to(output)) for file in __import__("pathlib").Path(output).rglob("*") if file.is_file()))
say(torch.load(output + "/r/tracker/entries.th")["loss"])
"""


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """With a file system of its own at the output root."""

    def start(output: Path, code: str = TRAINER) -> subprocess.Popen[str]:
        output.mkdir(exist_ok=True)
        command = f'mount -t tmpfs none {output} && exec "$0" -c "$1" {output}'
        return subprocess.Popen(
            ["unshare", "-m", "sh", "-c", command, sys.executable, code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def lines(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    return output.splitlines()


FILES = "r/checkpoints/net_cp=first_model.th r/checkpoints/net_cp=second_model.th r/tracker/entries.th"


@pytest.mark.parametrize("is_killed", [False, True], ids=["daemon-lives", "daemon-is-killed"])
def test_files_are_where_the_trainer_looks(
    is_killed: bool, daemon: RunningDaemon, trainer: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = trainer(tmp_path / "out")
    assert process.stdout is not None and process.stdout.readline() == "saved\n"
    if is_killed:
        daemon.process.kill()
        daemon.process.wait()
        successor = RunningDaemon(daemon.socket)
    files, entries = lines(process)
    assert set(FILES.split()) <= set(files.split()) and not [name for name in files.split() if "journal" in name]
    assert entries == "{1: 1.0, 2: 2.0}"
    # Nothing of it is where the daemon would have looked.
    assert list((tmp_path / "out").iterdir()) == []
    if is_killed:
        assert successor.stop() == 0


def test_two_trainers_with_one_path_are_two_runs(
    daemon: RunningDaemon, trainer: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    both = [trainer(tmp_path / "out") for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
    with noether_writer.open_run(tmp_path / "out", "r") as run:
        run.log({"loss": 7.0}, update=1)
    for process in both:
        _, entries = lines(process)
        assert entries == "{1: 1.0, 2: 2.0}"
    assert torch.load(tmp_path / "out/r/tracker/entries.th")["loss"] == {1: 7.0}


def test_a_directory_that_only_the_trainer_may_write_to(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a unit with ProtectSystem=strict sees it."""
    path, output = str(short_directory / "s"), tmp_path / "out"
    output.mkdir()
    command = f'mount --bind {output} {output} && mount -o remount,ro,bind {output} && exec "$0" --socket {path}'
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", command, DAEMON])
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    until(lambda: Path(path).exists())
    with noether_writer.open_run(output, "r") as run:
        run.log({"loss": 1.0}, update=1)
        run.save("net", "t", {"w": torch.ones(3)}).wait(30)
    assert (output / "r/checkpoints/net_cp=t_model.th").exists()
    assert torch.load(output / "r/tracker/entries.th")["loss"] == {1: 1.0}
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


ANY_FILE = """
import os, sys, torch, noether_writer
path = sys.argv[1] + "/x.pt"
noether_writer.save({"step": 1}, sys.argv[1] + "/gone.pt")
noether_writer.remove(sys.argv[1] + "/gone.pt")
noether_writer.save({"step": 2}, path)
print(noether_writer.load(path)["step"], os.listdir(sys.argv[1]), flush=True)
"""


def test_a_file_without_a_run_is_where_the_trainer_looks(
    daemon: RunningDaemon, trainer: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    for _ in range(2):
        assert lines(trainer(tmp_path / "out", ANY_FILE)) == ["2 ['x.pt']"]
    assert list((tmp_path / "out").iterdir()) == []
    noether_writer.save({"step": 7}, tmp_path / "out/x.pt").wait(60)
    assert torch.load(tmp_path / "out/x.pt") == {"step": 7}


def test_a_descriptor_that_is_no_directory_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = Raw(daemon.socket)
    message = json.dumps({"output_root": str(tmp_path), "run_id": "r", "session": SESSION}).encode()
    with open(tmp_path / "file", "w") as file:
        trainer.send(frames.pack(frames.OPEN_RUN, message, 1, fds=1), [file.fileno()])
    error = trainer.receive_type(frames.ERROR).json()
    assert error["code"] == "bad-path" and "no directory" in error["message"]
    trainer.close()
