"""One connection to the daemon: the handshake, frames out without ever blocking the trainer, frames in on a thread.

The thread reads, hands events to `on_event`, answers to whoever waits for them, and sends what the socket did not take
at once. What the frames mean is the run's business.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from . import environment, frames, locate
from .errors import DaemonUnavailable, NoetherWriterError, ProtocolError, WaitTimeout, of_wire

ANSWER_SECONDS = 60.0
LOOK_SECONDS = 30.0
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Connection:
    def __init__(self, on_event: Callable[[frames.Frame], None], on_lost: Callable[[Connection], None]) -> None:
        self.pid = os.getpid()
        self.lost: DaemonUnavailable | None = None
        #: Why the daemon, or this side, has ended the connection, where that was said.
        self.ended_by: NoetherWriterError | None = None
        self._on_event, self._on_lost = on_event, on_lost
        self._queue_bytes = environment.count("NOETHER_WRITER_QUEUE_BYTES", 64 << 20) * 2
        self._socket = locate.connect_or_start()
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._out: deque[tuple[bytes, int]] = deque()
        self._out_bytes = 0
        self._answered = threading.Condition()
        self._answers: dict[int, frames.Frame] = {}
        self._next_request = 1
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._loop, daemon=True, name="noether-writer-io")
        self._thread.start()
        from . import __version__

        hello = {"versions": frames.VERSIONS, "client": f"noether-writer-python/{__version__}"}
        try:
            self.welcome = self.request(frames.HELLO, hello).json()
            frames.check_welcome(self.welcome)
        except BaseException as error:
            self.close()
            if self.ended_by is not None and isinstance(error, DaemonUnavailable):
                raise self.ended_by from None
            raise

    def send(self, data: bytes, fd: int = -1) -> None:
        """Hands over one or more whole frames; `fd` goes with their first byte. Never blocks on the daemon.

        Raises:
            DaemonUnavailable: lost, full, or this process was forked from the one that connected.
        """
        if os.getpid() != self.pid:
            raise DaemonUnavailable("this connection belongs to the parent process; open a run in this one")
        if self.lost:
            raise self.lost
        with self._lock:
            if not self._out:
                sent = self._try_send(data, fd)
                if sent == len(data):
                    return
                data = data[sent:]
                if sent:
                    fd = -1
            if self._out_bytes + len(data) > self._queue_bytes:
                raise DaemonUnavailable(
                    f"the daemon does not read: {self._out_bytes} bytes wait for it already "
                    "(limit NOETHER_WRITER_QUEUE_BYTES); this frame was not taken"
                )
            self._out.append((data, fd))
            self._out_bytes += len(data)
        self._wake()

    def request(
        self,
        type_: int,
        message: dict[str, Any],
        timeout: float | None = ANSWER_SECONDS,
        look: Callable[[], None] | None = None,
    ) -> frames.Frame:
        """Sends a JSON frame and waits for what answers it; an `error` answer is raised.

        Args:
            look: with a timeout of None: called each LOOK_SECONDS; ends the wait by raising.
        """
        with self._answered:
            number = self._next_request
            self._next_request += 1
        self.send(frames.pack_json(type_, message, number))
        slice_s = LOOK_SECONDS if timeout is None and look is not None else timeout
        while True:
            with self._answered:
                arrived = self._answered.wait_for(lambda: number in self._answers or self.lost is not None, slice_s)
            if arrived or look is None or timeout is not None:
                break
            look()
        with self._answered:
            answer = self._answers.pop(number, None)
        if answer is None:
            if self.lost:
                raise self.lost
            assert not arrived
            raise WaitTimeout(f"the daemon has not answered within {timeout:.3g} s; it goes on working")
        if answer.type == frames.ERROR:
            raise of_wire(answer.json())
        return answer

    def close(self) -> None:
        """Says goodbye, if this process is the one that connected, and closes."""
        if os.getpid() != self.pid:
            self._socket.close()
            return
        if not self.lost:
            with contextlib.suppress(DaemonUnavailable):
                self.send(frames.pack(frames.CLOSE))
        self._closing = True
        self._wake()
        self._thread.join(timeout=5)

    def _try_send(self, data: bytes, fd: int) -> int:
        try:
            if fd < 0:
                return self._socket.send(data, _FLAGS)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            return self._socket.sendmsg([data], ancillary, _FLAGS)
        except BlockingIOError:
            return 0
        except OSError:
            # The reading side finds out and says so, once.
            return 0

    def _wake(self) -> None:
        # A full pipe wakes the thread just as well.
        with self._lock, contextlib.suppress(OSError):
            if self._wake_write >= 0:
                os.write(self._wake_write, b"\0")

    def _loop(self) -> None:
        decoder = frames.FrameDecoder()
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        reason = "the daemon closed the connection"
        try:
            while True:
                interest = select.POLLIN | (select.POLLOUT if self._out else 0)
                poller.register(self._socket.fileno(), interest)
                for fd, _events in poller.poll():
                    if fd == self._wake_read:
                        os.read(self._wake_read, 4096)
                self._flush()
                if self._closing and not self._out:
                    return
                try:
                    data = self._socket.recv(1 << 16)
                except BlockingIOError:
                    continue
                if not data:
                    return
                for frame in decoder.feed(data):
                    self._take(frame)
        except ProtocolError as error:
            self.ended_by = error
        except OSError as error:
            reason = f"the connection to the daemon is lost: {error.strerror or error}"
        finally:
            self.lost = DaemonUnavailable(f"{self.ended_by or reason}; what it had accepted is in its care")
            self._socket.close()
            with self._lock:
                wake, self._wake_write = self._wake_write, -1
            os.close(wake)
            os.close(self._wake_read)
            with self._answered:
                self._answered.notify_all()
            if not self._closing:
                self._on_lost(self)

    def _flush(self) -> None:
        with self._lock:
            while self._out:
                data, fd = self._out[0]
                sent = self._try_send(data, fd)
                self._out_bytes -= sent
                if sent < len(data):
                    if sent:
                        self._out[0] = (data[sent:], -1)
                    return
                self._out.popleft()

    def _take(self, frame: frames.Frame) -> None:
        if frame.type == frames.ERROR and not frame.request and (message := frame.json()).get("fatal"):
            self.ended_by = of_wire(message)
        if frame.request and frame.type != frames.CHECKPOINT_EVENT:
            with self._answered:
                self._answers[frame.request] = frame
                self._answered.notify_all()
        else:
            self._on_event(frame)
