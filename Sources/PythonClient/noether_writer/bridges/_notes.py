# SPDX-License-Identifier: Apache-2.0
"""What a bridge notes beside a run, so that another process can continue after its death at any moment.

A row is noted by its checksum before it is sent, and counted as kept after the tracker is known to have it. What lies
between is in doubt: the next process asks the tracker, or sends it in a form that the tracker takes once.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import uuid
from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .. import frames
from ._tracker import BridgeInUse, Memory

_DIGEST_BYTES = 8


def digest(update: int, values: Mapping[str, frames.Scalar]) -> bytes:
    """Which row it is, whatever the order of its values, and whether it comes from a file or from the daemon. Not its
    time: a file has none."""
    return blake2b(repr((update, sorted(values.items()))).encode(), digest_size=_DIGEST_BYTES).digest()


class Notes(Memory):
    """The notes of one run for one tracker. They are this process's alone as long as they are open.

    Raises:
        BridgeInUse: another process has them.
        OSError, sqlite3.Error: they can't be kept there.
    """

    def __init__(self, folder: Path, tracker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{tracker}.sqlite"
        self._lock = os.open(folder / f"{tracker}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock()
            self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                self._load()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise BridgeInUse(
                f"another bridge, process {pid}, uploads this run to this tracker (it has {self.path.parent} locked). "
                "Nothing was uploaded by this one. End the other one first, or leave the run to it"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _load(self) -> None:
        # At a power cut too, nothing may be noted as kept that was not, nor sent that was not noted.
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS rows (position INTEGER PRIMARY KEY, step INTEGER, digest BLOB, keys TEXT)"
        )
        self._facts = {
            name: json.loads(value) for name, value in self._database.execute("SELECT name, value FROM facts")
        }
        self.updates = array("q")
        self._digests = bytearray()
        self._last_keys: list[str] | None = None
        for step, found, keys in self._database.execute("SELECT step, digest, keys FROM rows ORDER BY position"):
            self.updates.append(step)
            self._digests += found
            self._last_keys = json.loads(keys) if keys else None
        if self.recall("key") is None:
            self.remember(key=uuid.uuid4().hex[:16], generation=1, kept=0)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def kept(self) -> int:
        return int(self._facts["kept"])

    def digest(self, position: int) -> bytes:
        start = position * _DIGEST_BYTES
        return bytes(self._digests[start : start + _DIGEST_BYTES])

    def keys(self, position: int) -> list[str] | None:
        """The keys that were sent of the last row, if it was sent before the next one came."""
        return self._last_keys if position == len(self) - 1 else None

    def note(self, rows: Sequence[tuple[int, bytes, Sequence[str] | None]]) -> None:
        """Appends (update, digest, keys) of rows that will be sent. `keys` if more may be added to this row."""
        first = len(self)
        with self._transaction():
            self._database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)",
                [
                    (first + place, update, found, None if keys is None else json.dumps(list(keys)))
                    for place, (update, found, keys) in enumerate(rows)
                ],
            )
        for update, found, keys in rows:
            self.updates.append(update)
            self._digests += found
            self._last_keys = None if keys is None else list(keys)

    def amend(self, found: bytes, keys: Sequence[str]) -> None:
        """The last row has got more values, which the tracker has."""
        with self._transaction():
            self._database.execute(
                "UPDATE rows SET digest = ?, keys = ? WHERE position = ?",
                (found, json.dumps(list(keys)), len(self) - 1),
            )
        self._digests[-_DIGEST_BYTES:] = found
        self._last_keys = list(keys)

    def keep(self, count: int) -> None:
        """The tracker has the first `count` rows."""
        if count > self.kept:
            self.remember(kept=min(count, len(self)))

    def begin_anew(self, *, beside_the_old_one: bool) -> None:
        """For another run of the tracker, which has nothing yet."""
        generation = self.recall("generation") + beside_the_old_one
        stays = {name: self.recall(name) for name in ("project", "name") if self.recall(name) is not None}
        with self._transaction():
            self._database.execute("DELETE FROM rows")
            self._database.execute("DELETE FROM facts")
            self._facts = {}
            self._write(key=uuid.uuid4().hex[:16], generation=generation, kept=0, **stays)
        del self.updates[:]
        self._digests.clear()
        self._last_keys = None

    def recall(self, name: str) -> Any:
        return self._facts.get(name)

    def remember(self, **facts: Any) -> None:
        with self._transaction():
            self._write(**facts)

    def _write(self, **facts: Any) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO facts VALUES (?, ?)", [(name, json.dumps(value)) for name, value in facts.items()]
        )
        self._facts.update(facts)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)

    def __enter__(self) -> Notes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Transaction:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._database.execute("ROLLBACK" if kind else "COMMIT")
