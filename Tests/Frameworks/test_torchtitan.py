# SPDX-License-Identifier: Apache-2.0
"""torchtitan's own manager, built by its configuration, saves and resumes through the daemon. One rank on gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import until

pytest.importorskip("torchtitan")
from noether_writer import dcp
from noether_writer.torchtitan import CheckpointManager


@pytest.fixture(autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meet = tmp_path_factory.mktemp("meet") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Step:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def training(folder: Path, mode: str, keep: int = 2) -> tuple[CheckpointManager, Step, torch.nn.Module]:
    net = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(8)).sum().backward()
    optimizer.step()
    step = Step()
    config = CheckpointManager.Config(enable=True, interval=1, async_mode=mode, keep_latest_k=keep)
    manager = config.build(
        dataloader=None,
        model_parts=[net],
        optimizers=optimizer,
        lr_schedulers=Step(),
        states={"train_state": step},
        sd_adapter=None,
        base_folder=str(folder),
    )
    return manager, step, net


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_training_is_resumed_at_its_newest_durable_step(daemon: Any, tmp_path: Path, mode: str) -> None:
    manager, step, net = training(tmp_path, mode)
    assert isinstance(manager, CheckpointManager)
    for number in range(1, 6):
        step.step = number
        with torch.no_grad():
            net.weight.fill_(float(number))
        assert manager.save(number)
        manager.maybe_wait_for_staging()
    manager.maybe_wait_for_saving()
    assert (tmp_path / "checkpoint" / "step-5" / dcp.MANIFEST).exists()
    # What a killed job has left is no checkpoint.
    left = tmp_path / "checkpoint" / f".step-9.partial-{'0' * 32}"
    left.mkdir()
    (left / ".metadata").write_bytes(b"")
    # The one that was under way when the last one was begun may not count yet.
    until(lambda: not any((tmp_path / "checkpoint" / f"step-{number}").exists() for number in (1, 2)))
    names = {each.name for each in (tmp_path / "checkpoint").iterdir()}
    assert names - {"step-3"} == {"step-4", "step-5", left.name}
    manager.close()
    again, found, other = training(tmp_path, mode)
    assert again.load()
    assert found.step == 5 and bool((other.weight == 5).all())
    again.close()
