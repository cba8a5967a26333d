# SPDX-License-Identifier: Apache-2.0
"""Something happens at the n-th opcode that a call executes in the client's own code: an exception, or a handler."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import noether_writer

_CLIENT = os.path.dirname(noether_writer.__file__) + os.sep
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = sysconfig.get_path("purelib") + os.sep


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, known from any other."""


@dataclass(frozen=True)
class Place:
    """One opcode. `is_checked`: CPython runs signal handlers there, so that not only a debugger can raise there."""

    file: str
    line: int
    function: str
    opcode: str
    offset: int
    is_checked: bool

    def __str__(self) -> str:
        where = f"{self.file}:{self.line} in {self.function}, before {self.opcode}"
        return where if self.is_checked else f"{where} (no signal arrives there)"


@functools.cache
def _instructions(code: CodeType) -> dict[int, tuple[str, bool]]:
    """The name of the opcode at each offset, and whether a signal handler may have run just before it."""
    found = {}
    after_call = False
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        found[instruction.offset] = (name, after_call or name == "RESUME" or name.startswith("JUMP_BACKWARD"))
        after_call = name.startswith("CALL")
    return found


class Probe:
    """
    Args:
        number: of the opcode, from 1 on; 0: none, all are only counted.
        action: what happens there; it is not traced itself.
        deep: also in the code of the standard library that the client calls; only where a signal can arrive, since that
            code is written for no more.
    """

    def __init__(self, number: int, action: Callable[[], None], deep: bool = False) -> None:
        self.number, self._action, self._deep = number, action, deep
        self.count = 0
        # Where it happened; with number 0 all places in order.
        self.place: Place | None = None
        self.places: list[Place] = []

    def run(self, call: Callable[[], Any]) -> BaseException | None:
        """
        Returns:
            what the call raised.
        """
        sys.settrace(self._on_call)
        try:
            call()
        except BaseException as error:
            return error
        finally:
            sys.settrace(None)
        return None

    def _on_call(self, frame: FrameType, event: str, argument: object) -> Any:
        if not self._is_of_client(frame):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._on_opcode

    def _is_of_client(self, frame: FrameType) -> bool:
        file = frame.f_code.co_filename
        if file.startswith(_CLIENT):
            return True
        if not self._deep or not (file.startswith((_LIBRARY, "<frozen"))) or file.startswith(_PACKAGES):
            return False
        caller = frame.f_back
        return caller is not None and self._is_of_client(caller)

    def _on_opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event != "opcode":
            return self._on_opcode
        if self._deep and not self._place(frame).is_checked:
            return self._on_opcode
        self.count += 1
        if self.number == 0:
            self.places.append(self._place(frame))
        elif self.count == self.number:
            self.place = self._place(frame)
            sys.settrace(None)
            self._action()
        return self._on_opcode

    def _place(self, frame: FrameType) -> Place:
        code = frame.f_code
        opcode, is_checked = _instructions(code)[frame.f_lasti]
        return Place(
            os.path.basename(code.co_filename), frame.f_lineno, code.co_name, opcode, frame.f_lasti, is_checked
        )
