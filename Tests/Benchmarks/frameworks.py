# SPDX-License-Identifier: Apache-2.0
"""How long training waits for one checkpoint, with a framework's own way and with the adapter, in turn in one run.
Without fsync the own ways promise less than the adapter, which makes each file durable after training has gone on."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import bench
import torch
from bench import ROUNDS, row

warnings.filterwarnings("ignore")
for name in ("lightning", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)


def lightning(folder: Path) -> list[dict[str, object]]:
    """A model of 128 MiB with Adam: files of 384 MiB."""
    import lightning.pytorch as L
    from noether_writer.lightning import CheckpointIO

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(32))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            for layer in self.layers:
                batch = layer(batch)
            return batch.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    data: Any = torch.utils.data.DataLoader(torch.randn(2, 1024), batch_size=1)
    trainers = {}
    for way, plugins in (("Lightning's own", []), ("noether-writer", [CheckpointIO()])):
        trainer = L.Trainer(
            default_root_dir=str(folder),
            max_epochs=1,
            plugins=plugins,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Model(), data)
        trainers[way] = trainer
    return _in_turn(
        "A Lightning checkpoint of 384 MiB",
        trainers,
        lambda way, trainer: trainer.save_checkpoint(folder / f"{len(way)}.ckpt"),
        lambda trainer: trainer.strategy.teardown(),
    )


def transformers(folder: Path) -> list[dict[str, object]]:
    """A model of 128 MiB with AdamW: a directory of 384 MiB."""
    from noether_writer import wait
    from noether_writer.transformers import TrainerMixin
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    class Ours(TrainerMixin, Trainer):
        pass

    config = BertConfig(
        vocab_size=1000, hidden_size=1024, num_hidden_layers=2, num_attention_heads=4, intermediate_size=5500
    )
    data = [{"input_ids": torch.randint(0, 1000, (4,)), "labels": 0} for _ in range(2)]
    trainers = {}
    for way, kind in (("transformers' own", Trainer), ("noether-writer", Ours)):
        arguments = TrainingArguments(
            str(folder / way.replace(" ", "")),
            max_steps=1,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainers[way] = kind(BertForSequenceClassification(config), arguments, train_dataset=data)
        trainers[way].train()

    def save(way: str, trainer: Any) -> None:
        trainer.state.global_step += 1
        trainer._save_checkpoint(trainer.model, None)

    def settle(trainer: Any) -> None:
        wait()
        for path in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(path)

    return _in_turn("A Transformers checkpoint of 384 MiB", trainers, save, settle)


def _in_turn(case: str, ways: dict[str, Any], save: Any, settle: Any) -> list[dict[str, object]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(ROUNDS + 1):
        for way, trainer in ways.items():
            bench.rest()
            start = time.perf_counter()
            save(way, trainer)
            taken = time.perf_counter() - start
            settle(trainer)
            # Buffers and the page cache are warm from the second one on.
            if index:
                seconds[way].append(taken)
    rows = [row(case, way, "training waits", values, "s") for way, values in seconds.items()]
    bench.show(rows)
    return rows


def main() -> None:
    with bench.daemon() as (folder, _):
        rows = lightning(folder) + transformers(folder)
    if len(sys.argv) > 1:
        bench.keep(rows, sys.argv[1])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
