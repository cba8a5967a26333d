# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run were best by a key of its log so far: `open_run(keep_best=...)`.

The daemon removes by numbers in tags. It knows nothing of a checkpoint's worth, so each save names the older ones that
stay.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import _checkpoints
from .frames import shown

Mode = Literal["min", "max"]
# Values between two saves of which the last ones are kept: a tag may name an earlier update than the last one.
_VALUES = 10_000
#: Tags without a number that mean what they say: nobody expects that such a checkpoint is removed.
NAMES = frozenset(("latest", "last", "best", "final"))


def has_number(tag: str) -> bool:
    """Whether the daemon's retention understands the tag."""
    return any(character in "0123456789" for character in tag)


@dataclass
class _Saved:
    tag: str
    update: int
    value: float
    file: str


class KeepBest:
    """
    Raises:
        ValueError, TypeError: it is not (key, mode, n).
    """

    def __init__(self, given: Any) -> None:
        if not isinstance(given, (tuple, list)) or len(given) != 3:
            raise TypeError(f'keep_best must be (key, "min" or "max", n), not {shown(given)}')
        key, mode, count = given
        if not isinstance(key, str) or not key:
            raise TypeError(f"keep_best needs a key of the log, not {shown(key)}")
        if mode not in ("min", "max"):
            raise ValueError(f'keep_best needs "min" or "max", not {shown(mode)}')
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"keep_best needs a number of checkpoints, 1 or more, not {shown(count)}")
        self.key = key
        self._sign = 1.0 if mode == "min" else -1.0
        self._count = count
        self._saved: list[_Saved] = []
        # (update, value) since the last save, the newest last.
        self._values: deque[tuple[int, float]] = deque(maxlen=_VALUES)

    def look(self, values: Mapping[str, Any], update: int) -> None:
        """Takes note of the key, if it is among the values that are logged now."""
        value = _number(_found(values, self.key))
        if value is None:
            return
        just_saved = [each for each in self._saved if each.update == update]
        for each in just_saved:
            # An evaluation of what was saved just before.
            each.value = value
        if not just_saved:
            self._values.append((update, value))

    def recall(self, run_directory: Path, logged: Mapping[int, Any]) -> None:
        """Takes note of what an earlier process has saved: `logged` are the values of the key, by update."""
        numbers = {update: number for update, value in logged.items() if (number := _number(value)) is not None}
        found = [each for each in _checkpoints.checkpoints(run_directory) if each.update is not None]
        values = _checkpoints.values_at(found, numbers)
        for each in found:
            if each.update is not None and each.update in values and has_number(each.tag):
                self._saved.append(_Saved(each.tag, each.update, values[each.update], each.path.name))
        self._saved.sort(key=lambda each: each.update)
        while self._saved and self._values and self._values[0][0] <= self._saved[-1].update:
            self._values.popleft()

    def save(self, files: Iterable[tuple[str, str]], last_update: int | None) -> list[_Saved]:
        """(tag, file) of what is saved now. `begun` takes the result, if the save has begun."""
        result = []
        for tag, file in files:
            if has_number(tag) and (update := _update_of(tag, last_update)) is not None:
                value = next((value for at, value in reversed(self._values) if at <= update), math.nan)
                result.append(_Saved(tag, update, value, file))
        return result

    def kept(self, now: Iterable[_Saved], exists: Collection[str], folder: Path) -> list[str]:
        """The tags of those that stay, if `now` is saved too. `exists` are files on their way."""
        best: dict[str, float] = {}
        for each in (*self._saved, *now):
            if not math.isnan(each.value):
                best[each.tag] = each.value * self._sign
        newest = {each.tag for each in now}
        files: dict[str, list[str]] = {}
        for each in self._saved:
            files.setdefault(each.tag, []).append(each.file)
        tags: list[str] = []
        # Of equal values, the earlier checkpoint counts.
        for tag in sorted(best, key=best.__getitem__):
            if len(tags) == self._count:
                break
            if tag in newest or any(file in exists or os.path.exists(folder / file) for file in files[tag]):
                tags.append(tag)
        return [tag for tag in tags if tag not in newest]

    def begun(self, now: Iterable[_Saved]) -> None:
        """These are on their way."""
        for each in now:
            self._saved = [other for other in self._saved if other.file != each.file]
            self._saved.append(each)
            while self._values and self._values[0][0] <= each.update:
                self._values.popleft()


def _found(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key of the log: a dict below a key has keys `key/...`."""
    if key in values:
        return values[key]
    for name, value in values.items():
        if isinstance(value, Mapping) and key.startswith(f"{name}/"):
            return _found(value, key[len(name) + 1 :])
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bool)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # Whoever logs it says what is wrong with it.
        return None


def _update_of(tag: str, last_update: int | None) -> int | None:
    """As of `Checkpoint.update`, before there is a file."""
    in_tag = _checkpoints.update_in(tag)
    if in_tag is not None and _checkpoints.is_progress(tag):
        return in_tag
    return in_tag if last_update is None else last_update
