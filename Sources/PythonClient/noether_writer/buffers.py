# SPDX-License-Identifier: Apache-2.0
"""The pool of shared buffers: sealed memfds that stay mapped and are used again (fresh shared memory costs several
times as much as a warm copy). A buffer belongs to whoever holds a reference (see core/pool.h), so no exception can give
it back too early."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from typing import Any

from . import _cgroup, _core, ending, environment
from .errors import PoolExhausted, StorageError

Buffer = _core.Buffer
# What a pool leaves of the job's memory, unless a sixteenth is more.
_SPARE_BYTES = 16 << 20
# How often a save that finds no room in the job looks whether another process has given some back.
_LOOK_SECONDS = 0.5
# For a call that looks once.
_MOMENT_SECONDS = 0.001
# Memory is asked for in pieces: a call that a signal interrupts begins anew.
_PIECE_BYTES = 64 << 20


class BufferPool:
    """All buffers together have at most `limit` bytes, and there are at most a quarter as many as this process may have
    descriptors; one is always allowed. A buffer that was not used for `idle_s` seconds goes back to the system.

    Without a limit of its own, or of NOETHER_WRITER_POOL_BYTES, a pool takes at most half of the machine's memory, and
    never more than the memory limit of its job leaves free.
    """

    def __init__(self, limit: int | None = None) -> None:
        named = environment.count("NOETHER_WRITER_POOL_BYTES", -1) if limit is None else limit
        self._looks_at_job = named < 0
        self._most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if named < 0 else named
        self.limit = self._most
        self.timeout_s = environment.seconds("NOETHER_WRITER_POOL_TIMEOUT", 600)
        self.idle_s = environment.seconds("NOETHER_WRITER_POOL_IDLE_SECONDS", 300)
        self._core = _core.Pool(self.limit)

    def reserve(self, needed: int) -> Buffer:
        """
        Raises:
            PoolExhausted, StorageError: nothing was taken.
        """
        timeout = ending.within(self.timeout_s)
        if self._looks_at_job and _cgroup.room() is not None:
            buffer = self._take_of_job(needed, timeout)
        else:
            buffer = self._core.take(needed, timeout)
        if isinstance(buffer, int):
            limit = " (see `ulimit -a`)" if buffer in (errno.EFBIG, errno.EMFILE, errno.ENOMEM) else ""
            raise StorageError(
                buffer,
                f"no shared memory of {needed} bytes could be had: {os.strerror(buffer)}{limit}; the save was not made",
            )
        self._unpin_retired()
        if buffer is None:
            _, held, _, count = self._core.sizes()
            if held + needed > self.limit:
                of_job = " (of the memory of this job)" if self.limit < self._most else ""
                raise PoolExhausted(
                    f"{held} bytes of checkpoints wait for the daemon, and {needed} more would exceed the limit of "
                    f"{self.limit}{of_job}; the save was not made. Free storage, save less often, or raise "
                    "NOETHER_WRITER_POOL_BYTES"
                )
            raise PoolExhausted(
                f"{count} saves wait for the daemon, and each holds a file descriptor: one more would exceed a quarter "
                "of the descriptors that this process may have; the save was not made. Free storage, save less "
                "often, or raise the limit (`ulimit -n`)"
            )
        return buffer

    def _take_of_job(self, needed: int, timeout: float) -> Buffer | int | None:
        """As `take`, and it keeps the pool within what the job may still take: it is better to wait than to be killed.
        The processes of a job (its ranks) do this in turn, and the memory is the job's before the next one looks.

        Raises:
            PoolExhausted: even empty pools of all processes would leave no room.
        """
        deadline = time.monotonic() + timeout
        while True:
            with _cgroup.one_at_a_time():
                if self._has_room(needed):
                    buffer = self._core.take(needed, _MOMENT_SECONDS)
                    if buffer is not None and (isinstance(buffer, int) or _commit(buffer)):
                        return buffer
                    buffer = None
            if (left := deadline - time.monotonic()) <= 0:
                return None
            if not self._core.sizes()[3]:
                # All of it is with other processes.
                time.sleep(min(left, _LOOK_SECONDS))
                continue
            # Only what comes back to this process, which needs nothing more of the job.
            self._core.set_limit(self.nbytes)
            buffer = self._core.take(needed, min(left, _LOOK_SECONDS))
            if buffer is not None:
                return buffer

    def _has_room(self, needed: int) -> bool:
        """Sets the limit to what the job leaves.

        Raises:
            PoolExhausted: even empty pools of all processes would leave no room.
        """
        room = _cgroup.room()
        if room is None:
            self.limit = self._most
            self._core.set_limit(self.limit)
            return True
        all_bytes = self.nbytes
        # A little is left for the trainer itself.
        self.limit = min(self._most, all_bytes + room - min(room, max(room // 16, _SPARE_BYTES)))
        self._core.set_limit(self.limit)
        if needed <= all_bytes + room:
            return True
        # The buffers of other ranks come back.
        if needed > all_bytes + room + max(0, _cgroup.shared() - all_bytes):
            raise PoolExhausted(
                f"a save needs a buffer of {needed} bytes, and the memory limit of this job (its control group) leaves "
                f"{all_bytes + room}: the save was not made, since the kernel would have killed the job. Give the job "
                "more memory, by the size of what it saves, or set NOETHER_WRITER_POOL_BYTES to try it"
            )
        return False

    def shrink(self, idle_s: float | None = None) -> None:
        """Gives memory back to the system that was not used for `idle_s` seconds (None: for as long as set)."""
        self._core.shrink(self.idle_s if idle_s is None else idle_s)
        self._unpin_retired()

    def _unpin_retired(self) -> None:
        while (buffer := self._core.retired()) is not None:
            _unpin(buffer.address)
            buffer.destroy()

    @property
    def is_forked(self) -> bool:
        """Whether it belongs to the parent of this process."""
        return self._core.is_forked

    @property
    def nbytes(self) -> int:
        """The bytes of all its buffers."""
        return self._core.sizes()[2]


def _commit(buffer: Buffer) -> bool:
    """Has the kernel charge a new buffer's memory to the job now. Later, while bytes are written, the job could be
    killed for it, and it would be too late to wait.

    Returns:
        False if the job has no memory left. The buffer is destroyed then.
    """
    if os.fstat(buffer.fd).st_blocks * 512 >= buffer.capacity:
        return True
    try:
        for at in range(0, buffer.capacity, _PIECE_BYTES):
            os.posix_fallocate(buffer.fd, at, min(_PIECE_BYTES, buffer.capacity - at))
    except OSError:
        buffer.destroy()
        return False
    return True


_pool: BufferPool | None = None


def pool() -> BufferPool:
    """The pool of this process; a forked child makes its own."""
    global _pool
    found = _pool
    if found is None or found.is_forked:
        found = _pool = BufferPool()
    return found


def memory_of(buffer: Buffer) -> Any:
    """The buffer's bytes, for torch.frombuffer. The buffer stays in use as long as this object, or a tensor of it, is
    alive."""
    memory = (ctypes.c_char * buffer.capacity).from_address(buffer.address)
    memory.owner = buffer  # type: ignore[attr-defined]
    return memory


def pin(buffer: Buffer) -> None:
    """Makes the memory known to CUDA, once: copies from a device then run at full speed and beside the host.

    If the driver refuses (a limit on locked memory), copies still work, but more slowly.
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
