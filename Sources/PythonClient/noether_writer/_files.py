# SPDX-License-Identifier: Apache-2.0
"""Files at any path: `save`, `load`, `remove` and `wait` for programs that have no runs, and what other modules of this
library build on.

One session of this process serves all of them. It is made when it is first needed, by a forked child anew. The daemon
works below this process's own root directory, so that a file is where this process looks, whatever the daemon sees.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import re
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from . import _restore, ending, environment, frames, run
from ._conversation import Conversation
from .buffers import Buffer, memory_of, pool
from .errors import (
    OTHER_VERSION,
    CheckpointStalled,
    DaemonNotFound,
    DaemonUnavailable,
    NoetherWriterError,
    ProtocolError,
    RefusedName,
    StorageError,
    WaitTimeout,
    WrongSocket,
)
from .frames import kind_of
from .saves import (
    MODES,
    STALL_SECONDS,
    File,
    Order,
    RawSave,
    Sent,
    Ticket,
    begin,
    hand_over,
    mode_of,
    open_saves,
    wait_all,
)
from .session import ANSWER_SECONDS, STALLED, Session
from .untraced import not_followed, untraced

__all__ = ["load", "remove", "save", "wait"]

_LAYOUT = "files"
_NAME_BYTES = 255
_PATH_BYTES = 4096
_NOT_KNOWN = (
    ": whether a save of this path is on its way is not known. Load again, or use torch.load to read what is there"
)
# How a zip archive begins.
_ARCHIVE = b"PK\3\4"
# After a daemon has died, for how long `load` waits for the next one, and how often it looks.
_AGAIN_SECONDS = 2.0
_AGAIN_PAUSE_SECONDS = 0.05


class _Session(Session):
    """The session of this process's files."""

    def named(self, run_id: str) -> str:
        return "the files that this process saves"

    def check_welcome(self) -> None:
        if _LAYOUT not in self.welcome.get("capabilities", ()):
            raise ProtocolError(
                f"{self.welcome.get('daemon')} is too old to save a file that belongs to no run. "
                f"Nothing was sent; {OTHER_VERSION}"
            )

    def check_open(self) -> None:
        if self.core.is_forked:
            raise DaemonUnavailable("this save belongs to the parent process, which waits for it")
        super().check_open()

    @property
    def id(self) -> str:
        return str(self._message["session"])


def _message(session: str) -> dict[str, Any]:
    return {
        "output_root": "/",
        "run_id": _LAYOUT,
        "layout": _LAYOUT,
        "session": session,
        "log": False,
        "node": platform.node(),
        "progress": True,
    }


# By process, and counted: one that was ended makes room for the next. Filled by setdefault alone, which is one step.
_sessions: dict[tuple[int, int], _Session] = {}


def _known_session() -> _Session | None:
    """The session of this process, if there is one that is open."""
    number = 0
    while (found := _sessions.get((os.getpid(), number))) is not None:
        if not (found.core.is_closed or found.core.is_forked):
            return found
        number += 1
    return None


def _session() -> _Session:
    if (known := _known_session()) is not None:
        return known
    # A variable that cannot be read is found out now, not when the training is over.
    ending.seconds()
    made = _Session(_message(uuid.uuid4().hex))
    number = 0
    while True:
        found = _sessions.setdefault((os.getpid(), number), made)
        if found is made:
            run.also_at_the_end_of_a_child()
            return made
        if not (found.core.is_closed or found.core.is_forked):
            # Another thread was faster.
            made.end()
            return found
        number += 1


# Paths


def _text(path: Any) -> str:
    """
    Raises:
        RefusedName: it is no path.
    """
    try:
        text: str | bytes = os.fspath(path)
    except TypeError:
        raise RefusedName(f"{kind_of(path)} is not a path; nothing was changed") from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if "\0" in text:
        raise RefusedName(f"the path {text!r} holds a NUL; nothing was changed")
    return text


def _refused(number: int, words: str, path: str) -> StorageError:
    return StorageError(number, f"{words}. Nothing was changed", path)


def _located(text: str) -> str:
    """The absolute path of a file or directory whose directory is there: without links in its directory; its own name
    is as it is given.

    Raises:
        StorageError, RefusedName.
    """
    directory, name = os.path.split(text)
    if name in ("", ".", ".."):
        raise _refused(errno.EISDIR, f"{text!r} names a directory", text)
    try:
        real = os.path.realpath(directory or ".", strict=True)
    except FileNotFoundError:
        # torch.save's words.
        raise _refused(errno.ENOENT, f"Parent directory {directory or '.'} does not exist", text) from None
    except OSError as error:
        raise _refused(error.errno or errno.EIO, f"{directory}: {error.strerror}", text) from None
    return _checked(os.path.join(real, name))


def _without_slashes(text: str) -> str:
    """The name of a directory, which may be given with slashes after it."""
    return text.rstrip("/") or text


def _checked(path: str) -> str:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise RefusedName(
            f"the path {path!a} is not UTF-8, and paths must be: choose another name; nothing was changed"
        ) from None
    if size >= _PATH_BYTES or len(os.path.basename(path).encode()) > _NAME_BYTES:
        raise _refused(errno.ENAMETOOLONG, f"{path}: {os.strerror(errno.ENAMETOOLONG)}", path)
    return path


def _followed(path: str) -> str:
    """The path of the file to which a link leads, as torch.save writes there; else the path itself."""
    if not os.path.islink(path):
        return path
    try:
        return _checked(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        # What it names is not there yet.
        return _located(os.path.realpath(path))
    except OSError as error:
        raise _refused(error.errno or errno.EIO, f"{path}: {error.strerror}", path) from None


def _target(path: Any, obj: object, archive: Callable[[str], str] | None) -> File:
    """Finds the file that a save of this path writes. If the save is bound to fail, this raises, as torch.save would.

    Raises:
        StorageError, RefusedName.
    """
    text = _text(path)
    place = _followed(_located(text))
    directory = os.path.dirname(place)
    try:
        found = os.stat(directory)
    except OSError as error:
        raise _refused(error.errno or errno.EIO, f"{directory}: {error.strerror}", place) from None
    if not stat.S_ISDIR(found.st_mode):
        raise _refused(errno.ENOTDIR, f"{directory} is not a directory", place)
    _check_writable(directory, place)
    return File(place, obj, None if archive is None else archive(text), run.umask(), found.st_dev)


def _check_writable(directory: str, path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise _refused(error.errno or errno.EIO, f"{path}: {error.strerror}", path) from None
    else:
        if stat.S_ISREG(mode) and not os.access(path, os.W_OK):
            raise _refused(errno.EACCES, f"{path}: {os.strerror(errno.EACCES)}", path)
    if stat.S_ISDIR(mode):
        raise _refused(errno.EISDIR, f"{path} is a directory", path)
    if not stat.S_ISREG(mode):
        raise _refused(
            errno.EEXIST,
            f"{path} is not a regular file: a save replaces the whole file, which would remove it. Use torch.save",
            path,
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        raise _refused(
            number,
            f"{directory}: {os.strerror(number)}. A save writes a new file there, which then takes the name",
            path,
        )


def archive_name(text: str) -> str:
    """What torch.save(obj, text) lets the names of its records begin with.

    Raises:
        RefusedName: there is nothing left of the name; torch.save refuses it too.
    """
    if not text.isascii():
        return "archive"
    name = re.split(r"[/\\]", text)[-1]
    if not (name := name.rpartition(".")[0] if "." in name else name):
        raise RefusedName(f"invalid file name: {text}: a name needs something before its last dot; nothing was changed")
    return name


# What the application calls


@not_followed
def save(obj: object, path: str | os.PathLike[str], snapshot: str | None = None) -> Ticket:
    """Saves what `torch.save(obj, path)` writes, to that path, through the daemon. It returns after one memory copy.

    Args:
        path: as for torch.save: relative to the working directory of this moment; its directory must exist; a link is
            followed. `ticket.path` says where the file will be.
        snapshot: `copy` or `overlap`, as for `Run.save`; None: as NOETHER_WRITER_SNAPSHOT says, or else `copy`.

    Saves, and `remove`, of one path happen in the order of their calls, and the last one counts. Those of other paths
    do not wait for it. The new file has the mode of the one that it replaces, or else the one that this process's umask
    gives it.

    Raises:
        what pickling raises, StorageError (no such directory, no permission, not a file, no memory), RefusedName,
        PoolExhausted, TorchMissing, DaemonNotFound: nothing was sent. Also errors of earlier saves that no other call
        has raised.
    """
    return _save(obj, path, snapshot)


@untraced
def _save(obj: object, path: Any, snapshot: str | None) -> Ticket:
    mode = mode_of(snapshot or environment.choice("NOETHER_WRITER_SNAPSHOT", "copy", MODES))
    target = _target(path, obj, archive_name)
    session = _session()
    return _settled(session, begin(session, [target], mode, None))


def save_raw(path: str | os.PathLike[str], nbytes: int, fill: Callable[[memoryview], object]) -> Ticket:
    """Saves a file of so many bytes as they are.

    Args:
        fill: writes them into the memory that it gets: the memory that the daemon reads. It must not keep it.
    """
    target = _target(path, None, None)
    session = _session()
    number = session.core.number()
    buffer = pool().reserve(nbytes)
    memory = memoryview(memory_of(buffer)).cast("B")[:nbytes]
    try:
        fill(memory)
    finally:
        memory.release()
    return _settled(session, hand_over(session, [RawSave(session, target, buffer, nbytes, number)]))


def save_buffer(path: str | os.PathLike[str], buffer: Buffer, nbytes: int) -> Ticket:
    """Saves a file with the first bytes of a buffer, which must not be written to any more."""
    target = _target(path, None, None)
    session = _session()
    return _settled(session, hand_over(session, [RawSave(session, target, buffer, nbytes, session.core.number())]))


def save_bytes(data: Any, path: str | os.PathLike[str]) -> Ticket:
    """Saves what has the bytes of a buffer: bytes, a memoryview, an array."""
    with memoryview(data) as view, view.cast("B") as content:

        def fill(memory: memoryview) -> None:
            memory[:] = content

        return save_raw(path, len(content), fill)


def remove(
    path: str | os.PathLike[str], *, recursive: bool = False, after: Sequence[str | os.PathLike[str]] = ()
) -> Ticket:
    """Removes a file after the saves of its path that were begun before, and returns at once. What is not there is
    removed.

    Args:
        path: a link itself is removed, and not what it leads to.
        recursive: removes a directory too, with all that is in it, and all that was saved to paths below it.
        after: paths of files, or of directories: it happens only when what this process has saved there before is
            durable. If that has failed, nothing is removed, and the ticket has the error. So there is always one.

    Raises:
        StorageError: it is a directory, and `recursive` is false; or its own directory is not there. RefusedName,
        DaemonNotFound. Nothing was removed.
    """
    place = _located(_without_slashes(_text(path)))
    if not recursive and os.path.isdir(place) and not os.path.islink(place):
        raise StorageError(
            errno.EISDIR, f"{place} is a directory: remove(path, recursive=True) removes it. Nothing was removed", place
        )
    first = [_located(_without_slashes(_text(each))) for each in after]
    session = _session()
    number = session.core.number()
    message: dict[str, Any] = {"path": place, "recursive": recursive}
    if first:
        message["after"] = first
    return _settled(session, hand_over(session, [Order(session, frames.REMOVE, message, place, number)]))


def commit(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    files: Sequence[str] = (),
    patience: float = 0,
) -> Ticket:
    """Gives a directory another name when all that this process has saved below it is durable. If something of it has
    failed, it keeps its name, and the ticket has the error.

    Args:
        replace: a directory that has the name already is exchanged for this one in one step, and then removed.
        files: paths in the directory of files that must be there.
        patience: for how many seconds the daemon waits for those that others save there, perhaps by another daemon.
    """
    first, second = (_located(_without_slashes(_text(each))) for each in (source, path))
    session = _session()
    number = session.core.number()
    # A daemon that does not know what has become of these finds out whether they are there.
    own = [
        os.path.relpath(each, first)
        for sent in open_saves(session)
        if not isinstance(sent, Order)
        for each in sent.paths
        if _is_within(each, first)
    ]
    message: dict[str, Any] = {"from": first, "to": second, "replace": replace}
    message["files"] = list(dict.fromkeys([*files, *own]))
    if patience:
        message["patience_s"] = patience
    return _settled(session, hand_over(session, [Order(session, frames.COMMIT, message, second, number)]))


def wait(timeout: float | None = None) -> None:
    """Returns when all that this process has saved with `save` is durable, and all that it has removed is gone.

    Args:
        timeout: in seconds; None waits as long as storage accepts data and the daemon is there.

    Raises:
        the error of the first save that failed, if no other call has raised it. As `Ticket.wait`.
    """
    if (session := _known_session()) is not None:
        timeout, deadline = ending.bounded(timeout)
        wait_all(session, deadline, timeout)


def _settled(session: _Session, ticket: Ticket) -> Ticket:
    if run.settles():
        run.say_last_words(session, ending.begin())
    return ticket


# Loading


def load(path: Any, **arguments: Any) -> Any:
    """Waits for what is on its way to this path, then returns `torch.load(path, **arguments)`.

    It waits for saves, removals and renames of this process and of all others that use the same daemon. If no daemon
    runs, nothing is on its way, and none is started.

    If the daemon still has the file in memory, and nobody has changed the file since, nothing is read from storage: the
    tensors are a private mapping of that memory, as `mmap=True` makes it of a file. With `mmap=False` they are copies.

    Raises:
        StorageError, or another error that says why: the last save of this path has failed, and nobody was told. It is
        raised once; the next call reads the file that is there.
        CheckpointStalled: storage refuses a save of this path for now. DaemonUnavailable: the daemon does not answer.
        Also what torch.load raises.
    """
    import torch

    place = None
    if isinstance(path, str | os.PathLike):
        # What cannot be the path of a save is torch.load's to refuse.
        with contextlib.suppress(StorageError, RefusedName):
            place = _followed(_located(_text(path)))
    if place is not None:
        _wait_for(place)
        if _maps_privately() and (image := _image_of(place)) is not None:
            try:
                return torch.load(_restore.path_of(image), **_from_memory(image, arguments))
            finally:
                os.close(image)
    return torch.load(path, **arguments)


def _image_of(place: str) -> int | None:
    try:
        if not stat.S_ISREG(os.stat(place).st_mode):
            return None
        file = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # torch.load's to say.
        return None
    try:
        return _restore.image_of(file)
    finally:
        os.close(file)


def _maps_privately() -> bool:
    """Whether tensors that torch.load maps are this process's own: with MAP_SHARED what is written to them goes into
    the file, and it must be the file then."""
    import torch

    return torch.serialization.get_default_mmap_options() in (None, mmap.MAP_PRIVATE)


def _from_memory(image: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for torch.load, which maps archives only."""
    if arguments.get("mmap") is None and os.pread(image, len(_ARCHIVE), 0) == _ARCHIVE:
        return {**arguments, "mmap": True}
    return arguments


def wait_for(path: str | os.PathLike[str]) -> None:
    """Waits for what is on its way to this path, to paths below it, and to directories above it, of all processes.

    Raises:
        as `load`, but for what torch.load raises.
    """
    place = None
    with contextlib.suppress(StorageError, RefusedName):
        place = _located(_without_slashes(_text(path)))
    if place is not None:
        _wait_for(place)


def _wait_for(place: str) -> None:
    session = _known_session()
    if session is not None:
        for sent in open_saves(session):
            if any(_is_within(place, each) or _is_within(each, place) for each in sent.paths):
                _wait_for_own(session, sent, place)
        after = 0
        while (failed := session.core.find(after, True)) is not None:
            after = failed.sequence + 1
            if place in failed.paths:
                failed.tell()
                raise _with_older(failed.make_error(), place)
    _wait_for_others(place, None if session is None else session.id)


def _wait_for_own(session: _Session, sent: Sent, place: str) -> None:
    try:
        Ticket(session, [sent]).wait()
    except NoetherWriterError as error:
        if sent.is_failed:
            raise _with_older(error, place) from None
        raise


def _with_older(error: NoetherWriterError, place: str) -> NoetherWriterError:
    """The error of a save, which says what is to be loaded in its place."""
    there = "holds what was saved before it" if os.path.lexists(place) else "is not there"
    words = f"the last save of {place} has failed: {error}. {place} {there}; the next call of load reads what is there"
    if isinstance(error, StorageError):
        return StorageError(error.errno or errno.EIO, words, place)
    return type(error)(words)


def _wait_for_others(place: str, session: str | None) -> None:
    """Waits for what other processes have asked of the daemon for this path.

    Args:
        session: this process's, if it has one: what it was told itself it is not told again.
    """
    lost_at: float | None = None
    while True:
        try:
            _ask_for(place, session)
            return
        except (DaemonNotFound, WrongSocket):
            # There is no daemon of this user.
            if lost_at is None:
                return
        except DaemonUnavailable:
            # It has died or left. Whoever waits for something from it starts the next one.
            if lost_at is None:
                lost_at = time.monotonic()
        if time.monotonic() > lost_at + ending.within(_AGAIN_SECONDS):
            return
        time.sleep(_AGAIN_PAUSE_SECONDS)


def _ask_for(place: str, session: str | None) -> None:
    with Conversation(_NOT_KNOWN) as daemon:
        if not _open(daemon, session):
            # It has no such saves.
            return
        while True:
            answer = _ask_once(daemon, place, ending.within(STALL_SECONDS))
            if answer["done"]:
                if session is None:
                    daemon.say_goodbye()
                _raise_failure(answer, place)
                return
            if stalled := answer.get("stalled"):
                raise CheckpointStalled(f"{place} is not durable yet: {stalled[0]['message']}. {STALLED}")
            if ending.has_begun():
                raise WaitTimeout(f"{place} is not durable yet, and this process ends; the daemon continues")


def _open(daemon: Conversation, session: str | None) -> bool:
    """Whether the daemon saves files of no run."""
    if _LAYOUT not in daemon.welcome.get("capabilities", ()):
        return False
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        daemon.ask(frames.OPEN_RUN, _message(session or uuid.uuid4().hex), ending.within(ANSWER_SECONDS), root)
    finally:
        os.close(root)
    return True


def _ask_once(daemon: Conversation, place: str, seconds: float) -> dict[str, Any]:
    message = {"path": place, "timeout_s": seconds}
    return daemon.ask(frames.WAIT_PATH, message, seconds + ending.within(ANSWER_SECONDS))


def is_free(place: str, seconds: float) -> bool:
    """Waits until the daemon of this node has done what it has accepted for this path; False: not in this time."""
    try:
        with Conversation(_NOT_KNOWN) as daemon:
            if not _open(daemon, None):
                return True
            done = bool(_ask_once(daemon, place, ending.within(seconds))["done"])
            daemon.say_goodbye()
            return done
    except (DaemonNotFound, WrongSocket, DaemonUnavailable, WaitTimeout):
        return True


# What other processes were told, and this one has raised.
_told: set[str] = set()


def _raise_failure(answer: dict[str, Any], place: str) -> None:
    for failure in answer["failed"]:
        if failure["message"] not in _told:
            _told.add(failure["message"])
            raise _with_older(StorageError(failure.get("errno") or errno.EIO, failure["message"], place), place)


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
