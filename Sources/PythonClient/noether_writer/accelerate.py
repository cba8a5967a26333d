# SPDX-License-Identifier: Apache-2.0
"""For Hugging Face Accelerate: `Tracker`.

from accelerate import Accelerator
from noether_writer.accelerate import Tracker

accelerator = Accelerator(log_with=Tracker("runs", "2026-01-01_abcde"))
accelerator.init_trackers("project", config={"lr": 1e-3})
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.tracking import GeneralTracker

from ._adapters import QuietLog
from .run import Run, open_run

__all__ = ["Tracker"]


class Tracker(GeneralTracker):
    """Logs into a run, on the main process. A tracker never ends a training: what it cannot take, it says once.

    Args:
        output_root, run_id: as for `noether_writer.open_run`.
        options: the other arguments of `open_run`, such as `resume="auto"`.
    """

    name = "noether_writer"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, output_root: str | os.PathLike[str], run_id: str, **options: Any) -> None:
        super().__init__()
        self._arguments = (output_root, run_id)
        self._options = options
        self._quiet = QuietLog()
        self._run: Run | None = None
        self._is_opened = False

    @property
    def tracker(self) -> Run | None:
        """The run; None if it could not be opened."""
        if not self._is_opened:
            self._is_opened = True
            self._run = self._quiet.attempt("opening the run", lambda: open_run(*self._arguments, **self._options))
        return self._run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Writes the hyperparameters to `tracker/config.yaml`."""
        if not self._is_opened:
            self._options.setdefault("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs the values of one step; without `step`, of the next one."""
        values = dict(values)
        epoch = values.pop("epoch", None)
        self._quiet.log(self.tracker, values, step, epoch=epoch)

    def finish(self) -> None:
        """Writes the log, and closes the run."""
        if (run := self._run) is not None:
            self._quiet.attempt("writing the log", run.finish)
            run.close()
