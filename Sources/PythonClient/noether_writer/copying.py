"""The memory copy of a snapshot: what the trainer waits for, or, in overlap mode, what continues beside it.

On the CPU in C (`Sources/CCopy`): on two threads, without the GIL, past the caches. From CUDA on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from .buffers import Buffer, memory_of, pin

# In overlap mode these are copied before the call returns: running statistics change in the next forward.
SMALL_BYTES = 64 << 10


class Copy:
    """Copies storages to their offsets in a buffer. Any thread may take part. One that is let go of stops first."""

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
        self._devices: list[_StreamCopy] = []
        if not on_cpu:
            there = [i for i, storage in enumerate(storages) if storage.device.type != "cpu"]
            _from_devices([(storages[i], offsets[i], lengths[i]) for i in there if lengths[i]], buffer, self._devices)
            here = sorted(set(range(len(storages))).difference(there))
            offsets, addresses, lengths = ([column[i] for i in here] for column in (offsets, addresses, lengths))
        self._small_bytes = 0
        if small_first:
            order = sorted(range(len(lengths)), key=lambda i: lengths[i] > SMALL_BYTES)
            offsets, addresses, lengths = ([column[i] for i in order] for column in (offsets, addresses, lengths))
            self._small_bytes = sum(length for length in lengths if length <= SMALL_BYTES)
        self._host = _core.Copy(buffer, storages, offsets, addresses, lengths)

    def start(self) -> None:
        """A thread of the library begins; the caller continues."""
        self._host.start()

    def run_small(self) -> None:
        """Small storages are copied when this returns."""
        self._host.run(self._small_bytes)

    def finish(self) -> None:
        """Takes part, and returns when all is copied."""
        self._host.finish()
        for device in self._devices:
            device.wait()

    def before_change(self) -> None:
        """What this thread does to the tensors after this comes after the copy; on a device, in stream order."""
        self._host.finish()
        for device in self._devices:
            device.order()


def _from_devices(pieces: list[tuple[Any, int, int]], buffer: Buffer, found: list[_StreamCopy]) -> None:
    """Copies (storage, offset, length) from CUDA devices begin; from any other device they are done on return."""
    import torch

    for device in dict.fromkeys(storage.device for storage, _, _ in pieces):
        memory = memory_of(buffer)
        views = [
            (
                torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=offset),
                torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[:length],
            )
            for storage, offset, length in pieces
            if storage.device == device
        ]
        if device.type == "cuda":
            pin(buffer)
            copy = _StreamCopy(device, views)
            found.append(copy)
            copy.start()
        else:
            for target, source in views:
                target.copy_(source)


_streams: dict[Any, Any] = {}


class _StreamCopy:
    """From one CUDA device, on a stream beside the trainer's: it waits for what is queued there now, and no more."""

    def __init__(self, device: Any, views: list[tuple[Any, Any]]) -> None:
        import torch

        self._device = device
        self._views = views
        if (stream := _streams.get(device)) is None:
            stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = stream
        self._copied: Any = None
        self._has_ended = False

    def start(self) -> None:
        import torch

        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for target, source in self._views:
                target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(stream)
        self._copied = copied

    def order(self) -> None:
        import torch

        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        self._copied.synchronize()
        self._has_ended = True
        self._views = []

    def __del__(self) -> None:
        # Given up in the middle: the buffer may be used again only when the device does not write to it any more.
        if not self._has_ended and self._views:
            self._stream.synchronize()
