# SPDX-License-Identifier: Apache-2.0
"""A connection without a run, for questions: what a run's rows are, whether everything is durable. It starts no
daemon."""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections import deque
from typing import Any

from . import daemon_launcher, frames
from .errors import DaemonUnavailable, ProtocolError, WaitTimeout, heeding_limits, of_wire

# For more descriptors than one message of the daemon's has.
_ANCILLARY_BYTES = socket.CMSG_SPACE(8 * array.array("i").itemsize)


class Conversation:
    """Connects and greets.

    Args:
        safe: what to say to the reader of an error about what was not lost, and about what to do.

    Raises:
        DaemonNotFound (none listens, and none is started), DaemonUnavailable, ProtocolError, WrongSocket,
        OutOfDescriptors.
    """

    def __init__(self, safe: str = "") -> None:
        self._safe = safe
        self._socket = heeding_limits(daemon_launcher.connect)
        self._decoder = frames.FrameDecoder()
        self._frames: deque[frames.Frame] = deque()
        # That came, and that nobody has taken yet, in order.
        self._descriptors: deque[int] = deque()
        self._request = 0
        try:
            from . import __version__

            hello = {"versions": frames.VERSIONS, "client": f"noether-writer-python/{__version__}"}
            #: The daemon's answer: its version, its limits and what it can do.
            self.welcome = self.ask(frames.HELLO, hello)
            frames.check_welcome(self.welcome)
        except BaseException:
            self.close()
            raise

    def ask(
        self, type_: int, message: dict[str, Any], timeout: float | None = None, descriptor: int | None = None
    ) -> dict[str, Any]:
        """Returns the JSON of the answer.

        Args:
            descriptor: goes with the question.

        Raises:
            what an `error` says, DaemonUnavailable, WaitTimeout (no answer within `timeout` seconds).
        """
        self._request += 1
        deadline = None if timeout is None else time.monotonic() + timeout
        text = json.dumps(message, ensure_ascii=False).encode()
        descriptors = [] if descriptor is None else [descriptor]
        self._sending(frames.pack(type_, text, self._request, len(descriptors)), descriptors)
        answer = self.next_frame(deadline)
        if answer.type == frames.ERROR:
            raise of_wire(answer.json())
        return answer.json()

    def ask_for_descriptor(self, type_: int, message: dict[str, Any], timeout: float) -> int | None:
        """As `ask`, for a descriptor: the caller closes it. None: the answer has none."""
        self.ask(type_, message, timeout)
        return self._descriptors.popleft() if self._descriptors else None

    def next_frame(self, deadline: float | None = None) -> frames.Frame:
        """Returns the next frame that the daemon sends.

        Raises:
            DaemonUnavailable, WaitTimeout (none came before `deadline`).
        """
        while not self._frames:
            if deadline is not None and (left := deadline - time.monotonic()) <= 0:
                raise WaitTimeout(f"the daemon did not answer in time{self._safe}")
            try:
                self._socket.settimeout(None if deadline is None else left)
                data = self._receive()
            except TimeoutError:
                continue
            except OSError as error:
                raise self._lost(error) from error
            if not data:
                raise DaemonUnavailable(f"the daemon closed the connection{self._safe}")
            self._frames.extend(self._decoder.feed(data))
        frame = self._frames.popleft()
        if frame.descriptors > len(self._descriptors):  # guard: client-counts-descriptors (never)
            raise ProtocolError(f"a descriptor of the daemon's was lost on the way{self._safe}")
        return frame

    def _receive(self) -> bytes:
        data, ancillary, flags, _ = self._socket.recvmsg(1 << 16, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:  # guard: client-checks-truncation (never)
            raise ProtocolError(f"descriptors of the daemon's were cut off: this process can open no more{self._safe}")
        return data

    def _sending(self, data: bytes, descriptors: list[int]) -> None:
        try:
            sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else 0
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> DaemonUnavailable:
        return DaemonUnavailable(f"the connection to the daemon is lost: {error.strerror or error}{self._safe}")

    def say_goodbye(self) -> None:
        """The daemon may forget what it knows of this connection."""
        self._sending(frames.pack(frames.CLOSE), [])

    def close(self) -> None:
        """Ends the connection. It may be called more than once."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
