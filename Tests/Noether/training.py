# SPDX-License-Identifier: Apache-2.0
"""A small training as a Noether user writes one: nothing here knows of noether_writer.

usage: training.py OUTPUT_ROOT RUN_ID EPOCHS [--resume RUN_ID] [--fail-at UPDATE] [--kill-at UPDATE]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from noether.core.callbacks import CheckpointCallback
from noether.core.models import CompositeModel, Model
from noether.core.providers import PathProvider
from noether.core.schemas.callbacks import CheckpointCallbackConfig
from noether.core.schemas.dataset import DatasetBaseConfig
from noether.core.schemas.initializers import ResumeInitializerConfig
from noether.core.schemas.models import ModelBaseConfig
from noether.core.schemas.trainers import BaseTrainerConfig
from noether.core.trackers import NoopTracker
from noether.data import Dataset
from noether.data.container import DataContainer
from noether.data.pipeline import Collator
from noether.training.trainers import BaseTrainer


class Waves(Dataset):
    def __init__(self) -> None:
        super().__init__(DatasetBaseConfig(kind="waves"))
        self.pipeline = Collator()

    def __len__(self) -> int:
        return 64

    def getitem_x(self, index: int) -> torch.Tensor:
        return torch.linspace(0, 1, 8) + index / 64

    def getitem_y(self, index: int) -> torch.Tensor:
        return torch.sin(self.getitem_x(index))


class Part(Model):
    def __init__(self, name: str, counter: Any, frozen: bool = False) -> None:
        optimizer = None if frozen else {"kind": "torch.optim.AdamW", "lr": 1e-2}
        super().__init__(
            ModelBaseConfig(kind="part", name=name, optimizer_config=optimizer),
            is_frozen=frozen,
            update_counter=counter,
        )
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class Pair(CompositeModel):
    def __init__(self, counter: Any) -> None:
        super().__init__(ModelBaseConfig(kind="pair", name="pair"), update_counter=counter)
        self.encoder, self.decoder = Part("encoder", counter), Part("decoder", counter)
        self.scale = Part("scale", counter, frozen=True)

    @property
    def submodels(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "decoder": self.decoder, "scale": self.scale}

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x)) + self.scale(x)


class Trainer(BaseTrainer):
    fail_at = kill_at = -1

    def loss_compute(self, forward_output: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        update = self.update_counter.cur_iteration.update
        if update == self.fail_at:
            raise RuntimeError("this training fails")
        if update == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return ((forward_output - targets["y"]) ** 2).mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("run")
    parser.add_argument("epochs", type=int)
    parser.add_argument("--resume")
    parser.add_argument("--fail-at", type=int, default=-1)
    parser.add_argument("--kill-at", type=int, default=-1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    provider = PathProvider(arguments.output, arguments.run, stage_name="train")
    tracker = NoopTracker(metric_property_provider=None, path_provider=provider)
    tracker.init("cpu", "test", "train", {}, arguments.run, str(arguments.output))
    initializer = None
    if arguments.resume:
        initializer = ResumeInitializerConfig(
            run_id=arguments.resume, stage_name="train", model_name="pair", checkpoint_tag="latest"
        )
    trainer = Trainer(
        config=BaseTrainerConfig(
            kind="trainer",
            max_epochs=arguments.epochs,
            effective_batch_size=8,
            callbacks=None,
            initializer=initializer,
            log_every_n_updates=5,
            track_every_n_updates=1,
            forward_properties=["x", "index"],
            target_properties=["y"],
        ),
        data_container=DataContainer({"train": Waves()}, num_workers=0, pin_memory=False),
        device="cpu",
        tracker=tracker,
        path_provider=provider,
    )
    trainer.fail_at, trainer.kill_at = arguments.fail_at, arguments.kill_at
    model = Pair(trainer.update_counter)
    config = CheckpointCallbackConfig(
        kind="checkpoint",
        every_n_updates=10,
        save_weights=True,
        save_optim=True,
        save_latest_weights=True,
        save_latest_optim=True,
    )
    original = trainer.get_user_callbacks
    trainer.get_user_callbacks = lambda model, evaluation=False: [
        *original(model, evaluation),
        CheckpointCallback(callback_config=config, **trainer._get_default_callback_kwargs(model)),
    ]
    print("writers:", type(trainer.checkpoint_writer).__module__, type(trainer.log_writer).__module__)
    trainer.train(model)
    tracker.close()
    losses = trainer.log_writer.get_all_metric_values("loss/online/loss/U1")
    print("losses:", len(losses))
    with open(arguments.output / f"{arguments.run}.keys", "w") as file:
        file.write("\n".join(sorted({key for entry in trainer.log_writer.log_entries for key in entry})))


if __name__ == "__main__":
    main()
