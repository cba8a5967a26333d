# SPDX-License-Identifier: Apache-2.0
"""What the adapters for frameworks share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .errors import DaemonNotFound, NoetherWriterError

logger = logging.getLogger("noether_writer")


class QuietLog:
    """A log for the loggers of frameworks: what it cannot take it says once, and the training continues."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """Returns what `action` returns, or None if it failed."""
        try:
            return action()
        except (NoetherWriterError, OSError, ValueError, TypeError) as error:
            kind = f"{what} {type(error).__name__}"
            if kind not in self._said:
                self._said.add(kind)
                advice = "" if isinstance(error, DaemonNotFound) else " This is said once"
                logger.warning("%s: %s. The training continues without it.%s", what, error, advice)
            return None

    def log(self, run: Any, values: Mapping[str, Any], update: int | None, **more: Any) -> None:
        """Logs what can be logged; a value that is no scalar is left out alone."""
        if run is None:
            return
        taken = {key: value for key, value in values.items() if self._is_taken(key, value)}
        if taken:
            self.attempt("logging", lambda: run.log(taken, update, **more))

    def _is_taken(self, key: str, value: Any) -> bool:
        if isinstance(value, (bool, int, float, str)) or value is None:
            return True
        if isinstance(value, Mapping):
            return True
        if getattr(value, "numel", lambda: getattr(value, "size", 0))() == 1:
            return True
        kind = f"{key} {type(value).__name__}"
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(
                "%r is a %s, and a log holds numbers, texts and tensors of one element: it is left out (said once)",
                key,
                type(value).__name__,
            )
        return False
