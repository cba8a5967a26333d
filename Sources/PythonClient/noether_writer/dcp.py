# SPDX-License-Identifier: Apache-2.0
"""Sharded state: `torch.distributed.checkpoint` through the daemon.

A checkpoint is written beside its place, as `.NAME.partial-PID-NONCE`, and takes its name in one step when every file
of every rank is durable. It has the layout of torch's FileSystemWriter, and a manifest with a checksum of each item.
"""

from __future__ import annotations

import concurrent.futures
import errno
import glob
import io
import json
import os
import pickle
import re
import uuid
import zlib
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystem,
    FileSystemReader,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter as _StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from . import _files
from .errors import DamagedCheckpoint, NoetherWriterError, StorageError, UnsupportedValue, WaitTimeout

__all__ = ["StorageReader", "StorageWriter", "Ticket", "load", "save"]

MANIFEST = ".noether_writer_manifest.json"
_METADATA = ".metadata"
# What torch.save writes beside the bytes of one tensor is about 1.2 KiB. A tensor that needs more fails aloud.
_ROOM = 4096
# How much is read at once for a checksum.
_PART = 1 << 19


@dataclass(frozen=True)
class _Result(WriteResult):
    """What the coordinator needs to know of an item for the manifest."""

    crc32: int = 0
    file_length: int = 0
    file_crc32: int = 0


class _Memory(io.RawIOBase):
    """A file in memory of a fixed size, for torch.save."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        # This is the only copy of the bytes that torch.save hands over. It ends before torch.save continues.
        with memoryview(data) as given, given.cast("B") as content:
            end = self.length + len(content)
            if end > len(self._view):
                raise NoetherWriterError("a tensor needs more room in its file than was counted; nothing was committed")
            self._view[self.length : end] = content
            self.length = end
            return len(content)


def _partials(path: str) -> list[str]:
    directory, name = os.path.split(path)
    return sorted(glob.glob(os.path.join(glob.escape(directory), f".{glob.escape(name)}.partial-*")))


def _is_of_living(partial: str) -> bool:
    """Whether another process that lives writes it. A number that another process has now keeps it; no harm is done."""
    found = re.search(r"\.partial-(\d+)-[0-9a-f]+$", partial)
    if found is None:
        return True
    pid = int(found[1])
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class StorageWriter(BlockingAsyncStager, _StorageWriter):
    """For `torch.distributed.checkpoint.save` and `async_save` (with threads). Every rank's files are durable before
    the checkpoint takes its name; an older checkpoint of that name is whole until then.

    Args:
        path: of the checkpoint, a directory. Its own directory must exist, and every rank must see it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._is_coordinator = False
        self._partial: str | None = None

    def __reduce__(self) -> Any:
        raise UnsupportedValue(
            "noether_writer.dcp.StorageWriter does not work in a process of its own: use "
            "async_checkpointer_type=AsyncCheckpointerType.THREAD. Nothing was saved"
        )

    @property
    def checkpoint_id(self) -> str:
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._partial = None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path, save_id=uuid.uuid4().hex)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise NoetherWriterError("use_collectives=False has no commit of all ranks: save without it")
        self._is_coordinator = is_coordinator
        self._partial = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        place = _files._located(os.path.normpath(self._path))
        if os.path.lexists(place) and (os.path.islink(place) or not os.path.isdir(place)):
            raise StorageError(errno.EEXIST, f"{place} is not a directory: a checkpoint does not replace it", place)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator's part. Which directory it has made, the other ranks find out from the file system: a plan
        may be a cached one of an earlier save, and must not name it."""
        place = _files._located(os.path.normpath(self._path))
        for partial in _partials(place):
            if _is_of_living(partial):
                raise StorageError(
                    errno.EBUSY, f"another process saves {place} now ({partial}). Nothing was saved", place
                )
            _files.remove(partial, recursive=True).wait()
        directory, name = os.path.split(place)
        self._partial = os.path.join(directory, f".{name}.partial-{os.getpid()}-{uuid.uuid4().hex}")
        _files._checked(self._partial)
        os.mkdir(self._partial)
        for number, plan in enumerate(plans):
            if plan.storage_data is None:
                plans[number] = SavePlan(plan.items, _StoragePrefix(f"__{number}_"), plan.planner_data, plan.usable)
        return plans

    def _directory(self) -> str:
        if self._partial is None:
            place = _files._located(os.path.normpath(self._path))
            found = _partials(place)
            if len(found) != 1:
                raise NoetherWriterError(
                    f"this rank sees {len(found)} partial directories of {place}, and one is expected: "
                    "every rank must see the same file system. Nothing was committed"
                )
            self._partial = found[0]
        return self._partial

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0.distcp"
        data: list[Any] = [planner.resolve_data(item) for item in plan.items]
        rooms = [
            value.getbuffer().nbytes
            if item.type == WriteItemType.BYTE_IO
            else value.numel() * value.element_size() + _ROOM
            for item, value in zip(plan.items, data, strict=True)
        ]
        total = sum(rooms)
        made: list[tuple[Any, int, int, int]] = []
        whole = 0

        def fill(memory: memoryview) -> None:
            nonlocal whole
            start = 0
            for item, value, room in zip(plan.items, data, rooms, strict=True):
                with memory[start : start + room] as view:
                    file = _Memory(view)
                    if item.type == WriteItemType.BYTE_IO:
                        file.write(value.getbuffer())
                    else:
                        # If the tensor is a view, only the elements that it shows are saved.
                        plain = value.detach().cpu()
                        if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
                            plain = plain.clone()
                        torch.save(plain, cast(IO[bytes], file))
                    # The buffer was used before.
                    view[file.length :] = bytes(room - file.length)
                    with view[: file.length] as written:
                        made.append((item.index, start, file.length, zlib.crc32(written)))
                start += room
            whole = zlib.crc32(memory)

        _files.save_raw(os.path.join(self._directory(), name), total, fill).wait()
        return [
            _Result(index, length, _StorageInfo(name, offset, length), crc, total, whole)
            for index, offset, length, crc in made
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
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
        partial = self._directory()
        for name, content in (
            (_METADATA, record),
            (MANIFEST, json.dumps({"version": 1, "checksum": "crc32", "files": files}).encode()),
        ):
            _files.save_bytes(content, os.path.join(partial, name))
        place = _files._located(os.path.normpath(self._path))
        _files.commit(partial, place, replace=True, files=[*files, MANIFEST]).wait()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(FileSystem.validate_checkpoint_id(checkpoint_id))


class StorageReader(FileSystemReader):
    """For `torch.distributed.checkpoint.load`. It waits for a save of this path that is on its way, and checks what it
    reads against the manifest. A checkpoint that another writer has made has none, and is read unchecked.

    Raises:
        DamagedCheckpoint, or why the last save of this path has failed, once, as `noether_writer.load` (DCP puts them
        into a CheckpointException).
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        _files.wait_for(self.path)
        metadata_path = os.path.join(self.path, _METADATA)
        if (files := self._manifest()) is not None:
            with open(metadata_path, "rb") as file:
                content = file.read()
            if zlib.crc32(content) != files[_METADATA]["crc32"]:
                raise DamagedCheckpoint(f"{metadata_path} is not what was saved: load another checkpoint")
        return super().read_metadata(*args, **kwargs)

    def _manifest(self) -> dict[str, Any] | None:
        path = os.path.join(self.path, MANIFEST)
        try:
            with open(path, "rb") as file:
                files: dict[str, Any] = json.loads(file.read())["files"]
                return files
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error}): load another checkpoint") from None

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        files = self._manifest()
        self._sums: dict[tuple[str, int, int], int] | None = None
        if files is not None:
            self._sums = {
                (name, offset, length): crc for name, entry in files.items() for offset, length, crc in entry["items"]
            }
        self._names = {(info.relative_path, info.offset): index.fqn for index, info in metadata.storage_data.items()}

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if self._sums is None:
            return super()._slice_file(file, sinfo)
        key = (sinfo.relative_path, sinfo.offset, sinfo.length)
        if self._sum(file, sinfo) != self._sums.get(key):
            raise DamagedCheckpoint(
                f"{self._names[key[:2]]} in {os.path.join(self.path, sinfo.relative_path)} is not what was saved: load "
                "another checkpoint"
            )
        return super()._slice_file(file, sinfo)

    @staticmethod
    def _sum(file: Any, sinfo: Any) -> int | None:
        """The checksum of an item; None if the file ends before it."""
        file.seek(sinfo.offset)
        # In parts that stay in the processor's cache, into memory that is used again: new memory costs more.
        with memoryview(bytearray(min(_PART, max(1, sinfo.length)))) as part:
            crc, left = 0, sinfo.length
            while left:
                count = file.readinto(part[: min(left, len(part))])
                if not count:
                    return None
                crc = zlib.crc32(part[:count], crc)
                left -= count
        return crc


class Ticket:
    """A sharded save on its way."""

    def __init__(self, path: str, future: concurrent.futures.Future[Any]) -> None:
        self.path = path
        self._future = future

    @property
    def done(self) -> bool:
        """Whether the checkpoint is durable or given up."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the checkpoint is durable on all ranks and has its name.

        Raises:
            what failed, on any rank: an error of this library, or a CheckpointException of torch. WaitTimeout.
        """
        try:
            self._future.result(timeout)
        except CheckpointException as error:
            raise _own(error) from error
        except concurrent.futures.TimeoutError:
            if self._future.done():
                raise
            raise WaitTimeout(f"{self.path} is not durable after {timeout} s; the save continues") from None


# A group of its own: a collective of the trainer, at the same time in another thread, must not meet one of the save.
_groups: dict[Any, Any] = {}


def save(state_dict: dict[str, Any], path: str | os.PathLike[str]) -> Ticket:
    """Saves a sharded state. All ranks call it. It returns when the state is copied."""
    group = None
    if dist.is_available() and dist.is_initialized():
        world = dist.group.WORLD
        if (group := _groups.get(world)) is None:
            group = _groups[world] = dist.new_group(backend="gloo")
    writer = StorageWriter(path)
    future: Any = state_dict_saver.async_save(
        state_dict, storage_writer=writer, process_group=group, no_dist=group is None
    )
    return Ticket(os.fspath(path), future)


def load(state_dict: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads into the tensors of `state_dict`, of as many ranks as there are now. All ranks call it.

    Raises:
        DamagedCheckpoint: a checksum differs. CheckpointException of torch: something else failed on a rank.
    """
    is_alone = not (dist.is_available() and dist.is_initialized())
    try:
        state_dict_loader.load(state_dict, storage_reader=StorageReader(path), no_dist=is_alone)
    except CheckpointException as error:
        raise _own(error) from error


def _own(error: Any) -> BaseException:
    """The error of this library in one of torch, which is no Exception."""
    return next((each for each, _ in error.failures.values() if isinstance(each, NoetherWriterError)), error)
