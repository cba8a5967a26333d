# SPDX-License-Identifier: Apache-2.0
"""`noether-writer stop` and `restart`, and an update that finds the daemon of the release before it. Trainers that live
meanwhile lose nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import daemon_of, until
from hostile import Raw
from noether_writer import daemon_launcher, daemon_replacement, frames

CLI = str(Path(DAEMON).with_name("noether-writer"))
SWIFT_TRAINER = str(Path(DAEMON).with_name("SwiftTrainer"))


def cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=120, env=os.environ | variables)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def path(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a socket; whoever serves it at the end is ended."""
    path = str(short_directory / "d/socket")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    monkeypatch.setattr(daemon_replacement, "_times_left", daemon_replacement.MOST_TIMES)
    yield path
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(daemon_of(path), signal.SIGTERM)
        until(lambda: not Path(path).exists())


LIVE = """
import logging, os, sys, time, noether_writer, torch
logging.basicConfig(format="%(levelname)s %(message)s")
noether_writer.__version__ = sys.argv[3]
run = noether_writer.open_run(sys.argv[1], "live")
update, tickets = 0, []
while not os.path.exists(sys.argv[2]):
    update += 1
    run.log({"loss": float(update)}, update=update)
    if update % 20 == 0:
        tickets.append(run.save("net", f"U{update}", {"update": update, "w": torch.full((50_000,), float(update))}))
        tickets.append(run.save("net", "latest", {"update": update}))
    if update == 20:
        print("trains", flush=True)
    time.sleep(0.002)
run.finish(60)
for ticket in tickets:
    ticket.wait(60)
run.close()
print(update, flush=True)
"""


# What the programs of this build are.
THIS = noether_writer.__version__
OLDER, NEWER = "0.0.9", "9.9.9"


class LiveTrainer:
    """Logs and saves all the time, until `end`."""

    def __init__(self, folder: Path, version: str = THIS, program: str = DAEMON) -> None:
        self.output, self.end_file = folder / "live_output", folder / "end"
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIVE, str(self.output), str(self.end_file), version],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOETHER_WRITER_WHEN_AWAY": "raise", "NOETHER_WRITER_DAEMON": program},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "trains\n", self.process.communicate()[1]

    def end(self) -> str:
        """Checks that nothing is missing. What it has said."""
        self.end_file.touch()
        output, said = self.process.communicate(timeout=120)
        assert self.process.returncode == 0 and "ERROR" not in said, said
        last = int(output)
        run = self.output / "live"
        assert torch.load(run / "tracker/entries.th")["loss"] == {u: float(u) for u in range(1, last + 1)}
        for update in range(20, last + 1, 20):
            loaded = torch.load(run / f"checkpoints/net_cp=U{update}_model.th")
            assert loaded["update"] == update and bool((loaded["w"] == update).all())
        assert torch.load(run / "checkpoints/net_cp=latest_model.th")["update"] == last // 20 * 20
        assert not list(run.rglob(".noether-writer-*")) and not list(run.rglob("entries.journal"))
        return said

    def connected(self, pid: int) -> bool:
        report = json.loads(cli("status", "--json").stdout or "{}")
        return report.get("pid") == pid and any(run["state"] == "running" for run in report["runs"])


# What ends it


def accepted(folder: Path) -> tuple[noether_writer.Run, noether_writer.Ticket]:
    run = noether_writer.open_run(folder, "r")
    ticket = run.save("net", "t", {"w": torch.ones(3)})
    until(lambda: ticket.accepted)
    return run, ticket


def test_stop_returns_when_all_is_durable_and_the_process_gone(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(path, "checkpoint.created=slow", monkeypatch)
    run, ticket = accepted(tmp_path)
    assert not ticket.done
    result = cli("stop")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"process {daemon.process.pid} has left; everything that it had accepted is durable\n"
    assert has_ended(daemon.process.pid) and daemon.process.wait() == 0
    assert daemon.process.stderr is not None
    said = daemon.process.stderr.read()
    assert "leaving: process" in said and "noether-writer stop" in said
    assert torch.load(tmp_path / "r/checkpoints/net_cp=t_model.th")["w"].tolist() == [1, 1, 1]
    run.close()


def test_stop_as_json(path: str) -> None:
    daemon = RunningDaemon(path)
    answer = json.loads(cli("stop", "--json").stdout)
    assert answer == {
        "left": daemon.process.pid, "gone": True, "done": True, "pending": 0, "failed": [], "stalled": []
    }  # fmt: skip
    assert daemon.process.wait() == 0


def test_stop_where_no_daemon_is(path: str) -> None:
    result = cli("stop")
    assert (result.returncode, result.stdout) == (3, "") and "no daemon listens" in result.stderr


def test_stop_waits_for_a_daemon_that_leaves_already(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(path, "checkpoint.created=slow", monkeypatch)
    run, _ = accepted(tmp_path)
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: not Path(path).exists())
    result = cli("stop")
    assert result.returncode == 0, result.stderr
    assert f"process {daemon.process.pid} has left" in result.stdout and has_ended(daemon.process.pid)
    assert daemon.process.wait() == 0
    run.close()


def test_stop_has_its_time_and_says_what_is_in_flight(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(path, "checkpoint.created=hang", monkeypatch)
    run, _ = accepted(tmp_path)
    result = cli("stop", "--timeout", "0.3")
    assert result.returncode == 2
    assert f"process {daemon.process.pid} has not left yet: 1 checkpoint in flight" in result.stdout
    # None is started beside it.
    result = cli("restart", "--timeout", "0.3", "--json")
    assert result.returncode == 2, result.stderr
    answer = json.loads(result.stdout)
    assert answer["left"] == daemon.process.pid and not answer["gone"] and "started" not in answer
    daemon.process.kill()
    daemon.process.wait()
    run.wait(30)
    run.close()


def test_what_storage_did_not_take_is_an_error(
    path: str, tmp_path: Path, state_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_DRAIN_SECONDS", "1")
    daemon = faulty_daemon(path, "checkpoint.created=ENOSPC", monkeypatch)
    run, _ = accepted(tmp_path)
    result = cli("stop")
    assert result.returncode == 1, result.stdout
    assert "has left; within its drain_seconds storage did not take 1 checkpoint" in result.stdout
    assert "stalled" in result.stderr and "net_cp=t_model.th" in result.stderr
    assert daemon.process.wait() == 1
    run.wait(30)
    run.close()


@pytest.mark.parametrize("command", ["stop", "restart"])
def test_a_daemon_of_a_service_manager_is_left_to_it(
    command: str, path: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(short_directory / "nobody"))
    daemon = RunningDaemon(path)
    monkeypatch.delenv("NOTIFY_SOCKET")
    result = cli(command)
    assert (result.returncode, result.stdout) == (1, "")
    assert "a service manager keeps the daemon" in result.stderr
    client = Raw(path)
    assert "leave" not in client.welcome["capabilities"] and "service" in client.welcome
    client.send(frames.pack_json(frames.LEAVE, {}, 1))
    assert client.receive_type(frames.ERROR).json()["code"] == "unknown-type"
    assert cli("status").returncode == 0 and daemon.stop() == 0


def test_leave_on_the_wire(path: str, tmp_path: Path) -> None:
    """It is refused where there is a run; the answer comes at the very end, behind those of all runs."""
    daemon = RunningDaemon(path)
    trainer = Raw(path)
    assert "leave" in trainer.welcome["capabilities"] and "service" not in trainer.welcome
    trainer.open_run(tmp_path)
    trainer.send(frames.pack_json(frames.LEAVE, {}, 7))
    assert trainer.receive_type(frames.ERROR).json()["code"] == "already-open"
    asker = Raw(path)
    asker.send(frames.pack_json(frames.LEAVE, {"reason": "a test\n"}, 7) + frames.pack_json(frames.LEAVE, {}, 8))
    assert asker.receive_type(frames.ERROR).json()["code"] == "already-open"
    answer = asker.receive_type(frames.WAITED)
    assert answer.request == 7 and answer.json() == {"done": True, "pending": 0, "failed": [], "stalled": []}
    assert daemon.process.wait(30) == 0
    assert daemon.process.stderr is not None and r'"a test\n"' in daemon.process.stderr.read()


# What comes after it


def test_restart_under_a_trainer_that_logs_and_saves(path: str, tmp_path: Path) -> None:
    RunningDaemon(path)
    trainer = LiveTrainer(tmp_path)
    for _ in range(4):
        before = daemon_of(path)
        result = cli("restart")
        assert result.returncode == 0, result.stderr
        assert f"process {before} has left; everything that it had accepted is durable; process " in result.stdout
        after = daemon_of(path)
        assert f"process {after} serves\n" in result.stdout and after != before and has_ended(before)
        until(lambda pid=after: trainer.connected(pid))  # type: ignore[misc]
    trainer.end()


def test_stop_under_a_trainer_that_logs_and_saves(path: str, tmp_path: Path) -> None:
    """It starts the next daemon by itself."""
    RunningDaemon(path)
    trainer = LiveTrainer(tmp_path)
    before = daemon_of(path)
    assert cli("stop").returncode == 0 and has_ended(before)
    until(lambda: daemon_of(path) != before and trainer.connected(daemon_of(path)))
    trainer.end()


def test_restart_under_a_swift_trainer(path: str, tmp_path: Path) -> None:
    RunningDaemon(path)
    trainer = subprocess.Popen(
        [SWIFT_TRAINER, tmp_path, "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    for line in trainer.stdout:
        if int(line) % 500 == 0:
            assert cli("restart").returncode == 0
    _, error = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, error
    run = tmp_path / "long"
    assert torch.load(run / "tracker/entries.th")["loss"] == {u: 1 / u for u in range(1, 2001)}
    for update in range(100, 2001, 100):
        assert torch.load(run / f"checkpoints/net_cp=U{update}_model.th")["update"] == update
    assert not list(run.rglob(".noether-writer-*")) and not list(run.rglob("entries.journal"))


@pytest.mark.parametrize("named", [True, False], ids=["named", "beside"])
def test_restart_starts_one_where_none_is_and_it_inherits_nothing(
    named: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"MINE": "1", "PATH": "/usr/bin:/bin"}
    if not named:
        variables["NOETHER_WRITER_DAEMON"] = ""
    result = cli("restart", **variables)
    assert result.returncode == 0, result.stderr
    pid = daemon_of(path)
    assert result.stdout == f"no daemon was there; process {pid} serves\n"
    assert os.readlink(f"/proc/{pid}/exe") == str(Path(DAEMON).resolve())
    assert b"MINE=" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.getsid(pid) == pid


def test_restart_where_nothing_can_be_started(path: str) -> None:
    result = cli("restart", NOETHER_WRITER_DAEMON="/nonexistent")
    assert (result.returncode, result.stdout) == (3, "") and "NOETHER_WRITER_DAEMON" in result.stderr


# Updates


def program_of(version: str, folder: Path) -> str:
    """A copy of the daemon's program that says that it is another release."""
    assert len(version) == len(THIS) <= 7
    # A short literal of Swift is a number of 8 bytes.
    words, others = (text.encode().ljust(8, b"\0") for text in (THIS, version))
    data = Path(DAEMON).read_bytes()
    folder.mkdir(exist_ok=True)
    program = folder / f"noether-writerd-{version}"
    program.write_bytes(data.replace(words, others))
    program.chmod(0o755)
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    if said != version:
        pytest.skip(f"the compiler has put the version elsewhere: {said}")
    return str(program)


def start(program: str, path: str, monkeypatch: pytest.MonkeyPatch) -> RunningDaemon:
    with monkeypatch.context() as patch:
        patch.setattr("conftest.DAEMON", program)
        return RunningDaemon(path)


OPEN = """
import logging, sys, noether_writer
logging.basicConfig(format="%(levelname)s %(message)s")
for name in ("second", "third"):
    with noether_writer.open_run(sys.argv[1], name) as run:
        run.log({"loss": 1.0}, update=1)
"""


def open_run(client: str, output: Path) -> str:
    """In a process of its own; what that one says of versions."""
    command = [sys.executable, "-c", OPEN] if client == "Python" else [SWIFT_TRAINER]
    arguments = [str(output)] if client == "Python" else [str(output), "20"]
    result = subprocess.run(command + arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return "".join(line for line in result.stderr.splitlines(True) if "version" in line)


def serving() -> tuple[int, str]:
    report = json.loads(cli("status", "--json").stdout)
    return report["pid"], report["version"]


@pytest.mark.parametrize("client", ["Python", "Swift"])
def test_an_older_daemon_hands_over_under_a_trainer_that_logs_and_saves(
    client: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = start(program_of(OLDER, tmp_path / "bin"), path, monkeypatch)
    live = LiveTrainer(tmp_path, version=OLDER)
    assert serving() == (older.process.pid, OLDER)
    said = open_run(client, tmp_path / "out")
    assert older.process.wait(30) == 0
    pid, version = serving()
    assert version == THIS and pid == daemon_of(path)
    assert said.count("\n") == 1 and f"is version {OLDER}, older than {THIS}: it finishes" in said
    assert older.process.stderr is not None
    assert f'asks for it: "a trainer brings version {THIS}"' in older.process.stderr.read()
    until(lambda: live.connected(pid))
    live.end()
    # It is no news any more.
    assert open_run(client, tmp_path / "again") == "" and serving() == (pid, THIS)


def test_trainers_of_two_releases_do_not_fight(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one would start the older daemon again. Whichever serves at the end, nothing is lost."""
    program = program_of(OLDER, tmp_path / "bin")
    older = start(program, path, monkeypatch)
    live = LiveTrainer(tmp_path, version=OLDER, program=program)
    said = open_run("Python", tmp_path / "out")
    assert older.process.wait(30) == 0 and 1 <= said.count(f"is version {OLDER}, older than {THIS}") <= 3
    assert serving()[1] in (OLDER, THIS)
    for name in ("second", "third"):
        assert torch.load(tmp_path / f"out/{name}/tracker/entries.th")["loss"] == {1: 1.0}
    live.end()


@pytest.mark.parametrize("client", ["Python", "Swift"])
@pytest.mark.parametrize("version", [NEWER, THIS])
def test_a_daemon_that_is_not_older_is_left_alone(
    version: str, client: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start(DAEMON if version == THIS else program_of(version, tmp_path / "bin"), path, monkeypatch)
    assert open_run(client, tmp_path / "out") == ""
    assert serving() == (daemon.process.pid, version)
    assert daemon.stop() == 0


@pytest.mark.parametrize("client", ["Python", "Swift"])
def test_a_daemon_as_old_as_the_program_that_would_be_started_is_left_alone(
    client: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library was updated, and the program was not."""
    program = program_of(OLDER, tmp_path / "bin")
    daemon = start(program, path, monkeypatch)
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", program)
    assert open_run(client, tmp_path / "out") == ""
    assert serving() == (daemon.process.pid, OLDER)
    assert daemon.stop() == 0


@pytest.mark.parametrize("client", ["Python", "Swift"])
def test_an_older_daemon_of_a_service_manager_is_left_to_it(
    client: str, path: str, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(OLDER, tmp_path / "bin")
    with monkeypatch.context() as patch:
        patch.setenv("NOTIFY_SOCKET", str(short_directory / "nobody"))
        daemon = start(program, path, monkeypatch)
    said = open_run(client, tmp_path / "out")
    assert f"older than {THIS}. It is left as it is, since a service manager keeps it: to update it, " in said
    assert serving() == (daemon.process.pid, OLDER)
    assert daemon.stop() == 0


def test_an_older_daemon_that_writes_is_left_to_it(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new run waits no longer than a moment for what others save, and the others save on."""
    program = program_of(OLDER, tmp_path / "bin")
    monkeypatch.setattr(noether_writer, "__version__", OLDER)
    with monkeypatch.context() as patch:
        patch.setattr("conftest.DAEMON", program)
        daemon = faulty_daemon(path, "checkpoint.created=hang@1", patch)
        patch.undo()
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    first, _ = accepted(tmp_path)
    monkeypatch.setattr(noether_writer, "__version__", THIS)
    monkeypatch.setattr(daemon_replacement, "PATIENCE_SECONDS", 0.2)
    with noether_writer.open_run(tmp_path, "second") as second:
        assert second._session.welcome["daemon"] == f"noether-writerd/{OLDER}"
        second.save("net", "t", {"a": 1}).wait(30)
    said = [record.getMessage() for record in caplog.records if "older than" in record.getMessage()]
    assert len(said) == 1 and "It still writes" in said[0] and "`noether-writer restart`" in said[0]
    daemon.process.kill()
    daemon.process.wait()
    first.wait(30)
    first.close()


@pytest.mark.parametrize(
    ("version", "other", "is_older"),
    [
        ("0.1.0", "0.1.1", True),
        ("0.9.0", "0.10.0", True),
        ("1.2.3", "2.0.0", True),
        ("0.1.0", "0.1.0", False),
        ("0.2.0", "0.1.9", False),
        ("1.0.0rc1", "1.0.0", False),
        ("1.0.0", "1.0.1.dev3", True),
        ("", "1.0.0", False),
        ("1.0", "2.0.0", False),
        ("1.x.0", "2.0.0", False),
    ],
)
def test_which_release_is_older(version: str, other: str, is_older: bool) -> None:
    assert daemon_replacement.is_older(version, other) is is_older


def test_both_clients_replace_an_older_daemon_by_the_same_numbers() -> None:
    """The Python client's are the ones that count; Swift has no way to import them."""
    source = (Path(__file__).parents[2] / "Sources/NoetherWriterClient/DaemonReplacement.swift").read_text()
    patience = re.search(r"static let patience = ([\d.]+)", source)
    times = re.search(r"static let timesLeft = Mutex\((\d+)\)", source)
    assert patience is not None and float(patience[1]) == daemon_replacement.PATIENCE_SECONDS
    assert times is not None and int(times[1]) == daemon_replacement.MOST_TIMES


@pytest.mark.parametrize("client", ["Python", "Swift"])
def test_a_daemon_that_takes_long_to_load_is_waited_for(
    client: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from storage of the network on a busy node. What has ended is waited for a shorter time."""
    monkeypatch.setattr(daemon_launcher, "START_SECONDS", 0.1)
    program = tmp_path / "noether-writerd"
    seconds = 1 if client == "Python" else 21
    program.write_text(f'#!/bin/sh\nsleep {seconds}\nexec "{DAEMON}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", str(program))
    if client == "Swift":
        trained = subprocess.run([SWIFT_TRAINER, tmp_path / "out", "3"], capture_output=True, text=True, timeout=120)
        assert trained.returncode == 0, trained.stderr
    else:
        with noether_writer.open_run(tmp_path, "r") as run:
            run.log({"a": 1}, update=1)
    assert not has_ended(daemon_of(path))
