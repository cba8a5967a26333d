# SPDX-License-Identifier: Apache-2.0
"""The pool of shared buffers: sealed memfds, kept mapped and used again (fresh shared memory costs several times a warm
copy). A buffer belongs to whoever holds a reference (see core/pool.h): no exception gives it back too early."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

from . import _core, ending, environment
from .errors import PoolExhausted, StorageError

Buffer = _core.Buffer


class BufferPool:
    """Bounded by `limit` bytes in all (default: half of the memory) and by a quarter of the descriptors that this
    process may have; one is always allowed. A buffer that was not used for `idle_s` seconds goes back to the system."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _default_bytes() if limit is None else limit
        self.timeout_s = environment.seconds("NOETHER_WRITER_POOL_TIMEOUT", 600)
        self.idle_s = environment.seconds("NOETHER_WRITER_POOL_IDLE_SECONDS", 300)
        self._core = _core.Pool(self.limit)

    def take(self, needed: int) -> Buffer:
        """
        Raises:
            PoolExhausted, StorageError: nothing was taken.
        """
        buffer = self._core.take(needed, ending.within(self.timeout_s))
        if isinstance(buffer, int):
            limit = " (see `ulimit -a`)" if buffer in (errno.EFBIG, errno.EMFILE, errno.ENOMEM) else ""
            raise StorageError(
                buffer, f"no shared memory of {needed} bytes: {os.strerror(buffer)}{limit}; nothing was saved now"
            )
        self._unpin_retired()
        if buffer is None:
            _, held, _, count = self._core.sizes()
            if held + needed > self.limit:
                raise PoolExhausted(
                    f"{held} bytes of checkpoints wait for the daemon and {needed} more would pass the limit of "
                    f"{self.limit}; nothing was saved now. Free storage, save less often, or raise "
                    "NOETHER_WRITER_POOL_BYTES"
                )
            raise PoolExhausted(
                f"{count} saves wait for the daemon, and each holds a file descriptor: one more would pass a quarter "
                "of the descriptors that this process may have; nothing was saved now. Free storage, save less "
                "often, or raise the limit (`ulimit -n`)"
            )
        return buffer

    def shrink(self, idle_s: float | None = None) -> None:
        """Gives memory that was not used for so long back to the system."""
        self._core.shrink(self.idle_s if idle_s is None else idle_s)
        self._unpin_retired()

    def _unpin_retired(self) -> None:
        while (buffer := self._core.retired()) is not None:
            _unpin(buffer.address)
            buffer.destroy()

    @property
    def is_forked(self) -> bool:
        """Whether it is the parent's."""
        return self._core.is_forked

    @property
    def nbytes(self) -> int:
        """Of all its buffers."""
        return self._core.sizes()[2]


_pool: BufferPool | None = None


def pool() -> BufferPool:
    """One pool a process; a forked child makes its own."""
    global _pool
    found = _pool
    if found is None or found.is_forked:
        found = _pool = BufferPool()
    return found


def memory_of(buffer: Buffer) -> Any:
    """The buffer's bytes, for torch.frombuffer. They stay its own as long as this, or a tensor of it, is alive."""
    memory = (ctypes.c_char * buffer.capacity).from_address(buffer.address)
    memory.owner = buffer  # type: ignore[attr-defined]
    return memory


def pin(buffer: Buffer) -> None:
    """Makes the memory known to CUDA, once: copies from a device then run at full speed and beside the host.

    Where the driver refuses (a limit on locked memory), copies still work, more slowly.
    """
    if not buffer.pinned and _pin(buffer.address, buffer.capacity):
        buffer.pinned = True


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
