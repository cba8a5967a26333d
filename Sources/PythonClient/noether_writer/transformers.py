# SPDX-License-Identifier: Apache-2.0
"""For Hugging Face Transformers: `TrainerMixin`, so that training does not wait for its checkpoints, and `Callback` for
the log.

    from transformers import Trainer
    from noether_writer.transformers import Callback, TrainerMixin

    class MyTrainer(TrainerMixin, Trainer):
        pass

    trainer = MyTrainer(model, arguments, train_dataset=data, callbacks=[Callback("runs", "2026-01-01_abcde")])
    trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import trainer as trainer_module
from transformers import trainer_utils

from . import _files, _safetensors
from ._adapters import QuietLog, logger
from .run import Run, distributed_place, open_run

__all__ = ["Callback", "TrainerMixin"]

_PARTIAL = ".partial-"


class TrainerMixin:
    """Put before `transformers.Trainer` in the bases of a class.

    - `checkpoint-N` is written beside its place, under a name that begins with a dot, and takes its name in one step
      when all of its files are durable: model, optimizer, scheduler, RNG states and the trainer's state. So a
      `checkpoint-N` that is there is whole, and `resume_from_checkpoint=True` never meets half of one.
    - Training continues after one memory copy.
    - `save_total_limit`: older checkpoints go after the newer one is durable.
    - `train` waits at its beginning for what an earlier process had handed over, and at its end for all it has saved.

    With FSDP, DeepSpeed, or `push_to_hub`, Trainer saves in its own way; that is said once.
    """

    _nw_staged: tuple[str, str] | None = None
    _nw_directory: str | None = None
    _nw_pending: tuple[str, ...] = ()
    _nw_has_said = False

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **named: Any) -> Any:
        """As Trainer's. `resume_from_checkpoint=True` begins anew if there is no checkpoint."""
        directory = str(self.args.output_dir)  # type: ignore[attr-defined]
        if os.path.isdir(directory):
            _files.wait_for(directory)
            if resume_from_checkpoint is True and trainer_utils.get_last_checkpoint(directory) is None:
                resume_from_checkpoint = None
        elif resume_from_checkpoint is True:
            resume_from_checkpoint = None
        result = super().train(resume_from_checkpoint, *arguments, **named)  # type: ignore[misc]
        _files.wait()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save: Callable[..., None] = super()._save_checkpoint  # type: ignore[misc]
        if (reason := self._nw_own_way()) is not None:
            if not self._nw_has_said:
                self._nw_has_said = True
                logger.warning("checkpoints are saved by transformers itself, and training waits for them: %s", reason)
            return save(model, trial)
        directory = str(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        step = self.state.global_step  # type: ignore[attr-defined]
        final = os.path.join(directory, f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{step}")
        rank, ranks = distributed_place() or (0, 1)
        partial = os.path.join(directory, f".{os.path.basename(final)}{_PARTIAL}{_nonce(rank, ranks)}")
        if rank == 0:
            self._nw_clean(directory)
            os.makedirs(partial, exist_ok=True)
        self._nw_name_best(directory, final)
        try:
            with self._nw_redirected(final, partial):
                save(model, trial)
        except BaseException:
            if rank == 0:
                _files.remove(partial, recursive=True)
            raise
        self._nw_commit(partial, final, rank, ranks)
        return None

    def _nw_own_way(self) -> str | None:
        arguments = self.args  # type: ignore[attr-defined]
        if arguments.push_to_hub:
            return "push_to_hub needs the files at once"
        for member, words in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
            if getattr(self, member, False):
                return f"{words} writes its own files; see noether_writer.dcp and noether_writer.deepspeed"
        return None

    def _nw_commit(self, partial: str, final: str, rank: int, ranks: int) -> None:
        """The directory takes its name; then older ones go."""
        if ranks > 1:
            if rank != 0:
                # A small file: the states of this rank's random number generators.
                _files.wait()
            torch.distributed.barrier()
        if rank != 0:
            return
        # The small files that transformers has written by itself; the daemon syncs its own.
        for path in Path(partial).iterdir():
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _files.commit(partial, final, replace=os.path.exists(final))
        self._nw_pending = (*self._nw_pending, final)
        self._nw_rotate(os.path.dirname(final), final)

    def _nw_rotate(self, directory: str, newest: str) -> None:
        """Removes older checkpoints when the newest is durable, by the rules of transformers' `rotate_checkpoints`."""
        limit = self.args.save_total_limit  # type: ignore[attr-defined]
        if limit is None or limit <= 0:
            return
        found = {
            str(path) for path in Path(directory).glob(f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()
        }
        ordered = sorted(
            found | set(self._nw_pending),
            key=lambda path: int(path.rpartition("-")[2]) if path.rpartition("-")[2].isdecimal() else -1,
        )
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        kept = {newest} | ({str(Path(best))} if best is not None else set())
        surplus = len(ordered) - max(limit, len(kept))
        for path in [each for each in ordered if each not in kept][: max(0, surplus)]:
            _files.remove(path, recursive=True, after=[newest])
            self._nw_pending = tuple(each for each in self._nw_pending if each != path)

    def _nw_name_best(self, directory: str, final: str) -> None:
        """What transformers does if the directory of the best checkpoint is there; ours may be on its way."""
        step = self.state.best_global_step  # type: ignore[attr-defined]
        if step:
            best = os.path.join(directory, f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{step}")
            if best == final or best in self._nw_pending or os.path.exists(best):
                self.state.best_model_checkpoint = best  # type: ignore[attr-defined]

    def _nw_clean(self, directory: str) -> None:
        """Removes what processes that were killed have left half done, once."""
        if self._nw_directory == directory:
            return
        self._nw_directory = directory
        for path in Path(directory).glob(f".{trainer_utils.PREFIX_CHECKPOINT_DIR}-*{_PARTIAL}*"):
            _files.remove(path, recursive=True)

    @contextlib.contextmanager
    def _nw_redirected(self, final: str, partial: str) -> Iterator[None]:
        """What is written to `final` goes to `partial`; tensors go through the daemon."""
        state = self.state  # type: ignore[attr-defined]

        def to_json(path: str) -> None:
            type(state).save_to_json(state, _moved(path, final, partial))

        own_save, own_file, own_rotate = torch.save, safetensors.torch.save_file, trainer_module.rotate_checkpoints

        def save(obj: object, f: Any, *arguments: Any, **named: Any) -> Any:
            if arguments or named or not _is_below(f, partial):
                return own_save(obj, f, *arguments, **named)
            return _files.save(obj, f)

        def save_file(tensors: Any, filename: Any, metadata: Any = None) -> Any:
            if not _is_below(filename, partial):
                return own_file(tensors, filename, metadata)
            return _safetensors.save_file(tensors, filename, metadata)

        self._nw_staged = final, partial
        state.save_to_json = to_json
        users = [
            module
            for name in ("transformers.modeling_utils", "peft.peft_model")
            if (module := sys.modules.get(name)) is not None and hasattr(module, "safe_save_file")
        ]
        torch.save, safetensors.torch.save_file = save, save_file  # type: ignore[assignment]
        trainer_module.rotate_checkpoints = lambda *_, **__: None
        for module in users:
            module.safe_save_file = save_file  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.save, safetensors.torch.save_file = own_save, own_file
            trainer_module.rotate_checkpoints = own_rotate
            for module in users:
                module.safe_save_file = own_file  # type: ignore[attr-defined]
            del state.save_to_json
            self._nw_staged = None

    def _nw_place(self, output_dir: str | None) -> str | None:
        return output_dir if output_dir is None or self._nw_staged is None else _moved(output_dir, *self._nw_staged)

    def save_model(self, output_dir: str | None = None, *arguments: Any, **named: Any) -> None:
        """As Trainer's."""
        super().save_model(self._nw_place(output_dir), *arguments, **named)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(self._nw_place(output_dir))  # type: ignore[misc]

    def _save_scaler(self, output_dir: str) -> None:
        super()._save_scaler(self._nw_place(output_dir))  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(self._nw_place(output_dir))  # type: ignore[misc]

    def _load_best_model(self) -> None:
        # All of them: with `save_total_limit=1`, transformers then removes those that are not the best.
        _files.wait_for(str(self.args.output_dir))  # type: ignore[attr-defined]
        super()._load_best_model()  # type: ignore[misc]


def _moved(path: str, final: str, partial: str) -> str:
    if os.path.abspath(path) == os.path.abspath(final):
        return partial
    return os.path.join(partial, os.path.basename(path)) if _is_below(path, final) else path


def _is_below(path: Any, directory: str) -> bool:
    if not isinstance(path, str | os.PathLike):
        return False
    return os.path.abspath(path).startswith(os.path.abspath(directory) + os.sep)


def _nonce(rank: int, ranks: int) -> str:
    """The same on all ranks."""
    words = [uuid.uuid4().hex[:8]]
    if ranks > 1:
        torch.distributed.broadcast_object_list(words, src=0)
    return words[0]


class Callback(transformers.TrainerCallback):
    """Logs what Trainer logs into a run, on the main process. It never ends a training: what it cannot take, it says
    once.

    Args:
        output_root, run_id: as for `noether_writer.open_run`. Without a run id: the trainer's `run_name`, or else the
            name of its output directory.
        options: the other arguments of `open_run`. A training that is resumed continues its log.
    """

    def __init__(self, output_root: str | os.PathLike[str] = "runs", run_id: str | None = None, **options: Any) -> None:
        self._root = output_root
        self._run_id = run_id
        self._options = options
        self._quiet = QuietLog()
        #: The run, from the beginning of the training on; None if it could not be opened.
        self.run: Run | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the run."""
        if not state.is_world_process_zero or self.run is not None:
            return
        run_id = self._run_id or args.run_name or os.path.basename(os.path.abspath(args.output_dir))
        options = dict(self._options)
        if state.global_step > 0:
            options.setdefault("resume_at", state.global_step)
        options.setdefault("config", {"trainer": args.to_sanitized_dict()})
        self.run = self._quiet.attempt("opening the run", lambda: open_run(self._root, str(run_id), **options))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Logs the values of one step."""
        if state.is_world_process_zero and logs:
            values = dict(logs)
            epoch = values.pop("epoch", state.epoch)
            self._quiet.log(self.run, values, state.global_step, epoch=epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the log. An evaluation after it logs into the same run."""
        if (run := self.run) is not None:
            self._quiet.attempt("writing the log", run.finish)
