# SPDX-License-Identifier: Apache-2.0
"""The drop-ins behave as Noether's writers: names, contents, errors."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from noether_writer import CheckpointWriter, LogWriter


class Counter:
    def __init__(self) -> None:
        self.epoch, self.update, self.sample = 0, 1, 4

    @property
    def cur_iteration(self) -> dict[str, int]:
        return {"epoch": self.epoch, "update": self.update, "sample": self.sample}


class Model(torch.nn.Linear):
    def __init__(self, name: str, frozen: bool = False) -> None:
        super().__init__(3, 2)
        self.name, self.is_frozen = name, frozen
        self.optimizer = None if frozen else torch.optim.Adam(self.parameters())


@pytest.fixture
def provider(tmp_path: Path) -> Any:
    return SimpleNamespace(output_root=tmp_path, run_id="r", stage_name="train", debug=False)


def files(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "r/train/checkpoints").iterdir()}


def test_composite_names_and_contents(daemon: Any, provider: Any, tmp_path: Path) -> None:
    writer = CheckpointWriter(provider, Counter())
    inner = SimpleNamespace(name="inner", submodels={"x": Model("x")})
    model = SimpleNamespace(
        name="ae",
        submodels={"enc": Model("enc"), "dec": Model("dec", True), "no": None, "sub": inner},
    )
    trainer = SimpleNamespace(state_dict=lambda: {"callback_state_dicts": [1]})
    writer.save(model, "E1", trainer, save_latest_weights=True, save_frozen_weights=False, model_info="i")
    # One frame, and with it one copy, for a tag and `latest`: two models, two optimizers, the trainer.
    assert writer.run._core.sequence == 5
    writer.wait(30)
    assert files(tmp_path) == {
        "ae.enc_i_cp=E1_model.th",
        "ae.enc_i_cp=latest_model.th",
        "ae.enc_cp=E1_optim.th",
        "inner.x_i_cp=E1_model.th",
        "inner.x_i_cp=latest_model.th",
        "inner.x_cp=E1_optim.th",
        "ae_cp=E1_trainer.th",
        "ae_cp=latest_trainer.th",
    }
    for tag in ("E1", "latest"):
        loaded = torch.load(tmp_path / f"r/train/checkpoints/ae.enc_i_cp={tag}_model.th")
        assert torch.equal(loaded.pop("state_dict")["weight"], model.submodels["enc"].weight)
        assert loaded == {
            "checkpoint_tag": tag,
            "training_iteration": {"epoch": 0, "update": 1, "sample": 4},
            "run_id": "r",
        }


def test_config_extras_and_errors(daemon: Any, provider: Any, tmp_path: Path) -> None:
    writer = CheckpointWriter(provider, Counter())
    config = SimpleNamespace(model_dump=lambda: {"width": 3}, config_kind="a.B")
    writer.save_model_checkpoint("m", "latest", {}, config, "ema=0.9", ema=0.9)
    writer.wait(30)
    loaded = torch.load(tmp_path / "r/train/checkpoints/m_ema=0.9_cp=latest_model.th")
    assert (loaded["ema"], loaded["model_config"], loaded["config_kind"]) == (
        0.9,
        {"width": 3},
        "a.B",
    )

    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="model_dump"):
        writer.save_model_checkpoint("m", "t", {}, SimpleNamespace(model_dump=broken))
    with pytest.raises(NotImplementedError):
        writer.save(object(), "t")


def test_log_writer(daemon: Any, provider: Any, tmp_path: Path, caplog: Any) -> None:
    seen: list[dict[str, Any]] = []
    counter = Counter()
    writer = LogWriter(provider, counter, SimpleNamespace(log=seen.append))
    writer.flush()
    writer.finish()
    assert not (tmp_path / "r").exists()
    logger = logging.getLogger("t")
    with caplog.at_level(logging.INFO):
        writer.add_scalar("loss/", torch.tensor(float("nan")), logger=logger, format_str=".2f")
    assert "loss: nan" in caplog.text
    writer.add_nonscalar("image", object())
    with pytest.raises(KeyError, match="already logged"):
        writer.add_scalar("loss", 1.0)
    writer.flush()
    assert set(seen[0]) == {"epoch", "update", "sample", "loss", "image"}
    writer.add_scalar("acc", 0.5)
    with pytest.raises(AssertionError):
        writer.flush()
    counter.update = 2
    writer.log_cache["update"] = 2  # type: ignore[index]
    writer.flush()
    assert len(writer.log_entries) == 2
    assert writer.log_entries[0]["update"] == 1 and "image" not in writer.log_entries[0]
    assert writer.get_all_metric_values("acc") == [0.5]
    writer.finish()
    entries = torch.load(tmp_path / "r/train/tracker/entries.th")
    assert list(entries) == ["epoch", "sample", "loss", "acc"]
    assert entries["acc"] == {2: 0.5} and entries["sample"] == {1: 4, 2: 4}
