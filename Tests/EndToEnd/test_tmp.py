# SPDX-License-Identifier: Apache-2.0
"""Where there is no runtime directory, a socket's directory is in /tmp, where anybody may have made it before."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import noether_writer
import pytest
from conftest import DAEMON, RunningDaemon
from noether_writer import daemon_launcher, errors

CLI = str(Path(DAEMON).with_name("noether-writer"))
NOBODY = 65534

# In a mount namespace of its own, with a /tmp of its own. What is planted is the work of root, or of another user; then
# the process becomes nobody, who has no runtime directory, and opens a run.
VICTIM = """
import os, signal, subprocess, sys, traceback
import noether_writer
from noether_writer import errors, daemon_launcher
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/tmp"], check=True)
directory = f"/tmp/noether-writer-{NOBODY}"
os.mkdir("/tmp/elsewhere", 0o755)
open("/tmp/elsewhere/precious", "w").close()
os.chown("/tmp/elsewhere/precious", NOBODY, NOBODY)
os.chown("/tmp/elsewhere", NOBODY, NOBODY)
signal.alarm(60)
exec(sys.argv[1])
ours = ("XDG_", "NOETHER_WRITER_SETTING_", "NOETHER_WRITER_CONFIG", "NOETHER_WRITER_SOCKET")
for name in [name for name in os.environ if name.startswith(ours)]:
    os.environ.pop(name, None)
os.environ.update(USER="nobody", HOME="/tmp/home")
os.setgroups([])
os.setgid(NOBODY)
os.setuid(NOBODY)
for name, command in (("daemon", [DAEMON]), ("command line", [CLI, "status"])):
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode != 0, name
    print(name + ":", result.stderr.strip())
try:
    noether_writer.open_run("/tmp/out", "r")
except errors.NoetherWriterError as error:
    print("library:", type(error).__name__, error)
assert not daemon_launcher.is_alive()
assert os.stat("/tmp/elsewhere/precious").st_size == 0
assert os.listdir("/tmp/elsewhere") == ["precious"]
"""

ANOTHERS = "os.mkdir(directory, 0o777); os.chmod(directory, 0o777); os.chown(directory, 1, 1)"
PLANTED = {
    "another's directory": (ANOTHERS, "belongs to uid 1"),
    "another's directory with a link as the log": (
        ANOTHERS + "; os.symlink('/tmp/elsewhere/precious', directory + '/daemon.log')",
        "belongs to uid 1",
    ),
    "another's directory with a FIFO as the log and the lock": (
        ANOTHERS + "; [os.mkfifo(directory + name) for name in ('/daemon.log', '/socket.lock')]",
        "belongs to uid 1",
    ),
    "a link to a directory of one's own": ("os.symlink('/tmp/elsewhere', directory)", "is not a directory"),
    "a file": ("open(directory, 'w').close()", "is not a directory"),
    "one's own directory that others may enter": (
        "os.mkdir(directory); os.chmod(directory, 0o755); os.chown(directory, NOBODY, NOBODY)",
        "can be entered by others",
    ),
}


@pytest.fixture
def as_nobody() -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    if subprocess.run(["setpriv", f"--reuid={NOBODY}", "--clear-groups", "test", "-x", DAEMON]).returncode:
        pytest.skip("nobody may not run the daemon from here")


@pytest.mark.usefixtures("as_nobody")
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_directory_is_refused(kind: str) -> None:
    plant, words = PLANTED[kind]
    script = f"NOBODY, DAEMON, CLI = {NOBODY}, {DAEMON!r}, {CLI!r}\n" + VICTIM
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script, plant], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3, lines
    for line in lines:
        assert words in line and f"/tmp/noether-writer-{NOBODY}" in line, line
    assert "library: WrongSocket" in lines[2] and "to a place of yours" in lines[2]


GOOD = """
import os, subprocess, sys, noether_writer
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/tmp"], check=True)
ours = ("XDG_", "NOETHER_WRITER_SETTING_", "NOETHER_WRITER_CONFIG", "NOETHER_WRITER_SOCKET")
for name in [name for name in os.environ if name.startswith(ours)]:
    os.environ.pop(name, None)
os.makedirs("/tmp/mine/a"); os.chown("/tmp/mine/a", NOBODY, NOBODY)
os.environ.update(USER="nobody", HOME="/tmp/mine/a", TMPDIR="/tmp/mine/a")
os.setgroups([]); os.setgid(NOBODY); os.setuid(NOBODY)
run = noether_writer.open_run("/tmp/mine/a/out", "r")
for temporary in ("/tmp/mine/a", "/var/tmp"):
    status = subprocess.run([CLI, "runs"], env=os.environ | {"TMPDIR": temporary}, capture_output=True, text=True)
    assert status.returncode == 0, status
    print(status.stdout)
for name in ("", "/socket", "/daemon.log"):
    print(oct(os.stat(f"/tmp/noether-writer-{NOBODY}{name}").st_mode & 0o777))
pid = run._session.welcome["pid"]
run.close()
os.kill(pid, 15)
"""


@pytest.mark.usefixtures("as_nobody")
def test_who_has_no_runtime_directory_has_one_in_tmp_whatever_tmpdir_says() -> None:
    script = f"NOBODY, CLI = {NOBODY}, {CLI!r}\n" + GOOD
    result = subprocess.run(["unshare", "-m", sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-3:] == ["0o700", "0o600", "0o600"]


# The runtime directory of a login that is not on this node, or is over before its trainer is. Root can end it.
LOGIN = """
import os, subprocess, sys, time, noether_writer
from noether_writer import daemon_launcher
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/tmp"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", "/run"], check=True)
ours = ("XDG_", "NOETHER_WRITER_SETTING_", "NOETHER_WRITER_CONFIG", "NOETHER_WRITER_SOCKET")
for name in [name for name in os.environ if name.startswith(ours)]:
    os.environ.pop(name, None)
runtime = f"/run/user/{NOBODY}"
os.makedirs("/tmp/mine"); os.chown("/tmp/mine", NOBODY, NOBODY)
os.makedirs(runtime); os.chown(runtime, NOBODY, NOBODY)
root = subprocess.Popen(["sh", "-c", f"read line; rm -r {runtime}"], stdin=subprocess.PIPE)
os.environ.update(USER="nobody", HOME="/tmp/mine", XDG_RUNTIME_DIR=runtime)
os.setgroups([]); os.setgid(NOBODY); os.setuid(NOBODY)
def logout():
    root.stdin.close()
    assert root.wait(30) == 0
if sys.argv[1] == "elsewhere":
    logout()
run = noether_writer.open_run("/tmp/mine/out", "r")
run.log({"a": 1}, update=1)
while run.log_durable_update != 1:
    time.sleep(0.01)
print(daemon_launcher.socket_path())
if sys.argv[1] == "over":
    logout()
    time.sleep(2)
run.log({"a": 2}, update=2)
run.finish(60)
print(daemon_launcher.socket_path())
for command in ("status", "export r", "stop"):
    result = subprocess.run([CLI, *command.split()], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result
    print(result.stdout)
"""


@pytest.mark.usefixtures("as_nobody")
@pytest.mark.parametrize("login", ["elsewhere", "over"])
def test_a_runtime_directory_that_is_gone_is_not_used(login: str) -> None:
    script = f"NOBODY, CLI = {NOBODY}, {CLI!r}\n" + LOGIN
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script, login], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stdout + result.stderr
    first, second, *rest = result.stdout.splitlines()
    fallback = f"/tmp/noether-writer-{NOBODY}/socket"
    assert first == (fallback if login == "elsewhere" else f"/run/user/{NOBODY}/noether-writer/socket")
    assert second == fallback and any(fallback in line for line in rest)
    assert any(line.startswith("1,") for line in rest) and any(line.startswith("2,") for line in rest), rest


@pytest.mark.parametrize("kind", ["symlink", "FIFO", "directory", "hard link"])
def test_a_log_is_a_plain_file(kind: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the socket is."""
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "socket"))
    log, elsewhere = short_directory / "daemon.log", short_directory / "elsewhere"
    elsewhere.write_text("precious")
    if kind == "symlink":
        log.symlink_to(elsewhere)
    elif kind == "FIFO":
        os.mkfifo(log)
    elif kind == "directory":
        log.mkdir()
    else:
        os.link(elsewhere, log)
    with pytest.raises(errors.WrongSocket, match=r"daemon\.log"):
        noether_writer.open_run(short_directory / "out", "r")
    assert elsewhere.read_text() == "precious" and not (short_directory / "socket").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_leaves_a_users_runtime_directory_alone(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sudo -E`: what root makes there would lock the user out."""
    theirs = short_directory / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    monkeypatch.delenv("NOETHER_WRITER_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    found = daemon_launcher.socket_path()
    assert not found.startswith(str(theirs))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(theirs)}
    said = subprocess.run([CLI, "status"], env=environment, capture_output=True, text=True)
    assert found in said.stdout + said.stderr and list(theirs.iterdir()) == []
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_directory))
    assert daemon_launcher.socket_path() == f"{short_directory}/noether-writer/socket"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("name", ["nobody", "", "../../tmp", "no such user"])
def test_a_name_that_is_another_users_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`su` leaves USER as it is when somebody becomes root: in that user's place root would lock the user out."""
    for variable in ("NOETHER_WRITER_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("USER", name)
    found = daemon_launcher.socket_path()
    own = "no such user" if name == "no such user" else "root"
    assert found == f"/run/noether-writer/{own}/socket"
    said = subprocess.run([CLI, "status"], capture_output=True, text=True)
    assert found in said.stdout + said.stderr
    # The specification: a path that is not absolute counts for nothing.
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    assert daemon_launcher.socket_path() == found


UNMAPPED = """
import os, sys
from noether_writer import errors, daemon_launcher
assert os.geteuid() == 65534, os.geteuid()
try:
    daemon_launcher.connect()
except errors.WrongSocket as error:
    print(error)
"""


def test_the_uid_of_all_who_have_none_is_nobodys(daemon: RunningDaemon) -> None:
    """In a user namespace without a map, this process and every other one are uid 65534."""
    os.chmod(Path(daemon.socket).parent, 0o755)
    os.chmod(daemon.socket, 0o666)
    result = subprocess.run(["unshare", "-U", sys.executable, "-c", UNMAPPED], capture_output=True, text=True)
    if "unshare" in result.stderr:
        pytest.skip("no user namespaces here")
    assert result.returncode == 0, result.stderr
    assert "nothing was sent" in result.stdout
    assert stat.S_ISSOCK(os.stat(daemon.socket).st_mode)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(daemon.socket)
