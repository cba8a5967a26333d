# SPDX-License-Identifier: Apache-2.0
"""Sharded state through torch.distributed.checkpoint, with real ranks on gloo."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import RunningDaemon, until
from noether_writer import dcp
from noether_writer.errors import DamagedCheckpoint, StorageError, UnsupportedValue
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
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old = tmp_path / f".ck.partial-{ended.pid}-0123abcd"
    old.mkdir()
    (old / "__0_0.distcp").write_bytes(b"half")
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


def test_a_process_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValue, match=r"AsyncCheckpointerType\.THREAD"):
        pickle.dumps(dcp.StorageWriter(tmp_path / "c"))
