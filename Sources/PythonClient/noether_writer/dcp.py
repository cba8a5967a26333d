# SPDX-License-Identifier: Apache-2.0
"""Sharded state: `torch.distributed.checkpoint` through the daemon.

A checkpoint is written beside its place, as `.NAME.partial-NONCE`, and takes its name in one step when every file of
every rank is durable. It has the layout of torch's FileSystemWriter, and a manifest with a checksum of each item.

When each rank has handed its files to its node's daemon, rank 0's daemon is told to give the checkpoint its name: this
happens also if every trainer dies then. The name of a file is the sign that it is durable, and this daemon waits until
all of them are there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import glob
import io
import json
import os
import pickle
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter as _StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

try:
    from torch.distributed.checkpoint.filesystem import (
        CURRENT_DCP_VERSION,
        FileSystem,
        FileSystemReader,
        _StorageInfo,
        _StoragePrefix,
    )
except ImportError as error:
    raise ImportError(
        f"noether_writer.dcp needs a newer torch than {torch.__version__} (it is tested with 2.13): {error}. "
        "noether_writer itself works with torch 2.4 and newer: save each rank's state with Run.save until then"
    ) from error

from . import _archive, _core, _files, _restore, ending, manifest, progress, saves
from .errors import (
    CheckpointStalled,
    DaemonUnavailable,
    DamagedCheckpoint,
    NoetherWriterError,
    StorageError,
    WaitTimeout,
)
from .partials import OWNER, PATIENCE_SECONDS, Partial
from .saves import STALL_SECONDS
from .session import STALLED
from .shards import Item, Shard, is_known, is_plain, saved_by_torch, stage

__all__ = ["StorageReader", "StorageWriter", "Ticket", "load", "save"]

MANIFEST = manifest.NAME
_METADATA = manifest.METADATA
_SUFFIX = ".distcp"
_FAILED = ".failed-"
_WATCH_SECONDS = 3600.0
# At once: the kernel takes no more than 2 GiB, and what is checked next is still in a cache.
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class _Result(WriteResult):
    """What the coordinator needs to know of an item for the manifest."""

    crc32: int = 0
    file_length: int = 0
    file_crc32: int = 0


class _Here(threading.local):
    #: The directory of the save that this thread makes, as the coordinator has said it.
    partial: str | None = None


_here = _Here()


def _announced(prefix: str, partial: str) -> _StoragePrefix:
    _here.partial = partial
    return _StoragePrefix(prefix)


@dataclass
class _Announcement(_StoragePrefix):
    """Says to a rank, as it arrives there with the rank's plan, in which directory this save is made. The plan itself
    must not say it: DCP may take one of an earlier save in its place."""

    partial: str = ""

    def __reduce__(self) -> Any:
        return _announced, (self.prefix, self.partial)


class StorageWriter(_StorageWriter):
    """For `torch.distributed.checkpoint.save` and `async_save`. An older checkpoint of the same name is whole until
    every rank's files of the new one are durable.

    With `async_save` and threads, the state is copied once, by `stage`, before the call returns. A second `async_save`
    waits for the first one.

    Args:
        path: of the checkpoint, a directory. Its own directory must exist, and every rank must see it. A directory that
            is there already must be a checkpoint, or empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._is_coordinator = False
        self._partial: Partial | None = None
        self._shard: Shard | None = None
        #: This rank's files that are on their way, and the commit.
        self.tickets: list[saves.Ticket] = []
        #: How many checkpoints stay, as for `save`.
        self.keep_last: int | None = None
        #: Whether nothing more comes to these.
        self.has_handed_over = False

    def __reduce__(self) -> Any:
        # To the process of AsyncCheckpointerType.PROCESS, which copies the state once more.
        return StorageWriter, (self._path,)

    @property
    def checkpoint_id(self) -> str:
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        _wait_for_other_saves()
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)

    # What makes it an AsyncStager.

    should_synchronize_after_execute = False
    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies a state; what is returned may only be saved by this writer."""
        _wait_for_other_saves()
        staged, shard = stage(state_dict)
        self.take(shard)
        return staged

    def take(self, shard: Shard) -> None:
        """The memory in which the tensors are that are saved next."""
        self._shard = shard

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass

    # What DCP calls, in this order.

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path, save_id=uuid.uuid4().hex)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise NoetherWriterError("use_collectives=False has no commit of all ranks: save without it")
        _wait_for_other_saves()
        self._is_coordinator = is_coordinator
        self.abandon()
        self.tickets = []
        self.has_handed_over = False
        _here.partial = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator's part."""
        place = _place(self._path)
        _check_replaceable(place)
        self._partial = Partial(place)
        path = _here.partial = self._partial.path
        return [
            dataclasses.replace(plan, storage_data=_Announcement(f"__{number}_", path))
            for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(list(self._write(plan, planner)))
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[_Result]:
        shard, self._shard = self._shard, None
        self.has_handed_over = not plan.items and not self._is_coordinator
        if not plan.items:
            return []
        if (partial := _here.partial) is None:
            raise NoetherWriterError("the coordinator has not said where this save is made: nothing was committed")
        # As bytes, or as a tensor whose bytes are torch's to surround.
        contents: list[Any] = []
        for item in plan.items:
            value: Any = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                contents.append(value.getbuffer())
                continue
            value = value.detach()
            contents.append(value if is_plain(value) and value.numel() else saved_by_torch(value))
        written: dict[int, tuple[str, Item, int, int]] = {}
        rest = list(range(len(contents)))
        prefix = plan.storage_data.prefix
        if shard is not None:
            places = {i: place for i in rest if (place := _placed(shard, contents[i])) is not None}
            # In the order of the items that have no place yet, as far as there is room.
            room, values = shard.room, list[int]()
            for i in rest:
                if i not in places and not isinstance(contents[i], torch.Tensor) and len(contents[i]) <= room:
                    values.append(i)
                    room -= len(contents[i])
            if places or values:
                self._send(shard, places, values, contents, partial, f"{prefix}0{_SUFFIX}", written)
            rest = [i for i in rest if i not in written]
        if rest:
            tensors = {i: contents[i] for i in rest if isinstance(contents[i], torch.Tensor)}
            values = [i for i in rest if i not in tensors]
            fresh = Shard(list(tensors.values()), sum(len(contents[i]) for i in values))
            own = dict(zip(tensors, fresh.places, strict=True))
            number = 1 if written else 0
            self._send(fresh, own, values, contents, partial, f"{prefix}{number}{_SUFFIX}", written)
        for ticket in self.tickets:
            ticket.wait_accepted()
        if not self._is_coordinator:
            self.has_handed_over = True
            _watch(self.tickets, os.path.join(partial, f"{_FAILED}{prefix}"))
        return [
            _Result(
                item.index,
                found.length,
                _StorageInfo(name, found.offset, found.length),
                found.crc32,
                file_length,
                file_crc32,
            )
            for item, (name, found, file_length, file_crc32) in (
                (item, written[i]) for i, item in enumerate(plan.items)
            )
        ]

    def _send(
        self,
        shard: Shard,
        places: dict[int, Any],
        values: list[int],
        contents: list[Any],
        partial: str,
        name: str,
        written: dict[int, tuple[str, Item, int, int]],
    ) -> None:
        """Hands one file over, and notes where each item is."""
        found, length, crc = shard.compose(list(places.values()), [contents[i] for i in values])
        self._take(_files.save_buffer(os.path.join(partial, name), shard.buffer, length))
        for i, item in zip((*places, *values), found, strict=True):
            written[i] = (name, item, length, crc)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._partial is not None
        partial = self._partial
        metadata.version = CURRENT_DCP_VERSION
        every = [each for of_rank in results for each in of_rank]
        metadata.storage_data = {each.index: each.storage_data for each in every}
        metadata.storage_meta = self.storage_meta()
        record = pickle.dumps(metadata)
        files: dict[str, Any] = {_METADATA: {"length": len(record), "crc32": zlib.crc32(record), "items": []}}
        for each in every:
            assert isinstance(each, _Result)
            info = each.storage_data
            entry = {"length": each.file_length, "crc32": each.file_crc32, "items": []}
            files.setdefault(info.relative_path, entry)["items"].append([info.offset, info.length, each.crc32])
        contents = {
            _METADATA: record,
            MANIFEST: manifest.encoded(files),
        }
        try:
            self._wait_for(self._commit(partial, contents, [*files, MANIFEST]))
        except StorageError:
            # Given up. After anything else, a daemon that was told to commit will.
            self.abandon()
            raise
        self._partial.committed()
        self._partial = None
        if self.keep_last is not None:
            with contextlib.suppress(OSError, NoetherWriterError):
                for path in manifest.older(partial.place, self.keep_last):
                    # What is not removed now is with the next save.
                    _files.remove(path, recursive=True).leave_unsaid()

    def _commit(self, partial: Partial, contents: dict[str, bytes], files: list[str]) -> saves.Ticket:
        try:
            for name, content in contents.items():
                self._take(_files.save_bytes(content, os.path.join(partial.path, name)))
            ticket = self._take(
                _files.commit(partial.path, partial.place, replace=True, files=files, patience=PATIENCE_SECONDS)
            )
            self.has_handed_over = True
        except BaseException:
            self.abandon()
            raise
        ticket.wait_accepted()
        return ticket

    def _take(self, ticket: saves.Ticket) -> saves.Ticket:
        # If it fails, the commit does, which says it.
        ticket.leave_unsaid()
        self.tickets.append(ticket)
        return ticket

    def _wait_for(self, commit: saves.Ticket) -> None:
        assert self._partial is not None
        failures = glob.escape(os.path.join(self._partial.path, _FAILED)) + "*"

        def is_over() -> bool:
            if commit.done:
                return True
            for found in glob.glob(failures):
                raise _failure(found)
            return False

        timeout, deadline = ending.bounded(None)
        commit.wait_for(is_over, deadline, timeout)

    def abandon_unless_committing(self) -> None:
        if not self.has_handed_over:
            self.abandon()

    def abandon(self) -> None:
        """What was not committed never will be."""
        if (partial := self._partial) is not None:
            self._partial = None
            partial.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(FileSystem.validate_checkpoint_id(checkpoint_id))


def _place(path: str) -> str:
    return _files._located(os.path.normpath(path))


def _placed(shard: Shard, content: Any) -> Any:
    return shard.place_of(content) if isinstance(content, torch.Tensor) else None


def _check_replaceable(place: str) -> None:
    """
    Raises:
        StorageError: what has the name is no checkpoint, or more than one: it would be lost.
    """
    try:
        names = [] if os.path.islink(place) else os.listdir(place)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise StorageError(
            errno.EEXIST, f"{place} is not a directory: a checkpoint does not replace it. Nothing was saved", place
        ) from None
    if os.path.islink(place):
        raise StorageError(
            errno.EEXIST, f"{place} is a link: a checkpoint does not replace it. Nothing was saved", place
        )
    known = (_METADATA, f"{_METADATA}.tmp", MANIFEST, OWNER)
    for name in names:
        if name not in known and not name.endswith(_SUFFIX) and not name.startswith(_FAILED):
            raise StorageError(
                errno.ENOTEMPTY,
                f"{place} holds {name}, which is no part of a checkpoint: it is not replaced, since {name} would be "
                "lost. Nothing was saved; save to another path",
                place,
            )


_OF_TORCH, _OF_OURS = "AsyncCheckpointExecutor", "noether-writer-dcp"


def _threads_of_torch() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(_OF_TORCH)]


def _wait_for_other_saves() -> None:
    """Those that this process has begun before: two at once would mix their collectives, and end in any order. What a
    thread of theirs does was waited for when it was begun."""
    if threading.current_thread().name.startswith((_OF_TORCH, _OF_OURS)):
        return
    for thread in _threads_of_torch():
        thread.join()
    if (last := _last) is not None:
        concurrent.futures.wait([last])


def _watch(tickets: list[saves.Ticket], path: str) -> None:
    """If one of them fails, this is said to the coordinator, whose daemon may be another one."""

    def watch() -> None:
        for ticket in tickets:
            while not ticket.done:
                try:
                    ticket.wait_quietly(_WATCH_SECONDS)
                except WaitTimeout:
                    continue
                except DaemonUnavailable:
                    # This process, or its session, ends.
                    return
                except NoetherWriterError as error:
                    # If it cannot be said, the coordinator's daemon finds out when its patience ends.
                    with contextlib.suppress(OSError):
                        _say(path, error)
                    return

    threading.Thread(target=watch, daemon=True, name="noether-writer-shards").start()


def _say(path: str, error: NoetherWriterError) -> None:
    number = error.errno if isinstance(error, StorageError) else None
    with open(f"{path}.new", "w") as file:
        file.write(json.dumps({"errno": number, "message": str(error)}))
    os.rename(f"{path}.new", path)


def _failure(path: str) -> StorageError:
    """What another rank has said."""
    with contextlib.suppress(OSError, ValueError):
        with open(path) as file:
            said = json.load(file)
        return StorageError(said["errno"] or errno.EIO, f"{said['message']} (of another rank). Nothing was committed")
    return StorageError(errno.EIO, f"another rank's files were not written ({path}). Nothing was committed")


class StorageReader(FileSystemReader):
    """For `torch.distributed.checkpoint.load`. It waits for a save of this path that is on its way, and checks what it
    reads against the manifest. A checkpoint that another writer has made has none, and is read unchecked.

    Raises:
        DamagedCheckpoint, or why the last save of this path has failed, once, as `noether_writer.load` (DCP puts them
        into a CheckpointException).
    """

    _directory = -1

    #: Why the metadata could not be read: DCP keeps the words of it alone.
    error: NoetherWriterError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._read_metadata(*args, **kwargs)
        except NoetherWriterError as error:
            self.error = self.error or error
            raise

    def _read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        _files.wait_for(self.path)
        self._close()
        # From here on the name may lead to a newer checkpoint.
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[str, Any] | None = None
        self._identity: tuple[int, ...] = ()
        try:
            self._files = manifest.decoded(self._content(MANIFEST))
        except FileNotFoundError:
            return super().read_metadata(*args, **kwargs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"{os.path.join(self.path, MANIFEST)} cannot be read ({error}): load another checkpoint"
            ) from None
        content = self._content(_METADATA)
        self._identity = (zlib.crc32(content), len(content))
        if self._identity != (self._files[_METADATA]["crc32"], self._files[_METADATA]["length"]):
            raise DamagedCheckpoint(
                f"{os.path.join(self.path, _METADATA)} is not what was saved: load another checkpoint"
            )
        metadata: Metadata = pickle.loads(content)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _content(self, name: str) -> bytes:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory), "rb") as file:
            return file.read()

    def _close(self) -> None:
        if (directory := self._directory) >= 0:
            self._directory = -1
            os.close(directory)

    def __del__(self) -> None:
        self._close()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self._identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if any(plan.storage_data != plans[0].storage_data for plan in plans):
            raise NoetherWriterError(
                f"{self.path} was replaced by a newer checkpoint while it was loaded, and the ranks see different "
                "ones: load again"
            )
        return plans

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        files = self._files
        self._sums: dict[tuple[str, int], tuple[int, int]] | None = None
        if files is not None:
            self._sums = {
                (name, offset): (length, crc) for name, entry in files.items() for offset, length, crc in entry["items"]
            }
        self._shapes = {
            (fqn, tuple(chunk.offsets)): (each.properties.dtype, tuple(chunk.sizes))
            for fqn, each in metadata.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
            for chunk in each.chunks
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self._sums is None:
            return super().read_data(plan, planner)
        # What several requests want of one item is read and checked once.
        wanted: dict[tuple[str, int], list[ReadItem]] = {}
        for request in plan.items:
            info = self.storage_data[request.storage_index]
            wanted.setdefault((info.relative_path, info.offset), []).append(request)
        memory = _Scratch()
        name, file = "", None
        try:
            for (relative_path, _), requests in sorted(wanted.items(), key=lambda item: item[0]):
                if file is None or name != relative_path:
                    if file is not None:
                        file.close()
                    name, file = relative_path, self._open(relative_path, requests)
                self._read(file, requests, planner, memory)
        finally:
            if file is not None:
                file.close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self, name: str, requests: list[ReadItem]) -> Any:
        path = os.path.join(self.path, name)
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            pass
        else:
            if (image := _restore.image_of(file)) is not None:
                os.close(file)
                file = image
            return open(file, "rb", buffering=0)
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._directory), os.stat(self.path)):
                raise NoetherWriterError(
                    f"{self.path} was replaced by a newer checkpoint while it was loaded: load again"
                )
        raise DamagedCheckpoint(
            f"{path} is missing, and {requests[0].storage_index.fqn} in it: load another checkpoint"
        )

    def _read(self, file: Any, requests: list[ReadItem], planner: LoadPlanner, memory: _Scratch) -> None:
        index = requests[0].storage_index
        info = self.storage_data[index]
        assert self._sums is not None
        length, crc = self._sums.get((info.relative_path, info.offset), (-1, 0))
        if length != info.length:
            raise self._damaged(requests[0])
        archive = None
        if requests[0].type != LoadItemType.BYTE_IO and not info.transform_descriptors:
            shape = self._shapes.get((index.fqn, tuple(index.offset or ())))
            if shape is not None and is_known(shape[0]):
                archive = _archive.archive_of(*shape)
        if archive is not None and archive.length == length:
            head = os.pread(file.fileno(), len(archive.head), info.offset)
            if head == archive.head:
                self._read_plain(file, requests, planner, memory, archive, crc)
                return
        content = memory.of(length)
        _read_into(file, info.offset, content, self._damaged, requests[0])
        if _core.crc32(content.data_ptr(), length) != crc:
            raise self._damaged(requests[0])
        for request in requests:
            stream: Any = io.BytesIO(content.numpy().tobytes())
            stream = self.transforms.transform_load_stream(request, info.transform_descriptors or (), stream)
            if request.type == LoadItemType.BYTE_IO:
                planner.load_bytes(request, io.BytesIO(stream.read(-1)))
                continue
            if not stream.seekable():
                stream = io.BytesIO(stream.read(-1))
            _give(planner, request, torch.load(stream, map_location="cpu", weights_only=True))

    def _read_plain(
        self,
        file: Any,
        requests: list[ReadItem],
        planner: LoadPlanner,
        memory: _Scratch,
        archive: _archive.Archive,
        crc: int,
    ) -> None:
        """A tensor as this library writes it. If all of it is wanted, it is read to where it is wanted."""
        info = self.storage_data[requests[0].storage_index]
        dtype, shape = self._shapes[requests[0].storage_index.fqn, tuple(requests[0].storage_index.offset or ())]
        start = info.offset + len(archive.head)
        target: Any = None
        if len(requests) == 1:
            target = planner.resolve_tensor(requests[0]).detach()
            is_direct = (
                is_plain(target)
                and target.device.type == "cpu"
                and target.dtype == dtype
                and tuple(target.shape) == shape
                and target.is_contiguous()
                and not any(requests[0].storage_offsets)
            )
            if is_direct:
                content = target.view(-1).view(torch.uint8) if target.dim() else target.view(1).view(torch.uint8)
            else:
                content = memory.of(archive.nbytes)
        else:
            is_direct, content = False, memory.of(archive.nbytes)
        _read_into(file, start, content, self._damaged, requests[0])
        tail_length = archive.length - len(archive.head) - archive.nbytes
        tail = os.pread(file.fileno(), tail_length, start + archive.nbytes)
        if archive.checksum(_core.crc32(content.data_ptr(), archive.nbytes), tail) != crc or len(tail) != tail_length:
            raise self._damaged(requests[0])
        if is_direct:
            planner.commit_tensor(requests[0], target)
            return
        tensor = content.view(dtype).view(shape)
        for request in requests:
            _give(planner, request, tensor, target)

    def _damaged(self, request: ReadItem) -> DamagedCheckpoint:
        info = self.storage_data[request.storage_index]
        return DamagedCheckpoint(
            f"{request.storage_index.fqn} in {os.path.join(self.path, info.relative_path)} is not what was saved: load "
            "another checkpoint"
        )


class _Scratch:
    """Memory that is used again: new memory costs more than the read."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int) -> Any:
        if self._tensor.numel() < nbytes:
            self._tensor = torch.empty(nbytes, dtype=torch.uint8)
        return self._tensor[:nbytes]


def _read_into(
    file: Any, start: int, content: Any, damaged: Callable[[ReadItem], Exception], request: ReadItem
) -> None:
    """Reads bytes into a tensor of bytes."""
    left = memoryview(content.numpy())
    while left:
        count = os.preadv(file.fileno(), [left[:_READ_BYTES]], start)
        if not count:
            raise damaged(request)
        start, left = start + count, left[count:]


def _give(planner: LoadPlanner, request: ReadItem, tensor: Any, target: Any = None) -> None:
    part = narrow_tensor_by_index(tensor, request.storage_offsets, request.lengths)
    if target is None:
        target = planner.resolve_tensor(request).detach()
    if target.size() != part.size():
        raise AssertionError(f"req {request.storage_index} mismatch sizes {target.size()} vs {part.size()}")
    target.copy_(part)
    planner.commit_tensor(request, target)


class Ticket(saves.Ticket):
    """A sharded save on its way. `accepted`, `written`, `bytes_done` and `stalled` speak of this rank's files, and on
    rank 0 of the commit; `durable`, `done` and `error` of the whole checkpoint."""

    def __init__(self, path: str, nbytes: int, writer: StorageWriter, future: concurrent.futures.Future[Any]) -> None:
        self._place = path
        self._nbytes = nbytes
        self._writer = writer
        self._future = future
        self.names = [os.path.basename(path)]

    @property
    def _tickets(self) -> list[saves.Ticket]:
        return list(self._writer.tickets)

    @property
    def paths(self) -> list[str]:
        """The directory of the checkpoint."""
        return [self._place]

    @property
    def nbytes(self) -> int:
        """How many bytes of memory this rank has copied."""
        return self._nbytes

    @property
    def bytes_total(self) -> int:
        """The bytes of this rank's files, as the daemon says when it has accepted them; 0 before."""
        return sum(ticket.bytes_total for ticket in self._tickets)

    @property
    def bytes_done(self) -> int:
        """How many of `bytes_total` the file system has."""
        return sum(ticket.bytes_done for ticket in self._tickets)

    @property
    def accepted(self) -> bool:
        """Whether the daemon holds what this rank has to bring: then this process may die. On rank 0 this includes the
        commit, which the other ranks' files come before."""
        return self.durable or (self._writer.has_handed_over and all(ticket.accepted for ticket in self._tickets))

    @property
    def written(self) -> bool:
        """Whether the file system has all bytes of this rank's files."""
        return self.durable or (self._writer.has_handed_over and all(ticket.written for ticket in self._tickets))

    @property
    def durable(self) -> bool:
        """Whether the checkpoint is durable on all ranks and has its name."""
        return self._future.done() and self._future.exception() is None

    @property
    def done(self) -> bool:
        """Whether the checkpoint is durable or given up."""
        return self._future.done()

    @property
    def error(self) -> NoetherWriterError | None:
        """Why it was given up, on any rank, or None."""
        error = self._future.exception() if self._future.done() else None
        if error is None:
            return None
        own = _own(error)
        return own if isinstance(own, NoetherWriterError) else NoetherWriterError(f"the save has failed: {own!r}")

    @property
    def stalled(self) -> str | None:
        """Why storage refuses a file of this rank for now, or None."""
        return next((reason for ticket in self._tickets if (reason := ticket.stalled)), None)

    def wait_until(self, deadline: float | None, timeout: float | None) -> None:
        """Like `wait`, for callers that have one deadline for several tickets.

        Raises:
            what failed, on any rank: an error of this library, or a CheckpointException of torch; else as a
            `noether_writer.Ticket`.
        """
        stalled_since = None
        with progress.shown([self]):
            while True:
                now = time.monotonic()
                try:
                    left = 1.0 if deadline is None else min(1.0, max(0.0, deadline - now))
                    self._future.result(left)
                    return
                except CheckpointException as error:
                    raise _own(error) from error
                except concurrent.futures.TimeoutError:
                    if self._future.done():
                        raise
                reason, now = self.stalled, time.monotonic()
                stalled_since = None if reason is None else stalled_since or now
                is_over = deadline is not None and now >= deadline
                if reason is not None and (
                    is_over or (deadline is None and now - (stalled_since or now) > STALL_SECONDS)
                ):
                    raise CheckpointStalled(f"not durable yet: {self._place}: {reason}. {STALLED}")
                if is_over:
                    raise WaitTimeout(f"{self._place} is not durable after {timeout:.3g} s; the save continues")

    def wait_for(self, is_reached: Callable[[], bool], deadline: float | None, timeout: float | None) -> None:
        while not is_reached():
            self.wait_until(min(deadline or time.monotonic() + 1.0, time.monotonic() + 1.0), timeout)

    def wait_snapshot(self) -> None:
        """Returns at once: the tensors may be changed as soon as `save` has returned."""

    def leave_unsaid(self) -> None:
        """No other call raises its failure in any case."""


# By process and by group: a group of its own for each, since a collective of the trainer, at the same time in another
# thread, must not meet one of the save. One thread, so that the saves of all ranks come in the same order.
_groups: dict[Any, Any] = {}
_saving: ThreadPoolExecutor | None = None
_last: concurrent.futures.Future[None] | None = None


def _forget() -> None:
    global _saving, _last
    _groups.clear()
    _saving = _last = None


os.register_at_fork(after_in_child=_forget)


def _group(process_group: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    if (found := _groups.get(group)) is None:
        ranks = dist.get_process_group_ranks(group)
        found = _groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return found


def save(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = None,
    process_group: Any = None,
    keep_last: int | None = None,
) -> Ticket:
    """Saves a sharded state. All ranks call it, in the same order. It returns when the state is copied, once.

    Args:
        state_dict: of tensors, DTensors and other values, in dicts and lists; a Stateful object in it is asked for its
            state.
        path: of the checkpoint, a directory. Its own directory must exist. An older checkpoint there is replaced when
            all of this one is durable.
        planner: of torch.distributed.checkpoint; None: its default.
        process_group: whose ranks save; None: all.
        keep_last: how many checkpoints stay, with this one, of those in the same directory whose names are this one's
            up to the number at its end (`step-500`). Older ones are removed after this one is durable. None: all.

    Raises:
        PoolExhausted, StorageError, and what copy.deepcopy raises: nothing was saved, and the other ranks' tickets say
        so. What fails later, the ticket raises.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    group = _group(process_group)
    try:
        place = _place(os.fspath(path))
        state = {key: each.state_dict() if isinstance(each, Stateful) else each for key, each in state_dict.items()}
        staged, shard = stage(state)
    except BaseException as error:
        if group is not None:
            # The other ranks wait for this one.
            _begin(StorageWriter(path), [{}], _Failed(error), group)
        raise
    writer = StorageWriter(place)
    writer.keep_last = keep_last
    writer.take(shard)
    return Ticket(place, shard.nbytes, writer, _begin(writer, [staged], planner, group))


class _Failed(DefaultSavePlanner):
    """Says on all ranks why this one has nothing to save."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(enable_plan_caching=False)
        self._words = f"the state could not be copied on this rank: {error!r}. Nothing was saved"

    def create_local_plan(self) -> SavePlan:
        raise NoetherWriterError(self._words)


def _begin(
    writer: StorageWriter, staged: list[Any], planner: SavePlanner | None, group: Any
) -> concurrent.futures.Future[None]:
    global _saving, _last
    if (executor := _saving) is None:
        executor = _saving = ThreadPoolExecutor(1, thread_name_prefix=_OF_OURS)
    _last = executor.submit(_save, writer, staged, planner, group, _threads_of_torch())
    return _last


def _save(
    writer: StorageWriter,
    staged: list[Any],
    planner: SavePlanner | None,
    group: Any,
    before: list[threading.Thread],
) -> None:
    for thread in before:
        thread.join()
    try:
        state_dict_saver.save(
            staged.pop(), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None
        )
    except BaseException:
        writer.abandon_unless_committing()
        raise


def load(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    planner: LoadPlanner | None = None,
    process_group: Any = None,
) -> None:
    """Loads into the tensors of `state_dict`, on as many ranks as there are now. All ranks call it.

    Args:
        planner, process_group: as for `save`.

    Raises:
        DamagedCheckpoint: a checksum differs. CheckpointException of torch: something else failed on a rank.
    """
    is_alone = not (dist.is_available() and dist.is_initialized())
    reader = StorageReader(path)
    try:
        state_dict_loader.load(
            state_dict,
            storage_reader=reader,
            planner=planner,
            process_group=process_group,
            no_dist=is_alone,
        )
    except CheckpointException as error:
        raise reader.error or _own(error) from error


def _own(error: BaseException) -> BaseException:
    """The error of this library in one of torch, which is no Exception."""
    failures: Any = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((each for each, _ in failures if isinstance(each, NoetherWriterError)), error)
