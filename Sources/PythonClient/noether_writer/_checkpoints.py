# SPDX-License-Identifier: Apache-2.0
"""Finds the checkpoints of a run in its files, with a daemon or without: what is there, what is newest, what is best.

Nothing here needs torch, and nothing that a file holds is executed: of a pickle, plain values are read, and everything
else becomes an empty object.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import logging
import math
import os
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import _restore, frames, manifest
from ._conversation import Conversation
from .errors import DaemonNotFound, DaemonUnavailable, UnknownRun, WaitTimeout
from .saves import KINDS
from .subscription import Row, Subscription

logger = logging.getLogger("noether_writer")

LOG_UPDATE = "user.noether_writer.log_update"
_INFO = "user.noether_writer.info"
# The attribute that the directory of a sharded checkpoint has.
_COMMIT = "user.noether_writer.commit"
_SHARDED = "sharded"
# A pickle that is longer is not read for the few numbers that may be in it.
_PICKLE_BYTES = 64 << 20
# For which the answer may be late, beyond the time that the daemon was given, in seconds.
_GRACE_SECONDS = 5.0
_TAG = re.compile(r"(?:^|_)([EUS])(0|[1-9][0-9]*)(?=_|$)", re.ASCII)
_IS_PROGRESS = re.compile(r"E\d+_U\d+_S\d+", re.ASCII)


AnyKind = Literal["model", "optim", "trainer", "sharded"]


@dataclass(frozen=True)
class Checkpoint:
    """One file in the directory `checkpoints` of a run, or one sharded checkpoint there (`noether_writer.dcp`).

    Attributes:
        path: absolute.
        name: the model's name. If the file has lost its extended attributes, `name` ends with `_<info>`, and `info` is
            None. Of a sharded one: its name up to `_cp=` or up to a number at its end.
        kind: `model`, `optim` or `trainer`; or `sharded`: `path` is a directory.
        info: as it was given to `save`, or None.
        tag: as it was given to `save`, such as `E1_U200_S800` or `latest`; of a sharded one what comes after `_cp=`, or
            its name.
        update: where in the training it was saved: the number that the file holds as
            `training_iteration["update"]`, or else that of a tag `E1_U200_S800`, or else the last update in the log at
            that moment, or else that of a tag such as `U200`. It is None if none of these is known.
        epoch: as the file or its tag says, or None.
        sample: as the file or its tag says, or None.
        nbytes: the size of the file, or of all files, in bytes.
        durable_at: when the file was written, in seconds since 1970.
    """

    path: Path
    name: str
    kind: AnyKind
    info: str | None
    tag: str
    update: int | None
    epoch: int | None
    sample: int | None
    nbytes: int
    durable_at: float


def checkpoints(run_directory: str | os.PathLike[str]) -> list[Checkpoint]:
    """Returns the checkpoints of a run, the newest last. It reads files only, and needs no daemon.

    The newest is the one that was written last. If a file of the run has lost the extended attributes that
    noether-writer gives it, the files were copied, and the times of copies say nothing: then the highest update is the
    newest.

    Args:
        run_directory: `<output_root>[/debug]/<run_id>[/<stage_name>]`, as `run.directory` gives it.

    Returns:
        an empty list if the directory is empty or does not exist: the run has not begun.

    Raises:
        UnknownRun: there is such a directory, and it is not the directory of a run.
        OSError: it cannot be read.
    """
    directory = Path(os.path.abspath(run_directory))
    folder = directory / "checkpoints"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        _check_run(directory)
        return []
    files = [each for name in names if (each := _read(folder, name) or _read_sharded(folder, name)) is not None]
    found, has_attributes = [each for each, _ in files], all(has_attribute for _, has_attribute in files)
    if not has_attributes and all(each.update is not None for each in found):
        return sorted(found, key=lambda each: (each.update, each.durable_at, each.path))
    return sorted(found, key=lambda each: (each.durable_at, each.update or 0, each.path))


def latest(
    run_directory: str | os.PathLike[str],
    name: str | None = None,
    kind: AnyKind | None = "model",
    *,
    info: str | None = None,
    update: int | None = None,
    verify: bool = True,
) -> Checkpoint | None:
    """Returns the newest checkpoint of a run that is whole and durable, or None.

    A file that is damaged is left out, with a warning that names it; then the next older one is taken.

    Args:
        run_directory: as for `checkpoints`.
        name: only those of this model.
        kind: only `model` (also those that are sharded), `optim`, `trainer` or `sharded`; None: any.
        info: only those with this info. None: those without one, or all if each has one.
        update: only those of this update. So the optimizer's file is of the same moment as the model's.
        verify: whether the whole file is read and its checksums are compared. The file is then in the page cache, and
            loading it takes no second read. A file that the daemon still has in memory is not read: `load` takes it
            from there.

    Raises:
        as `checkpoints`.
    """
    _check_kind(kind)
    for each in reversed(_wanted(run_directory, name, kind, info)):
        if update in (None, each.update) and (not verify or _is_whole(each.path)):
            return each
    return None


def best(
    run_directory: str | os.PathLike[str],
    key: str,
    mode: Literal["min", "max"] = "min",
    *,
    name: str | None = None,
    kind: AnyKind | None = "model",
    info: str | None = None,
    verify: bool = True,
) -> Checkpoint | None:
    """Returns the checkpoint at which a key of the log had its best value, or None.

    The value of a checkpoint is the last one that was logged up to its update, and after the update of the checkpoint
    before it: the result of an evaluation counts for the next checkpoint, and for no later one. NaN is never the best.
    Of equal values, the earlier checkpoint counts.

    The log is the daemon's if it has the run, or else that of `tracker/entries.th`.

    Args:
        key: of the log, such as `loss/val`.
        mode: whether the lowest or the highest value is the best.
        name, kind, info, verify: as for `latest`.

    Raises:
        KeyError: the log has no such key; the message names the keys that it has.
        ValueError: `mode` is neither `min` nor `max`.
        also as `checkpoints`.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be min or max, not {mode!r}")
    _check_kind(kind)
    series: dict[tuple[str, str], list[Checkpoint]] = {}
    for each in _wanted(run_directory, name, kind, info):
        if each.update is not None:
            series.setdefault((each.name, each.kind), []).append(each)
    if not series:
        return None
    logged = _logged(Path(os.path.abspath(run_directory)), key)
    rated: list[tuple[float, int, float, Checkpoint]] = []
    for members in series.values():
        values = values_at(members, logged)
        rated += [
            (value, each.update, -each.durable_at, each)
            for each in members
            if each.update is not None
            and not math.isnan(value := values.get(each.update, math.nan) * (1 if mode == "min" else -1))
        ]
    for *_, each in sorted(rated, key=lambda item: item[:3]):
        if not verify or _is_whole(each.path):
            return each
    return None


def values_at(members: Iterable[Checkpoint], logged: Mapping[int, float]) -> dict[int, float]:
    """The value of each update that was saved: the last one that was logged up to it, and after the one before it."""
    updates = sorted(logged)
    before = -math.inf
    values: dict[int, float] = {}
    for update in sorted({each.update for each in members if each.update is not None}):
        place = bisect.bisect_right(updates, update) - 1
        if place >= 0 and updates[place] > before:
            values[update] = logged[updates[place]]
        before = update
    return values


def is_progress(tag: str) -> bool:
    """Whether a tag is one of Noether's, E1_U200_S800."""
    return _IS_PROGRESS.fullmatch(tag) is not None


def update_in(tag: str) -> int | None:
    """The update that a tag names, or None."""
    return next((int(number) for letter, number in _TAG.findall(tag) if letter == "U"), None)


def resumable_update(run_directory: str | os.PathLike[str]) -> int | None:
    """Returns the update at which a run can be resumed, or None if it has no checkpoint.

    A crash may leave a new file of the model beside an old one of its optimizer. So this is the newest update of which
    all files are whole, and of which another update has no file (by name and kind) beyond those.

    Raises:
        ValueError: the run has a log and checkpoints, and no checkpoint says its update.
        also as `checkpoints`.
    """
    found = checkpoints(run_directory)
    members: dict[int, list[Checkpoint]] = {}
    for each in reversed(found):
        if each.update is not None:
            members.setdefault(each.update, []).append(each)
    series = {update: {(each.name, each.kind) for each in files} for update, files in members.items()}
    for update, files in members.items():
        if any(series[update] < others for others in series.values()):
            continue
        if all([_is_whole(each.path) for each in files]):
            return update
    entries = Path(run_directory) / "tracker" / "entries.th"
    if found and not members and entries.exists():
        raise ValueError(
            f'resume="auto": none of the checkpoints in {found[0].path.parent} says its update (their extended '
            f"attributes are lost, and their tags hold none), so nobody knows which part of the log {entries} belongs "
            "to them. Nothing was changed; open the run with resume_at=, the last update to keep"
        )
    return None


def wait_for_run(run_id: str, timeout: float) -> None:
    """Waits until the daemon, if one is there, has written what an earlier process of this run has handed to it. What
    storage refuses for longer than `timeout` seconds is said in a warning."""
    with contextlib.suppress(DaemonNotFound, UnknownRun):
        try:
            with Conversation() as daemon:
                done = daemon.ask(frames.WAIT, {"run_id": run_id, "timeout_s": timeout}, timeout + _GRACE_SECONDS)
        except (DaemonUnavailable, WaitTimeout) as error:
            logger.warning("whether the last checkpoints of run %s are written is not known: %s", run_id, error)
            return
        if not done["done"]:
            stalled = "; ".join(f"{each['path']}: {each['message']}" for each in done.get("stalled") or ())
            logger.warning(
                "run %s is resumed at an older checkpoint than its last one: after %g s, %d checkpoints are still not "
                "durable%s",
                run_id,
                timeout,
                done["pending"],
                f" ({stalled})" if stalled else "",
            )


def last_update(run_directory: str | os.PathLike[str]) -> int | None:
    """Returns the last update in the log of a run that has ended, or None if it has none."""
    entries = Path(run_directory) / "tracker" / "entries.th"
    if not entries.exists():
        return None
    content = plain_content(entries, None)
    return max((max(series) for series in content.values() if series), default=None)


# MARK: what a file says


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in (*KINDS, _SHARDED):
        raise ValueError(f"kind must be model, optim, trainer or sharded, or None for any, not {kind!r}")


def _wanted(
    run_directory: str | os.PathLike[str], name: str | None, kind: AnyKind | None, info: str | None
) -> list[Checkpoint]:
    kinds = (kind, _SHARDED) if kind == "model" else (kind,)
    found = [
        each
        for each in checkpoints(run_directory)
        if name in (None, each.name) and (kind is None or each.kind in kinds)
    ]
    return [each for each in found if each.info == info] or (found if info is None else [])


def _check_run(directory: Path) -> None:
    """
    Raises:
        UnknownRun: it is there, and is no directory of a run.
    """
    if not directory.exists() or (directory / "tracker").is_dir():
        return
    below = sorted(os.listdir(directory))
    if not below:
        return
    runs = [name for name in below if (directory / name / "checkpoints").is_dir()]
    hint = f" {', '.join(runs[:3])} below it {'is' if len(runs) == 1 else 'are'}." if runs else ""
    raise UnknownRun(
        f"{directory} is not the directory of a run: it holds neither checkpoints nor tracker.{hint} A run's directory "
        "is <output_root>[/debug]/<run_id>[/<stage_name>], as run.directory gives it"
    )


def _read(folder: Path, file: str) -> tuple[Checkpoint, bool] | None:
    """Returns a checkpoint and whether it has its extended attributes, or None if the file is not a checkpoint."""
    beginning, mark, end = file.rpartition("_cp=")
    tag, _, kind = end.removesuffix(".th").rpartition("_")
    if not (mark and beginning and tag and file.endswith(".th") and kind in KINDS):
        return None
    path = folder / file
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        # It was removed in this moment.
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    attributes = _attributes(path)
    info = attributes.get(_INFO)
    name = beginning
    if info and beginning.endswith(f"_{info}"):
        name = beginning[: -len(info) - 1]
    else:
        info = None
    in_tag = {letter: int(number) for letter, number in _TAG.findall(tag)}
    inside = _iteration(path) if kind == "model" else {}
    log_update = attributes.get(LOG_UPDATE)
    update = inside.get("update")
    if update is None and not _IS_PROGRESS.fullmatch(tag) and log_update is not None:
        update = int(log_update)
    if update is None:
        update = in_tag.get("U")
    return Checkpoint(
        path=path,
        name=name,
        kind=kind,  # type: ignore[arg-type]
        info=info,
        tag=tag,
        update=update,
        epoch=inside.get("epoch", in_tag.get("E")),
        sample=inside.get("sample", in_tag.get("S")),
        nbytes=facts.st_size,
        durable_at=facts.st_mtime_ns / 1e9,
    ), LOG_UPDATE in attributes


def _read_sharded(folder: Path, name: str) -> tuple[Checkpoint, bool] | None:
    """Returns a sharded checkpoint and whether it is where it was made, or None if the name is not one's."""
    path = folder / name
    try:
        if not manifest.is_sharded(path):
            return None
        written = os.stat(path / manifest.METADATA).st_mtime_ns / 1e9
        nbytes = sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    except FileNotFoundError:
        return None
    beginning, mark, tag = name.rpartition("_cp=")
    start, number = manifest.series(name)
    in_tag = {letter: int(count) for letter, count in _TAG.findall(tag)} if mark else {}
    has_attribute = False
    with contextlib.suppress(OSError):
        has_attribute = bool(os.getxattr(path, _COMMIT))
    return Checkpoint(
        path=path,
        name=(beginning if mark else start.rstrip("-_=.") or name),
        kind="sharded",
        info=None,
        tag=tag if mark else name,
        update=in_tag.get("U", number),
        epoch=in_tag.get("E"),
        sample=in_tag.get("S"),
        nbytes=nbytes,
        durable_at=written,
    ), has_attribute


def _attributes(path: Path) -> dict[str, str]:
    values = {}
    for name in (LOG_UPDATE, _INFO):
        # Without attributes: a file system that keeps none, or a copy.
        with contextlib.suppress(OSError):
            values[name] = os.getxattr(path, name).decode(errors="replace")
    if not values.get(LOG_UPDATE, "0").lstrip("-").isdecimal():
        del values[LOG_UPDATE]
    return values


def _iteration(path: Path) -> dict[str, int]:
    """`training_iteration` of a file that holds it, as Noether's models do."""
    try:
        content = plain_content(path)
    except Exception:
        # Whether it is damaged is asked elsewhere, with all of its checksums.
        return {}
    iteration = content.get("training_iteration") if isinstance(content, dict) else None
    if not isinstance(iteration, dict):
        return {}
    return {
        key: value for key, value in iteration.items() if type(value) is int and key in ("epoch", "update", "sample")
    }


class _Left:
    """What stands for every object of a class: it takes whatever a pickle does to it, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists and plain values. It imports nothing and calls nothing that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Left

    def persistent_load(self, pid: Any) -> Any:
        return _Left()


def plain_content(path: Path, limit: int | None = _PICKLE_BYTES) -> Any:
    """What a .th file holds, without its tensors and objects; None if its pickle is longer than `limit` bytes.

    Raises:
        what a damaged file raises.
    """
    with zipfile.ZipFile(path) as archive:
        entry = next(each for each in archive.infolist() if re.fullmatch(r"[^/]+/data\.pkl", each.filename))
        if limit is not None and entry.file_size > limit:
            return None
        return _PlainUnpickler(io.BytesIO(archive.read(entry))).load()


def _is_whole(path: Path) -> bool:
    """Whether all records of a file have their checksums. It is made durable too, whoever has written it."""
    try:
        if path.is_dir():
            damaged = manifest.damage(path)
            return damaged is None or _is_damaged(path, damaged)
        with open(path, "rb") as file:
            if (image := _restore.image_of(file.fileno())) is not None:
                # It is durable, and as the daemon has written it. Whoever loads it reads nothing of it from storage.
                os.close(image)
                return True
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is None and not any(name.endswith("/data.pkl") for name in archive.namelist()):
                    damaged = "data.pkl, which is missing"
            if damaged is None:
                os.fsync(file.fileno())
        if damaged is None:
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            return True
    except FileNotFoundError:
        # It was removed in this moment, by retention for example.
        return False
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        damaged = str(error)
    return _is_damaged(path, damaged)


def _is_damaged(path: Path, damaged: str | None) -> bool:
    logger.warning(
        "%s is damaged (%s), and an older checkpoint is taken. `noether-writer verify %s` says more",
        path,
        damaged,
        path,
    )
    return False


# MARK: the log


def _logged(directory: Path, key: str) -> dict[int, float]:
    """The numbers of a key, by update."""
    entries, journal = directory / "tracker" / "entries.th", directory / "tracker" / "entries.journal"
    series = None
    if journal.exists() or not entries.exists():
        series = _logged_by_daemon(directory, key)
        if series is None and journal.exists():
            logger.warning(
                "the last part of the log of %s is in a journal, and no daemon answers that knows it: what is best is "
                "judged without that part",
                directory,
            )
    if series is None:
        content = plain_content(entries, None) if entries.exists() else {}
        if key not in content:
            raise _unknown_key(key, directory, list(content))
        series = content[key]
    return {update: float(value) for update, value in series.items() if isinstance(value, (int, float)) and update >= 0}


def _logged_by_daemon(directory: Path, key: str) -> dict[int, Any] | None:
    try:
        with Conversation() as daemon:
            runs = daemon.ask(frames.STATUS, {})["runs"]
        run = next(each for each in reversed(runs) if _is_same(each["run_directory"], directory))
        subscription = Subscription(run["run_id"], 0, run["run_directory"])
    except (DaemonNotFound, DaemonUnavailable, UnknownRun, StopIteration):
        return None
    values: dict[int, Any] = {}
    keys: dict[str, None] = {}
    with subscription:
        total = int(subscription.run["entries"])
        for event in subscription if total > 0 else ():
            if isinstance(event, Row):
                keys.update(dict.fromkeys(event.values))
                if key in event.values:
                    values[event.update] = event.values[key]
                if event.index + 1 >= total:
                    break
    if key not in keys:
        raise _unknown_key(key, directory, list(keys))
    return values


def _is_same(one: str, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _unknown_key(key: str, directory: Path, known: Sequence[str]) -> KeyError:
    names = ", ".join(repr(each) for each in sorted(known) if each not in ("epoch", "sample")) or "none"
    return KeyError(f"the log of {directory} has no key {key!r}; it has {names}")
