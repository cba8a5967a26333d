# SPDX-License-Identifier: Apache-2.0
"""A client that keeps no rule: frames by hand, on a socket of its own."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Any

from noether_writer import frames

SESSION = "0123456789abcdef" * 2


def header(type_: int, length: int, *, fds: int = 0, magic: int = 0x574E, version: int = 1, reserved: int = 0) -> bytes:
    return struct.pack("<HBBIIHH", magic, version, type_, 1, length, fds, reserved)


def save_payload(
    sizes: Sequence[int], storages_length: int, targets: Sequence[dict[str, Any]], sequence: int = 1
) -> bytes:
    message = {"storages_length": storages_length, "buffer": 1, "targets": list(targets)}
    return frames.pack_save(sequence, list(sizes), message)


def target(**members: Any) -> dict[str, Any]:
    return {"kind": "model", "name": "n", "tag": "t", "pickle_offset": 128, "pickle_length": 5, **members}


def log_payload(sequence: int, update: int, ids: Sequence[int], values: Sequence[float] | None = None) -> bytes:
    values = values if values is not None else [0.5] * len(ids)
    count = len(ids)
    return (
        struct.pack("<Qqd2I", sequence, update, 0.0, count, 0)
        + struct.pack(f"<{count}d", *values)
        + struct.pack(f"<{count}I", *ids)
        + bytes(count)
    )


def definition_payload(first: int, keys: Sequence[bytes]) -> bytes:
    return struct.pack("<II", first, len(keys)) + b"".join(struct.pack("<H", len(key)) + key for key in keys)


def memfd(size: int = 1 << 20, seals: int | None = None, content: bytes = b"", holes: bool = False) -> int:
    """A memfd with the seals that the protocol asks for, unless others are given; with holes only if so told."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if not holes:
        os.posix_fallocate(fd, 0, size)
    os.pwrite(fd, content, 0)
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if seals is None else seals
    if wanted:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, wanted)
    return fd


class Raw:
    """One connection."""

    def __init__(self, path: str, hello: bool = True, timeout: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        # Blocking at first: with a timeout, a full backlog is an error at once.
        self.socket.connect(path)
        self.socket.settimeout(timeout)
        self._decoder = frames.FrameDecoder()
        self._frames: list[frames.Frame] = []
        if hello:
            self.send(frames.pack_json(frames.HELLO, {"versions": [1], "client": "hostile"}, 1))
            welcome = self.receive()
            assert welcome.type == frames.WELCOME
            self.welcome = welcome.json()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of it, or what the daemon takes before it closes; descriptors go with the first byte."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(ConnectionError):
            sent = self.socket.sendmsg([data], rights)
            self.socket.sendall(data[sent:])

    def is_read(self) -> bool:
        """Whether the daemon has read all that was sent (SIOCOUTQ, unix(7))."""
        return struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)))[0] == 0

    def receive(self) -> frames.Frame:
        while not self._frames:
            data = self.socket.recv(1 << 16)
            assert data, "the daemon closed the connection"
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def receive_type(self, type_: int) -> frames.Frame:
        while (frame := self.receive()).type != type_:
            pass
        return frame

    def rest(self) -> list[frames.Frame]:
        """What comes until the daemon closes."""
        found = []
        try:
            while True:
                found.append(self.receive())
        except (AssertionError, ConnectionError):
            return found

    def ask(self, type_: int, message: dict[str, Any]) -> dict[str, Any]:
        self.send(frames.pack_json(type_, message, 1))
        # Beside events, which answer nothing.
        while (frame := self.receive()).request != 1:
            pass
        return frame.json()

    def open_run(self, root: object, run_id: str = "r", **members: Any) -> dict[str, Any]:
        message = {"output_root": str(root), "run_id": run_id, "session": SESSION, **members}
        return self.ask(frames.OPEN_RUN, message)

    def define(self, first: int, keys: Sequence[bytes]) -> None:
        payload = struct.pack("<II", first, len(keys)) + b"".join(struct.pack("<H", len(k)) + k for k in keys)
        self.send(frames.pack(frames.DEFINE_KEYS, payload))

    def log(self, sequence: int, update: int, ids: Sequence[int]) -> None:
        self.send(frames.pack(frames.LOG, log_payload(sequence, update, ids)))

    def save(self, payload: bytes, fds: Sequence[int]) -> list[dict[str, Any]]:
        """Sends a save, and gives back its events up to `released`."""
        self.send(frames.pack(frames.SAVE, payload, fds=len(fds[:1])), fds)
        events: list[dict[str, Any]] = []
        while not events or events[-1]["event"] != "released":
            events.append(self.receive_type(frames.CHECKPOINT_EVENT).json())
        return events

    def close(self) -> None:
        self.socket.close()


def error_of(found: list[frames.Frame]) -> str:
    """The code of the one error before a connection's end."""
    errors = [json.loads(frame.payload) for frame in found if frame.type == frames.ERROR]
    assert len(errors) == 1 and errors[0]["fatal"], errors
    return str(errors[0]["code"])
