# SPDX-License-Identifier: Apache-2.0
"""Noether's LogWriter, but the daemon keeps the log: a trainer that is killed loses none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, overload

from .errors import DuplicateKeyError, UnsupportedValue, UpdateOrderError
from .frames import kind_of, shown
from .providers import is_rank0, open_provided
from .run import Run, plain


class LogEntries(Sequence[dict[str, Any]]):
    """The entries that were flushed so far. They are in the daemon and are fetched when they are read; the last one is
    kept here."""

    _PAGE = 1000

    def __init__(self) -> None:
        self.run: Run | None = None
        self.last: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.run.entry_count if self.run else 0

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return list(self)[index]
        position = range(len(self))[index]
        if position == len(self) - 1 and self.last is not None:
            return self.last
        assert self.run is not None
        return self.run.entries(position, 1)[0]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LogEntries) and other.run is self.run:
            return True
        return isinstance(other, LogEntries | list) and len(self) == len(other) and list(self) == list(other)

    # It has no hash, like a list, because it changes.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<noether_writer.LogEntries: {len(self)} rows>"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), self._PAGE):
            assert self.run is not None
            yield from self.run.entries(start, min(self._PAGE, len(self) - start))


class LogWriter:
    """Collects the values of an update. `flush` hands them to the tracker and to the daemon.

    Args:
        path_provider: like Noether's PathProvider (`run_id`, `output_root`, `stage_name`, `debug`).
        update_counter: has the present `epoch`, `update` and `sample`.
        tracker: anything with `log(dict)`.
    """

    def __init__(self, path_provider: Any, update_counter: Any, tracker: Any) -> None:
        self.logger = logging.getLogger(type(self).__name__)
        self.path_provider = path_provider
        self.update_counter = update_counter
        self.tracker = tracker
        self.log_entries: Sequence[dict[str, Any]] = LogEntries() if is_rank0("log_writer") else []
        self.log_cache: dict[str, Any] | None = None
        self.non_scalar_keys: set[str] = set()

    def add_scalar(
        self,
        key: str,
        value: Any,
        logger: logging.Logger | None = None,
        format_str: str | None = None,
    ) -> None:
        """Adds a scalar to the current update.

        Args:
            key: a trailing `/` is removed.
            value: float, int, bool, str, None, or a tensor or numpy value of one element.
            logger: gets the line `key: value`, formatted by `format_str`.

        Raises:
            KeyError: the key was already logged for this update.
            TypeError: the value is not a scalar; `add_nonscalar` takes it.
        """
        if not isinstance(key, str):
            raise UnsupportedValue(f"the key {shown(key)} is {kind_of(key)}: a key must be a text")
        try:
            value = plain(value)
        except UnsupportedValue as error:
            raise type(error)(f"{key!r}: {error}; add_nonscalar hands it to the tracker") from error
        if not (value is None or isinstance(value, float | int | str)):
            raise UnsupportedValue(f"{key!r} is {kind_of(value)}, not a scalar; add_nonscalar hands it to the tracker")
        self._add(key, value, is_scalar=True)
        if logger is not None:
            text = value if format_str is None else f"{value:{format_str}}"
            logger.info(f"{key.removesuffix('/')}: {text}")

    def add_nonscalar(self, key: str, value: Any) -> None:
        """Adds something that only the tracker gets (an image, a histogram)."""
        self._add(key, value, is_scalar=False)

    def _add(self, key: str, value: Any, is_scalar: bool) -> None:
        key = key.removesuffix("/")
        counter = self.update_counter
        if self.log_cache is None:
            self.log_cache = {
                "epoch": counter.epoch,
                "update": counter.update,
                "sample": counter.sample,
            }
        if key in self.log_cache:  # guard: log-writer-key-once (never)
            raise DuplicateKeyError(
                f"key {key!r} was already logged for update {counter.update}; its first value stays"
            )
        self.log_cache[key] = value
        if not is_scalar:
            self.non_scalar_keys.add(key)

    def flush(self) -> None:
        """Hands the values of the update on. If there are none, it does nothing.

        Raises:
            AssertionError: the update is not larger than the last one.
        """
        cache = self.log_cache
        if cache is None:
            return
        entries = self.log_entries
        if self._was_logged(cache):
            # An interrupt came after `run.log` and before the end of this method.
            entry = {key: value for key, value in cache.items() if key not in self.non_scalar_keys}
            entries.last = entry  # type: ignore[attr-defined]
            self.log_cache = None
            self.non_scalar_keys.clear()
            return
        self.tracker.log(cache)
        if len(entries) > 0 and not cache["update"] > entries[-1]["update"]:  # guard: log-writer-update-larger (never)
            raise UpdateOrderError(
                f"update {cache['update']} is not larger than the last one, {entries[-1]['update']}: nothing of it was "
                "logged"
            )
        entry = {key: value for key, value in cache.items() if key not in self.non_scalar_keys}
        if isinstance(entries, LogEntries):
            if entries.run is None:
                entries.run = open_provided(self.path_provider, log=True)
            values = {key: value for key, value in entry.items() if key != "update"}
            entries.run.log(values, update=entry["update"])
            entries.last = entry
        elif isinstance(entries, list):
            entries.append(entry)
        self.log_cache = None
        self.non_scalar_keys.clear()

    def _was_logged(self, cache: dict[str, Any]) -> bool:
        entries = self.log_entries
        if not isinstance(entries, LogEntries) or entries.run is None:
            return False
        is_new = entries.last is None or entries.last["update"] != cache["update"]
        return bool(is_new and entries.run.last_update == cache["update"])

    def get_all_metric_values(self, key: str) -> list[Any]:
        """All values of a key so far, in the order of their updates."""
        entries = self.log_entries
        if isinstance(entries, LogEntries) and key != "update":
            return list(entries.run.values(key)) if entries.run else []
        return [entry[key] for entry in entries if key in entry]

    def finish(self) -> None:
        """Flushes, and returns when tracker/entries.th is durable. If nothing was logged, or this is not rank 0, no
        file is written."""
        self.flush()
        if isinstance(self.log_entries, LogEntries) and self.log_entries.run and is_rank0("log_writer"):
            self.log_entries.run.finish()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()
