# SPDX-License-Identifier: Apache-2.0
"""For Lightning: `CheckpointIO`, so that a fit does not wait for its checkpoints, and `Logger`.

    from lightning.pytorch import Trainer
    from noether_writer.lightning import CheckpointIO, Logger

    trainer = Trainer(plugins=[CheckpointIO()], logger=Logger("runs"))

It works with `lightning` and with `pytorch_lightning`. Strategies that write sharded checkpoints by themselves (FSDP,
ModelParallelStrategy) do not use a CheckpointIO.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _checkpoints, _files
from ._adapters import QuietLog
from .run import Run, open_run

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning" in sys.modules:
    from lightning.fabric.plugins import CheckpointIO as _CheckpointIO
    from lightning.pytorch.loggers import Logger as _Logger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
else:
    from lightning_fabric.plugins import CheckpointIO as _CheckpointIO
    from pytorch_lightning.loggers import Logger as _Logger
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

__all__ = ["CheckpointIO", "Logger"]


class CheckpointIO(_CheckpointIO):
    """Saves checkpoints through the daemon. A save returns after one memory copy.

    - A checkpoint is removed only after the one that was saved last is durable: there is never a moment without one.
    - Loading waits for a save of that path that is on its way (`ckpt_path="best"`, `trainer.test`).
    - `teardown`, which Lightning calls after each fit, validation and test, waits until everything is durable, and
      raises what failed.

    Args:
        snapshot: `copy` or `overlap`, as for `noether_writer.save`. A Lightning checkpoint holds more than tensors, so
            most of it is copied before the call returns in both.
    """

    def __init__(self, snapshot: str | None = None) -> None:
        self._snapshot = snapshot
        self._last: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """
        Raises:
            TypeError: there are `storage_options`; also as `noether_writer.save`.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for other storage: noether_writer writes files. Leave them out")
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._last = _files.save(checkpoint, place, self._snapshot).path

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Waits for a save of that path that is on its way, then loads it.

        Args:
            map_location: as for torch.load; None loads to the CPU.
            weights_only: as for torch.load; None: False, as a Lightning checkpoint holds more than weights.

        Raises:
            FileNotFoundError: there is no such file, and none is on its way; also as `noether_writer.load`.
        """
        try:
            loaded: dict[str, Any] = _files.load(
                path,
                map_location=map_location if map_location is not None else torch.device("cpu"),
                weights_only=bool(weights_only),
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"Checkpoint file not found: {path}") from None
        return loaded

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint, a file or a directory, when the one that was saved last is durable."""
        _files.remove(path, recursive=True, after=() if self._last is None else [self._last])

    def teardown(self) -> None:
        """Waits until everything is durable, and raises what failed. Saving may continue after it."""
        _files.wait()


class Logger(_Logger):
    """Logs the metrics of a fit into a run: `<save_dir>/<name>/<version>`.

    A logger never ends a training: what it cannot take, it says once.

    Args:
        save_dir: the output root.
        name: a directory below it.
        version: the run's id; None: `version_0`, or the next number that is free. If the run has a log already, it
            continues from the first step that is logged.
        options: for `noether_writer.open_run`, such as `tensorboard=True`.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] = "runs",
        name: str = "lightning_logs",
        version: int | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._save_dir = os.path.abspath(save_dir)
        self._name = name
        self._version = version
        self._options = options
        self._hparams: dict[str, Any] = {}
        self._run: Run | None = None
        self._kept: int | None = None
        self._quiet = QuietLog()

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    @property
    def version(self) -> str:
        """The run's id."""
        if self._version is None:
            taken = {entry.name for entry in Path(self.root_dir).glob("version_*")}
            self._version = next(name for number in range(len(taken) + 1) if (name := f"version_{number}") not in taken)
        return self._version if isinstance(self._version, str) else f"version_{self._version}"

    @property
    def save_dir(self) -> str:
        """The output root."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The directory of all versions."""
        return os.path.join(self._save_dir, self._name)

    @property
    def log_dir(self) -> str:
        """The run's directory."""
        return os.path.join(self.root_dir, self.version)

    @property
    def experiment(self) -> Run | None:
        """The run; None if it could not be opened, or on a rank other than 0."""
        if self._run is None and rank_zero_only.rank == 0:
            # Lightning asks before it has loaded a checkpoint: which part of the log stays is known at the first step.
            self._kept = self._quiet.attempt("reading the log", lambda: _checkpoints.last_update(self.log_dir))
            self._open(self._kept)
        return self._run

    def _open(self, resume_at: int | None) -> None:
        def opened() -> Run:
            config = self._hparams or None
            return open_run(self.root_dir, self.version, config=config, resume_at=resume_at, **self._options)

        self._run = self._quiet.attempt(f"opening the run {self.log_dir}", opened)

    def _at(self, step: int | None) -> Run | None:
        run = self.experiment
        kept, self._kept = self._kept, None
        if run is not None and kept is not None and step is not None and step <= kept:
            run.close()
            # A training that begins anew: its log is kept beside the new one.
            self._open(step - 1 if step > 0 else None)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keeps them for `tracker/config.yaml`, which the run brings when it is opened."""
        self._hparams.update(vars(params) if isinstance(params, Namespace) else params)
        if self._run is None and not args and not kwargs:
            return
        self._quiet.attempt("hyperparameters", self._late)

    def _late(self) -> None:
        if self._run is not None and self._hparams:
            raise ValueError("they came after the first metrics; tracker/config.yaml holds what was known then")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs the metrics of one step."""
        run = self._at(step)
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self._quiet.log(run, values, step, epoch=epoch)

    @rank_zero_only
    def save(self) -> None:
        """Waits until the daemon holds every update."""
        if (run := self._run) is not None:
            self._quiet.attempt("flushing the log", run.flush)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the log. Logging may continue after it."""
        if (run := self._run) is not None:
            self._quiet.attempt("writing the log", run.finish)
