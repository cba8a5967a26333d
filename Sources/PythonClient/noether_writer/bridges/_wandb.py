# SPDX-License-Identifier: Apache-2.0
"""W&B, online or offline, as WANDB_MODE says.

W&B has a process of its own, wandb-core, that takes rows without an answer. What it has for certain is asked elsewhere:
online of the server, when the run is resumed; offline of the .wandb file, whose records are read back.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._tracker import Identity, Lost, Refused, Tracker, Unreachable, Upload, missing, plain

_TAKEN_KEYS = ("_step", "_timestamp", "_runtime", "_wandb")
# How long the core of an earlier process may take to end, after that process did.
_CORE_SECONDS = 20.0
# The framing of a .wandb file is that of a log of LevelDB.
_FILE_HEADER = 7
_BLOCK = 32768


class Wandb(Tracker):
    name = "wandb"
    project_variable = "WANDB_PROJECT"
    # A step is closed when the next one begins.
    takes_additions = False

    @classmethod
    def check(cls) -> None:
        try:
            import wandb  # noqa: F401
            from wandb.proto import wandb_internal_pb2  # noqa: F401
        except ImportError as error:
            raise missing("wandb", "wandb", error) from error

    def open(self, identity: Identity) -> int:
        import wandb

        _await_end(self.memory.recall("wandb_core"))
        self._updates = identity.noted
        self._kept = identity.kept
        self._lag: Segment | None = None
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_transaction_log_flush_interval=1.0,
        )
        try:
            self._run: Any = wandb.init(
                project=identity.project,
                id=identity.key,
                name=identity.name,
                resume="allow",
                reinit="create_new",
                config={"noether_writer": {"run_directory": identity.directory}},
                settings=settings,
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise Refused(f"W&B: {error}. Log in (wandb login), or set WANDB_API_KEY or WANDB_MODE=offline") from error
        except (wandb.errors.Error, OSError) as error:
            raise Unreachable(f"W&B: {_first_line(error)}") from error
        if self._run.settings.mode == "disabled":
            raise Refused("WANDB_MODE=disabled: W&B takes nothing, and so nothing was uploaded. Unset it")
        return self._truth(identity)

    def _truth(self, identity: Identity) -> int:
        self._last_step: int | None = None
        if not self._run.offline:
            # Rows up to there are on the server; it refuses steps below.
            first = int(self._run.starting_step)
            self._kept = bisect_right(identity.noted, first - 1)
        else:
            files = list(self.memory.recall("wandb_files") or [])
            steps = [step for name in files for step in Segment(Path(name)).steps()]
            if steps:
                # Files may have been synchronised and removed: so what is noted as kept stays kept.
                self._kept = max(self._kept, bisect_right(identity.noted, max(steps)))
            self._lag = Segment(Path(self._run.settings.sync_file))
            self.memory.remember(wandb_files=[*files, str(self._lag.path)])
        self.memory.remember(wandb_core=_core_of(os.getpid()))
        if self._kept:
            self._last_step = identity.noted[self._kept - 1]
        return self._kept

    def configure(self, config: Mapping[str, Any]) -> None:
        with _connected():
            self._run.config.update(plain(config), allow_val_change=True)

    def send(self, uploads: Sequence[Upload]) -> None:
        with _connected():
            for each in uploads:
                if each.update < 0 or (self._last_step is not None and each.update <= self._last_step):
                    self.voice.once(f"W&B takes no step {each.update}, and the row of this update is left out", "step")
                    continue
                row = {self._key(key): value for key, value in each.values.items()}
                self._run.log({**row, "_timestamp": each.wall_time}, step=each.update, commit=True)
                self._last_step = each.update

    def _key(self, key: str) -> str:
        if key not in _TAKEN_KEYS:
            return key
        self.voice.once(f"W&B has its own {key!r}: the key of the log is 'logged{key}' there", f"key {key}")
        return f"logged{key}"

    def kept(self) -> int:
        if self._lag is not None:
            for step in self._lag.steps():
                self._kept = max(self._kept, bisect_right(self._updates, step))
        return self._kept

    def finish(self, is_finished: bool) -> None:
        with _connected():
            self._run.finish(exit_code=0 if is_finished else 1)
        self._kept = len(self._updates)

    def leave(self, note: str | None) -> None:
        with _connected():
            if note is not None:
                self._run.notes = note
                self._run.tags = (*(self._run.tags or ()), "superseded")
            self._run.finish(exit_code=0)
        self._kept = len(self._updates)


class Segment:
    """The .wandb file of one process: what W&B has of a run that is offline. Read from where the last call ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = _FILE_HEADER

    def steps(self) -> Iterator[int]:
        """The steps of the rows that were written since the last call."""
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record

        for data in self._records():
            record = Record()
            with contextlib.suppress(DecodeError):
                record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                yield from (int(item.value_json) for item in record.history.item if _name(item) == "_step")

    def _records(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return
        base = self._at
        at, parts = 0, b""
        while True:
            left = _BLOCK - (base + at) % _BLOCK
            if left < _FILE_HEADER:
                at += left
                continue
            if at + _FILE_HEADER > len(data):
                return
            _, length, kind = struct.unpack_from("<IHB", data, at)
            end = at + _FILE_HEADER + length
            if kind == 0 or end > len(data):
                return
            # 1: whole, 2: the first part, 3: a middle one, 4: the last one.
            parts = data[at + _FILE_HEADER : end] if kind in (1, 2) else parts + data[at + _FILE_HEADER : end]
            at = end
            if kind in (1, 4):
                self._at = base + at
                yield parts


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


class _connected:
    """What wandb raises if its core is gone: what it had taken may be lost."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        import wandb

        if isinstance(error, (wandb.errors.Error, OSError, RuntimeError)):
            raise Lost(f"W&B: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _core_of(parent: int) -> list[int] | None:
    """(process, when it started, in ticks) of the core that this process has started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (found := _process(int(folder.name))) and found[:2] == ("wandb-core", parent):
            return [int(folder.name), found[2]]
    return None


def _process(pid: int) -> tuple[str, int, int] | None:
    """(name, parent, when it started) of a process, or None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else (name, int(fields[1]), int(fields[19]))


def _await_end(core: Sequence[int] | None) -> None:
    """The core of a process that was killed may still write what it has taken.

    Raises:
        Unreachable: it has not ended yet.
    """
    deadline = time.monotonic() + _CORE_SECONDS
    while core and (found := _process(core[0])) and found[0] == "wandb-core" and found[2] == core[1]:
        if core == _core_of(os.getpid()):
            return
        if time.monotonic() > deadline:
            raise Unreachable(f"process {core[0]}, which an earlier bridge has started, still uploads this run")
        time.sleep(0.05)
