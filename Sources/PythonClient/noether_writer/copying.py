# SPDX-License-Identifier: Apache-2.0
"""The memory copy of a snapshot: what the trainer waits for, or, in overlap mode, what continues beside it.

On the CPU the copy is made in C (`Sources/CCopy`): on two threads, without the GIL, past the caches. From CUDA it is
made on a stream of its own.

If a storage changes while it is copied beside the trainer, this is found out:

- On the CPU by the kernel (Linux 6.7), which says of each whole page whether it was written since the call, whatever
  wrote it. What is not watched, the bytes at a storage's ends and memory that others can change, is copied before the
  call returns.
- On the CPU, if the kernel cannot say so, by torch's counters of changes made in place (`_Counters`), as far as there
  is one for a storage; the others are copied before the call returns.
- On CUDA by a sum of each storage, which the device takes in the order of the trainer's stream before anything that
  comes after the call, and which the copy must have too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from . import _core
from .buffers import Buffer, memory_of, pin
from .errors import is_foreign
from .tensors import version

if TYPE_CHECKING:
    from .snapshot import Snapshot

# In overlap mode these are copied before the call returns: running statistics change in the next forward.
SMALL_BYTES = 64 << 10
# From here on a second thread pays for what the trainer waits for.
TWO_THREADS_BYTES = 4 << 20
# A check waits this long for the main thread, which may be in one long call; then it compares the copy instead.
_MAIN_THREAD_SECONDS = 5.0


class Copy:
    """Copies the storages of a snapshot to their offsets in a buffer. Any thread may take part. One that is let go of
    stops first.

    Args:
        beside: whether it may continue beside the trainer: `overlaps` says whether it does.
    """

    def __init__(self, shot: Snapshot, offsets: Sequence[int], buffer: Buffer, *, beside: bool) -> None:
        self._devices: list[_StreamCopy] = []
        self._counters: _Counters | None = None
        self._watch: _core.Watch | None = None
        storages, lengths = shot.storages, shot.lengths
        on_device: list[int] = []
        if not shot.on_cpu:
            on_device = [i for i, storage in enumerate(storages) if storage.device.type != "cpu"]
        #: The numbers of the storages on the CPU, and of those of them that are copied beside the trainer.
        here = sorted(set(range(len(storages))).difference(on_device)) if on_device else range(len(storages))
        later: Collection[int] = self._large(shot, here) if beside else ()
        if later:
            # Before anything is read.
            later = self._guarded(shot, sorted(later))
        self._later = later
        there = [(i, storages[i], offsets[i], lengths[i]) for i in on_device if lengths[i]]
        _from_devices(there, buffer, self._devices)
        places, addresses, sizes = (
            [column[i] for i in here] if on_device else column for column in (offsets, shot.addresses, lengths)
        )
        flags = bytes(i in later for i in here) if later else None
        self._host = _core.Copy(buffer, storages, places, addresses, sizes, flags, self._watch)

    @property
    def overlaps(self) -> bool:
        """Whether something is copied beside the trainer after `start` of a copy that may be."""
        return bool(self._later) or bool(self._devices)

    @property
    def is_on_devices(self) -> bool:
        return bool(self._devices)

    def start(self) -> None:
        """A thread of the library begins with what is copied before the trainer continues."""
        if self._host.now_bytes >= TWO_THREADS_BYTES:
            self._host.start()

    def run_now(self) -> None:
        """What can't be copied beside the trainer is copied when this returns."""
        self._host.run_now()

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

    def changed_here(self) -> frozenset[int]:
        """After `finish` or `before_change`: the storages on the CPU that were changed while they were copied. What the
        first such call finds counts, if the copy has just ended: what comes later is the trainer's right."""
        if not self._later:
            return frozenset()
        if self._watch is not None:
            pages = self._watch.changed()
            if pages is None:
                return frozenset(self._watched)
            changed = frozenset(i for i, count in zip(self._watched, pages, strict=True) if count and i in self._later)
            return frozenset(self._later) if self._host.failed and not changed else changed
        assert self._counters is not None
        return self._counters.changed(self._host)

    def changed_on_devices(self) -> frozenset[int]:
        """After `finish`: the storages of which the copy is not what the device had when it was asked for."""
        return frozenset(number for device in self._devices for number in device.changed())

    def _large(self, shot: Snapshot, here: Sequence[int]) -> list[int]:
        """Without those of which a device may write the memory while the kernel does not see it."""
        import torch

        large = [i for i in here if shot.lengths[i] > SMALL_BYTES]
        if not large or not _core.can_guard():
            return []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            large = [i for i in large if not shot.storages[i].is_pinned()]
        return large

    def _guarded(self, shot: Snapshot, large: list[int]) -> Collection[int]:
        """Those of which a change is found out."""
        self._watch = watch([shot.addresses[i] for i in large], [shot.lengths[i] for i in large])
        if self._watch is not None:
            self._watched = large
            return {i for i, is_watched in zip(large, self._watch.watched, strict=True) if is_watched}
        if threading.get_ident() != threading.main_thread().ident:
            return ()
        self._counters = _Counters(shot, large)
        return self._counters.numbers


def watch(addresses: Sequence[int], lengths: Sequence[int]) -> _core.Watch | None:
    """None: this kernel can't (before Linux 6.7), may not (a sandbox), or none of it is memory that it can watch."""
    try:
        return _core.Watch(addresses, lengths)
    except OSError as error:
        if is_foreign(error):
            raise
        return None


class _Counters:
    """torch's counters of changes made in place.

    The counter moves after the change, so that an operation that is under way does not show. The check therefore comes
    when none of the main thread's can be: on the main thread itself, between two steps of its Python code. If it stays
    in one call, the copy is compared with the memory instead.
    """

    def __init__(self, shot: Snapshot, numbers: Sequence[int]) -> None:
        self._tensors = shot.counted(numbers)
        self.numbers = frozenset(self._tensors)
        self._before = {
            number: (version(tensor), shot.addresses[number], shot.lengths[number])
            for number, tensor in self._tensors.items()
        }
        # Set once, by whoever comes first.
        self._changed: dict[str, frozenset[int]] = {}

    def _look(self) -> frozenset[int]:
        found = set()
        for number, tensor in self._tensors.items():
            storage = tensor.untyped_storage()
            if (version(tensor), storage.data_ptr(), storage.nbytes()) != self._before[number]:
                found.add(number)
        return frozenset(found)

    def _decide(self) -> None:
        if "now" in self._changed:
            return
        try:
            changed = self._look()
        except Exception as error:
            if is_foreign(error):
                raise
            # Nobody knows.
            changed = self.numbers
        self._changed.setdefault("now", changed)

    def changed(self, host: _core.Copy) -> frozenset[int]:
        if "now" not in self._changed and host.failed:
            self._changed.setdefault("now", self._look() or self.numbers)
        if threading.get_ident() == threading.main_thread().ident:
            self._decide()
        deadline = time.monotonic() + _MAIN_THREAD_SECONDS
        while "now" not in self._changed and (left := deadline - time.monotonic()) > 0:
            # It may be interrupted there, before it has begun.
            if not _core.on_main_thread(self._decide, left):
                time.sleep(0.001)
        if "now" not in self._changed:
            is_same = host.is_same()
            self._changed.setdefault("now", self._look() if is_same else self._look() or self.numbers)
        return self._changed["now"]


def _from_devices(pieces: list[tuple[int, Any, int, int]], buffer: Buffer, found: list[_StreamCopy]) -> None:
    """Copies (number, storage, offset, length) from CUDA devices begin; from any other device they are done on
    return."""
    import torch

    for device in dict.fromkeys(storage.device for _, storage, _, _ in pieces):
        memory = memory_of(buffer)
        there = [piece for piece in pieces if piece[1].device == device]
        views = [
            (
                torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=offset),
                torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[:length],
            )
            for _, storage, offset, length in there
        ]
        if device.type == "cuda":
            pin(buffer)
            copy = _StreamCopy(device, views, buffer, [(number, offset, length) for number, _, offset, length in there])
            found.append(copy)
            copy.start()
        else:
            for target, source in views:
                target.copy_(source)


_streams: dict[Any, Any] = {}


class _StreamCopy:
    """From one CUDA device, on a stream beside the trainer's: it waits for what is queued there now, and no more.

    Args:
        places: the number of each storage, and the place of its copy in the buffer.
    """

    def __init__(
        self, device: Any, views: list[tuple[Any, Any]], buffer: Buffer, places: Sequence[tuple[int, int, int]]
    ) -> None:
        import torch

        self._device = device
        self._views = views
        self._buffer = buffer
        self._places = places
        if (stream := _streams.get(device)) is None:
            stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = stream
        self._sums: Sums | None = None
        self._copied: Any = None
        self._has_ended = False
        self._changed: dict[str, frozenset[int]] = {}

    def start(self) -> None:
        import torch

        # On the trainer's stream: before whatever it queues after this.
        self._sums = Sums([source for _, source in self._views])
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

    def changed(self) -> frozenset[int]:
        """After `wait`."""
        import torch

        if "now" not in self._changed:
            assert self._sums is not None
            # Not on a stream of the trainer's, which has other things to do first.
            with torch.cuda.stream(self._stream):
                sums = self._sums.values()
            copied = [_core.sum_of(self._buffer, offset, length) for _, offset, length in self._places]
            changed: set[int] = set()
            for rows, expected in zip(self._sums.groups, sums, strict=True):
                if sum(copied[row] for row in rows) % (1 << 64) != expected:
                    changed.update(self._places[row][0] for row in rows)
            self._changed.setdefault("now", frozenset(changed))
        return self._changed["now"]

    def __del__(self) -> None:
        # Given up in the middle: the buffer may be used again only when the device does not write to it any more.
        if not self._has_ended and self._views:
            self._stream.synchronize()


class Sums:
    """The sums of pieces of memory on a device, each of its 64-bit words and the bytes after them (see nw_sum in
    Sources/CCopy). Small pieces have one sum together: a sum costs a launch, whatever it is of."""

    #: Which pieces each sum is of.
    groups: list[list[int]]

    _SMALL_BYTES = 1 << 20
    # Small pieces are brought together for it.
    _GROUP_BYTES = 64 << 20

    def __init__(self, pieces: Sequence[Any]) -> None:
        """
        Args:
            pieces: tensors of uint8, in one dimension, on one device.
        """
        import torch

        self.groups = []
        sums = []
        for rows in self._grouped([piece.numel() for piece in pieces]):
            self.groups.append(rows)
            words, rest = [], []
            for row in rows:
                piece = pieces[row]
                whole = piece.numel() // 8 * 8
                if whole:
                    # Kernels read words at aligned addresses only.
                    aligned = piece if piece.data_ptr() % 8 == 0 else piece.clone()
                    words.append(aligned[:whole].view(torch.int64))
                if whole < piece.numel():
                    rest.append(piece[whole:])
            parts = [torch.cat(some) if len(some) > 1 else some[0] for some in (words, rest) if some]
            total = parts[0].sum(dtype=torch.int64)
            sums.append(total + parts[1].sum(dtype=torch.int64) if len(parts) > 1 else total)
        self._sums = torch.stack(sums) if sums else None

    def _grouped(self, sizes: Sequence[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        room = 0
        for row, size in enumerate(sizes):
            if size > self._SMALL_BYTES:
                groups.append([row])
                continue
            if size > room:
                small: list[int] = []
                groups.append(small)
                room = self._GROUP_BYTES
            small.append(row)
            room -= size
        return groups

    def values(self) -> list[int]:
        """From the device, modulo 2^64."""
        return [] if self._sums is None else [number % (1 << 64) for number in self._sums.tolist()]
