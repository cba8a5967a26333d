# SPDX-License-Identifier: Apache-2.0
"""A run has one owner, whatever the spelling of its path, the daemon or the pid namespace, and no longer than its
process lives."""

from __future__ import annotations

import itertools
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon, faulty_daemon
from harness import until
from hostile import Raw, memfd, save_payload, target
from noether_writer import errors, frames
from refused_calls import ALLOW, refuse, under_filter

Trainer = subprocess.Popen[str]

RUN = """
import os, sys, torch, noether_writer
try:
    run = noether_writer.open_run(sys.argv[1], "r", rank=int(sys.argv[2]))
except noether_writer.NoetherWriterError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit()
print("opened", flush=True)
for line in sys.stdin:
    try:
        exec(line)
        print("done", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
run.close()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., Trainer]]:
    """Starts trainers that open run r, and then do what they are told."""
    started: list[Trainer] = []

    def start(root: str | Path, rank: int = 0, *before: str, **variables: str) -> Trainer:
        started.append(
            subprocess.Popen(
                [*before, sys.executable, "-c", RUN, str(root), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | variables,
            )
        )
        return started[-1]

    yield start
    for trainer in started:
        trainer.kill()
        trainer.wait()


def said(trainer: Trainer) -> str:
    assert trainer.stdout is not None
    return trainer.stdout.readline().strip()


def tell(trainer: Trainer, line: str) -> str:
    assert trainer.stdin is not None
    trainer.stdin.write(line + "\n")
    trainer.stdin.flush()
    return said(trainer)


def save(tag: str, value: int) -> str:
    return f"run.save('net', '{tag}', {{'part': torch.full((3,), {value})}}).wait(30)"


# The name of a file


def test_a_name_belongs_to_the_rank_that_saves_it_first(
    start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    ranks = [start(tmp_path, rank) for rank in (0, 1)]
    assert [said(rank) for rank in ranks] == ["opened"] * 2
    assert tell(ranks[0], save("U20", 0)) == "done"
    refused = tell(ranks[1], save("U20", 1))
    assert refused.startswith("NameInUse rank 0 has saved net_cp=U20_model.th in run r")
    # What to do, in three ways.
    assert all(words in refused for words in ("rank into the name", "rank 0 only", "noether_writer.dcp")), refused
    file = tmp_path / "r/checkpoints/net_cp=U20_model.th"
    assert torch.equal(torch.load(file)["part"], torch.zeros(3, dtype=torch.int64))
    # Its own names are each rank's, again and again; the run goes on for both.
    for rank in (0, 1, 0, 1):
        assert tell(ranks[rank], save(f"rank{rank}", rank)) == "done"
    assert tell(ranks[0], save("U20", 5)) == "done"
    assert torch.load(file)["part"].tolist() == [5, 5, 5]
    assert len(list(file.parent.iterdir())) == 3


def test_a_name_is_free_when_nobody_has_the_run_open(
    start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    """The next job of a run may have its ranks elsewhere."""
    for rank in (1, 0):
        trainer = start(tmp_path, rank)
        assert said(trainer) == "opened"
        assert tell(trainer, save("U20", rank)) == "done"
        trainer.communicate(timeout=60)


def test_a_save_under_two_names_takes_neither_if_one_belongs_to_another_rank(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    first, second = Raw(daemon.socket), Raw(daemon.socket)
    first.open_run(tmp_path, rank=0, world_size=2)
    second.open_run(tmp_path, rank=1, world_size=2, session="f" * 32, log=False)
    content = b"\x80\x02K\x01."
    sequences = itertools.count(1)

    def send(client: Raw, *tags: str) -> list[str]:
        fd = memfd(content=bytes(128) + content * 2)
        targets = [target(name="net", tag=tag, pickle_offset=128 + 5 * index) for index, tag in enumerate(tags)]
        events = client.save(save_payload([100], 128, targets, sequence=next(sequences)), [fd])
        os.close(fd)
        return [event["error"]["code"] if event["event"] == "failed" else event["event"] for event in events]

    assert "durable" in send(first, "latest")
    assert send(second, "U1", "latest") == ["name-in-use", "released"]
    assert [p.name for p in (tmp_path / "r/checkpoints").iterdir()] == ["net_cp=latest_model.th"]
    # Nor does the refused save leave a claim.
    assert "durable" in send(first, "U1")
    first.close()
    second.close()


# The run


@pytest.mark.parametrize("spelling", ["link", "link/../out"])
def test_another_spelling_is_the_same_run(
    spelling: str, start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    first = start(out)
    assert said(first) == "opened"
    assert tell(first, "run.log({'a': 1}, update=1)") == "done"
    assert said(start(tmp_path / spelling)).startswith(f"RunInUse run r is held by process {first.pid} on ")
    # Another rank of the job may spell it so, and is in the same run.
    other = start(f"{tmp_path}/{spelling}", 1)
    assert said(other) == "opened"
    assert tell(other, save("latest", 1)) == "done"
    assert tell(first, save("latest", 0)).startswith("NameInUse rank 1 has saved")
    assert tell(first, "run.finish()") == "done"
    assert torch.load(out / "r/tracker/entries.th") == {"a": {1: 1}}


def test_debug_and_a_run_in_debug_are_the_same_run(
    start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    first = start(tmp_path / "debug")
    assert said(first) == "opened"
    with pytest.raises(errors.RunInUse, match=f"process {first.pid}"):
        noether_writer.open_run(tmp_path, "r", debug=True)


@pytest.mark.parametrize("logs", [True, False])
def test_two_daemons_never_share_a_run(
    logs: bool, start: Callable[..., Trainer], daemon: RunningDaemon, short_directory: Path, tmp_path: Path
) -> None:
    """From open_run on, with a log or without."""
    (tmp_path / "link").symlink_to(tmp_path)
    other = RunningDaemon(str(short_directory / "other"))
    first = start(tmp_path)
    assert said(first) == "opened"
    if logs:
        assert tell(first, "run.log({'a': 1}, update=1)") == "done"
    for root in (tmp_path, tmp_path / "link"):
        refused = said(start(root, NOETHER_WRITER_SOCKET=other.socket))
        assert refused.startswith("RunInUse run r is held by another daemon"), refused
    first.communicate(timeout=60)
    # With its end the other daemon may have it.
    second = start(tmp_path, NOETHER_WRITER_SOCKET=other.socket)
    assert said(second) == "opened"
    assert said(start(tmp_path)).startswith("RunInUse run r is held by another daemon")
    second.communicate(timeout=60)
    assert other.stop() == 0


def test_ranks_of_one_job_may_have_two_daemons(
    start: Callable[..., Trainer], daemon: RunningDaemon, short_directory: Path, tmp_path: Path
) -> None:
    """As on two nodes with one file system."""
    other = RunningDaemon(str(short_directory / "other"))
    ranks = [start(tmp_path, 0), start(tmp_path, 1, NOETHER_WRITER_SOCKET=other.socket)]
    for number, rank in enumerate(ranks):
        assert said(rank) == "opened"
        assert tell(rank, save(f"rank{number}", number)) == "done"
        rank.communicate(timeout=60)
    assert len(list((tmp_path / "r/checkpoints").iterdir())) == 2
    assert other.stop() == 0


# The lease


def without_pidfds(command: Sequence[str]) -> list[str]:
    """On a kernel that knows neither SO_PEERPIDFD (Linux 6.5) nor pidfd_open (5.3)."""
    operations = [
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 3, 0, 434),  # pidfd_open
        (0x15, 0, 3, 55),  # getsockopt
        (0x20, 0, 0, 32),  # its option
        (0x15, 2, 1, 77),  # SO_PEERPIDFD
        (0x06, 0, 0, refuse(38)),  # ENOSYS
        (0x06, 0, 0, ALLOW),
        (0x06, 0, 0, refuse(92)),  # ENOPROTOOPT
    ]
    return under_filter(operations, 434, 38, command)


@pytest.fixture(params=["pidfds", "no pidfds"])
def any_daemon(
    request: pytest.FixtureRequest, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[bytes]]:
    command = [DAEMON, "--socket", str(short_directory / "s")]
    if request.param == "no pidfds":
        if platform.machine() != "x86_64":
            pytest.skip("numbers of calls are those of x86-64")
        command = without_pidfds(command)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until((short_directory / "s").exists)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    yield process
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.usefixtures("any_daemon")
def test_a_run_belongs_to_one_process_on_any_kernel(start: Callable[..., Trainer], tmp_path: Path) -> None:
    first = start(tmp_path)
    assert said(first) == "opened"
    assert said(start(tmp_path)).startswith(f"RunInUse run r is held by process {first.pid} on ")
    # The same process may.
    assert tell(first, "other = noether_writer.Run(sys.argv[1], 'r', log=False)") == "done"
    first.kill()
    first.wait()
    assert said(start(tmp_path)) == "opened"


FORKS = """
import os, sys, time, noether_writer
run = noether_writer.open_run(sys.argv[1], "r")
for update in range(1, 51):
    run.log({"a": update}, update=update)
if os.fork() == 0:
    # A data loader's worker: it inherits every descriptor, and stays.
    print(os.getpid(), flush=True)
    time.sleep(600)
sys.stdin.read()
"""


@pytest.mark.usefixtures("any_daemon")
def test_a_dead_trainers_worker_does_not_hold_its_run(start: Callable[..., Trainer], tmp_path: Path) -> None:
    script = FORKS.replace(
        "if os.fork()", "[os.dup(int(n)) for n in os.listdir('/proc/self/fd') if _is_socket(n)]\nif os.fork()"
    ).replace(
        "run = ",
        "def _is_socket(n):\n"
        "    try: return os.readlink('/proc/self/fd/' + n).startswith('socket:')\n"
        "    except OSError: return False\n"
        "run = ",
        1,
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(said(trainer))
    try:
        trainer.kill()
        trainer.wait()
        # All that it had sent is in its file, though its worker has the socket.
        until((tmp_path / "r/tracker/entries.th").exists)
        assert list(torch.load(tmp_path / "r/tracker/entries.th")["a"])[:1] == [1]
        assert said(start(tmp_path)) == "opened"
        assert Path(f"/proc/{worker}").exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_restart_waits_for_the_end_of_the_trainer_before_it(
    start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    first = start(tmp_path)
    assert said(first) == "opened"
    next_one = start(tmp_path)
    client = Raw(daemon.socket)
    # Its open_run has come: one connection each, and this one.
    until(lambda: client.ask(frames.STATUS, {})["connections"] == 3)
    client.close()
    first.kill()
    first.wait()
    assert said(next_one) == "opened"


@pytest.mark.skipif(os.geteuid() != 0, reason="pid namespaces are root's")
def test_two_containers_are_two_processes(start: Callable[..., Trainer], short_directory: Path, tmp_path: Path) -> None:
    """To a daemon in a container of its own each of them is process 0."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"]).returncode:
        pytest.skip("no pid namespaces here")
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = str(short_directory / "socket")
    daemon = subprocess.Popen([*container, DAEMON, "--socket", path], stderr=subprocess.DEVNULL)
    try:
        until(Path(path).exists)
        first = start(tmp_path, 0, *container, NOETHER_WRITER_SOCKET=path)
        assert said(first) == "opened"
        assert tell(first, "run.log({'a': 1}, update=1)") == "done"
        refused = said(start(tmp_path, 0, *container, NOETHER_WRITER_SOCKET=path))
        assert refused.startswith("RunInUse run r is held by a process of another pid namespace"), refused
        # The same process may open it again; and it ends with that process.
        assert tell(first, "run = noether_writer.open_run(sys.argv[1], 'r')") == "done"
        first.kill()
        first.wait()
        assert said(start(tmp_path, 0, *container, NOETHER_WRITER_SOCKET=path)) == "opened"
    finally:
        daemon.kill()
        daemon.wait()


def test_a_run_waits_for_its_trainer_and_is_given_to_nobody_else(
    start: Callable[..., Trainer], daemon: RunningDaemon, tmp_path: Path
) -> None:
    """The daemon dies; the trainer is stopped, so that it can't reconnect yet."""
    first = start(tmp_path)
    assert said(first) == "opened"
    assert tell(first, "run.log({'a': 1}, update=1)") == "done"
    assert tell(first, "while run._core.kept_rows: pass") == "done"
    first.send_signal(signal.SIGSTOP)
    daemon.crash()
    assert said(start(tmp_path)).startswith(f"RunInUse run r is held by process {first.pid} on ")
    first.send_signal(signal.SIGCONT)
    assert tell(first, "run.log({'a': 2}, update=2)") == "done"
    assert tell(first, "run.finish()") == "done"
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 1, 2: 2}}


def test_a_process_opens_its_run_as_often_as_it_likes(daemon: RunningDaemon, tmp_path: Path) -> None:
    """From many threads, by many spellings."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            root = tmp_path / ("out" if number % 2 else "link")
            run = noether_writer.Run(root, "r", log=False)
            run.save(f"net{number}", "t", {"w": torch.ones(3)}).wait(30)
            run.close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(list((tmp_path / "out/r/checkpoints").iterdir())) == 8


def test_a_rank_does_not_wait_for_the_file_of_another(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file that is begun hangs its disk queue for good; each rank has its own lane to the others."""
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=hang@1", monkeypatch)
    ranks = [noether_writer.open_run(tmp_path, "r", rank=rank) for rank in range(2)]
    hangs = ranks[0].save("net", "rank0", {"a": torch.ones(3)})
    until(lambda: hangs.accepted and list((tmp_path / "r/checkpoints").iterdir()))
    waits = ranks[0].save("net", "rank0-next", {"a": torch.ones(3)})
    for number in range(3):
        ranks[1].save("net", f"rank1-{number}", {"a": torch.ones(3)}).wait(60)
    assert waits.accepted and not waits.written and not hangs.durable
    daemon.process.kill()
    for run in ranks:
        run._session.end()
