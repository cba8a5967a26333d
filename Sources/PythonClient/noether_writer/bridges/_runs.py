# SPDX-License-Identifier: Apache-2.0
"""Which runs a bridge follows, and one thread for each."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnknownRun
from ._follower import Follower, Options
from ._source import entries_file, is_same, journal_file, known_runs
from ._tracker import BridgeInUse, Tracker, Voice

_SCAN_SECONDS = 2.0
_AGAIN_SECONDS = 30.0
# Runs that have ended are uploaded side by side, so many at a time; each run that lives has its place.
_ENDED_AT_A_TIME = 2
_DEPTH = 8


@dataclass(frozen=True)
class Found:
    directory: Path
    is_live: bool
    name: str

    def signature(self) -> object:
        """Another one if there may be more to upload than before."""
        try:
            facts = os.stat(entries_file(self.directory))
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_size


class Chosen:
    """What the command line names: a run, all runs below a directory, or all runs that the daemon has.

    Raises:
        UnknownRun.
    """

    def __init__(self, name: str | None) -> None:
        self._root: Path | None = None
        self._run: Path | None = None
        if name is None:
            return
        path = Path(os.path.abspath(name))
        if _is_run(path):
            self._run = path
        elif path.is_dir():
            self._root = path
        else:
            self._run = _by_id(name)

    @property
    def is_one(self) -> bool:
        return self._run is not None

    def find(self) -> list[Found]:
        runs = known_runs()
        ids = {os.path.realpath(each["run_directory"]): each["run_id"] for each in runs}
        live = [Path(each["run_directory"]) for each in runs if each["state"] == "running"]
        if self._run is not None:
            return [Found(self._run, any(is_same(self._run, each) for each in live), _name(self._run, ids))]
        if self._root is None:
            directories = [Path(each["run_directory"]) for each in runs]
        else:
            directories = list(_below(self._root))
            real = os.path.realpath(self._root)
            directories += [each for each in live if os.path.realpath(each).startswith(real + os.sep)]
        unique = {os.path.realpath(each): each for each in reversed(directories)}
        alive = {os.path.realpath(each) for each in live}
        return [Found(directory, path in alive, _name(directory, ids)) for path, directory in sorted(unique.items())]


def _name(directory: Path, ids: Mapping[str, str]) -> str:
    """RUN_ID or RUN_ID/STAGE, as far as the daemon or config.yaml knows the run's id; or else the directory's name."""
    run_id = ids.get(os.path.realpath(directory))
    if run_id is None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (directory / "tracker/config.yaml").read_text()
            found = re.search(r"^run_name: *(['\"]?)(.+)\1$", text, re.M)
            run_id = found[2] if found else None
    return f"{run_id}/{directory.name}" if run_id == directory.parent.name else directory.name


def _is_run(path: Path) -> bool:
    return (path / "tracker").is_dir()


def _below(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    if _is_run(root):
        yield root
    if depth == 0:
        return
    try:
        with os.scandir(root) as entries:
            names = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for name in sorted(names):
        if name not in ("tracker", "checkpoints") and not name.startswith("."):
            yield from _below(root / name, depth - 1)


def _by_id(run_id: str) -> Path:
    known = known_runs()
    found = {each["run_directory"]: None for each in known if each["run_id"] == run_id}
    if len(found) == 1:
        return Path(next(iter(found)))
    if found:
        raise UnknownRun(f"several runs have the id {run_id}: name the directory, one of {', '.join(found)}")
    names = sorted({each["run_id"] for each in known})
    hint = f"the daemon has {', '.join(names[:8])}" if names else "no daemon has any run now"
    raise UnknownRun(
        f"{run_id} is neither a directory nor the id of a run that the daemon has: {hint}. Name the run's directory, "
        "or start the bridge when the run has begun"
    )


class Work:
    """Follows the chosen runs until they have ended, or for ever.

    Args:
        once: whether to leave when all runs that are there have ended.
    """

    def __init__(
        self, chosen: Chosen, kind: type[Tracker], options: Options, once: bool, stop: threading.Event
    ) -> None:
        self._chosen, self._kind, self._options, self._once, self._stop = chosen, kind, options, once, stop
        self._voice = Voice(kind.name)
        self._threads: dict[Path, threading.Thread] = {}
        self._live: set[Path] = set()
        self._done: dict[Path, object] = {}
        self._again_at: dict[Path, float] = {}
        self._failed: dict[Path, str] = {}

    def do(self) -> bool:
        """Returns whether everything was uploaded, as far as is known."""
        while not self._stop.is_set():
            for path in [path for path, thread in self._threads.items() if not thread.is_alive()]:
                del self._threads[path]
                self._live.discard(path)
            is_open = False
            for found in self._chosen.find():
                is_open |= self._begin(found)
            if self._once and not is_open and not self._threads:
                break
            self._stop.wait(0.1 if self._once else _SCAN_SECONDS)
        for thread in self._threads.values():
            thread.join()
        return not self._failed

    def _begin(self, found: Found) -> bool:
        """Starts to follow a run, if it is time. Returns whether there is something to do for it, now or later."""
        path = found.directory
        if path in self._threads:
            return True
        if self._once and path in self._failed:
            return False
        if time.monotonic() < self._again_at.get(path, 0):
            return True
        if not found.is_live:
            if self._done.get(path, self) == found.signature():
                return False
            if len(self._threads) - len(self._live) >= _ENDED_AT_A_TIME:
                return True
        elif path not in self._live:
            self._live.add(path)
        thread = threading.Thread(target=self._follow, args=(found,), name=f"bridge {path.name}")
        self._threads[path] = thread
        thread.start()
        return True

    def _follow(self, found: Found) -> None:
        path = found.directory
        signature = found.signature()
        name = found.name
        try:
            follower = Follower(path, name, self._kind, self._options, self._stop)
            if follower.follow():
                self._done[path] = signature
                self._failed.pop(path, None)
            elif not self._stop.is_set():
                # It has no log, or one that can't be read now.
                self._done[path] = signature
                if journal_file(path).exists() or self._chosen.is_one:
                    self._fail(path, name, "it has no log that can be read now")
        except BridgeInUse as error:
            self._fail(path, name, str(error))
        except Exception as error:
            self._fail(path, name, f"{error or type(error).__name__}")

    def _fail(self, path: Path, name: str, reason: str) -> None:
        self._again_at[path] = time.monotonic() + _AGAIN_SECONDS
        if self._failed.get(path) != reason:
            self._failed[path] = reason
            self._voice.say(f"{name} is not uploaded: {reason}")
