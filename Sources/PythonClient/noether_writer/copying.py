"""The memory copy of a snapshot: what the trainer waits for, or, in overlap mode, what goes on beside it.

On the CPU by libnoether-writer-copy (C, beside the daemon): on two threads, without the GIL, past the caches. Without
it by memmove, on one thread and more slowly. From CUDA on a stream of its own.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from . import library
from .buffers import Buffer

# In overlap mode these are copied before the call returns: running statistics change in the next forward.
SMALL_BYTES = 64 << 10
_CHUNK_BYTES = 16 << 20
_ALL = (1 << 64) - 1
_COLUMNS = ("targets", "sources", "ends")


class _State(ctypes.Structure):
    """struct nw_copy."""

    _fields_ = [(name, ctypes.c_uint64) for name in (*_COLUMNS, "count", "fresh", "next", "done", "helpers")]


class Copy:
    """Copies storages to their offsets in a buffer. Any thread may take part."""

    def __init__(
        self,
        storages: Sequence[Any],
        addresses: Sequence[int],
        lengths: Sequence[int],
        offsets: Sequence[int],
        buffer: Buffer,
        *,
        on_cpu: bool,
        small_first: bool = False,
    ) -> None:
        # Alive until the copy has ended, whatever the trainer does with its tensors.
        self._held: Any = (storages, buffer)
        targets = [buffer.address + offset for offset in offsets]
        self._devices: list[_StreamCopy] = []
        if not on_cpu:
            there = [i for i, storage in enumerate(storages) if storage.device.type != "cpu"]
            self._devices = _from_devices([(storages[i], offsets[i], lengths[i]) for i in there if lengths[i]], buffer)
            here = sorted(set(range(len(storages))).difference(there))
            targets, addresses, lengths = ([column[i] for i in here] for column in (targets, addresses, lengths))
        self._small_bytes = 0
        if small_first:
            order = sorted(range(len(lengths)), key=lambda i: lengths[i] > SMALL_BYTES)
            targets, addresses, lengths = ([column[i] for i in order] for column in (targets, addresses, lengths))
            self._small_bytes = sum(length for length in lengths if length <= SMALL_BYTES)
        self._library = _library()
        if self._library is None:
            self._pieces = [
                (target + start, source + start, min(_CHUNK_BYTES, length - start))
                for target, source, length in zip(targets, addresses, lengths, strict=True)
                for start in range(0, length, _CHUNK_BYTES)
            ]
            self._lock = threading.Lock()
        else:
            self._columns = [array.array("Q", column) for column in (targets, addresses, itertools.accumulate(lengths))]
            self._state = _State(
                *(column.buffer_info()[0] for column in self._columns), len(targets), buffer.take_fresh()
            )
            self._pointer = ctypes.addressof(self._state)

    def start(self) -> None:
        """A thread of the library begins; the caller goes on."""
        if self._library is not None:
            self._library.nw_copy_start(self._pointer)

    def run_small(self) -> None:
        """Small storages are copied when this returns; without the library all of them."""
        if self._library is None:
            return self._run_host()
        self._library.nw_copy_run(self._pointer, self._small_bytes)
        self._library.nw_copy_wait(self._pointer)

    def _run_host(self) -> None:
        if self._library is None:
            with self._lock:
                while self._pieces:
                    ctypes.memmove(*self._pieces.pop())
        else:
            self._library.nw_copy_run(self._pointer, _ALL)
            self._library.nw_copy_wait(self._pointer)

    def finish(self) -> None:
        """Takes part, and returns when all is copied."""
        self._run_host()
        for device in self._devices:
            device.wait()

    def before_change(self) -> None:
        """What this thread does to the tensors after this comes after the copy; on a device, in stream order."""
        self._run_host()
        for device in self._devices:
            device.order()

    def stop(self) -> None:
        """Gives up; returns when nothing is copied any more."""
        if self._library is None:
            with self._lock:
                self._pieces.clear()
        else:
            self._library.nw_copy_stop(self._pointer)
        self.finish()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if (found := library.load()) is not None:
        for name in ("nw_copy_start", "nw_copy_wait", "nw_copy_stop"):
            getattr(found, name).argtypes = [ctypes.c_void_p]
            getattr(found, name).restype = None
        found.nw_copy_run.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        found.nw_copy_run.restype = None
    return found


def _from_devices(pieces: list[tuple[Any, int, int]], buffer: Buffer) -> list[_StreamCopy]:
    """Copies (storage, offset, length) from CUDA devices begin; from any other device they are done on return."""
    import torch

    found: list[_StreamCopy] = []
    for device in dict.fromkeys(storage.device for storage, _, _ in pieces):
        views = [
            (
                torch.frombuffer(buffer.map, dtype=torch.uint8, count=length, offset=offset),
                torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[:length],
            )
            for storage, offset, length in pieces
            if storage.device == device
        ]
        if device.type == "cuda":
            buffer.pin()
            found.append(_StreamCopy(device, views))
        else:
            for target, source in views:
                target.copy_(source)
    return found


_streams: dict[Any, Any] = {}


class _StreamCopy:
    """From one CUDA device, on a stream beside the trainer's: it waits for what is queued there now, and no more."""

    def __init__(self, device: Any, views: list[tuple[Any, Any]]) -> None:
        import torch

        self._device = device
        self._views = views
        if (stream := _streams.get(device)) is None:
            stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for target, source in views:
                target.copy_(source, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(stream)

    def order(self) -> None:
        import torch

        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        self._copied.synchronize()
        self._views = []
