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
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import RunningDaemon, until
from noether_writer import dcp
from noether_writer.errors import DamagedCheckpoint, StorageError
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

RANK = """
import os, sys
import torch, torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from noether_writer import dcp
rank, world, what, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + sys.argv[5], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
def state(fill):
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(65, 130), torch.nn.Linear(130, 7))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=mesh)
    sharded = model.state_dict()
    if fill:
        for value in sharded.values():
            value.to_local().zero_()
    return sharded, plain
if what == "save":
    sharded, _ = state(False)
    for step in range(3):  # The later ones have a cached plan, and replace the checkpoint.
        dcp.save({"model": sharded, "step": step, "plain": torch.arange(5) + step}, path).wait()
    torch_dcp.save({"model": sharded, "step": 9, "plain": torch.arange(5)}, checkpoint_id=path + "-stock")
elif what == "killed":
    class Killed(dcp.StorageWriter):
        def write_data(self, plan, planner):
            result = super().write_data(plan, planner)
            if rank == 1:
                os.kill(os.getpid(), 9)
            return result
    sharded, _ = state(True)
    torch_dcp.save({"model": sharded, "step": 77, "plain": torch.arange(5)}, storage_writer=Killed(path))
else:
    for place, step in ((path, 2), (path + "-stock", 9)):
        sharded, plain = state(True)
        found = {"model": sharded, "step": 0, "plain": torch.zeros(5, dtype=torch.int64)}
        dcp.load(found, place)
        assert found["step"] == step
        for name, value in found["model"].items():
            assert torch.equal(value.full_tensor(), plain[name]), name
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(world: int, what: str, path: Path, tmp_path: Path) -> list[int]:
    meet = tmp_path / f"meet-{what}-{world}"
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), what, str(path), str(meet)], env=environment)
        for rank in range(world)
    ]
    return [rank.wait(300) for rank in ranks]


def test_a_state_that_three_ranks_have_saved_is_loaded_by_two_and_by_stock_torch(daemon: Any, tmp_path: Path) -> None:
    path = tmp_path / "ck"
    assert run_ranks(3, "save", path, tmp_path) == [0, 0, 0]
    assert not list(tmp_path.glob(".ck.partial-*"))
    # One rank is killed when its files are durable: the older checkpoint stays, whole.
    codes = run_ranks(2, "killed", path, tmp_path)
    assert codes[1] == -9 and codes[0] != 0
    assert len(list(tmp_path.glob(".ck.partial-*"))) == 1
    assert run_ranks(2, "load", path, tmp_path) == [0, 0]
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert found["step"] == 2 and torch.equal(found["plain"], torch.arange(5) + 2)


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
    assert {each.name for each in path.iterdir()} == {*files, dcp.MANIFEST}
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
