# SPDX-License-Identifier: Apache-2.0
"""Buffers are charged to the trainer's job. A job with a memory limit waits, or is told; it is not killed for them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
from conftest import DAEMON, faulty_daemon, not_sanitized
from harness import until
from noether_writer import _cgroup, errors

MIB = 1 << 20
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Group:
    """A memory group of the machine's own, made for one test."""

    def __init__(self) -> None:
        is_v2 = "memory" in (V2 / "cgroup.controllers").read_text() if (V2 / "cgroup.controllers").exists() else False
        self.limit_file = "memory.max" if is_v2 else "memory.limit_in_bytes"
        self.path = (V2 if is_v2 else V1) / f"noether-writer-{uuid.uuid4().hex[:8]}"
        try:
            self.path.mkdir()
            (self.path / self.limit_file).write_text(str(1 << 40))
        except OSError as error:
            pytest.skip(f"memory groups cannot be made here: {error}")

    def run(self, script: str, *arguments: str, limit: int) -> subprocess.CompletedProcess[str]:
        (self.path / self.limit_file).write_text(str(limit))
        return subprocess.run(self._command(script, *arguments), capture_output=True, text=True, timeout=120)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self._command(script, *arguments), stdin=pipe, stdout=pipe, text=True)

    def _command(self, script: str, *arguments: str) -> list[str]:
        enter = f"import os; open({str(self.path / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        return [sys.executable, "-c", enter + script, *arguments]

    def used(self) -> int:
        return int((self.path / self.limit_file.replace("limit", "usage").replace(".max", ".current")).read_text())


@pytest.fixture
def group() -> Iterator[Group]:
    found = Group()
    yield found
    found.path.rmdir()


PILE_UP = """
import sys, torch, noether_writer
from noether_writer.errors import PoolExhausted
run = noether_writer.open_run(sys.argv[1], "r")
weights = torch.ones(32 << 18)  # 32 MiB
try:
    for count in range(100):
        run.save("net", f"U{count}", {"w": weights})
except PoolExhausted as error:
    print(count, error)
run._session.end()
"""


RANK = """
import sys, torch, noether_writer
from noether_writer.errors import PoolExhausted
run = noether_writer.open_run(sys.argv[1], "r")
weights = torch.ones(100 << 18)  # 100 MiB
print("ready", flush=True)
sys.stdin.readline()
try:
    for count in range(100):
        run.save("net", f"U{count}", {"w": weights})
except PoolExhausted as error:
    print(count, error)
run._session.end()
"""


@not_sanitized("its memory is another")
def test_a_job_with_a_limit_is_told_before_it_is_killed(
    group: Group, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Storage takes nothing, so no buffer comes back.
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=hang", monkeypatch)
    monkeypatch.setenv("NOETHER_WRITER_POOL_TIMEOUT", "0.5")
    result = group.run(PILE_UP, str(tmp_path), limit=700 * MIB)
    assert result.returncode == 0, result.stderr[-500:]
    count, _, words = result.stdout.partition(" ")
    assert int(count) >= 2 and "of the memory of this job" in words
    daemon.process.kill()
    daemon.process.wait()


@not_sanitized("its memory is another")
def test_logs_stay_within_the_memory_of_the_daemon(
    group: Group, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is killed for its logs recovers them, and is killed again."""
    socket = str(short_directory / "socket")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", socket)
    monkeypatch.setenv("NOETHER_WRITER_WHEN_AWAY", "raise")
    (group.path / group.limit_file).write_text(str(64 * MIB))
    daemon = group.start("import sys; os.execv(sys.argv[1], sys.argv[1:])", DAEMON, "--socket", socket)
    until(Path(socket).exists)
    run = noether_writer.open_run(tmp_path, "r")
    # 4 million values, at 9 bytes each.
    with pytest.raises(errors.LogFull, match="log_bytes"):
        for update in range(1, 100_000):
            run.log({f"k{i}": float(update) for i in range(40)}, update=update)
        run.finish(100)
    run.close()
    daemon.terminate()
    assert daemon.wait(60) == 0


@not_sanitized("its memory is another")
def test_ranks_of_a_job_take_its_memory_in_turn(
    group: Group, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them see the same room at the same time."""
    daemon = faulty_daemon(str(short_directory / "socket"), "checkpoint.created=hang", monkeypatch)
    monkeypatch.setenv("NOETHER_WRITER_POOL_TIMEOUT", "2")
    (group.path / group.limit_file).write_text(str(1 << 40))
    ranks = [group.start(RANK, str(tmp_path / f"{rank}")) for rank in range(4)]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "ready\n"
    used = group.used()
    (group.path / group.limit_file).write_text(str(used + 400 * MIB))
    for rank in ranks:
        assert rank.stdin
        rank.stdin.write("\n")
        rank.stdin.flush()
    counts = []
    for rank in ranks:
        said, _ = rank.communicate(timeout=60)
        assert rank.returncode == 0, (rank.returncode, said, counts)
        count, _, words = said.partition(" ")
        assert "of the memory of this job" in words or "the memory limit of this job" in words
        counts.append(int(count))
    # 100 MiB each: as many as there is room for, whoever was faster.
    assert 2 <= sum(counts) <= 4
    daemon.process.kill()
    daemon.process.wait()


TOO_LARGE = """
import sys, torch, noether_writer
from noether_writer import _cgroup
from noether_writer.errors import PoolExhausted
run = noether_writer.open_run(sys.argv[1], "r")
state = {name: torch.ones(64 << 18) for name in "abc"}  # 192 MiB
used = (1 << 40) - _cgroup.room()
with open(sys.argv[2], "w") as limit:  # There is room for the tensors, and not for a copy of them.
    limit.write(str(used + (96 << 20)))
try:
    run.save("net", "a", state)
except PoolExhausted as error:
    print(error)
run.save("net", "small", {"w": torch.ones(1000)}).wait()
run.finish()
"""


@not_sanitized("its memory is another")
def test_a_save_that_can_never_fit_is_refused_at_once(
    group: Group, short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faulty_daemon(str(short_directory / "socket"), "none=slow", monkeypatch)
    result = group.run(TOO_LARGE, str(tmp_path), str(group.path / group.limit_file), limit=1 << 40)
    assert result.returncode == 0, result.stderr[-500:]
    assert "the memory limit of this job (its control group) leaves" in result.stdout
    assert daemon.stop() == 0


def tree(root: Path, cgroup: str, mounts: str, files: dict[str, object]) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, value in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return str(root)


UNIFIED = "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
SPLIT = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_no_limit(tmp_path: Path) -> None:
    assert _cgroup.room(str(tmp_path)) is None
    files = {"job/memory.max": "max", "job/memory.current": 5}
    assert _cgroup.room(tree(tmp_path, "0::/job\n", UNIFIED, files)) is None


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    files = {
        "job/step/memory.max": 1000 * MIB,
        "job/step/memory.current": 300 * MIB,
        "job/step/memory.stat": f"anon 5\nactive_file {MIB}\ninactive_file {99 * MIB}\nshmem {200 * MIB}",
        "job/memory.max": 900 * MIB,
        "job/memory.current": 850 * MIB,
    }
    root = tree(tmp_path, "1:name=systemd:/x\n0::/job/step\n", UNIFIED, files)
    assert _cgroup.room(root) == 50 * MIB
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("max")
    # The page cache of files could be given back; shared memory could not.
    assert _cgroup.room(root) == 800 * MIB


def test_cgroup_v1_and_an_absent_limit(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": 100 * MIB,
        "memory/job/memory.usage_in_bytes": 60 * MIB,
        "memory/job/memory.stat": f"active_file {MIB}\ntotal_active_file {10 * MIB}\ntotal_inactive_file 0",
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 900 * MIB,
    }
    root = tree(tmp_path, "4:memory:/job\n0::/\n", SPLIT + UNIFIED.replace("cgroup rw", "cgroup/unified rw"), files)
    assert _cgroup.room(root) == 50 * MIB


@pytest.mark.parametrize("path", ["/", "/../outside", "/docker/abc", "/docker/abc/../../x"])
def test_a_cgroup_namespace_shows_its_own_group_as_the_root(path: str, tmp_path: Path) -> None:
    mounts = UNIFIED.replace(" / ", " /docker/abc ", 1)
    files = {"memory.max": 100 * MIB, "memory.current": 40 * MIB}
    assert _cgroup.room(tree(tmp_path, f"0::{path}\n", mounts, files)) == 60 * MIB


def test_what_other_ranks_may_give_back_is_the_outermost_groups(tmp_path: Path) -> None:
    files = {
        "job/step/memory.max": 1000 * MIB,
        "job/step/memory.stat": f"shmem {20 * MIB}",
        "job/memory.max": 900 * MIB,
        "job/memory.stat": f"anon 5\nshmem {200 * MIB}\nactive_file 7",
        "memory.stat": f"shmem {999 * MIB}",
    }
    assert _cgroup.shared(tree(tmp_path / "v2", "0::/job/step\n", UNIFIED, files)) == 200 * MIB
    files = {
        "memory/job/memory.limit_in_bytes": 100 * MIB,
        "memory/job/memory.stat": f"shmem 5\ntotal_shmem {60 * MIB}",
    }
    assert _cgroup.shared(tree(tmp_path / "v1", "4:memory:/job\n", SPLIT, files)) == 60 * MIB
    assert _cgroup.shared(tree(tmp_path / "none", "0::/job\n", UNIFIED, {})) == 0


def test_a_rank_that_was_stopped_in_its_turn_does_not_hold_up_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, "0::/job\n", UNIFIED, {"job/memory.max": 100 * MIB})
    monkeypatch.setattr(_cgroup, "_TURN_SECONDS", 0.05)
    with _cgroup.one_at_a_time(root), _cgroup.one_at_a_time(root):
        pass


def test_memory_use_above_the_limit(tmp_path: Path) -> None:
    files = {"memory.max": 100 * MIB, "memory.current": 140 * MIB}
    assert _cgroup.room(tree(tmp_path, "0::/\n", UNIFIED, files)) == 0


def test_limits_of_this_machine_are_read(tmp_path: Path) -> None:
    found = _cgroup.room()
    assert found is None or 0 <= found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 64
