# SPDX-License-Identifier: Apache-2.0
"""Sharded state through torch.distributed.checkpoint, with real ranks on gloo."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import DAEMON, RunningDaemon
from harness import until
from noether_writer import dcp
from noether_writer.errors import DamagedCheckpoint, NoetherWriterError, StorageError, WaitTimeout
from noether_writer.partials import OWNER
from ranks import Server, pattern
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("ranks"))
    yield server
    server.end()


@pytest.mark.parametrize("kind, world", [("fsdp", 3), ("tp", 2), ("hsdp", 4), ("2d", 4)])
def test_a_model_that_ranks_have_saved_is_loaded_by_others_and_by_stock_torch(
    daemon: RunningDaemon, ranks: Server, tmp_path: Path, kind: str, world: int
) -> None:
    """FSDP2, tensor parallel, FSDP2 with replicas, and two of them at once, each with its optimizer: saved at one
    number of ranks, and loaded at others as FSDP2 or as it was, each bit equal."""
    path = tmp_path / "ck"
    assert ranks.run("save_model", path, world, [daemon.socket], kind=kind) == [None] * world
    is_whole(path)
    assert [each.name for each in tmp_path.iterdir()] == ["ck"]
    # What several ranks have is written once.
    written = sum(each.stat().st_size for each in path.glob("*.distcp"))
    assert written < 4 * 3 * (65 * 130 + 130 + 130 * 7 + 7) + (1 << 17)
    for others in (2, 4):
        assert ranks.run("load_model", path, others, [daemon.socket], kind="fsdp") == [None] * others
    assert ranks.run("load_model", path, world, [daemon.socket], kind=kind) == [None] * world
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert found["step"] == 2 and torch.equal(found["plain"], torch.arange(5) + 2)
    for name, value in found["model"].items():
        assert torch.equal(value, pattern(f".model.{name}", value.shape))


def test_one_process_saves_and_a_flipped_bit_raises_and_an_old_partial_directory_is_removed(
    daemon: Any, tmp_path: Path
) -> None:
    path = tmp_path / "ck"
    old = tmp_path / f".ck.partial-{'0' * 32}"
    old.mkdir()
    (old / "__0_0.distcp").write_bytes(b"half")
    (old / ".noether_writer_owner").write_text('{"node": "another", "pid": 1}')
    values = {"a": torch.arange(1000.0), "view": torch.arange(100)[::2], "text": "words"}
    dcp.save(values, path).wait()
    assert sorted(each.name for each in tmp_path.glob(".ck.*")) == []
    target = {"a": torch.zeros(1000), "view": torch.zeros(50, dtype=torch.int64), "text": ""}
    torch_dcp.load(target, storage_reader=torch_dcp.FileSystemReader(path), no_dist=True)
    assert torch.equal(target["a"], values["a"]) and torch.equal(target["view"], values["view"])
    assert target["text"] == "words"

    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"a in .*__0_0\.distcp is not what was saved"):
        dcp.load(target, path)


def test_a_save_survives_the_daemon(daemon: RunningDaemon, tmp_path: Path) -> None:
    """What it had taken is sent to the next one, and the older checkpoint stays whole until then."""
    path = tmp_path / "c"
    dcp.save({"w": torch.ones(1000), "step": 1}, path).wait()
    daemon.hold()
    ticket = dcp.save({"w": torch.full((1000,), 2.0), "step": 2}, path)
    until(lambda: list(tmp_path.glob(".c.partial-*")))
    found: dict[str, Any] = {"w": torch.zeros(1000), "step": 0}
    torch_dcp.load(found, checkpoint_id=path, no_dist=True)
    assert found["step"] == 1
    daemon.crash()
    ticket.wait()
    dcp.load(found, path)
    assert found["step"] == 2 and torch.equal(found["w"], torch.full((1000,), 2.0))
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


def test_what_stands_in_the_way_of_the_name_fails_the_save(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "c"
    daemon.hold()
    ticket = dcp.save({"w": torch.ones(1000)}, path)
    until(lambda: list(tmp_path.glob(".c.partial-*")))
    path.write_text("a file of somebody else")
    daemon.process.send_signal(signal.SIGCONT)
    with pytest.raises(StorageError, match="c"):
        ticket.wait()
    assert path.read_text() == "a file of somebody else"


class Box:
    """An object that only pickle knows."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and torch.equal(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]


def odd_state(factor: int = 1) -> dict[str, Any]:
    torch.manual_seed(factor)
    weight = torch.randn(33, 17)
    whole = torch.arange(1000.0) * factor
    return {
        "tied": {"a": weight, "b": weight},
        "views": [whole[3:900:7], whole[10:20], whole.view(10, 100).t(), whole.expand(2, 1000)],
        "scalar": torch.tensor(3.5 * factor),
        "empty": torch.empty(0),
        "empty2": torch.empty(3, 0, 2, dtype=torch.int16),
        "parameter": torch.nn.Parameter(torch.randn(5) * factor),
        "grad": torch.randn(4, requires_grad=True) * factor,
        "float8": torch.randn(12).to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(7).bfloat16(),
        "complex": torch.randn(6, dtype=torch.complex64).conj(),
        "negative": torch.randn(6, dtype=torch.complex64).conj().imag,
        "bool": torch.randn(9) > 0,
        "uint16": torch.arange(9).to(torch.uint16),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "nested": {"list": [1, {"deep": (torch.ones(2) * factor, "x")}], "none": None},
        "object": Box(torch.ones(3) * factor),
        "bytes": b"raw" * factor,
        "big": torch.randn(1 << 18),
    }


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in leaves(each, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, each in enumerate(value) for k, v in leaves(each, f"{name}.{key}").items()}
    return {name: value}


def emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: emptied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(emptied(each) for each in value)
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return None


def assert_equal(found: Any, expected: Any) -> None:
    a, b = leaves(found), leaves(expected)
    assert a.keys() == b.keys()
    for key, value in b.items():
        if isinstance(value, torch.Tensor):
            assert a[key].dtype == value.dtype, key
            same = a[key].detach(), value.detach()
            if value.dtype.itemsize == 1:
                same = tuple(each.contiguous().view(torch.uint8) for each in same)  # type: ignore[assignment]
            assert torch.equal(*same), key
        else:
            assert a[key] == value, key


def is_whole(path: Path) -> None:
    """What the manifest says is so, of every byte."""
    files = json.loads((path / dcp.MANIFEST).read_text())["files"]
    # The owner's file stays if rank 0 died after the commit.
    assert {each.name for each in path.iterdir()} - {OWNER} == {*files, dcp.MANIFEST}
    for name, entry in files.items():
        content = (path / name).read_bytes()
        assert (len(content), zlib.crc32(content)) == (entry["length"], entry["crc32"])
        for offset, length, crc in entry["items"]:
            assert zlib.crc32(content[offset : offset + length]) == crc


@pytest.mark.parametrize("way", ["save", "dcp.save", "dcp.async_save"])
def test_all_kinds_of_values_are_what_the_stock_reader_finds(daemon: Any, tmp_path: Path, way: str) -> None:
    """Views, tied tensors, types of a byte, without elements or dimensions, objects: by each way, also with the plan of
    an earlier save. The state may change as soon as the call has returned."""
    path = tmp_path / "ck"
    for factor in (1, 2):
        state, expected = odd_state(factor), odd_state(factor)
        if way == "save":
            ticket = dcp.save(state, path)
        elif way == "dcp.save":
            torch_dcp.save(state, storage_writer=dcp.StorageWriter(path), no_dist=True)
        else:
            future: Any = torch_dcp.async_save(state, storage_writer=dcp.StorageWriter(path), no_dist=True)
        for each in leaves(state).values():
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel():
                each.data.zero_()
        if way == "save":
            assert isinstance(ticket, noether_writer.Ticket)
            ticket.wait()
            assert ticket.durable and ticket.done and ticket.accepted and ticket.error is None
            assert ticket.path == str(path) and ticket.bytes_done == ticket.bytes_total > ticket.nbytes > 1 << 20
        elif way == "dcp.async_save":
            future.result()
        is_whole(path)
        for reader in (torch_dcp.FileSystemReader(path), dcp.StorageReader(path)):
            found = emptied(expected)
            torch_dcp.load(found, storage_reader=reader, no_dist=True)
            assert_equal(found, expected)
    # One archive inside is one that torch.save has written, and unzip accepts.
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == "big":
            content = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
            assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    assert [each.name for each in tmp_path.iterdir()] == ["ck"]


def test_saves_that_are_not_waited_for_come_in_order(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Two to one path, by each way, while the daemon stands still; and a load waits for the last one."""
    path = tmp_path / "c"
    daemon.hold()
    tickets = [dcp.save({"w": torch.full((1000,), float(step)), "step": step}, path) for step in (1, 2)]
    other = dcp.save({"w": torch.ones(3)}, tmp_path / "other")
    assert not any(each.done or each.durable or each.accepted for each in (*tickets, other))
    with pytest.raises(WaitTimeout, match="c is not durable after 0"):
        tickets[0].wait(0.1)
    daemon.process.send_signal(signal.SIGCONT)
    futures: list[Any] = [
        torch_dcp.async_save(
            {"w": torch.full((1000,), float(step)), "step": step}, storage_writer=dcp.StorageWriter(path), no_dist=True
        )
        for step in (3, 4)
    ]
    last = dcp.save({"w": torch.full((1000,), 5.0), "step": 5}, path)
    last.wait()
    assert all(each.durable for each in (*tickets, other))
    for future in futures:
        assert future.done() and future.exception() is None
    found: dict[str, Any] = {"w": torch.zeros(1000), "step": 0}
    dcp.load(found, path)
    assert found["step"] == 5 and bool((found["w"] == 5).all())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "other"]


def test_one_writer_object_serves_many_saves(daemon: RunningDaemon, tmp_path: Path) -> None:
    writer = dcp.StorageWriter(tmp_path / "first")
    futures: list[Any] = []
    for step in range(4):
        state = {"w": torch.full((1000,), float(step)), "step": step}
        futures.append(
            torch_dcp.async_save(state, checkpoint_id=tmp_path / f"c{step}", storage_writer=writer, no_dist=True)
        )
        state["w"].zero_()
    torch_dcp.save({"w": torch.full((1000,), 4.0), "step": 4}, checkpoint_id=tmp_path / "c4", storage_writer=writer)
    for future in futures:
        future.result()
    for step in range(5):
        found: dict[str, Any] = {"w": torch.zeros(1000), "step": 0}
        dcp.load(found, tmp_path / f"c{step}")
        assert found["step"] == step and bool((found["w"] == step).all())


def test_a_directory_that_is_no_checkpoint_is_not_replaced(daemon: RunningDaemon, tmp_path: Path) -> None:
    state = {"w": torch.ones(10)}
    results = tmp_path / "results"
    results.mkdir()
    (results / "thesis.tex").write_text("all of it")
    with pytest.raises(StorageError, match=r"results holds thesis\.tex, which is no part of a checkpoint"):
        dcp.save(state, results).wait()
    link = tmp_path / "link"
    link.symlink_to(results)
    with pytest.raises(StorageError, match="is a link"):
        dcp.save(state, link).wait()
    assert (results / "thesis.tex").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    dcp.save(state, tmp_path / "empty").wait()
    # One of torch's own writer is replaced.
    torch_dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    dcp.save(state, tmp_path / "stock").wait()
    is_whole(tmp_path / "stock")
    with pytest.raises(StorageError, match=r"Parent directory .*/nowhere does not exist"):
        dcp.save(state, tmp_path / "nowhere" / "c")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "link", "results", "stock"]


def test_another_process_saving_to_the_same_path_gets_an_error(
    daemon: RunningDaemon, ranks: Server, tmp_path: Path
) -> None:
    """As long as its rank 0 lives: the lock is the kernel's, on whatever node."""
    path = tmp_path / "c"
    daemon.hold()
    ticket = dcp.save({"w": torch.ones(10)}, path)
    until(lambda: list(tmp_path.glob(".c.partial-*")))
    ended = ranks.run("save", path, 2, [daemon.socket], step=1)
    assert all(
        "StorageError: another process saves to" in each and f"process {os.getpid()} on" in each for each in ended
    )
    daemon.process.send_signal(signal.SIGCONT)
    ticket.wait()
    assert ranks.run("save", path, 2, [daemon.socket], step=2) == [None, None]
    found = {"step": 0}
    dcp.load(found, path)
    assert found == {"step": 2}


SAID = ("the planner has failed", "KeyboardInterrupt", "TypeError: cannot pickle", "not be copied on this rank")


def test_a_rank_that_raises_is_told_to_all_and_leaves_nothing(
    daemon: RunningDaemon, ranks: Server, tmp_path: Path
) -> None:
    """In the planner, on one rank, before the save is made and while it writes; the older checkpoint stays."""
    path = tmp_path / "c"
    assert ranks.run("save", path, 2, [daemon.socket], step=1) == [None, None]
    for what in ("copy", "local_plan", "resolve", "interrupted"):
        for rank in (0, 1):
            ended = ranks.run("raises", path, 2, [daemon.socket], at=what, rank=rank)
            assert all(any(words in each for words in SAID) for each in ended), ended
            is_whole(path)
            found = {"step": 0}
            dcp.load(found, path)
            assert found == {"step": 1}
    assert ranks.run("save", path, 2, [daemon.socket], step=2) == [None, None]
    until(lambda: [each.name for each in tmp_path.iterdir()] == ["c"])


def test_asynchronous_saves_in_a_process_of_their_own(daemon: RunningDaemon, ranks: Server, tmp_path: Path) -> None:
    path = tmp_path / "c"
    (ended,) = ranks.run("in_a_process", path, 1, [daemon.socket])
    assert ended is None
    is_whole(path)
    found = {"w": torch.zeros(1000), "step": 0}
    dcp.load(found, path)
    assert found["step"] == 2 and bool((found["w"] == 2).all())


def test_a_flipped_bit_anywhere_names_the_tensor_and_the_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "c"
    state = {"small": torch.ones(3), "object": Box(torch.ones(2)), "large": torch.randn(40000), "text": "words"}
    dcp.save(state, path).wait()
    file = path / "__0_0.distcp"
    whole = file.read_bytes()
    items = json.loads((path / dcp.MANIFEST).read_text())["files"][file.name]["items"]
    names = {
        info.offset: index.fqn for index, info in torch_dcp.FileSystemReader(path).read_metadata().storage_data.items()
    }
    for offset, length, _ in items:
        for at in {offset, offset + 100, offset + length // 2, offset + length - 30, offset + length - 1}:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(DamagedCheckpoint, match=rf"{names[offset]} in .*__0_0\.distcp is not what was saved"):
                dcp.load(emptied(state), path)
    file.write_bytes(whole[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"in .*__0_0\.distcp is not what was saved"):
        dcp.load(emptied(state), path)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp is missing, and .* in it"):
        dcp.load(emptied(state), path)
    file.write_bytes(whole)
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(metadata[:50] + bytes([metadata[50] ^ 1]) + metadata[51:])
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is not what was saved"):
        dcp.load(emptied(state), path)
    (path / ".metadata").write_bytes(metadata)
    dcp.load(emptied(state), path)


def test_what_is_left_of_saves_to_other_paths_goes_when_it_is_old(daemon: RunningDaemon, tmp_path: Path) -> None:
    def make(name: str, *, is_old: bool) -> Path:
        made = tmp_path / f".{name}-{os.urandom(16).hex()}"
        made.mkdir()
        (made / OWNER).write_text("{}")
        if is_old:
            os.utime(made, (1e9, 1e9))
        return made

    old = [make("step-1.partial", is_old=True), make("step-2.new", is_old=True), make("step-3.trash", is_old=True)]
    young, foreign = make("step-4.partial", is_old=False), make("step-5.other", is_old=True)
    (tmp_path / ".partial-x").mkdir()
    dcp.save({"w": torch.ones(10)}, tmp_path / "step-6").wait()
    until(lambda: not any(each.exists() for each in old))
    kept = {".partial-x", young.name, foreign.name, "step-6"}
    until(lambda: {each.name for each in tmp_path.iterdir()} == kept)


def test_an_empty_state_and_a_planner_of_ones_own(daemon: RunningDaemon, tmp_path: Path) -> None:
    class Halves(torch_dcp.DefaultSavePlanner):
        """Writes something else than the state has."""

        def transform_object(self, write_item: Any, object: Any) -> Any:
            found = super().transform_object(write_item, object)
            return (found / 2).bfloat16().float() if isinstance(found, torch.Tensor) else found

    dcp.save({}, tmp_path / "empty").wait()
    is_whole(tmp_path / "empty")
    dcp.load({}, tmp_path / "empty")
    dcp.save({"w": torch.full((1000,), 8.0), "s": 3}, tmp_path / "halves", planner=Halves()).wait()
    found = {"w": torch.zeros(1000), "s": 0}
    dcp.load(found, tmp_path / "halves")
    assert bool((found["w"] == 4).all()) and found["s"] == 3
    is_whole(tmp_path / "halves")
    with pytest.raises(NoetherWriterError, match="use_collectives=False"):
        torch_dcp.save({}, storage_writer=dcp.StorageWriter(tmp_path / "c"), use_collectives=False)


def test_a_forked_child_saves_too(daemon: RunningDaemon, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(10)}, tmp_path / "parent").wait()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            dcp.save({"w": torch.ones(10)}, tmp_path / "child").wait(20)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    is_whole(tmp_path / "child")
    dcp.save({"w": torch.ones(10)}, tmp_path / "parent").wait()


def test_a_run_knows_its_sharded_checkpoints(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The newest whole one is found, also by programs without torch; `keep_last` removes what is older."""
    with noether_writer.open_run(tmp_path, "run") as run:
        folder = Path(run.directory) / "checkpoints"
        folder.mkdir(exist_ok=True)
        run.save("net", "U5", {"w": torch.ones(2)}).wait()
        for step in (9, 10, 11, 100):
            state = {"w": torch.full((1000,), float(step)), "step": step}
            last = dcp.save(state, folder / f"step-{step}", keep_last=3)
        dcp.save(state, folder / "net_cp=E2_U200_S800").wait()
        last.wait()
    (folder / f".step-500.partial-{'0' * 32}").mkdir()
    (folder / f".step-500.partial-{'0' * 32}" / ".metadata").write_bytes(b"half")
    until(lambda: not (folder / "step-9").exists())
    found = noether_writer.checkpoints(run.directory)
    assert [(each.name, each.kind, each.update) for each in found] == [
        ("net", "model", 5),
        ("step", "sharded", 10),
        ("step", "sharded", 11),
        ("step", "sharded", 100),
        ("net", "sharded", 200),
    ]
    newest = noether_writer.latest(run.directory)
    assert newest == found[-1] and newest is not None and (newest.epoch, newest.sample) == (2, 800)
    assert newest.nbytes > 4000 and newest.tag == "E2_U200_S800"
    assert noether_writer.latest(run.directory, kind="sharded", name="step") == found[3]
    assert noether_writer.latest(run.directory, kind="optim") is None
    # A damaged one is left out.
    file = folder / "net_cp=E2_U200_S800" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (folder / "step-100" / "__0_0.distcp").unlink()
    assert noether_writer.latest(run.directory) == found[2]
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        dcp.save({}, tmp_path / "c", keep_last=0)


def test_the_command_line_verifies_sharded_checkpoints(daemon: RunningDaemon, tmp_path: Path) -> None:
    cli = Path(DAEMON).with_name("noether-writer")
    dcp.save({"w": torch.ones(1000)}, tmp_path / "c").wait()
    found = subprocess.run([cli, "verify", tmp_path / "c"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"{tmp_path / 'c'}: ok, 2 files\n")
    file = tmp_path / "c" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = subprocess.run([cli, "verify", tmp_path / "c"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (
        1,
        f"{tmp_path / 'c'}: BROKEN: __0_0.distcp is not what was saved\n",
    )


def test_a_torch_that_is_too_old_is_named() -> None:
    program = """
import torch.distributed.checkpoint.filesystem as filesystem
del filesystem.CURRENT_DCP_VERSION
import noether_writer.dcp
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"ImportError: noether_writer.dcp needs a newer torch than {torch.__version__}" in result.stderr
