"""The pool of shared buffers: sealed memfds, kept mapped and used again (fresh shared memory costs several times a warm
copy). A buffer is out from `take` until the daemon releases it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from typing import Any

from . import environment
from .errors import PoolExhausted, StorageError

_ROUND_BYTES = 2 << 20
_SLACK_BYTES = 64 << 10


class Buffer:
    """One memfd. `capacity` in bytes; `address` of its mapping."""

    def __init__(self, number: int, needed: int) -> None:
        self.number = number
        wanted = needed + needed // 64 + _SLACK_BYTES
        self.capacity = (wanted + _ROUND_BYTES - 1) // _ROUND_BYTES * _ROUND_BYTES
        try:
            self.fd = os.memfd_create("noether-writer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.map = mmap.mmap(self.fd, self.capacity)
        except OSError as error:
            limit = " (see `ulimit -a`)" if error.errno in (errno.EFBIG, errno.EMFILE, errno.ENOMEM) else ""
            raise StorageError(
                error.errno or 0,
                f"no shared memory of {self.capacity} bytes: {error.strerror}{limit}; nothing was saved now",
            ) from None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self._pinned = False
        self._fresh = True
        # When it came back to the pool; time.monotonic().
        self.free_since = 0.0

    def take_fresh(self) -> bool:
        """Whether nothing was ever written to it; asked once, by who is about to."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def pin(self) -> None:
        """Makes the memory known to CUDA, once: copies from a device then run at full speed and beside the host.

        Where the driver refuses (a limit on locked memory), copies still work, more slowly.
        """
        if not self._pinned:
            self._pinned = _pin(self.address, self.capacity)

    def _unpin(self) -> None:
        if self._pinned:
            _unpin(self.address)

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            self._unpin()
        if (fd := getattr(self, "fd", -1)) >= 0:
            os.close(fd)


def _pin(address: int, nbytes: int) -> bool:
    import torch

    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(address, nbytes, 0)) == 0


def _unpin(address: int) -> None:
    import torch

    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)


def _default_bytes() -> int:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return environment.count("NOETHER_WRITER_POOL_BYTES", half)


class BufferPool:
    """Bounded by `limit` bytes in all (default: half of the memory); one is always allowed. A buffer that was not used
    for `idle_s` seconds goes back to the system."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _default_bytes() if limit is None else limit
        self.timeout_s = environment.seconds("NOETHER_WRITER_POOL_TIMEOUT", 600)
        self.idle_s = environment.seconds("NOETHER_WRITER_POOL_IDLE_SECONDS", 300)
        self._shrinks = False
        self._changed = threading.Condition()
        self._free: list[Buffer] = []
        self._out: dict[int, Buffer] = {}
        self._next = 1

    def take(self, needed: int) -> Buffer:
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while True:
                fitting = [b for b in self._free if needed <= b.capacity <= 2 * needed + _ROUND_BYTES]
                if fitting:
                    best = min(fitting, key=lambda b: b.capacity)
                    self._free.remove(best)
                    self._out[best.number] = best
                    return best
                held = sum(b.capacity for b in self._out.values())
                while self._free and held + sum(b.capacity for b in self._free) + needed > self.limit:
                    self._free.pop(0)
                if not self._out or held + needed <= self.limit:
                    buffer = Buffer(self._next, needed)
                    self._next += 1
                    self._out[buffer.number] = buffer
                    return buffer
                if not self._changed.wait(deadline - time.monotonic()):
                    raise PoolExhausted(
                        f"{held} bytes of checkpoints wait for the daemon and {needed} more would "
                        f"pass the limit of {self.limit}; nothing was saved now. Free storage, save less "
                        "often, or raise NOETHER_WRITER_POOL_BYTES"
                    )

    def release(self, number: int, *, reuse: bool = True) -> None:
        """
        Args:
            reuse: False lets go of it: something may still read it, and a new one takes its place.
        """
        with self._changed:
            if buffer := self._out.pop(number, None):
                if reuse:
                    buffer.free_since = time.monotonic()
                    self._free.append(buffer)
                    self._shrink_later(self.idle_s)
                self._changed.notify_all()

    def _shrink_later(self, seconds: float) -> None:
        """One timer at a time, and none where nothing is free."""
        if not self._shrinks:
            self._shrinks = True
            timer = threading.Timer(seconds, self._shrink)
            timer.daemon = True
            timer.start()

    def _shrink(self) -> None:
        with self._changed:
            self._shrinks = False
            now = time.monotonic()
            self._free = [b for b in self._free if now - b.free_since < self.idle_s]
            if self._free:
                self._shrink_later(min(b.free_since for b in self._free) + self.idle_s - now)

    @property
    def nbytes(self) -> int:
        """Of all its buffers."""
        with self._changed:
            return sum(b.capacity for b in (*self._free, *self._out.values()))
