# SPDX-License-Identifier: Apache-2.0
"""What a bridge asks of a tracker, and what can be wrong with one."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import frames
from ..errors import NoetherWriterError


class TrackerMissing(NoetherWriterError, ImportError):
    """The package of a tracker is not installed."""


class BridgeInUse(NoetherWriterError):
    """Another process uploads this run to this tracker."""


class Unreachable(Exception):
    """The tracker does not answer now. Nothing is known to be lost, and the same call may be made again."""


class Lost(Exception):
    """What was sent may be lost: the tracker's run has to be opened again, and says then what it has kept."""


class Gone(Exception):
    """The tracker has the run no more: somebody has deleted it."""


class Refused(NoetherWriterError):
    """The tracker will not take it, however often it is asked."""


@dataclass(frozen=True)
class Upload:
    """One row, or what was added to a row after it was sent.

    Attributes:
        position: which row of the log it is, counted from 0 without empty ones.
        is_in_doubt: an earlier process may have sent it.
        part: empty for a row, and another text for each addition to it.
    """

    position: int
    update: int
    wall_time: float
    values: dict[str, frames.Scalar]
    is_in_doubt: bool = False
    part: str = ""


class Voice:
    """Says what a person should know, on standard error; what is said once for each run is said once."""

    _lock = threading.Lock()

    def __init__(self, tracker: str, run: str = "") -> None:
        self._prefix = f"noether-writer bridge to {tracker}: " + (f"{run}: " if run else "")
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        with self._lock:
            print(self._prefix + text, file=sys.stderr, flush=True)

    def once(self, text: str, about: str | None = None) -> None:
        about = text if about is None else about
        if about not in self._said:
            self._said.add(about)
            self.say(f"{text} (this is said once)")


class Memory(ABC):
    """What is kept for a tracker's run from one process to the next."""

    @abstractmethod
    def recall(self, name: str) -> Any: ...

    @abstractmethod
    def remember(self, **facts: Any) -> None:
        """Durable when it returns."""


@dataclass(frozen=True)
class Identity:
    """The run as the tracker is told of it.

    Attributes:
        key: 16 hexadecimal digits that no other run has, and that an earlier process has used too.
        name: what people see.
        noted: the updates of the rows that earlier processes have sent, or were about to send.
        kept: how many of these the tracker has for certain.
        began: when the first row was logged, or None if there is none.
    """

    key: str
    name: str
    project: str
    directory: str
    noted: Sequence[int]
    kept: int
    began: float | None


class Tracker(ABC):
    """One run of a tracker.

    Any method may raise Unreachable, Lost, Gone and Refused.
    """

    #: As it is named on the command line.
    name: ClassVar[str]
    #: The variable in which its users put the name of their project.
    project_variable: ClassVar[str]
    #: Whether values can be added to a step after later ones, or after a pause. If not, the last row is sent when the
    #: next one comes.
    takes_additions: ClassVar[bool]

    def __init__(self, voice: Voice, memory: Memory) -> None:
        self.voice = voice
        self.memory = memory

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """Imports the package.

        Raises:
            TrackerMissing.
        """

    @abstractmethod
    def open(self, identity: Identity) -> int:
        """Opens the run, or makes it. Returns how many of the noted rows the tracker has; others are sent again."""

    @abstractmethod
    def configure(self, config: Mapping[str, Any]) -> None:
        """Takes the hyperparameters, perhaps again with others."""

    @abstractmethod
    def send(self, uploads: Sequence[Upload]) -> None: ...

    @abstractmethod
    def kept(self) -> int:
        """How many rows the tracker has for certain."""

    @abstractmethod
    def finish(self, is_finished: bool) -> None:
        """The run has ended. When this returns, the tracker has everything."""

    @abstractmethod
    def leave(self, note: str | None) -> None:
        """The bridge leaves a run that has not ended; or its log is in another run of the tracker from now on, and
        `note` says so."""


def missing(package: str, extra: str, error: ImportError) -> TrackerMissing:
    return TrackerMissing(
        f"the bridge needs the package {package}, which cannot be imported here ({error}). Nothing was uploaded. "
        f'Install it: pip install "noether-writer[{extra}]"'
    )


def plain(value: Any) -> Any:
    """`value` as JSON has it: dicts with texts as keys, lists, and plain values."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def flat(config: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts become keys `a<separator>b`."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            result.update(flat(value, separator, f"{name}{separator}"))
        else:
            result[name] = value
    return result
