# SPDX-License-Identifier: Apache-2.0
"""The Python and the Swift library do the same: the same calls, the same files, the same errors in the same words.

Each test runs a script of calls with each library, on a daemon of its own, and compares every answer, the files, and
what was said to standard error. What is expected is written down once, for both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import until
from test_restore import metric

DRIVERS = {
    "python": [sys.executable, str(Path(__file__).parent / "both_clients.py")],
    "swift": [str(Path(DAEMON).parent / "SwiftTrainer"), "drive"],
}
# A name that each library has in its own spelling; the test has Swift's.
SPELLINGS = {"run_id": "runID", "stage_name": "stageName", "resume_at=": "resumeAt:", "resume_at": "resumeAt"} | {
    "recursive=True": "recursive: true",
    "\\0": "\\x00",
}


def plain(words: str, root: Path) -> str:
    """The words, whatever the library's spelling and the time they take."""
    for python, swift in SPELLINGS.items():
        words = words.replace(python, swift)
    # Python's save has the whole path only when the daemon has named it.
    words = words.replace(f"{root}/r/checkpoints/", "").replace(str(root), "ROOT")
    words = re.sub(r"resumeAt:(\d|, but)", r"resumeAt=\1", words.replace("resumeAt: ", "resumeAt:"))
    words = re.sub(r"away for \d+ s", "away for N s", words)
    return words.replace('"', "'").replace("\\\\", "\\")


class Client:
    """A process that does what each line asks."""

    def __init__(self, name: str, root: Path, within: tuple[str, ...] = ()) -> None:
        self.name = name
        self.root = root
        self.process = subprocess.Popen(
            [*within, *DRIVERS[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __call__(self, call: str, **request: Any) -> str | None:
        """What came of it, or the kind of the error and its words."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if call == "open":
            request.setdefault("root", str(self.root))
        for pair in request.get("values", []):
            # JSON does not tell 1.0 from 1.
            pair[1] = f"float:{pair[1]}" if isinstance(pair[1], float) else pair[1]
        self.process.stdin.write(json.dumps({"call": call} | request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line.startswith("{"), (line, self.process.stderr and self.process.stderr.read())
        answer = json.loads(line)
        if code := answer.get("code"):
            return f"{code}: {plain(answer['words'], self.root)}"
        value: str | None = answer.get("value")
        return value

    def ends(self) -> list[str]:
        """Returns what it has said to standard error."""
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        lines = [line for line in errors.splitlines() if line.startswith("noether-writer: ")]
        return [plain(line.removeprefix("noether-writer: "), self.root) for line in lines]

    def entries(self) -> Any:
        return torch.load(self.root / "r/tracker/entries.th", weights_only=True)


@pytest.fixture(params=list(DRIVERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(name: str, tmp_path: Path) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def start() -> Client:
        clients.append(Client(name, tmp_path))
        return clients[-1]

    yield start
    for client in clients:
        if client.process.poll() is None:
            client.process.kill()
            client.process.communicate()


Start = Callable[[], Client]
PART = "it becomes one part of a path. Nothing was written; choose another"


def net(tag: str = "t", **more: str) -> list[dict[str, str]]:
    return [{"name": "net", "tag": tag} | more]


def test_a_run_and_its_files(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    assert client("open") == f"{tmp_path}/r none"
    for update in (1, 2, 5):
        values = [["loss", 1 / update], ["step", update], ["ok", True], ["no", None], ["word", "\u00e4"]]
        assert client("log", values=values, update=update, epoch=0, sample=4 * update) == str(update)
    assert client("log", values=[["loss", -0.5], ["huge", "bytes:255"]]) == "6"
    both = [{"name": "net", "tag": "E0_U6_S24"}, {"name": "net", "tag": "latest"}]
    assert client("save", names=both, state={"number": 3, "count": 1000, "update": 6}) is None
    assert client("wait") is None
    paths = [f"{tmp_path}/r/checkpoints/net_cp={tag}_model.th" for tag in ("E0_U6_S24", "latest")]
    assert client("ticket") == f"true true none {json.dumps(paths)}"
    assert client("save", names=net("t", kind="optim"), state={"number": 4}) is None
    assert client("save", names=net("t", info="ema"), state={"number": 5}) is None
    assert client("wait_run") is None
    assert client("values", key="loss") == "1=1.0 2=0.5 5=0.2 6=-0.5"
    assert client("finish") is None and client("finish") is None
    entries = client.entries()
    assert list(entries) == ["epoch", "sample", "loss", "step", "ok", "no", "word", "huge"]
    assert entries["loss"] == {1: 1.0, 2: 0.5, 5: 0.2, 6: -0.5} and entries["step"] == {1: 1, 2: 2, 5: 5}
    assert entries["huge"][6].bit_length() == 8 * 254 + 1 and entries["sample"] == {1: 4, 2: 8, 5: 20}
    for path in paths:
        state = torch.load(path, weights_only=True)
        assert torch.equal(state["state_dict"]["weight"], torch.full((1000,), 3.0))
        assert state["training_iteration"] == {"epoch": 0, "update": 6, "sample": 0}
        assert client("load", path=path) == "1000 3.0" and client("log_update", path=path) == "6"
    files = {file.relative_to(tmp_path / "r").as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {
        "checkpoints/net_cp=E0_U6_S24_model.th",
        "checkpoints/net_cp=latest_model.th",
        "checkpoints/net_cp=t_optim.th",
        "checkpoints/net_ema_cp=t_model.th",
        "tracker/entries.th",
        *(["tracker/config.yaml"] if client.name == "python" and "tracker/config.yaml" in files else []),
        "tracker/summary.yaml",
    }
    follower = start()
    assert follower("subscribe", id="r") is None
    client("close")
    rows = [
        f"{update} epoch=0 sample={4 * update} loss={1 / update} step={update} ok=true no=none word=\u00e4"
        for update in (1, 2, 5)
    ]
    assert follower("events") == ", ".join([*rows, "6 loss=-0.5 huge=255 bytes", "finished"])
    assert client.ends() == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"id": "a/b"}, f"runID 'a/b' holds a slash; {PART}"),
        ({"id": ""}, f"runID '' is empty; {PART}"),
        ({"stage": ".."}, f"stageName '..' is a directory reference; {PART}"),
        ({"stage": "a\nb"}, f"stageName 'a\\nb' holds a control character; {PART}"),
        ({"id": "i" * 300}, f"runID '{'i' * 64}...' has 300 bytes, and at most 255 are possible; {PART}"),
    ],
)
def test_names_of_runs(
    options: dict[str, str], problem: str, start: Start, daemon: RunningDaemon, tmp_path: Path
) -> None:
    assert start()("open", **options) == f"refusedName: {problem}"
    assert list(tmp_path.iterdir()) == []


def test_names_of_files(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    client("open")
    long = "l" * 300
    for names, problem in [
        (net(name="../up"), f"the model name '../up' holds a slash; {PART}"),
        (net(""), f"the tag '' is empty; {PART}"),
        (net(info="a\nb"), f"info 'a\\nb' holds a control character; {PART}"),
        (
            net(long[:250]),
            f"the file name '{('net_cp=' + long)[:64]}...' has 266 bytes, and at most 255 are possible; {PART}",
        ),
        ([], "one save writes 1 to 4 files, not 0"),
        ([name for tag in "abcde" for name in net(tag)], "one save writes 1 to 4 files, not 5"),
        (net() + net("u") + net(), "two files of one save have the name net_cp=t_model.th"),
    ]:
        assert client("save", names=names, state={"number": 1}) == f"refusedName: {problem}"
    # Nothing of it is left for the calls that come after.
    assert client("log", values=[["a", 1]]) == "1"
    assert client("save", names=net(), state={"number": 1}) is None
    assert client("finish") is None
    assert {file.name for file in (tmp_path / "r/checkpoints").iterdir()} == {"net_cp=t_model.th"}


def test_what_cannot_be_logged(start: Start, daemon: RunningDaemon) -> None:
    client = start()
    client("open")
    assert client("log", values=[["a", 1]], update=10) == "10"
    order = "update 9 is not larger than the last one, 10: nothing of it was logged"
    assert client("log", values=[["a", 1]], update=9) == f"updateOrder: {order}"
    for values, problem in [
        ([["", 1]], "the key '' has 0 bytes; a key must have 1 to 1024"),
        ([["k" * 2000, 1]], f"the key '{'k' * 40}' has 2000 bytes; a key must have 1 to 1024"),
        (
            [["big", "bytes:256"]],
            "'big' of update 11: an integer of more than 255 bytes cannot be logged. Nothing of it was logged",
        ),
        ([[f"k{number}", 1] for number in range(16_385)], "update 11 has 16385 values; at most 16384 fit into one"),
        (
            [["text", "t" * (2 << 20)]],
            "update 11 and the names of its keys have more than 1048576 bytes, and at most "
            "that many fit into one: write long texts to a file, use shorter keys, or log some in another update",
        ),
    ]:
        assert client("log", values=values, update=11) == f"unsupportedValue: {problem}"
    assert client("log", values=[["a", 2]], update=11) == "11"
    assert client("log", values=[["a", 3]], update=(1 << 63) - 1) == str((1 << 63) - 1)
    assert client("finish") is None
    assert client.entries() == {"a": {10: 1, 11: 2, (1 << 63) - 1: 3}}


def test_the_same_update_again(start: Start, daemon: RunningDaemon) -> None:
    client = start()
    client("open")
    assert client("log", values=[["a", 1], ["b", 1]]) == "1"
    assert client("log", values=[["c", 2]], update=1) == "1"
    assert client("log", values=[["a", 3]], update=1) == "1"
    assert client("log", values=[["a", 4]]) == "2"
    assert client("log", values=[["a", 5]], update=2) == "2"
    client("finish")
    assert client.entries() == {"a": {1: 3, 2: 5}, "b": {1: 1}, "c": {1: 2}}
    assert client.ends() == [
        "a key was logged twice at one update of run r (the last is 1): its last value is kept. This is said once"
    ]


def test_after_the_end(start: Start, daemon: RunningDaemon) -> None:
    client = start()
    client("open")
    client("log", values=[["a", 1]])
    assert client("finish") is None
    assert client("log", values=[["a", 2]]) == "2"
    assert client("finish") is None and client("finish") is None
    assert client.entries() == {"a": {1: 1, 2: 2}}
    assert client("close") is None and client("close") is None
    closed = "runClosed: this run is closed, and nothing more is sent: open it again to continue it"
    assert client("log", values=[["a", 3]]) == closed
    assert client("save", names=net(), state={"number": 1}) == closed
    assert client("values", key="a") == closed
    assert client("finish") in (None, closed)
    assert client("wait_run") is None
    assert client.ends() == []


def test_a_rank_that_is_not_zero(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    assert client("open", rank=1) == f"{tmp_path}/r none"
    for _ in range(2):
        assert client("log", values=[["a", 1]], update=7) == "none"
    assert client("save", names=net("rank1"), state={"number": 1}) is None
    assert client("finish") is None
    assert not (tmp_path / "r/tracker/entries.th").exists()
    assert client.ends() == ["this is rank 1, and rank 0 writes the log of run r: nothing is logged here"]


def test_a_daemon_that_does_not_answer(start: Start, daemon: RunningDaemon) -> None:
    client = start()
    client("open")
    client("log", values=[["a", 1]])
    assert client("flush") is None
    daemon.hold()
    client("log", values=[["a", 1]])
    try:
        client("save", names=net(), state={"number": 1})
        kept = "what it has not taken is kept in this process and sent when it is back"
        found = client("flush", timeout=0.2)
        assert found == f"waitTimeout: the daemon has not taken 1 update and 1 save within 0.2 s; {kept}"
        late = "is not durable after 0.2 s; the daemon continues"
        assert client("wait", timeout=0.2) == f"waitTimeout: net_cp=t_model.th {late}"
        assert client("wait_run", timeout=0.2) == f"waitTimeout: net_cp=t_model.th {late}"
        for _ in range(2):
            late = client("finish", timeout=0.2)
            assert late == "waitTimeout: the daemon has not answered within 0.2 s; it still works"
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert client("flush") is None and client("wait") is None and client("finish") is None
    assert client.entries() == {"a": {1: 1, 2: 1}}


def test_a_daemon_that_is_away(
    start: Start, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", "/bin/false")
    monkeypatch.setenv("NOETHER_WRITER_EXIT_TIMEOUT", "0.2")
    client = start()
    client("open")
    daemon.process.kill()
    daemon.process.wait()
    client("log", values=[["a", 1]])
    client("save", names=net(), state={"number": 1})
    client("save", names=net("u"), state={"number": 1})
    kept = "what it has not taken is kept in this process and sent when it is back"
    away = "the daemon has been away for N s"
    assert client("wait", timeout=0.2) == f"waitTimeout: net_cp=u_model.th is not durable after 0.2 s: {away}; {kept}"
    assert client("finish", timeout=0.2) == f"waitTimeout: {away}, and the time is over; {kept}"
    assert client.ends()[-1:] == [
        "run r: LOST with this process, the daemon is away: net_cp=t_model.th, net_cp=u_model.th, the last update of "
        "the log. Older files stay"
    ]


def test_a_trainer_with_nothing_to_send_brings_no_daemon_back(
    start: Start, daemon: RunningDaemon, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = short_directory / "started"
    program = short_directory / "program"
    program.write_text(f'#!/bin/sh\ntouch {mark}\nexec {DAEMON} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", str(program))
    client = start()
    client("open")
    client("log", values=[["a", 1]])
    client("save", names=net(), state={"number": 1})
    assert client("finish") is None
    daemon.process.kill()
    daemon.process.wait()
    # It sees the end of its connection before the next daemon's socket.
    until(lambda: not Path(f"/proc/{daemon.process.pid}").exists())
    daemon.process = RunningDaemon(daemon.socket).process
    client("log", values=[["a", 2]])
    assert client("finish") is None
    assert client.entries() == {"a": {1: 1, 2: 2}}
    assert not mark.exists()
    assert client.ends() == []


def test_no_daemon(start: Start, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = f"{short_directory}/d/socket"
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", socket)
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", "/bin/false")
    client = start()
    # Neither starts a daemon to follow a run.
    assert client("subscribe", id="r") == (
        f"daemonNotFound: no daemon listens on {socket}: nothing trains here now, or NOETHER_WRITER_SOCKET names "
        "another socket"
    )
    assert client("open") == (
        f"daemonNotFound: no daemon listens on {socket}, and the one that was started (/bin/false) exited with "
        f"status 1 (its log is {short_directory}/d/daemon.log)"
    )
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", f"{short_directory}/none")
    assert start()("open") == (
        f"daemonNotFound: no daemon listens on {socket}, and NOETHER_WRITER_DAEMON names {short_directory}/none, which "
        "is not a program that can be run: set it to the path of noether-writerd, or unset it to use the one of PATH"
    )
    monkeypatch.setenv("NOETHER_WRITER_DAEMON", "/bin/false")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", "relative")
    assert start()("open") == (
        "wrongSocket: NOETHER_WRITER_SOCKET is 'relative', and must be an absolute path, because the daemon works in "
        "another directory"
    )
    plain_file = short_directory / "plain"
    plain_file.write_text("")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(plain_file))
    assert start()("open") == (
        f"wrongSocket: {plain_file} is not a socket, and is left as it is: set NOETHER_WRITER_SOCKET to another path"
    )


def test_a_full_disk(start: Start, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC", monkeypatch)
    client = start()
    client("open")
    client("log", values=[["a", 1]])
    client("save", names=net(), state={"number": 1})
    until(lambda: "No space" in str(client("wait", timeout=0.05)))
    kept = (
        "The daemon keeps it in memory and tries again: free space or correct the permissions; the write then completes"
    )
    found = client("wait", timeout=0.1)
    assert (
        found is not None and found.startswith("checkpointStalled: not durable yet: ") and found.endswith(f". {kept}")
    )
    assert found.count("net_cp=t_model.th") == 1
    assert client("wait_run", timeout=0.1) == found
    late = client("finish", timeout=0.1)
    assert late is not None and "No space left on device" in late and late.startswith("checkpointStalled: ")
    daemon.crash()
    assert client("finish") is None
    assert client.entries() == {"a": {1: 1}}
    refused, accepted = client.ends()
    assert refused.startswith("storage refuses for now: ") and refused.endswith(f"No space left on device. {kept}")
    assert accepted == "storage accepts again: net_cp=t_model.th is durable"
    daemon.stop()


def test_a_file_that_is_refused_for_good(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    """A directory that has a file's name is in its way. The failure is said once."""
    (tmp_path / "r/checkpoints/refused_cp=t_model.th/full").mkdir(parents=True)
    client = start()
    client("open")
    client("save", names=[{"name": "refused", "tag": "t"}], state={"number": 1})
    found = client("wait")
    assert found == "storage: rename over refused_cp=t_model.th: Is a directory"
    assert client("wait") == found
    assert str(client("ticket")).startswith("true false storage")
    assert client("log", values=[["a", 1]]) == "1"
    assert client("save", names=net(), state={"number": 1}) is None
    assert client("finish") is None
    # Nobody has waited for this one: the next save says it, and is not made.
    client("save", names=[{"name": "refused", "tag": "t"}], state={"number": 1})
    until(lambda: str(client("ticket")).startswith("true"))
    assert client("log", values=[["a", 2]]) == "2"
    assert client("save", names=net(), state={"number": 2}) == found
    assert client("save", names=net("u"), state={"number": 2}) is None
    assert client("finish") is None
    assert client.entries() == {"a": {1: 1, 2: 2}}
    assert client.ends() == []


@pytest.mark.parametrize("by", ["update", "auto"])
def test_a_training_is_resumed(by: str, start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    first = start()
    first("open")
    for update in range(1, 11):
        first("log", values=[["loss", 1 / update]], update=update)
        if update in (4, 6):
            first("save", names=net(f"E0_U{update}_S0"), state={"number": update, "update": update})
    first("finish")
    assert first.ends() == []
    second = start()
    options = {"resume": True} if by == "auto" else {"resumeAt": 6}
    assert second("open", **options) == f"{tmp_path}/r 6"
    order = "update 5 is not larger than the last one, 6: nothing of it was logged"
    assert second("log", values=[["loss", 0]], update=5) == f"updateOrder: {order}"
    assert second("log", values=[["loss", 7.0]]) == "7"
    second("finish")
    assert second.ends() == []
    assert second.entries() == {"loss": {update: 1 / update for update in range(1, 7)} | {7: 7.0}}
    third = start()
    assert third("open", resumeAt=100) == f"{tmp_path}/r 100"
    third("finish")
    assert third.ends() == ["resumeAt=100, but the log of run r ends at update 7 (ROOT/r): it continues from there"]
    fourth = start()
    assert fourth("open") == f"{tmp_path}/r none"
    assert fourth.ends() == [
        "run r has a log already: ROOT/r/tracker/entries.th. It is kept beside the new one, under a name with a "
        "number. To continue that log instead, open the run with resumeAt:, the last update to keep"
    ]


def test_which_checkpoints_there_are(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    client("open", keepLast=2, keepEvery=3)
    for update in range(1, 9):
        client("log", values=[["loss", abs(update - 6.4)]], update=update)
        client("save", names=net(f"E0_U{update}_S0"), state={"number": update, "update": update})
        client("wait")
    client("save", names=net("latest", info="ema"), state={"number": 9})
    client("finish")
    run = str(tmp_path / "r")
    until(lambda: len(list((tmp_path / "r/checkpoints").iterdir())) == 5)
    found = client("checkpoints", path=run)
    tags = re.findall(r"_cp=(\w+)_model.th net", str(found))
    assert sorted(tags) == ["E0_U3_S0", "E0_U6_S0", "E0_U7_S0", "E0_U8_S0", "latest"]
    size = (tmp_path / "r/checkpoints/net_cp=E0_U8_S0_model.th").stat().st_size
    assert (
        client("latest", path=run) == f"{run}/checkpoints/net_cp=E0_U8_S0_model.th net model none E0_U8_S0 8 0 0 {size}"
    )
    best = client("best", path=run, key="loss")
    assert best is not None and " E0_U6_S0 6 0 0 " in best
    assert " E0_U3_S0 3 0 0 " in str(client("best", path=run, key="loss", mode="max"))
    for client_path in (str(tmp_path / "none"),):
        assert client("checkpoints", path=client_path) == "" and client("latest", path=client_path) is None


def test_a_run_that_another_process_has(start: Start, daemon: RunningDaemon) -> None:
    first, second = start(), start()
    first("open")
    first("log", values=[["a", 1]])
    found = second("open")
    assert found is not None and found.startswith("runInUse: ") and str(first.process.pid) in found
    assert re.sub(r"\d{2,}", "N", found) == re.sub(r"\d{2,}", "N", found)
    assert second("subscribe", id="none") is not None
    assert str(second("subscribe", id="none")).startswith("unknownRun: ")
    assert first("log", values=[["a", 2]]) == "2" and first("finish") is None
    assert first.entries() == {"a": {1: 1, 2: 2}}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NOETHER_WRITER_POOL_BYTES", "8 GiB", "must be a number of bytes, in digits, not '8 GiB'"),
        ("NOETHER_WRITER_WHEN_AWAY", "stop", "must be keep-training or raise, not 'stop'"),
        ("NOETHER_WRITER_KEEP_LAST", "two", "must be a number of checkpoints, in digits, not 'two'"),
        ("RANK", "first", "must be this process's number in its job, not 'first'"),
    ],
)
def test_variables(
    variable: str, value: str, words: str, start: Start, daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    client = start()
    found = client("open") or ""
    if not found.startswith("invalid"):
        # Python reads the pool's variables when something is saved.
        found = client("save", names=net(), state={"number": 1}) or ""
    assert found == f"invalidVariable: {variable} {words}"


@pytest.mark.parametrize("policy", ["keep-training", "raise"])
def test_a_log_that_is_full(policy: str, start: Start, short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_LOG_BYTES_PER_RUN", str(1 << 16))
    monkeypatch.setenv("NOETHER_WRITER_WHEN_AWAY", policy)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    daemon = RunningDaemon(str(short_directory / "s"))
    client = start()
    client("open")
    found: set[str] = set()
    for update in range(1, 8000):
        answer = client("log", values=[["loss", 1.0]], update=update)
        if answer != str(update):
            found.add(str(answer).partition(":")[0])
            break
    finished = client("finish")
    said = client.ends()
    entries = client.entries()["loss"]
    assert list(entries) == list(range(1, len(entries) + 1)) and 10 < len(entries) < 7999
    if policy == "raise":
        assert found == {"logFull"}
    else:
        assert finished is None
        assert sum("nothing more is logged" in words for words in said) == 1
    assert daemon.stop() == 0


def test_acknowledged_updates_that_are_gone(name: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """A journal that was damaged while no daemon had it open: the trainer lives, and its `finish` says so."""
    client = Client(name, tmp_path)
    client("open")
    for update in range(1, 1001):
        client("log", values=[["loss", float(update)]], update=update)
    client("flush")
    daemon.process.kill()
    daemon.process.wait()
    journal = tmp_path / "r/tracker/entries.journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    daemon.process = RunningDaemon(daemon.socket).process
    client("log", values=[["loss", 1.5]], update=1001)
    found = client("finish")
    assert found is not None and found.startswith("logDamaged: the log of run r has lost updates"), found
    assert client("finish") is None
    said = [words for words in client.ends() if "has lost updates" in words]
    assert len(said) == 1 and "entries.N.journal" in said[0]
    kept = client.entries()["loss"]
    last = int(re.search(r"it ends at update (\d+)", said[0])[1])  # type: ignore[index]
    assert kept == {update: float(update) for update in range(1, last + 1)} | {1001: 1.5}
    assert 0 < last < 1000 and (tmp_path / "r/tracker/entries.1.journal").read_bytes() == data


HAS_NAMESPACES = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0


@pytest.mark.skipif(not HAS_NAMESPACES, reason="mount namespaces need root here")
@pytest.mark.parametrize("is_killed", [False, True], ids=["daemon-lives", "daemon-is-killed"])
def test_files_are_where_the_trainer_looks(is_killed: bool, name: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """The daemon sees another file system than a trainer with private mounts."""
    output = tmp_path / "out"
    output.mkdir()
    client = Client(name, output, ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(output)))
    client("open")
    client("log", values=[["a", 1]])
    client("save", names=net(), state={"number": 1})
    client("save_file", path=f"{output}/net.pt", state={"number": 2})
    assert client("flush") is None and client("wait") is None and client("wait_files") is None
    if is_killed:
        daemon.crash()
    client("log", values=[["a", 2]])
    client("save", names=net("u"), state={"number": 3})
    client("save_file", path=f"{output}/other.pt", state={"number": 4})
    assert client("finish") is None and client("wait_files") is None
    assert client("values", key="a") == "1=1 2=2"
    for path, number in [
        ("r/checkpoints/net_cp=t_model.th", 1),
        ("r/checkpoints/net_cp=u_model.th", 3),
        ("net.pt", 2),
        ("other.pt", 4),
    ]:
        assert client("load_file", path=f"{output}/{path}") == f"4 {number}.0"
    client.ends()
    # Nothing of it is where the daemon would have looked.
    assert list(output.iterdir()) == []


# Files at any path


def test_files_at_any_path(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client, other = start(), start()
    path = tmp_path / "net.pt"
    for number in range(1, 6):
        assert client("save_file", path=str(path), state={"number": number, "count": 1000}) is None
    # Whoever loads it waits for what is on its way, in any process.
    assert other("load_file", path=str(path)) == "1000 5.0" and client("load_file", path=str(path)) == "1000 5.0"
    assert client("ticket") == f"true true none {json.dumps([str(path)])}"
    assert torch.equal(torch.load(path)["state_dict"]["weight"], torch.full((1000,), 5.0))
    subprocess.run(["unzip", "-tqq", path], check=True)
    # As torch.save names the records, by the path as it was given.
    assert "net/data.pkl" in subprocess.run(["unzip", "-l", path], capture_output=True, text=True).stdout
    # In order: the removal comes after the save before it, and before the save after it.
    client("save_file", path=str(path), state={"number": 6})
    client("remove_file", path=str(path))
    assert client("wait_files") is None and not path.exists()
    client("remove_file", path=str(path))
    client("save_file", path=str(path), state={"number": 7})
    assert client("wait_files") is None and client("load_file", path=str(path)) == "4 7.0"
    assert client.ends() == []


def test_a_file_comes_from_memory(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client, other = start(), start()
    path = tmp_path / "net.pt"
    client("save_file", path=str(path), state={"number": 5, "count": 1 << 19})
    assert client("wait_files") is None
    before = metric("restores_total")
    assert other("load_file", path=str(path)) == f"{1 << 19} 5.0"
    assert metric("restores_total") == before + 1
    # Somebody writes to it: it is read.
    path.touch()
    assert other("load_file", path=str(path)) == f"{1 << 19} 5.0"
    assert metric("restores_total") == before + 1
    # The next save is not what was given to the reader before.
    client("save_file", path=str(path), state={"number": 6, "count": 1 << 19})
    assert other("load_file", path=str(path)) == f"{1 << 19} 6.0"
    assert metric("restores_total") == before + 2
    assert client.ends() == []


def test_a_file_s_place_is_torch_save_s(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    (tmp_path / "there").mkdir()
    (tmp_path / "link.pt").symlink_to("there/real.pt")
    (tmp_path / "way").symlink_to("there")
    assert client("save_file", path=f"{tmp_path}/link.pt", state={"number": 1}) is None
    assert client("save_file", path=f"{tmp_path}/way/../there/./other.pt", state={"number": 2}) is None
    old = tmp_path / "there/old.pt"
    old.write_text("")
    old.chmod(0o640)
    assert client("save_file", path=str(old), state={"number": 3}) is None
    assert client("wait_files") is None
    assert (tmp_path / "link.pt").is_symlink() and torch.load(tmp_path / "there/real.pt")["state_dict"]["weight"][
        0
    ] == 1
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"real.pt", "other.pt", "old.pt"}
    assert old.stat().st_mode & 0o777 == 0o640
    changed = "Nothing was changed"
    for place, problem in [
        ("none/net.pt", f"storage: Parent directory ROOT/none does not exist. {changed}"),
        ("there", f"storage: ROOT/there is a directory. {changed}"),
        ("there/", f"storage: 'ROOT/there/' names a directory. {changed}"),
        ("there/old.pt/net.pt", f"storage: ROOT/there/old.pt is not a directory. {changed}"),
        ("n" * 256, f"storage: ROOT/{'n' * 256}: File name too long. {changed}"),
        ("a\0b", f"refusedName: the path 'ROOT/a\\x00b' holds a NUL; {changed.lower()}"),
        (
            ".pt",
            f"refusedName: invalid file name: ROOT/.pt: a name needs something before its last dot; {changed.lower()}",
        ),
    ]:
        found = client("save_file", path=f"{tmp_path}/{place}", state={"number": 1})
        assert found == problem, place
    os.mkfifo(tmp_path / "fifo")
    assert client("save_file", path=f"{tmp_path}/fifo", state={"number": 1}) == (
        "storage: ROOT/fifo is not a regular file: a save replaces the whole file, which would remove it. Use "
        f"torch.save. {changed}"
    )


def test_what_is_removed(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "in the way" / "full").mkdir(parents=True)
    client("save_file", path=f"{folder}/a.pt", state={"number": 1})
    assert client("remove_file", path=str(folder)) == (
        "storage: ROOT/folder is a directory: remove(path, recursive: true) removes it. Nothing was removed"
    )
    client("remove_file", path=f"{folder}/", recursive=True)
    assert client("wait_files") is None and not folder.exists()
    client("remove_file", path=str(folder), recursive=True)
    assert client("wait") is None
    # A removal that waits for a save which fails removes nothing, and says so.
    client("save_file", path=f"{tmp_path}/old.pt", state={"number": 1})
    folder.mkdir()
    client("wait_files")
    client("save_file", path=f"{folder}/new.pt", state={"number": 2})
    client("wait_files")
    client("remove_file", path=f"{tmp_path}/old.pt", after=[f"{folder}/new.pt"])
    assert client("wait") is None and not (tmp_path / "old.pt").exists()


def test_files_over_a_daemon_that_dies(start: Start, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = start()
    client("save_file", path=f"{tmp_path}/first.pt", state={"number": 1})
    client("wait_files")
    daemon.hold()
    for number in range(5):
        client("save_file", path=f"{tmp_path}/net.pt", state={"number": number})
        client("save_file", path=f"{tmp_path}/old{number}.pt", state={"number": number})
        client("remove_file", path=f"{tmp_path}/old{number}.pt", after=[f"{tmp_path}/net.pt"])
    late = client("wait_files", timeout=0.2)
    assert late is not None and late.startswith("waitTimeout: ") and "is not durable after 0.2 s" in late
    daemon.crash()
    assert client("wait_files") is None
    assert {file.name for file in tmp_path.iterdir()} == {"first.pt", "net.pt"}
    assert client("load_file", path=f"{tmp_path}/net.pt") == "4 4.0"
    assert client.ends() == []


def test_a_file_that_fails_is_said_once(
    start: Start, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC", monkeypatch)
    client = start()
    path = f"{tmp_path}/net.pt"
    client("save_file", path=path, state={"number": 1})
    until(lambda: "No space" in str(client("wait", timeout=0.05)))
    found = client("wait_files", timeout=0.1)
    assert found is not None and found.startswith("checkpointStalled: not durable yet: ") and found.count("net.pt") <= 1
    daemon.crash()
    assert client("wait_files") is None and client("load_file", path=path) == "4 1.0"
    daemon.stop()
