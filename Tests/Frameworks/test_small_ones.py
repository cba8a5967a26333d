# SPDX-License-Identifier: Apache-2.0
"""Accelerate, Ignite and DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Daemon


def test_accelerates_tracker(daemon: Daemon, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from noether_writer.accelerate import Tracker

    tracker = Tracker(tmp_path, "r")
    accelerator = accelerate.Accelerator(log_with=tracker, cpu=True)
    accelerator.init_trackers("project", config={"lr": 0.5})
    for step in range(1, 4):
        accelerator.log({"loss": torch.tensor(1.0 / step), "epoch": 1, "odd": object()}, step=step)
        accelerator.log({"acc": 0.5}, step=step)
    assert accelerator.get_tracker("noether_writer", unwrap=True) is tracker.tracker
    accelerator.end_training()
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert list(entries["loss"]) == [1, 2, 3] == list(entries["acc"]) and entries["epoch"] == {1: 1, 2: 1, 3: 1}
    assert "lr: 0.5" in (tmp_path / "r/tracker/config.yaml").read_text()


def test_ignites_save_handler(daemon: Daemon, tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint
    from noether_writer.ignite import SaveHandler

    net = torch.nn.Linear(2, 1)
    engine = Engine(lambda *_: None)
    handler = SaveHandler(tmp_path / "models")
    engine.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"model": net, "trainer": engine}, handler, n_saved=2))
    engine.run([0], max_epochs=5)
    handler.wait()
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"checkpoint_4.pt", "checkpoint_5.pt"}
    loaded = torch.load(tmp_path / "models/checkpoint_5.pt", weights_only=False)
    Checkpoint.load_objects({"model": net, "trainer": engine}, loaded)
    with pytest.raises(ValueError, match="require_empty=False"):
        SaveHandler(tmp_path / "models")


def test_ignite_always_has_a_checkpoint(daemon: Daemon, tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    from noether_writer.ignite import SaveHandler

    handler = SaveHandler(tmp_path)
    handler({"x": 1}, "1.pt")
    handler.wait()
    daemon.hold()
    # In Ignite's order.
    handler.remove("1.pt")
    handler({"x": 2}, "2.pt")
    daemon.kill()
    assert (tmp_path / "1.pt").exists()
    daemon.start()
    handler.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"2.pt"}


def test_deepspeeds_engine(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    from noether_writer.deepspeed import CheckpointEngine

    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        _train_with_deepspeed(deepspeed, CheckpointEngine, tmp_path)
    finally:
        torch.distributed.destroy_process_group()


def _train_with_deepspeed(deepspeed: Any, kind: Any, root: Path) -> None:
    net = torch.nn.Linear(4, 1)
    config = {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}}
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config, dist_init_required=False
    )
    engine.checkpoint_engine = kind()
    for _ in range(3):
        loss = engine(torch.ones(2, 4)).square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(root), tag="three")
    assert (root / "latest").read_text() == "three"
    saved = {path.name for path in (root / "three").iterdir()}
    assert "mp_rank_00_model_states.pt" in saved and not any(name.startswith(".") for name in saved)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    path, _ = engine.load_checkpoint(str(root))
    assert os.path.basename(os.path.dirname(str(path))) == "three" and torch.equal(net.weight, before)
