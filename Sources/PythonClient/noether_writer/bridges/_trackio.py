# SPDX-License-Identifier: Apache-2.0
"""trackio, in its local store. A row has an id of its own there, and is taken once however often it is sent."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from .. import frames
from ._tracker import Gone, Identity, Lost, Tracker, Unreachable, Upload, missing, plain

# JSON of trackio has no larger ones.
_LARGEST_INT = (1 << 63) - 1
# What trackio gives each row beside its values.
_TAKEN_KEYS = ("step", "timestamp")


class Trackio(Tracker):
    name = "trackio"
    project_variable = "TRACKIO_PROJECT"
    takes_additions = True

    @classmethod
    def check(cls) -> None:
        try:
            import trackio.sqlite_storage  # noqa: F401
        except ImportError as error:
            raise missing("trackio", "trackio", error) from error

    def open(self, identity: Identity) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        self._store = SQLiteStorage
        self._identity = identity
        self._kept = identity.kept
        self._config: dict[str, Any] | None = None
        count = self._count()
        if identity.kept and not count:
            raise Gone(f"trackio has no run {identity.name} in the project {identity.project} any more")
        # A power cut takes the last transactions of trackio's store. What is sent again it knows by its id.
        self._kept = identity.kept if count >= identity.kept else 0
        return self._kept

    def _count(self) -> int:
        identity = self._identity
        with _answering():
            return int(self._store.get_log_count(identity.project, identity.name, run_id=identity.key))

    def configure(self, config: Mapping[str, Any]) -> None:
        self._config = {str(key): _taken(plain(value)) for key, value in config.items()}
        if self._kept:
            # It is taken together with rows only: with the first one, which the store has already and leaves as it is.
            self._log([Upload(0, 0, 0.0, {})])

    def send(self, uploads: Sequence[Upload]) -> None:
        self._log(uploads)
        self._kept = max(self._kept, uploads[-1].position + 1)

    def _log(self, uploads: Sequence[Upload]) -> None:
        key = self._identity.key
        with _answering():
            self._store.bulk_log(
                self._identity.project,
                self._identity.name,
                [
                    {self._key(name): self._value(name, value) for name, value in each.values.items()}
                    for each in uploads
                ],
                steps=[each.update for each in uploads],
                timestamps=[datetime.fromtimestamp(each.wall_time, timezone.utc).isoformat() for each in uploads],
                config=self._config,
                log_ids=[f"{key}-{each.position}" + (f"-{each.part}" if each.part else "") for each in uploads],
                run_id=key,
            )
        self._config = None

    def _key(self, key: str) -> str:
        if key not in _TAKEN_KEYS:
            return key
        self.voice.once(f"trackio has its own {key!r}: the key of the log is {key + '_'!r} there", f"key {key}")
        return f"{key}_"

    def _value(self, key: str, value: frames.Scalar) -> frames.Scalar:
        taken: frames.Scalar = _taken(value)
        if taken is not value:
            self.voice.once(f"{key!r} has whole numbers beyond 64 bits, which trackio has as floats", f"big {key}")
        return taken

    def kept(self) -> int:
        return self._kept

    def finish(self, is_finished: bool) -> None:
        if self._count() < self._kept:
            raise Lost("rows have gone from trackio's store")

    def leave(self, note: str | None) -> None:
        pass


def _taken(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _taken(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_taken(item) for item in value]
    if isinstance(value, int) and not -_LARGEST_INT <= value <= _LARGEST_INT:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


class _answering:
    """What the store may take later is Unreachable: it is locked by another process, or its disk is full."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (sqlite3.OperationalError, OSError)):
            raise Unreachable(f"trackio's store: {error}") from error
