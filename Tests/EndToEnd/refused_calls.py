# SPDX-License-Identifier: Apache-2.0
"""A program on a kernel that does not know some system calls, or refuses them: a seccomp filter answers for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

ALLOW = 0x7FFF0000

_SCRIPT = """
import ctypes, json, os, struct, sys
operations, (call, error), command = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *operation) for operation in operations))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
filter = Program(len(operations), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0                   # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(filter)) == 0      # PR_SET_SECCOMP
assert libc.syscall(call, -1, None, None, 0) == -1 and ctypes.get_errno() == error
os.execv(command[0], command)
"""


def refuse(error: int) -> int:
    """What a filter returns so that the call fails with this errno (SECCOMP_RET_ERRNO)."""
    return 0x00050000 | error


def under_filter(
    operations: Sequence[tuple[int, int, int, int]], call: int, error: int, command: Sequence[str]
) -> list[str]:
    """`command`, run under a filter.

    Args:
        operations: (code, jump if true, jump if false, value), see bpf(4) and seccomp(2).
        call: the number of a call that fails with the errno `error` then; it is tried before the command starts.
    """
    return [sys.executable, "-c", _SCRIPT, json.dumps(operations), json.dumps([call, error]), *command]
