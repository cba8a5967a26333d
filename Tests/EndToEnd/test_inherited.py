# SPDX-License-Identifier: Apache-2.0
"""A daemon that a trainer starts serves others too: it is nobody's child, and keeps nothing of that trainer. What a run
needs of its trainer (umask, what is kept) the run brings."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from harness import daemon_of, until
from hostile import Raw
from noether_writer import frames

SAVES = """
import sys, torch, noether_writer
run = noether_writer.open_run(sys.argv[1], sys.argv[2])
for number in (1, 2, 3):
    run.save("net", f"E1_U{number}_S{number}", {"w": torch.ones(int(sys.argv[3]))}).wait(30)
print(run._session.welcome["pid"], flush=True)
run.close()
"""


@pytest.fixture
def own(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket where no daemon is; one that a trainer has started there is ended."""
    path = short_directory / "d/socket"
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(path))
    yield path
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(daemon_of(path), signal.SIGTERM)
        until(lambda: not path.exists())


def trainer(root: Path, run: str, before: str = "", prefix: str = "", size: int = 1000, **variables: str) -> int:
    """Runs a trainer as a shell would, with commands before it; the daemon's process."""
    result = subprocess.run(
        ["sh", "-c", f'{before} exec {prefix} "$0" -c "$@"', sys.executable, SAVES, str(root), run, str(size)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("hostile", [False, True])
def test_nothing_of_the_first_trainer_is_the_daemons(hostile: bool, own: Path, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    before, prefix = "cd /tmp;", ""
    if hostile:
        before = (
            "cd /tmp; umask 077; ulimit -S -f 8192; ulimit -S -n 64; ulimit -S -t 100; ulimit -S -l 64; "
            "trap '' HUP INT USR1; exec 9</dev/null;"
        )
        prefix = "ionice -c 3 nice -n 9 taskset -c 0 chrt -b 0"
    variables = {"NOETHER_WRITER_SETTING_KEEP_LAST": "1", "MALLOC_ARENA_MAX": "7", "NOTIFY_SOCKET": "/nowhere"}
    pid = trainer(tmp_path, "first", before, prefix, **variables)
    found = status(pid)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 0
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER
    assert int(found["SigBlk"], 16) == 0
    # What the daemon itself ignores.
    ignored = {n for n in signal.valid_signals() if int(found["SigIgn"], 16) >> (n - 1) & 1}
    assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
        soft, hard = resource.prlimit(pid, limit)
        assert soft == hard
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] > 1024
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    names = {variable.partition("=")[0] for variable in environment}
    assert names.isdisjoint(variables)
    assert "HOME" not in os.environ or "HOME" in names
    # Nobody's child, in a session of its own, with no descriptor of the trainer's.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    parent, session = int(fields[1]), int(fields[3])
    assert parent != os.getpid() and not Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"sh\0")
    assert session == pid
    assert not any(
        os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null" and number != "0"
        for number in os.listdir(f"/proc/{pid}/fd")
    )
    # What its files have is each trainer's own.
    assert trainer(tmp_path, "second", "umask 027;") == pid
    for run, mask in (("first", 0o077 if hostile else os.umask(0o22)), ("second", 0o027)):
        files = list((tmp_path / run / "checkpoints").iterdir())
        assert len(files) == 3, run
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, (run, oct(file.stat().st_mode))
        assert stat.S_IMODE(files[0].parent.stat().st_mode) == 0o777 & ~mask
    assert "KEEP_LAST" in own.with_name("daemon.log").read_text()


@pytest.mark.parametrize("prefix", ["", "nice -n 9"])
@pytest.mark.parametrize("lives", [False, True])
def test_a_daemon_that_can_not_shake_off_a_limit_gives_way(prefix: str, lives: bool, own: Path, tmp_path: Path) -> None:
    """Without CAP_SYS_RESOURCE a hard limit stays; with it there is none to give way for."""
    limited = subprocess.Popen(
        ["sh", "-c", f'ulimit -f 2048; exec {prefix} "$0" -c "$@"', sys.executable, STARTS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert limited.stdout is not None and limited.stdout.readline() == "open\n"
    if not lives:
        limited.communicate(timeout=60)
    # More than a file of that daemon's could have.
    second = trainer(tmp_path, "second", size=1 << 20)
    assert resource.prlimit(second, resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert len(list((tmp_path / "second/checkpoints").iterdir())) == 3
    if lives:
        limited.communicate(timeout=60)
        assert limited.returncode == 0
    until((tmp_path / "first/tracker/entries.th").exists)
    assert torch.load(tmp_path / "first/tracker/entries.th") == {"a": {1: 1}}


def test_a_daemon_is_nobodys_child_and_leaves_no_zombie(own: Path, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    pid = daemon_of(own)
    assert str(pid) not in children
    run.close()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), what="a zombie is left")


def test_settings_come_from_the_users_file(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_directory: Path
) -> None:
    config = tmp_path / "config/noether-writer/noether-writer.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"keep_last: 1\nstate_directory: {state_directory}\n")
    monkeypatch.delenv("NOETHER_WRITER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    trainer(tmp_path, "r")
    until(lambda: len(list((tmp_path / "r/checkpoints").iterdir())) == 1)


# What a run brings


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_retention_is_set_for_each_run(
    way: str, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "variable":
        monkeypatch.setenv("NOETHER_WRITER_KEEP_LAST", "1")
        monkeypatch.setenv("NOETHER_WRITER_KEEP_EVERY", "2")
        some = noether_writer.open_run(tmp_path, "some")
        monkeypatch.delenv("NOETHER_WRITER_KEEP_LAST")
        monkeypatch.delenv("NOETHER_WRITER_KEEP_EVERY")
    else:
        some = noether_writer.open_run(tmp_path, "some", keep_last=1, keep_every=2)
    all_ = noether_writer.open_run(tmp_path, "all")
    for update in range(1, 6):
        for run in (some, all_):
            run.save("net", f"U{update}", {"w": torch.ones(3)}).wait(30)
    some.close()
    all_.close()
    until(lambda: len(list((tmp_path / "some/checkpoints").iterdir())) == 3)
    assert {p.name for p in (tmp_path / "some/checkpoints").iterdir()} == {f"net_cp=U{n}_model.th" for n in (2, 4, 5)}
    assert len(list((tmp_path / "all/checkpoints").iterdir())) == 5


def test_retention_arguments_must_be_numbers(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="keep_last must be a number of checkpoints"):
        noether_writer.open_run(tmp_path, "r", keep_last=-1)
    monkeypatch.setenv("NOETHER_WRITER_KEEP_EVERY", "often")
    with pytest.raises(ValueError, match="NOETHER_WRITER_KEEP_EVERY must be a number of checkpoints"):
        noether_writer.open_run(tmp_path, "r")
    assert not (tmp_path / "r").exists()


def test_an_older_client_without_run_settings_is_served(daemon: RunningDaemon, tmp_path: Path) -> None:
    """One of before: the daemon's own settings and umask count."""
    client = Raw(daemon.socket)
    assert "run_settings" in client.welcome["capabilities"]
    assert "run_directory" in client.open_run(tmp_path)
    mask = int(status(os.getpid())["Umask"], 8)
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o777 & ~mask
    client.close()


def test_a_recovered_run_has_its_own_umask(daemon: RunningDaemon, tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        run = noether_writer.open_run(tmp_path, "r")
    finally:
        os.umask(before)
    run.log({"a": 1}, update=1)
    until(lambda: run.log_durable_update == 1)
    run._session.end()
    daemon.crash()
    client = Raw(daemon.socket)
    until(lambda: client.ask(frames.STATUS, {})["runs"])
    client.close()
    # Its trainer lives, and may come back; a daemon that leaves writes its log.
    assert daemon.stop() == 0
    files = [p for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert files
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o660, file


def test_default_acls_of_a_directory_are_kept(daemon: RunningDaemon, tmp_path: Path) -> None:
    """A default ACL: with one, a umask does not count (umask(2))."""
    shared = tmp_path / "shared"
    shared.mkdir()
    # acl(5) as the kernel keeps it: version 2; owner, group and mask all rwx, others nothing.
    entries = [(0x01, 7, 0xFFFFFFFF), (0x04, 7, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(shared, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"no ACLs here: {error}")
    (shared / "plain").mkdir()
    (shared / "plain/file").touch()
    with noether_writer.open_run(shared, "r") as run:
        run.save("net", "t", {"w": torch.ones(3)}).wait(30)
    for ours, theirs in (
        (shared / "r", shared / "plain"),
        (shared / "r/checkpoints/net_cp=t_model.th", shared / "plain/file"),
    ):
        assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(theirs.stat().st_mode)


# The end of one job


STARTS = """
import os, sys, torch, noether_writer
run = noether_writer.open_run(sys.argv[1], "first")
run.log({"a": 1}, update=1)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_job_that_ends_with_the_daemon_makes_another_client_reconnect(own: Path, tmp_path: Path) -> None:
    """A batch system kills all that a job has started, and so the daemon; the other job's trainer starts the next."""
    first = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "open\n"
    pid = daemon_of(own)
    run = noether_writer.open_run(tmp_path, "second")
    assert run._session.welcome["pid"] == pid
    for update in range(1, 101):
        run.log({"a": update}, update=update)
        if update == 50:
            for one in (pid, first.pid):
                os.kill(one, signal.SIGKILL)
            first.wait()
            ticket = run.save("net", "U50", {"w": torch.ones(3)})
    ticket.wait(60)
    assert run._session.welcome["pid"] != pid
    run.finish(60)
    run.close()
    assert torch.load(tmp_path / "second/tracker/entries.th") == {"a": {update: update for update in range(1, 101)}}
