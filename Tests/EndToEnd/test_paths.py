# SPDX-License-Identifier: Apache-2.0
"""Where files go when somebody moves things about: never through a link, never over what is not the daemon's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import until
from hostile import Raw
from noether_writer import errors
from refused_calls import ALLOW, refuse, under_filter

CLI = Path(DAEMON).with_name("noether-writer")

NOBODY = 65534


def without_openat2(error: int, command: Sequence[str]) -> list[str]:
    """On a kernel without openat2, as under older container filters, which answer with an errno."""
    operations = [
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 1, 437),  # openat2
        (0x06, 0, 0, refuse(error)),
        (0x06, 0, 0, ALLOW),
    ]
    return under_filter(operations, 437, error, command)


@pytest.fixture(params=["openat2", "ENOSYS", "EPERM"])
def any_daemon(request: pytest.FixtureRequest, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A daemon's socket: with openat2, and with the two ways in which it is refused."""
    path = str(short_directory / "d/socket")
    command = [DAEMON, "--socket", path]
    if request.param != "openat2":
        command = without_openat2({"ENOSYS": 38, "EPERM": 1}[request.param], command)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, "this daemon did not start"
        time.sleep(0.01)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    yield path
    for run in list(noether_writer.run._open_runs):
        run._session.end()
    process.terminate()
    assert process.wait(30) == 0


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in folder.rglob("*")
    }


def test_a_symlink_that_is_swapped_in_leads_nowhere(any_daemon: str, tmp_path: Path) -> None:
    """Thousands of times while runs are opened and saved to, parts of the path become symlinks to elsewhere."""
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "tracker").mkdir()
    (outside / "checkpoints/net_cp=t_model.th").write_text("not yours")
    (outside / "tracker/entries.th").write_text("not yours")
    before = snapshot(outside)
    root = tmp_path / "root"
    (root / "s").mkdir(parents=True)
    stop = threading.Event()
    swaps = [0]

    def swap(name: Path, target: Path) -> None:
        """Exchanges the directory and a link in one step, so that both are seen."""
        link = name.with_name(name.name + "-link")
        libc = ctypes.CDLL(None, use_errno=True)
        own = 0
        while not stop.is_set():
            if not os.path.lexists(link):
                os.symlink(target, link)
            # RENAME_EXCHANGE; missing at times, since the daemon makes what is missing.
            if libc.renameat2(-100, os.fsencode(name), -100, os.fsencode(link), 2) == 0:
                swaps[0] += 1
                own += 1
            # What was noticed is tried again after a while, and then finds its directory.
            if own > 500 and not name.is_symlink():
                own = 0
                stop.wait(0.3)

    threads = [
        threading.Thread(target=swap, args=(root / "r", outside)),
        threading.Thread(target=swap, args=(root / "s/checkpoints", outside / "checkpoints")),
        threading.Thread(target=swap, args=(root / "s/tracker", outside / "tracker")),
    ]
    for thread in threads:
        thread.start()
    done = 0
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline:
        for name in ("r", "s"):
            try:
                run = noether_writer.open_run(root, name)
                run.log({"a": 1}, update=1)
                run.save("net", "t", {"a": torch.ones(3)}).wait(5)
                run.finish(5)
                done += 1
            except (errors.StorageError, errors.RefusedName, errors.WaitTimeout, errors.DaemonBusy):
                # Where the name is a link for long, what was saved waits.
                pass
            finally:
                for run in list(noether_writer.run._open_runs):
                    run._session.end()
    stop.set()
    for thread in threads:
        thread.join()
    assert swaps[0] > 2000 and done > 0, (swaps, done)
    for name in (root / "r", root / "s", root / "s/checkpoints", root / "s/tracker"):
        if name.is_symlink():
            name.unlink()
    # What waits arrives.
    until(lambda: subprocess.run([CLI, "wait", "--timeout", "1"], capture_output=True).returncode == 0, 60)
    assert snapshot(outside) == before


@pytest.mark.parametrize("part", ["r", "r/stage", "r/stage/checkpoints", "r/stage/tracker"])
def test_a_symlink_in_a_run_is_refused_in_words(part: str, any_daemon: str, tmp_path: Path) -> None:
    """The way to the output root may have some; below it each could lead a daemon elsewhere."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    (root / part).parent.mkdir(parents=True)
    (root / part).symlink_to(elsewhere)
    with pytest.raises(
        errors.StorageError, match=f"{part}, which is a symbolic link: only .*Put a directory there, or"
    ):
        noether_writer.open_run(root, "r", "stage")
    assert list(elsewhere.iterdir()) == []
    (root / part).unlink()
    # A root that is a link is the user's own choice.
    (tmp_path / "link").symlink_to(root)
    with noether_writer.open_run(tmp_path / "link", "r", "stage") as run:
        run.save("net", "t", {"a": torch.ones(3)}).wait(20)
    assert (root / "r/stage/checkpoints/net_cp=t_model.th").exists()


def plant(kind: str, path: Path, elsewhere: Path) -> Callable[[], bool]:
    """Puts something under a name; gives back whether what it stood for is unharmed."""
    elsewhere.write_text("not yours")
    if kind == "symlink":
        path.symlink_to(elsewhere)
    elif kind == "dangling symlink":
        elsewhere.unlink()
        path.symlink_to(elsewhere)
        return lambda: not elsewhere.exists()
    elif kind == "hard link":
        os.link(elsewhere, path)
    elif kind == "directory":
        path.mkdir()
        return path.is_dir
    elif kind == "FIFO":
        os.mkfifo(path)
        return path.is_fifo
    elif kind == "socket":
        # By way of a descriptor: the path is too long for an address.
        parent = os.open(path.parent, os.O_PATH)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{parent}/{path.name}")
        os.close(parent)
        return path.is_socket
    elif kind == "another's file":
        path.write_text("not yours")
        os.chown(path, NOBODY, NOBODY)
        return lambda: path.read_text() == "not yours"
    return lambda: elsewhere.read_text() == "not yours"


KINDS = ["symlink", "dangling symlink", "hard link", "directory", "FIFO", "socket", "another's file"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_under_a_checkpoints_name(kind: str, any_daemon: str, tmp_path: Path) -> None:
    if kind == "another's file" and os.getuid() != 0:
        pytest.skip("only root can give a file away")
    run = noether_writer.open_run(tmp_path, "r")
    path = tmp_path / "r/checkpoints/net_cp=t_model.th"
    is_unharmed = plant(kind, path, tmp_path / "elsewhere")
    ticket = run.save("net", "t", {"a": torch.ones(3)})
    if "link" in kind:
        # The name is the run's: what pointed away from it makes room, and what it pointed to is not touched.
        ticket.wait(20)
        assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
        assert torch.equal(torch.load(path)["a"], torch.ones(3))
    else:
        with pytest.raises(errors.StorageError, match=r"net_cp=t_model.th"):
            ticket.wait(20)
    assert is_unharmed()
    assert not list((tmp_path / "r/checkpoints").glob(".noether-writer-*"))
    run.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["entries.journal", ".noether-writer-abc.tmp"])
def test_what_is_under_a_name_that_the_daemon_looks_at(name: str, kind: str, any_daemon: str, tmp_path: Path) -> None:
    if kind == "another's file" and os.getuid() != 0:
        pytest.skip("only root can give a file away")
    (tmp_path / "r/tracker").mkdir(parents=True)
    is_unharmed = plant(kind, tmp_path / "r/tracker" / name, tmp_path / "elsewhere")
    if name == "entries.journal":
        with pytest.raises((errors.StorageError, errors.RefusedName), match=r"entries.journal"):
            noether_writer.open_run(tmp_path, "r")
    else:
        with noether_writer.open_run(tmp_path, "r") as run:
            run.log({"a": 1}, update=1)
        assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1}}
    assert is_unharmed()


def test_somebody_elses_journal_stays(any_daemon: str, tmp_path: Path) -> None:
    (tmp_path / "r/tracker").mkdir(parents=True)
    journal = tmp_path / "r/tracker/entries.journal"
    journal.write_text("Dear diary")
    with pytest.raises(errors.StorageError, match="not a journal of noether-writer"):
        noether_writer.open_run(tmp_path, "r")
    assert journal.read_text() == "Dear diary"
    journal.unlink()
    noether_writer.open_run(tmp_path, "r").close()


def test_a_journal_that_has_another_name_is_not_written_to(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Writing to it would be writing to what a hard link elsewhere stands for."""
    (tmp_path / "r/tracker").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"NWJRNL01" + bytes(8))
    os.link(elsewhere, tmp_path / "r/tracker/entries.journal")
    with pytest.raises((errors.StorageError, errors.RefusedName), match="has another name too"):
        noether_writer.open_run(tmp_path, "r")
    assert elsewhere.read_bytes() == b"NWJRNL01" + bytes(8)


@pytest.mark.parametrize("part", ["r", "r/tracker", "r/checkpoints"])
def test_recovery_follows_no_symlink(part: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """The daemon dies; before the next one comes, a directory of the run is moved and a symlink put in its place."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    script = (
        "import noether_writer, sys, time\n"
        "run = noether_writer.open_run(sys.argv[1], 'r')\n"
        "run.log({'a': 1}, update=1)\n"
        "while run._core.kept_rows: time.sleep(0.005)\n"
        "print('acknowledged', flush=True)\n"
        "sys.stdin.read()\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "acknowledged\n"
    daemon.process.kill()
    trainer.kill()
    daemon.process.wait()
    trainer.wait()
    os.rename(root / part, outside)
    os.symlink(outside, root / part)
    before = snapshot(outside)
    second = RunningDaemon(daemon.socket)
    Raw(daemon.socket).close()
    assert second.stop() == 0
    daemon.process = second.process
    assert snapshot(outside) == before
    assert second.process.stderr is not None and "not recovered: " in second.process.stderr.read()
    # Put right, it is found again.
    os.unlink(root / part)
    os.rename(outside, root / part)
    third = RunningDaemon(daemon.socket)
    deadline = time.monotonic() + 10
    while not (root / "r/tracker/entries.th").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert third.stop() == 0
    daemon.process = third.process
    assert torch.load(root / "r/tracker/entries.th") == {"a": {1: 1}}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_those_of_any_program(mask: int, short_directory: Path, tmp_path: Path) -> None:
    """Those that the trainer's own umask would give, whatever the daemon's is."""
    path = str(short_directory / "d/socket")
    process = subprocess.Popen([DAEMON, "--socket", path], preexec_fn=lambda: os.umask(0o777 & ~mask))
    while not Path(path).exists():
        time.sleep(0.01)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    os.environ["NOETHER_WRITER_SOCKET"] = path
    before = os.umask(mask)
    try:
        run = noether_writer.open_run(tmp_path / "out", "r", "stage", debug=True, config={"a": 1})
        run.log({"a": 1}, update=1)
        run.save("net", "t", {"a": torch.ones(3)}).wait(20)
        deadline = time.monotonic() + 20
        while run.log_durable_update != 1:
            assert time.monotonic() < deadline, "the log was not made durable"
            time.sleep(0.01)
        assert stat.S_IMODE((tmp_path / "out/debug/r/stage/tracker/entries.journal").stat().st_mode) == 0o666 & ~mask
        run.finish()
        run.close()
    finally:
        os.umask(before)
        del os.environ["NOETHER_WRITER_SOCKET"]
    # The checkpoint, the log, its summary, the config; the journal goes a moment after the log is finished.
    until(lambda: sum(p.is_file() for p in (tmp_path / "out").rglob("*")) == 4)
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    for p in found:
        wanted = (0o777 if p.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(p.stat().st_mode) == wanted, p
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def access(path: Path) -> list[str]:
    """Who may do what: owner, group, setgid, and the access control list with its defaults."""
    result = subprocess.run(["getfacl", "-n", "-p", path], capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if not line.startswith("# file: ")]


@pytest.mark.parametrize(
    ("mode", "acl", "mask"),
    [
        (0o2775, "", 0o002),  # a group's project directory
        (0o2775, "d:u::rwx,d:g::rwx,d:o::-,d:u:65534:rwx", 0o022),
        (0o755, "d:u::rwx,d:g::r-x,d:o::-,d:g:65533:rwx", 0o077),
        (0o755, "", 0o077),  # a private trainer's
    ],
    ids=["group", "group with an ACL", "ACL", "private"],
)
def test_modes_groups_and_acls_of_a_directory_apply_to_files_in_it(
    mode: int, acl: str, mask: int, daemon: RunningDaemon, tmp_path: Path
) -> None:
    """As any program of the trainer's would have it, directories and files, also those that are replaced."""
    if os.getuid() != 0 or not shutil.which("setfacl"):
        pytest.skip("needs setfacl, and root, who can give a directory to a group")
    project = tmp_path / "project"
    project.mkdir()
    os.chown(project, -1, 65533)
    project.chmod(mode)
    if acl and subprocess.run(["setfacl", "-m", acl, project], capture_output=True).returncode:
        pytest.skip("no ACLs here")
    before = os.umask(mask)
    try:
        (project / "plain").mkdir()
        (project / "plain/file").touch()
        for update in (1, 2):
            with noether_writer.open_run(project, f"r{update}", "stage", config={"a": 1}, tensorboard=True) as run:
                run.log({"a": 1}, update=1)
                for _ in range(2):
                    run.save("net", "latest", {"a": torch.ones(3)}).wait(20)
        (project / "any").mkdir()
        for _ in range(2):
            noether_writer.save({"a": 1}, project / "any/file.pt").wait(20)
    finally:
        os.umask(before)
    until(lambda: not list(project.rglob("entries.journal")))
    found = [p for p in project.rglob("*") if "plain" not in p.parts]
    assert len([p for p in found if p.is_file()]) >= 11
    for path in found:
        assert access(path) == access(project / ("plain" if path.is_dir() else "plain/file")), path


def test_a_directory_of_somebody_else_is_refused_with_a_reason(short_directory: Path, tmp_path: Path) -> None:
    """The daemon of a user who may not write there."""
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    for folder in [short_directory, *tmp_path.parents[:3], tmp_path]:
        os.chmod(folder, 0o755)
    (tmp_path / "r").mkdir()
    (short_directory / "d").mkdir()
    os.chown(short_directory / "d", NOBODY, NOBODY)
    path = str(short_directory / "d/socket")

    def become_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    environment = os.environ | {"NOETHER_WRITER_SETTING_STATE_DIRECTORY": f"{path}.state", "NOETHER_WRITER_CONFIG": ""}
    process = subprocess.Popen([DAEMON, "--socket", path], preexec_fn=become_nobody, env=environment)
    while not Path(path).exists():
        assert process.poll() is None
        time.sleep(0.01)
    client = Raw(path)
    answer = client.open_run(tmp_path)
    assert answer["code"] == "bad-path" and answer["errno"] == 13 and "Permission denied" in answer["message"]
    client.close()
    assert list((tmp_path / "r").iterdir()) == []
    process.terminate()
    assert process.wait(20) == 0
