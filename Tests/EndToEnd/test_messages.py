# SPDX-License-Identifier: Apache-2.0
"""The mistakes of a newcomer: each is told what happened, what was kept and what to do, as soon as it can be known."""

from __future__ import annotations

import ast
import errno
import faulthandler
import gc
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import noether_writer
import numpy
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from hostile import Raw
from noether_writer import errors, frames
from noether_writer.saves import Target

ROOT = Path(__file__).parents[2]
CLI = str(Path(DAEMON).parent / "noether-writer")
SWIFT_TRAINER = Path(DAEMON).parent / "SwiftTrainer"
NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
HOURS_SECONDS = 36_000.0
HUNG_SECONDS = 600


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may wait until a time is over: all of these times are hours, and who waits for one is shown."""
    monkeypatch.setattr(noether_writer.daemon_launcher, "START_SECONDS", HOURS_SECONDS)
    for module in (noether_writer.session, noether_writer.run, noether_writer._files):
        monkeypatch.setattr(module, "ANSWER_SECONDS", HOURS_SECONDS)
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, *map(str, arguments)], capture_output=True, text=True)


# Sockets


def listen(path: Path, answer: Callable[[socket.socket], None] = lambda _: None) -> socket.socket:
    """Something that listens there, and is no daemon."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("relative", "must be an absolute path"),
        ("too long", "at most 107 are possible"),
        ("below a file", "Not a directory"),
        ("a file", "is not a socket, and is left as it is"),
        ("a directory", "is not a socket, and is left as it is"),
    ],
)
def test_a_path_where_no_socket_can_be(
    kind: str, words: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = short_directory / "file", short_directory / "folder"
    file.write_text("a person's own")
    folder.mkdir()
    path = {
        "relative": "socket",
        "too long": f"{short_directory}/{'x' * 107}",
        "below a file": f"{file}/socket",
        "a file": str(file),
        "a directory": str(folder),
    }[kind]
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", path)
    with pytest.raises(errors.WrongSocket, match=words) as raised:
        noether_writer.open_run(short_directory / "o", "r")
    assert "NOETHER_WRITER_SOCKET" in str(raised.value)
    assert file.read_text() == "a person's own" and folder.is_dir()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_daemon_leaves_alone_what_lies_where_it_would_listen(kind: str, short_directory: Path) -> None:
    path = short_directory / "s"
    if kind == "file":
        path.write_text("a person's own")
    else:
        path.mkdir()
    result = subprocess.run([DAEMON, "--socket", path], capture_output=True, text=True, timeout=10)
    assert result.returncode == 1 and "is not a socket and is left as it is" in result.stderr
    assert path.is_dir() if kind == "directory" else path.read_text() == "a person's own"


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def daemon_of_nobody(path: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"NOETHER_WRITER_SETTING_STATE_DIRECTORY": f"{path}.state", "NOETHER_WRITER_CONFIG": ""}
    daemon = subprocess.Popen(
        [DAEMON, "--socket", path], preexec_fn=as_nobody, env=environment, stderr=subprocess.DEVNULL
    )
    while not path.exists():
        assert daemon.poll() is None
        time.sleep(0.01)
    return daemon


@needs_root
def test_another_users_daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(short_directory, NOBODY, NOBODY)
    path = short_directory / "s"
    theirs = daemon_of_nobody(path)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(path))
    with pytest.raises(errors.WrongSocket, match=r"served by uid 65534, not by you \(uid 0\)"):
        noether_writer.open_run(short_directory / "o", "r")
    with pytest.raises(errors.WrongSocket, match="served by uid 65534"):
        noether_writer.subscribe("r")
    for arguments in (["status"], ["tail", "r"]):
        result = cli(*arguments)
        assert result.returncode in (3, 4) and "served by uid 65534, not by you (uid 0)" in result.stderr
    theirs.terminate()
    assert theirs.wait(20) == 0


@needs_root
def test_a_socket_or_directory_of_another_user(short_directory: Path) -> None:
    """The client's own part, without a library that nobody may read here: in a child that becomes nobody."""
    os.chmod(short_directory, 0o755)
    with listen(short_directory / "s"):
        os.chmod(short_directory / "s", 0o600)
        for path, words in (("s", "it is another user's"), ("new/s", "none can be started there")):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    as_nobody()
                    os.environ["NOETHER_WRITER_SOCKET"] = str(short_directory / path)
                    noether_writer.open_run(short_directory / "o", "r")
                except errors.WrongSocket as error:
                    status = 0 if words in str(error) and "to a place of yours" in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, path


def test_another_program_listens_on_the_socket(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    with listen(short_directory / "s", lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")):
        with pytest.raises(errors.ProtocolError, match="does not speak the noether-writer protocol"):
            noether_writer.open_run(short_directory / "o", "r")
        result = cli("status")
        assert result.returncode == 1 and "does not speak the noether-writer protocol" in result.stderr


# Daemons that do not start, or are of another version


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NOETHER_WRITER_DAEMON": "/nonexistent"}, "names /nonexistent, which is not a program"),
        ({"NOETHER_WRITER_DAEMON": "/bin/false"}, r"\(/bin/false\) exited with status 1"),
        (
            {"NOETHER_WRITER_CONFIG": "{}/c.yaml"},
            r"c.yaml, line 1, setting disk_queues: must be a number from 1 to.*daemon\.log",
        ),
    ],
)
def test_a_daemon_that_does_not_start(
    variables: dict[str, str], words: str, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = short_directory / "s"
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(path))
    # The last words of an earlier one are not this one's.
    (short_directory / "daemon.log").write_text("noether-writerd: something old\n")
    (short_directory / "c.yaml").write_text("disk_queues: many\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(short_directory))
    with pytest.raises(errors.DaemonNotFound, match=words) as raised:
        noether_writer.open_run(short_directory / "o", "r")
    assert str(path) in str(raised.value) and "something old" not in str(raised.value)


def test_a_daemon_program_that_cannot_be_executed(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = short_directory / "program"
    program.write_text("no program")
    program.chmod(0o755)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", str(program))
    with pytest.raises(errors.DaemonNotFound, match="program cannot be started: Exec format error"):
        noether_writer.open_run(short_directory / "o", "r")


def test_an_empty_variable_counts_as_unset(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", "")
    monkeypatch.setenv("NOETHER_WRITER_QUEUE_BYTES", "")
    monkeypatch.setenv("NOETHER_WRITER_SETTING_DISK_QUEUES", "")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_directory))
    run = noether_writer.open_run(short_directory / "o", "r")
    run.close()
    os.kill(json.loads(cli("status", "--json").stdout)["pid"], signal.SIGTERM)


def test_a_daemon_that_does_not_speak_this_version(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "VERSIONS", [2])
    for ask in (lambda: noether_writer.open_run(tmp_path, "r"), lambda: noether_writer.subscribe("r")):
        with pytest.raises(errors.ProtocolError, match=r"versions \[2\]; this daemon speaks 1; use one version of"):
            ask()


@pytest.mark.parametrize(
    ("header", "message", "words"),
    [
        ((1, 64), {"version": 7, "daemon": "noether-writerd/9"}, "noether-writerd/9 speaks version 7"),
        ((2, 64), {}, "version 2"),
        ((1, 65), {"code": "unsupported-version", "message": "this one speaks 3", "fatal": True}, "speaks 3"),
    ],
)
def test_a_daemon_of_another_version(
    header: tuple[int, int],
    message: dict[str, Any],
    words: str,
    short_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real daemons speak one version so far: these are frames of those to come."""
    version, type_ = header
    whole = {"pid": 1, "capabilities": [], "limits": {}, **message}
    payload = json.dumps(whole).encode()

    def answer(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        # What ends a connection may answer nothing that was asked.
        request = 0 if type_ == frames.ERROR else 1
        head = frames.HEADER.pack(frames.MAGIC, version, type_, request, len(payload), 0, 0)
        connection.sendall(head + payload)

    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    with listen(short_directory / "s", answer):
        with pytest.raises(errors.ProtocolError, match=words) as raised:
            noether_writer.open_run(short_directory / "o", "r")
        assert "restart the daemon" in str(raised.value)
        result = cli("status")
        assert result.returncode == 1 and words in result.stderr and "restart the daemon" in result.stderr


def test_what_ends_a_connection_says_so_to_who_asked(daemon: RunningDaemon) -> None:
    raw = Raw(daemon.socket)
    raw.send(frames.pack_json(frames.OPEN_RUN, {"run_id": 7}, request=9))
    answer = raw.receive()
    assert answer.type == frames.ERROR and answer.request == 9
    assert answer.json()["code"] == "bad-frame" and answer.json()["fatal"]
    raw.close()


def test_python_before_3_10(tmp_path: Path) -> None:
    source = (ROOT / "Sources/PythonClient/noether_writer/__init__.py").read_text()
    # So that an old one comes as far as the check.
    ast.parse(source, feature_version=(3, 7))
    pretends = "import sys; sys.version_info = (3, 9, 18, 'final', 0); import noether_writer"
    result = subprocess.run([sys.executable, "-c", pretends], capture_output=True, text=True)
    assert "ImportError: noether_writer needs Python 3.10 or newer" in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("NOETHER_WRITER_POOL_BYTES", "8 GiB", "a number of bytes, in digits, not '8 GiB'"),
        ("NOETHER_WRITER_POOL_TIMEOUT", "-1", "a number of seconds, not '-1'"),
        ("NOETHER_WRITER_QUEUE_BYTES", "64M", "a number of bytes, in digits, not '64M'"),
        ("NOETHER_WRITER_EXIT_TIMEOUT", "soon", "a number of seconds, not 'soon'"),
        ("NOETHER_WRITER_WHEN_AWAY", "explode", "keep-training or raise, not 'explode'"),
        ("NOETHER_WRITER_SNAPSHOT", "fast", "copy or overlap, not 'fast'"),
        ("RANK", "one", "this process's number in its job, not 'one'"),
    ],
)
def test_a_variable_with_a_wrong_value_is_an_error(
    name: str, text: str, words: str, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    monkeypatch.setattr(noether_writer.buffers, "_pool", None)
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {words}")):
        noether_writer.open_run(tmp_path, "r").save("net", "t", {"a": 1})


# Names and values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "the model name is None, and must be a text"),
        ({"name": 7}, "the model name is an int"),
        ({"name": "a/b"}, "the model name 'a/b' holds a slash"),
        ({"tag": ".."}, "the tag '..' is a directory reference"),
        ({"tag": ""}, "the tag '' is empty"),
        ({"tag": "line\n"}, "holds a control character"),
        ({"tag": "\ud800"}, "holds half of a surrogate pair"),
        ({"info": b"x"}, "info is a bytes"),
        ({"info": "x" * 300}, "has 300 bytes, and at most 255"),
        ({"name": "n" * 250}, "the file name"),
        ({"kind": "weights"}, "kind must be model, optim or trainer, not 'weights'"),
    ],
)
def test_a_name_that_no_file_can_have(
    change: dict[str, Any], words: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    target = Target(**{"name": "net", "tag": "t", "obj": {"a": 1}, "kind": "model", "info": None, **change})
    with pytest.raises(errors.RefusedName, match=re.escape(words)):
        run.save_as([target])
    # It was nothing: the run goes on.
    run.save("net", "t", {"a": 1}).wait(10)
    run.close()


def test_a_tag_may_be_a_number_and_not_none(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    number: Any = 7
    run.save("net", number, {}).wait(10)
    assert (run.directory / "checkpoints/net_cp=7_model.th").exists()
    nothing: Any = None
    with pytest.raises(errors.RefusedName, match="the tag is None, and must be a text"):
        run.save("net", nothing, {})
    run.close()


def test_a_save_with_no_target_or_too_many(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for targets in ([], [Target("net", str(i), {}) for i in range(5)]):
        with pytest.raises(errors.RefusedName, match=f"1 to 4 files, not {len(targets)}"):
            run.save_as(targets)
    with pytest.raises(errors.RefusedName, match=r"two files of one save have the name net_cp=t_model\.th"):
        run.save_as([Target("net", "t", {})] * 2)
    run.close()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"run_id": None}, errors.RefusedName, "run_id is None"),
        ({"run_id": "a/b"}, errors.RefusedName, "holds a slash"),
        ({"stage_name": 3}, errors.RefusedName, "stage_name is an int"),
        ({"resume_at": "7"}, errors.UnsupportedValue, "resume_at must be a whole number, not '7'"),
        ({"resume_at": 1.5}, errors.UnsupportedValue, "resume_at must be a whole number, not 1.5"),
        ({"config": [1]}, errors.UnsupportedValue, "config must be a dict of plain data, not a list"),
        ({"config": {"a": "b" * (1 << 20)}}, errors.UnsupportedValue, "bytes as YAML; at most 524288"),
        ({"output_root": "/" + "y" * 5000}, errors.RefusedName, "below 4096 bytes"),
    ],
)
def test_a_run_that_cannot_be_opened(
    arguments: dict[str, Any], kind: type[Exception], words: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=re.escape(words)) as raised:
        noether_writer.open_run(**{"output_root": tmp_path, "run_id": "r", **arguments})
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"loss": torch.ones(3)}, errors.NotOneElement, "'loss' of update 2: a Tensor of shape (3,)"),
        ({"loss": numpy.ones((2, 2))}, errors.NotOneElement, "'loss' of update 2: a ndarray of shape (2, 2)"),
        ({"loss": torch.ones(1, device="meta")}, errors.UnsupportedValue, "a Tensor without a number"),
        ({"loss": torch.nested.nested_tensor([torch.ones(1)])}, errors.UnsupportedValue, "a Tensor without a shape"),
        ({"loss": torch.nn.UninitializedParameter()}, errors.UnsupportedValue, "without a shape"),
        ({"ok": 1, "loss": [1.0]}, errors.UnsupportedValue, "'loss' of update 2: a list is not a scalar"),
        ({"loss": (x for x in ())}, errors.UnsupportedValue, "a generator is not a scalar"),
        ({"loss": "\ud800"}, errors.UnsupportedValue, "half of a surrogate pair"),
        ({"loss": "s" * (2 << 20)}, errors.UnsupportedValue, "write long texts to a file"),
        ({7: 1.0}, errors.UnsupportedValue, "the key 7 is an int: "),
        ({10**5000: 1.0}, errors.UnsupportedValue, "the key <int> is an int: "),
        ({"": 1.0}, errors.UnsupportedValue, "the key '' has 0 bytes"),
        ({"k" * 2000: 1.0}, errors.UnsupportedValue, "has 2000 bytes; a key must have 1 to 1024"),
        ({"a\0": 1.0}, errors.UnsupportedValue, "holds a NUL"),
        ({"k\ud800": 1.0}, errors.UnsupportedValue, "half of a surrogate pair"),
        ({str(i): 1.0 for i in range(20_000)}, errors.UnsupportedValue, "20000 values; at most 16384"),
        ({f"{i:01000}": 1.0 for i in range(1200)}, errors.UnsupportedValue, "names of its keys have"),
        (3.0, errors.UnsupportedValue, "log takes a dict of keys and scalars, not a float"),
    ],
)
def test_a_value_that_cannot_be_logged_damages_nothing(
    values: Any, kind: type[Exception], words: str, daemon: RunningDaemon, tmp_path: Path
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 1.0}, update=1)
    with pytest.raises(kind, match=re.escape(words)) as raised:
        run.log(values, update=2)
    assert len(str(raised.value)) < 300
    run.log({"loss": 2.0, "other": 3}, update=2)
    run.finish(30)
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries == {"loss": {1: 1.0, 2: 2.0}, "other": {2: 3}}


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones((), device="meta"), torch.ones(1).to_mkldnn(), numpy.ones(2)]
)
def test_a_refused_value_is_named_each_time(value: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    """Also once its type is known as one of numbers."""
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": torch.tensor(1.0), "b": numpy.ones(1)}, update=1)
    for update in (2, torch.tensor(2), None):
        said = r"'loss' of (update 2|the next update): .* Nothing of it was logged"
        with pytest.raises(errors.UnsupportedValue, match=re.compile(said, re.DOTALL)):
            run.log({"a": torch.tensor(1.0), "loss": value}, update=update)
    run.finish(30)
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1.0}, "b": {1: 1.0}}


@pytest.mark.parametrize(
    "update", ["7", 1.5, [], 1 << 63, pytest.param(10**5000, id="huge"), pytest.param("x" * 100_000, id="long")]
)
def test_non_scalar_update_is_rejected(update: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    with pytest.raises(errors.UnsupportedValue, match="update") as raised:
        run.log({"a": 1.0}, update=update)
    assert len(str(raised.value)) < 300
    run.log({"a": 1.0}, update=torch.tensor(3))
    assert run.last_update == 3 and type(run.last_update) is int
    run.close()


def test_many_new_keys_in_one_update(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({f"{i:0900}": i for i in range(1000)}, update=1)
    run.finish(30)
    assert len(torch.load(tmp_path / "r/tracker/entries.th")) == 1000


def test_an_update_that_the_daemon_refuses_is_not_silent(daemon: RunningDaemon, tmp_path: Path) -> None:
    """What only the daemon can know: nobody logs again, but the run is finished."""
    run = noether_writer.open_run(tmp_path, "r")
    other = Raw(daemon.socket)
    other.open_run(tmp_path, log=True)
    run.log({"a": 1.0}, update=1)
    with pytest.raises(errors.LogTakenOver):
        run.finish(30)
    other.close()
    run.close()


def test_what_can_not_be_pickled_is_named(daemon: RunningDaemon, tmp_path: Path) -> None:
    class Holder:
        def __init__(self) -> None:
            self.hook = open(os.devnull)  # noqa: SIM115

    run = noether_writer.open_run(tmp_path, "r")
    with pytest.raises(Exception, match="pickle") as raised:
        run.save("net", "t", {"w": torch.ones(3), "more": [1, {"fn": lambda: 1}]})
    if sys.version_info >= (3, 11):
        [note] = raised.value.__notes__
        assert "net_cp=t_model.th was not sent, and an older one stays as it is" in note
        assert note.endswith("what can't be pickled is obj['more'][1]['fn']")
    held: dict[str, Any] = {}
    held["itself"] = held
    with pytest.raises(TypeError, match="pickle"):
        run.save("net", "t", {"itself": held, "bad": open(os.devnull)})  # noqa: SIM115
    run.save("net", "t", {"w": 1}).wait(10)
    run.close()


def test_a_run_of_another_process(daemon: RunningDaemon, tmp_path: Path) -> None:
    import pickle

    run = noether_writer.open_run(tmp_path, "r")
    with pytest.raises(TypeError, match="open one in the other process"):
        pickle.dumps(run)
    run.close()


def test_a_closed_run_takes_nothing(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.close()
    for act in (lambda: run.log({"a": 1}, update=1), lambda: run.save("n", "t", {}), lambda: run.values("a")):
        with pytest.raises(errors.DaemonUnavailable, match="this run is closed, and nothing more is sent"):
            act()


# Runs that were there before


def test_a_run_id_that_has_a_log(daemon: RunningDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"a": 1}, update=5)
    assert caplog.messages == []
    noether_writer.open_run(tmp_path, "r").close()
    assert "run r has a log already" in caplog.text and "It is kept beside the new one" in caplog.text
    caplog.clear()
    noether_writer.open_run(tmp_path, "r", resume_at=5).close()
    assert caplog.messages == []


def test_resuming_what_is_not_there(daemon: RunningDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with noether_writer.open_run(tmp_path, "r", resume_at=100) as run:
        assert "resume_at=100, but the log of run r is empty" in caplog.text
        run.log({"a": 1}, update=5)
    caplog.clear()
    noether_writer.open_run(tmp_path, "r", resume_at=100).close()
    assert "resume_at=100, but the log of run r ends at update 5" in caplog.text


def test_resuming_from_a_broken_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    entries = tmp_path / "r/tracker/entries.th"
    entries.parent.mkdir(parents=True)
    entries.write_text("broken")
    with pytest.raises(errors.StorageError, match="it is left as it is") as raised:
        noether_writer.open_run(tmp_path, "r", resume_at=1)
    assert str(raised.value).count(str(entries)) == 1 and raised.value.errno == errno.EIO
    assert entries.read_text() == "broken"


@needs_root
def test_a_directory_of_another_user(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing in the end is not what was refused at first."""
    os.chmod(short_directory, 0o755)
    mine = short_directory / "mine"
    mine.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    path = mine / "s"
    daemon = daemon_of_nobody(path)
    raw = Raw(str(path))
    answer = raw.open_run(short_directory / "deep" / "er")
    assert answer["code"] == "bad-path" and answer["errno"] == errno.EACCES
    assert f"create {short_directory}/deep: Permission denied; the daemon writes as uid 65534" in answer["message"]
    raw.close()
    daemon.terminate()
    assert daemon.wait(20) == 0


# Storage that refuses, and daemons that die


def test_a_stalled_save_says_it_once_and_when_it_is_over(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    daemon = RunningDaemon(str(short_directory / "s"))
    try:
        (disk / "filler").write_bytes(bytes(1 << 20))
        run = noether_writer.open_run(disk, "r")
        ticket = run.save("net", "t", {"w": torch.zeros(400_000)})
        # The daemon tries more than once.
        monkeypatch.setattr(noether_writer.session, "LOOK_SECONDS", 1)
        # With a timeout, and by looking without one.
        for timeout in (2, None):
            words = r"No space left on device. The daemon keeps it in memory"
            with pytest.raises(errors.CheckpointStalled, match=words) as raised:
                run.finish(timeout)
            assert raised.value.__cause__ is None
        with pytest.raises(errors.CheckpointStalled, match=words) as raised:
            ticket.wait(0.1)
        assert str(raised.value).count("net_cp=t_model.th") == 1
        said = [message for message in caplog.messages if "storage refuses for now" in message]
        assert len(said) == 1 and "free space or correct the permissions" in said[0]
        (disk / "filler").unlink()
        ticket.wait(10)
        assert caplog.messages[-1] == f"storage accepts again: {ticket.paths[0]} is durable"
        run.close()
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_refused_file_is_named_once(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    path = tmp_path / "r/checkpoints/net_cp=t_model.th"
    path.mkdir()
    with pytest.raises(errors.StorageError) as raised:
        run.save("net", "t", {"a": 1}).wait(10)
    assert str(raised.value).count(str(path)) == 1 and raised.value.filename == str(path)
    run.close()


CAUGHT = """
import sys, noether_writer
run = noether_writer.open_run(sys.argv[1], "r")
(run.directory / "checkpoints/net_cp=t_model.th").mkdir()
(run.directory / "checkpoints/net_cp=u_model.th").mkdir()
# In this order: a save raises what an earlier one has come to by then.
good, bad = run.save_as([noether_writer.Target("net", "v", {})]), run.save("net", "t", {"a": 1})
try:
    bad.wait(20)
except noether_writer.NoetherWriterError:
    pass
good.wait(20)
if len(sys.argv) > 2:
    try:
        run.save("net", "u", {"a": 1})
    except noether_writer.NoetherWriterError:
        # Of the first one, as the contract says.
        run.save("net", "u", {"a": 1})
"""


def test_what_was_raised_is_not_said_again_at_the_end(daemon: RunningDaemon, tmp_path: Path) -> None:
    for index, more in enumerate(([], ["unseen"])):
        command = [sys.executable, "-c", CAUGHT, str(tmp_path / str(index)), *more]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0
        assert result.stderr.count("\n") == len(more), result.stderr
        assert ("net_cp=u_model.th: Is a directory" in result.stderr) == bool(more)


LOST = """
import os, signal, sys, time, noether_writer
run = noether_writer.open_run(sys.argv[1], "r")
run.log({"a": 1}, update=1)
run.flush(10)
os.environ["NOETHER_WRITER_DAEMON"] = "/bin/false"
os.kill(int(sys.argv[2]), signal.SIGKILL)
while not run._core.away_seconds:
    time.sleep(0.01)
try:
    run.save("net", "t", {"a": 1}).wait(0.1)
except noether_writer.errors.WaitTimeout as error:
    print(error)
run.log({"a": 2}, update=2)
run.log({"a": 2}, update=3)
"""


def test_what_is_lost_with_this_process_is_named(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_EXIT_TIMEOUT", "0.5")
    command = [sys.executable, "-c", LOST, str(tmp_path), str(daemon.process.pid)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert re.search(r"not durable after 0.1 s: the daemon has been away for .* kept in this process", result.stdout)
    words = (
        "LOST with this process, the daemon is away: net_cp=t_model.th, the last 2 updates of the log. Older files stay"
    )
    # Beside it there may be the warning that the daemon is away.
    said = [line for line in result.stderr.splitlines() if line.startswith("noether-writer: ")]
    assert said == [f"noether-writer: run r: {words}"], result.stderr


def test_reconnecting_leaves_nothing_open(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    before = open_files()
    for update in (2, 3, 4):
        # As a daemon that ends it.
        run._core.detach()
        run.log({"a": 1}, update=update)
        assert len(run.values("a")) == update
    assert open_files() == before
    run.close()


def test_a_save_that_the_daemon_cannot_read(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, and is not sent again: the connection and what else goes over it are as they were."""
    monkeypatch.setattr(noether_writer.run, "_check_targets", lambda targets: None)
    run = noether_writer.open_run(tmp_path, "r")
    name: Any = 7
    ticket = run.save(name, "t", {"a": 1})
    with pytest.raises(errors.ProtocolError, match=r"the member targets\[0\].name has the wrong type.*bad-layout"):
        ticket.wait(30)
    run.log({"a": 1}, update=1)
    run.save("n", "t", {"a": 1}).wait(30)
    run.finish(30)
    assert run._core.connection == 1
    run.close()


def test_swift_says_the_same(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer() -> list[str]:
        command = [SWIFT_TRAINER, "mistakes", tmp_path]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    closed = "this run is closed, and nothing more is sent: open it again to continue it"
    assert trainer() == [
        'the key "" has 0 bytes; a key must have 1 to 1024',
        f'the key "{"k" * 40}" has 2000 bytes; a key must have 1 to 1024',
        "a is twice in update 2: nothing of it was logged",
        "update 0 is not larger than the last one, 1: nothing of it was logged",
        "update 2 and the names of its keys have more than 1048576 bytes, and at most that many fit into one: write "
        "long texts to a file, use shorter keys, or log some in another update",
        closed,
        closed,
    ]
    entries = torch.load(tmp_path / "mistakes/tracker/entries.th")
    assert len(entries) == 301 and entries["key299"] == {1: 299} and entries["after"] == {2: 1}

    plain = tmp_path / "plain"
    plain.write_text("a person's own")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", "relative")
    assert "must be an absolute path" in trainer()[0]
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(plain))
    if len(str(plain)) < 107:
        assert "is not a socket, and is left as it is" in trainer()[0]
    assert plain.read_text() == "a person's own"


# The command line


def test_the_command_line_without_a_daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "none"))
    for command in ("status", "runs", "wait", "drain", "metrics"):
        result = cli(command)
        assert result.returncode == 3 and f"no daemon listens on {short_directory}/none" in result.stderr
        assert "nothing trains here now" in result.stderr
    result = cli("show", "r")
    assert result.returncode == 4 and "An ended run is named by its directory" in result.stderr
    assert "noether-writer runs" not in result.stderr


# What is written about them


def test_each_error_has_an_entry() -> None:
    page = (ROOT / "docs/ERRORS.md").read_text()
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.NoetherWriterError)
    ]
    assert len(classes) > 15
    entries = re.findall(r"^### (.*)\n\n(.*?)(?=\n^##)", page, re.S | re.M)
    named = set(re.findall(r"`([A-Za-z.]+)`", " ".join(title for title, _ in entries)))
    for title, entry in entries:
        for part in ("What happened", "What was kept", "What to do"):
            assert f"- **{part}:** " in entry, f"docs/ERRORS.md, {title}: nothing says {part}"
    for cls in classes:
        assert cls.__doc__ and len(cls.__doc__) < 400, cls
        if cls is not errors.NoetherWriterError:
            assert cls.__name__ in named, f"docs/ERRORS.md has no entry for {cls.__name__}"
    swift = (ROOT / "Sources/NoetherWriterClient/NoetherWriterError.swift").read_text()
    cases = re.findall(r"^        case (\w+)$", swift, re.M)
    assert len(cases) > 8
    for case in cases:
        assert f".{case}" in named, f"docs/ERRORS.md has no entry for NoetherWriterError.Code.{case}"
    source = (ROOT / "Sources/noether-writer/NoetherWriter.swift").read_text()
    for code in {"0", "1", "64", *re.findall(r"ExitCode\((\d+)\)", source)}:
        assert f"| `{code}` | " in page, f"docs/ERRORS.md does not name the exit status {code}"


def test_each_code_of_the_wire_has_an_entry() -> None:
    source = (ROOT / "Sources/Wire/WireError.swift").read_text()
    [body] = re.findall(r"enum Code.*?\n\n", source, re.S)
    found = re.findall(r'case `?(\w+)`?(?: = "([\w-]+)")?', body)
    codes = {explicit or name for name, explicit in found}
    assert len(codes) > 20
    protocol = (ROOT / "docs/PROTOCOL.md").read_text()
    [section] = re.findall(r"^## 7\. Errors\n(.*?)(?=^## )", protocol, re.S | re.M)
    rows = dict(re.findall(r"^\| ([\w-]+) \| (?:yes|no) \| (.*) \|$", section, re.M))
    assert set(rows) == codes
    for code, row in rows.items():
        assert row.count(" | ") == 1, f"{code} has no cell that says what to do"
    assert codes >= (set(errors._BY_CODE) - {errors.LOG_DAMAGED}) | set(errors._OF_VERSIONS)


def test_a_ticket_learns_that_its_save_is_durable_when_nobody_holds_the_run(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    # The session ends with its last save, in the middle of a look at it or not.
    for number in range(100):
        noether_writer.open_run(tmp_path, f"r{number}").save("net", "t", {"w": torch.ones(16)}).wait(20)


def test_flush_returns_when_the_daemon_holds_all_of_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        daemon.hold()
        run.log({"loss": 1.0}, update=1)
        ticket = run.save("net", "t", {"w": torch.ones(16)})
        with pytest.raises(errors.WaitTimeout, match=r"has not taken 1 update and 1 save within 0\.05 s"):
            run.flush(0.05)
        daemon.process.send_signal(signal.SIGCONT)
        run.flush(20)
        assert ticket.accepted
        run.flush()
    with pytest.raises(errors.WaitTimeout), noether_writer.open_run(tmp_path, "s") as run:
        daemon.hold()
        try:
            run.log({"loss": 1.0}, update=1)
            run.flush(0)
        finally:
            daemon.process.send_signal(signal.SIGCONT)


def test_flush_says_what_the_daemon_refuses(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    other = noether_writer.open_run(tmp_path, "r", rank=1)
    other.rank = 0
    other._session.core.log({"loss": 1.0}, 1, None, None, False)
    with pytest.raises(errors.NoetherWriterError):
        other.flush(20)
    other.flush(20)
    run.flush(20)
    other.close()
    run.close()


def test_open_run_says_that_it_waits_for_a_stopped_daemon(
    daemon: RunningDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noether_writer.open_run(tmp_path, "first").close()
    daemon.hold()

    class Continue(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            daemon.process.send_signal(signal.SIGCONT)

    handler = Continue()
    logger = logging.getLogger("noether_writer")
    logger.addHandler(handler)
    try:
        # It answers when it is said that it does not.
        noether_writer.open_run(tmp_path, "second").close()
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        logger.removeHandler(handler)
    assert re.search(r"run second: the daemon at .* has not answered for 1 s: it is stopped", caplog.text)


def test_a_daemon_that_is_slower_than_the_trainer_is_waited_for_and_a_stopped_one_is_not(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_QUEUE_BYTES", "20000")
    values = {f"key{number}": float(number) for number in range(20)}
    run = noether_writer.open_run(tmp_path, "r")
    for update in range(1, 5001):
        run.log(values, update=update)
    assert "no more are kept" not in caplog.text
    run.flush(20)
    daemon.hold()
    try:
        while "no more are kept" not in caplog.text:
            run.log(values)
        for _ in range(10):
            run.log(values)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    # An update that was not kept has its number all the same: the rows after the gap have theirs.
    step = run.last_update
    run.flush(20)
    run.log({"key0": 7.0})
    run.finish(20)
    found = torch.load(tmp_path / "r/tracker/entries.th")["key0"]
    assert list(found)[:5000] == list(range(1, 5001))
    assert found[step + 1] == 7.0 and step not in found
    assert re.search(r"the log of run r has a gap: \d+ updates could not be kept", caplog.text)
    assert len(found) + int(re.search(r"a gap: (\d+) updates", caplog.text)[1]) == step + 1
    run.close()


def test_a_caught_failure_keeps_no_objects_alive(daemon: RunningDaemon, tmp_path: Path) -> None:
    class Big:
        pass

    def fail(call: Callable[[], object]) -> weakref.ref[Big]:
        big = Big()
        try:
            call()
        except errors.NoetherWriterError:
            return weakref.ref(big)
        raise AssertionError("it did not fail")

    run = noether_writer.open_run(tmp_path, "r")
    (tmp_path / "r/checkpoints/net_cp=t_model.th").mkdir()
    gc.collect()
    gc.disable()
    try:
        references = [
            fail(lambda: run.save("net", "t", {"w": torch.ones(3)}).wait(20)),
            fail(lambda: run.log({"a": 1.0}, update=-1) or run.log({"a": 1.0}, update=-2)),
        ]
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
    run.close()


def test_a_handler_that_waits_for_a_lock_of_the_application_holds_up_no_session(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    lock = threading.Lock()
    is_called = threading.Event()

    class Locked(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_called.set()
            with lock:
                pass

    handler, logger = Locked(), logging.getLogger("noether_writer")
    run = noether_writer.open_run(tmp_path, "r")
    logger.addHandler(handler)
    try:
        with lock:
            daemon.process.kill()
            daemon.process.wait()
            # Nobody can start another one: the keeper says so.
            executable = os.environ.pop("NOETHER_WRITER_DAEMON")
            os.environ["NOETHER_WRITER_DAEMON"] = "/nowhere"
            run.log({"loss": 1.0}, update=1)
            assert is_called.wait(30)
            os.environ["NOETHER_WRITER_DAEMON"] = executable
            ticket = run.save("net", "t", {"w": torch.ones(3)}, snapshot="overlap")
            run.finish(30)
            assert ticket.durable
    finally:
        logger.removeHandler(handler)
        os.environ["NOETHER_WRITER_DAEMON"] = DAEMON
    run.close()
