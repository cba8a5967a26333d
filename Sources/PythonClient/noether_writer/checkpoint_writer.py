# SPDX-License-Identifier: Apache-2.0
"""Noether's CheckpointWriter, but the daemon writes the files: `save` returns after one memory copy."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from typing import Any

from .providers import is_rank0, open_provided
from .run import Run
from .saves import Target


class CheckpointWriter:
    """Saves models, optimizers and trainers under Noether's names.

    Args:
        path_provider: like Noether's PathProvider (`run_id`, `output_root`, `stage_name`, `debug`).
        update_counter: has `cur_iteration`, which `dict()` turns into epoch, update and sample.
    """

    def __init__(self, path_provider: Any, update_counter: Any) -> None:
        self.logger = logging.getLogger(type(self).__name__)
        self.path_provider = path_provider
        self.update_counter = update_counter
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The run that it saves to; it is opened when it is first needed."""
        if self._run is None:
            self._run = open_provided(self.path_provider, log=False)
        return self._run

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything that was saved is durable; raises what failed (see `Ticket.wait`)."""
        if self._run is not None:
            self._run.wait(timeout)

    def save_model_checkpoint(
        self,
        model_name: str,
        checkpoint_tag: str,
        state_dict: dict[str, Any],
        model_config: Any = None,
        model_info: str | None = None,
        **extra: Any,
    ) -> None:
        """Saves `{model_name}[_{model_info}]_cp={checkpoint_tag}_model.th`.

        Raises:
            RuntimeError: `model_config.model_dump()` failed. Also what pickling raises, and errors of earlier saves.
        """
        self._submit([self._model_target(model_name, checkpoint_tag, state_dict, model_config, model_info, extra)])

    def save(
        self,
        model: Any,
        checkpoint_tag: str,
        trainer: Any = None,
        save_weights: bool = True,
        save_optim: bool = True,
        save_latest_weights: bool = False,
        save_latest_optim: bool = False,
        model_names_to_save: list[str] | None = None,
        save_frozen_weights: bool = True,
        model_info: str | None = None,
    ) -> None:
        """Saves a model or a composite of models, their optimizers, and the trainer's state.

        It must be called on every rank, because a trainer may gather its state from all ranks; only rank 0 writes.

        Raises:
            RuntimeError: the model is wrapped in DistributedDataParallel.
            NotImplementedError: it is neither a model nor a composite.
        """
        trainer_state = trainer.state_dict() if trainer is not None else None
        if not is_rank0("checkpoint_writer"):
            return
        weights = _tags(checkpoint_tag, save_weights, save_latest_weights)
        optim = _tags(checkpoint_tag, save_optim, save_latest_optim)
        self._save_tree(model, None, weights, optim, model_names_to_save, save_frozen_weights, model_info)
        if trainer_state is not None:
            tags = _tags(checkpoint_tag, save_weights or save_optim, save_latest_weights or save_latest_optim)
            self._submit([Target(model.name, tag, trainer_state, "trainer") for tag in tags])

    def _save_tree(
        self,
        model: Any,
        name: str | None,
        weights: list[str],
        optim: list[str],
        names: list[str] | None,
        frozen: bool,
        info: str | None,
    ) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise RuntimeError("DistributedDataParallel models must be unwrapped before saving")
        if model is None:
            return
        if hasattr(model, "submodels"):
            for key, submodel in model.submodels.items():
                self._save_tree(submodel, f"{model.name}.{key}", weights, optim, names, frozen, info)
            return
        if not all(hasattr(model, part) for part in ("name", "state_dict", "optimizer", "is_frozen")):
            raise NotImplementedError(f"a {type(model).__name__} is neither a model nor a composite of models")
        if (model.is_frozen and not frozen) or (names and model.name not in names):
            return
        name = model.name if name is None else name
        config = getattr(model, "model_config", None)
        if type(self).save_model_checkpoint is not CheckpointWriter.save_model_checkpoint:
            # A subclass has its own way to save a model, so its method is called.
            for tag in weights:
                self.save_model_checkpoint(
                    model_name=name,
                    checkpoint_tag=tag,
                    model_info=info,
                    state_dict=model.state_dict(),
                    model_config=config,
                )
        elif weights:
            state = model.state_dict()
            self._submit([self._model_target(name, tag, state, config, info, {}) for tag in weights])
        if model.optimizer is not None and optim:
            state = model.optimizer.state_dict()
            self._submit([Target(name, tag, state, "optim") for tag in optim])

    def _model_target(
        self,
        name: str,
        tag: str,
        state_dict: dict[str, Any],
        config: Any,
        info: str | None,
        extra: dict[str, Any],
    ) -> Target:
        content: dict[str, Any] = {
            "state_dict": state_dict,
            "checkpoint_tag": str(tag),
            "training_iteration": dict(self.update_counter.cur_iteration),
            "run_id": self.path_provider.run_id,
            **extra,
        }
        if config is not None:
            try:
                content["model_config"] = config.model_dump(**_dump_arguments())
            except Exception as error:
                raise RuntimeError(f"model_dump of the model config failed: {error}") from error
            content["config_kind"] = config.config_kind
        return Target(str(name), str(tag), content, "model", info or None)

    def _submit(self, targets: list[Target]) -> None:
        if not targets:
            return
        self.run.save_as(targets)
        for target in targets:
            self.logger.info(f"saving {target.kind} as {target.archive}.th")


def _tags(tag: str, save: bool, save_latest: bool) -> list[str]:
    return [str(tag)] * save + ["latest"] * save_latest


def _dump_arguments() -> dict[str, bool]:
    """Since 2026.4 Noether leaves pydantic's computed fields out of a config."""
    if "noether.core.writers" not in sys.modules:
        return {}
    try:
        version = metadata.version("emmiai-noether")
    except metadata.PackageNotFoundError:
        return {}
    year, minor = (int(part) for part in version.split(".")[:2])
    return {"exclude_computed_fields": True} if (year, minor) >= (2026, 4) else {}
