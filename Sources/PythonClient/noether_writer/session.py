# SPDX-License-Identifier: Apache-2.0
"""A session with the daemon that outlives its connections. What is not acknowledged is kept, and sent again after a
reconnect. The daemon drops what it has taken already, by sequence number.

What may not be left half done is in `_core` (C): numbers, keys, kept frames, buffers, the socket. This module opens
connections, says in words what went wrong, and waits. A thread keeps each session: it reconnects, makes the frames of
saves whose copy runs beside the trainer, and logs warnings. If no thread can be started (at the end of the
interpreter), whoever waits does its work.

Neither logging nor saving waits here. Memory is bounded: when the daemon stays away and the kept updates reach their
limit, training continues and further updates are not kept (or raise, as `NOETHER_WRITER_WHEN_AWAY` says), which is said
once, with numbers.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from . import _core, daemon_launcher, daemon_replacement, ending, environment, frames, speaker
from .buffers import pool
from .errors import (
    LOG_DAMAGED,
    DaemonBusy,
    DaemonUnavailable,
    NoetherWriterError,
    ProtocolError,
    WaitTimeout,
    WrongSocket,
    heeding_limits,
    is_foreign,
    of_wire,
)

logger = logging.getLogger("noether_writer")

ANSWER_SECONDS = 60.0
LOOK_SECONDS = 30.0
FIRST_CONNECT_SECONDS = 20.0
AWAY_SECONDS = 60.0
CLOSE_SECONDS = 5.0
DISMISS_SECONDS = 1.0
#: After this long without an answer whoever opens a run is told what it waits for.
QUIET_SECONDS = 1.0
#: What is kept if storage refuses, and what to do.
STALLED = (
    "The daemon keeps it in memory and tries again: free space or correct the permissions; the write then completes"
)
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# How often a trainer that has nothing to send looks whether a daemon is back.
_IDLE_SECONDS = 1.0
# How long a thread waits at a time if it has to do the work of the session's thread.
_SLICE_SECONDS = 0.05
#: Every session that may still have something to deliver.
sessions: set[Session] = set()
# Those that have a thread.
_keeping: set[Session] = set()


class Session:
    """One run's session.

    Args:
        open_message: the message of `open_run`, with its session.

    Raises:
        DaemonNotFound, DaemonUnavailable, WrongSocket, OutOfDescriptors, and what the daemon answers to `open_run`.
    """

    def __init__(self, open_message: dict[str, Any]) -> None:
        when_away = environment.choice("NOETHER_WRITER_WHEN_AWAY", "keep-training", ("keep-training", "raise"))
        self.raises = when_away == "raise"
        self.limit = environment.count("NOETHER_WRITER_QUEUE_BYTES", 64 << 20)
        self.core = heeding_limits(_core.Session, self.limit, self.raises, pool().timeout_s)
        self.run_id: str = open_message["run_id"]
        #: In messages.
        self.title = self.named(self.run_id)
        self.welcome: dict[str, Any] = {}
        self.directory = ""
        #: The errors of updates that the daemon has refused: the next calls raise them, one after the other.
        self.errors: list[dict[str, Any]] = []
        #: Acknowledged updates that are gone: said at once, and raised by the next `finish`.
        self._log_damage: dict[str, Any] | None = None
        self._message = open_message
        self._attempt = 0
        self._retry_at = 0.0
        # How many connections were opened, and which one's end was noticed last.
        self._opened = 0
        self._ended = 0
        self._is_idle = False
        self._was_refused = False
        self._has_warned_of_absence = False
        self._said = ""
        self.opened = self._first_connect()
        self.directory = self.opened["run_directory"]

    def named(self, run_id: str) -> str:
        return f"run {run_id}"

    def check_welcome(self) -> None:
        """
        Raises:
            ProtocolError: this daemon cannot do what the session is for.
        """

    # What the trainer calls

    def check_open(self) -> None:
        """
        Raises:
            DaemonUnavailable: the run is closed, or belongs to the parent process.
        """
        if self.core.is_forked:
            raise DaemonUnavailable("this run belongs to the parent process; open a run in this one to write from it")
        if self.core.is_closed:
            raise DaemonUnavailable("this run is closed, and nothing more is sent: open it again to continue it")

    def keep(self) -> bool:
        """Makes sure that a thread keeps this session. Returns False if none can be started: then whoever waits does
        its work."""
        if self.core.is_kept:
            return True
        if ending.is_last:
            sessions.add(self)
            return False
        try:
            # The thread itself adds the session: an interrupt here leaves nothing behind.
            _thread.start_new_thread(_keep, (self,))
        except RuntimeError as error:
            if is_foreign(error):
                raise
            sessions.add(self)
            return False
        return True

    def wait(self, generation: int, seconds: float) -> None:
        """Waits until something has changed since `generation`, or for `seconds`. Handlers of signals run."""
        if self.core.is_forked:
            self.check_open()
        if not self.core.is_kept and not self.core.is_over and not self.keep():
            self.help()
            seconds = min(seconds, _SLICE_SECONDS)
        self.core.wait(generation, max(0.0, seconds))

    def help(self) -> None:
        """Does what the session's thread does when it is woken, but on the calling thread."""
        self.read_news()
        self.send_pending()
        if not (self.core.is_open or self.core.is_over or self.core.is_forked):  # guard: client-reconnects (never)
            self._come_back()

    def ask(
        self,
        type_: int,
        message: dict[str, Any],
        deadline: float | None,
        look: Callable[[], None] | None = None,
    ) -> frames.Frame:
        """Asks, and asks again after a reconnect if the first answer was lost: for questions that may be asked twice.

        Args:
            deadline: as time.monotonic() counts; None waits as long as the daemon is there.
            look: called each LOOK_SECONDS if there is no deadline; it ends the wait by raising.
        """
        asked_at = time.monotonic()
        payload = json.dumps(message, ensure_ascii=False).encode()
        while True:
            self._wait_open(deadline)
            connection = self.core.connection
            if not (number := self.core.ask(type_, payload, False)):
                continue
            looked_at = time.monotonic()
            while True:
                generation = self.core.generation
                if (answer := self.core.answer(number)) is not None:
                    frame = frames.Frame(answer[0], number, answer[1])
                    if frame.type == frames.ERROR:
                        raise of_wire(frame.json())
                    return frame
                if self.core.connection != connection or not self.core.is_open:
                    break
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    raise WaitTimeout(
                        f"the daemon has not answered within {max(0.0, deadline - asked_at):.3g} s; it still works"
                    )
                if deadline is None and look is not None and now - looked_at > LOOK_SECONDS:
                    look()  # guard: looks-while-it-waits (skip)
                    looked_at = time.monotonic()
                self.wait(generation, 1.0 if deadline is None else min(1.0, deadline - now))

    def wait_taken(self, deadline: float | None, timeout: float | None) -> None:
        """Returns when the daemon holds every update and every save.

        Args:
            deadline: time.monotonic(); None waits as long as the daemon is there.
            timeout: what a message names.
        """
        while True:
            generation = self.core.generation
            self.raise_next_error()
            if not self.core.saves_not_accepted and (self._was_refused or not self.core.kept_rows):
                # What the daemon has refused it never acknowledges; that was raised.
                return
            self._wait_open(deadline)
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise WaitTimeout(
                    f"the daemon has not taken {count_of(self.core.kept_rows, 'update')} and "
                    f"{count_of(self.core.saves_not_accepted, 'save')} within {timeout:.3g} s; "
                    f"{ending.of_kept()}"
                )
            self.wait(generation, 1.0 if deadline is None else min(1.0, deadline - now))

    def wait_sent(self, deadline: float | None) -> None:
        """Returns when the saves that another thread makes ready are on their way, or the time is over."""
        while True:
            generation = self.core.generation
            if self.core.pending() is None:
                return
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return
            self.wait(generation, min(1.0, left))
            # The keeper may be busy, or held up: it is for nobody alone to make them.
            self.send_pending()

    def close(self) -> None:
        """Takes nothing more from the trainer. Returns when the daemon has what it was given, or after CLOSE_SECONDS:
        then the rest is kept until this process ends, and sent when the daemon is there."""
        self.core.close()
        deadline = time.monotonic() + ending.within(CLOSE_SECONDS)
        while not self.core.is_over and (left := deadline - time.monotonic()) > 0:
            if self._was_refused and not self.core.saves_not_accepted:
                # The daemon never acknowledges what it has refused; that was raised, or is about to be.
                self.core.end()
            self.wait(self.core.generation, min(_SLICE_SECONDS, left))
        if self.core.is_over:
            self.core.drop_saves()
            sessions.discard(self)
        elif not ending.has_begun():
            logger.warning(
                "%s is closed, and the daemon has not taken %s and %s of it: they are kept in this process, and "
                "sent when the daemon is back",
                self.title,
                count_of(self.core.kept_rows, "update"),
                count_of(self.core.saves_not_accepted, "save"),
            )

    def end(self) -> None:
        """Ends now, even if the daemon does not have everything."""
        self.core.end()
        self.core.drop_saves()
        sessions.discard(self)

    def full(self) -> str:
        """In words: why an update was not kept."""
        return (
            f"the daemon has not taken {self.core.kept_rows} updates ({self.core.kept_bytes} bytes, limit "
            f"NOETHER_WRITER_QUEUE_BYTES={self.limit}); no more are kept"
        )

    # Connections

    def _wait_open(self, deadline: float | None) -> None:
        limit = time.monotonic() + ending.within(AWAY_SECONDS) if deadline is None else deadline
        while not self.core.is_open:
            generation = self.core.generation
            self.check_open()
            self.core.want()
            if (left := limit - time.monotonic()) <= 0:
                away = f"the daemon has been away for {self.core.away_seconds:.0f} s"
                kept = ending.of_kept()
                if deadline is None:
                    raise DaemonUnavailable(f"{away}; {kept}")
                raise WaitTimeout(f"{away}, and the time is over; {kept}")
            self.wait(generation, min(1.0, left))

    def _first_connect(self) -> dict[str, Any]:
        deadline = time.monotonic() + ending.within(FIRST_CONNECT_SECONDS)
        attempt = 0
        while True:
            try:
                return self._connect(daemon_launcher.connect_or_start)
            except daemon_replacement.DaemonReplaced:
                # The next one is started at once, and has its own time.
                deadline = time.monotonic() + ending.within(FIRST_CONNECT_SECONDS)
                continue
            except WrongSocket:
                raise
            except (DaemonUnavailable, DaemonBusy):
                # The daemon is leaving: the next one will be there in a moment.
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1

    def _connect(self, find: Callable[[], Any]) -> dict[str, Any]:
        return heeding_limits(self._connect_by, find)

    def _connect_by(self, find: Callable[[], Any]) -> dict[str, Any]:
        from . import __version__

        with find() as connected:
            # A run that has a daemon already stays with what it finds.
            may_replace = not self._opened and daemon_launcher.user_of(connected) == os.geteuid()
            if not self.core.attach(connected.fileno()):
                self.check_open()
        try:
            hello = {"versions": frames.VERSIONS, "client": f"noether-writer-python/{__version__}"}
            self.welcome = self._greet(frames.HELLO, hello)
            frames.check_welcome(self.welcome)
            if may_replace:
                daemon_replacement.hand_over(self.welcome, self._greet)
            self.check_welcome()
            opened = self._greet(frames.OPEN_RUN, self._message, self._root())
        except BaseException:
            self.core.detach()
            raise
        # The config is sent only when the run is first opened.
        self._message["config_yaml"] = None
        self._opened += 1
        for error in opened.get("refused") or ():
            # The connection may have been lost before that was heard.
            if self.core.refuse(int(error["sequence"])):
                self._add_error(error)
        self._check_acknowledged(opened)
        self.core.opened(int(opened["last_sequence"]), "log_merge" in self.welcome.get("capabilities", ()))
        return opened

    def _check_acknowledged(self, opened: dict[str, Any]) -> None:
        """Whether the daemon still has what it has acknowledged to this session."""
        if not opened.get("log", True) or int(opened["last_sequence"]) >= self.core.taken:
            return
        last = opened.get("log_update")
        message = (
            f"the log of run {self.run_id} has lost updates that the daemon had acknowledged: "
            f"{'it has nothing' if last is None else f'it ends at update {last}'}. Its journal was damaged or "
            f"removed; a damaged one is kept in {opened['run_directory']}/tracker as entries.N.journal, and the "
            "daemon's messages say more. What is logged from now on is kept"
        )
        damage = {"code": LOG_DAMAGED, "message": message}
        if self.raises:
            self._add_error(damage)
            return
        self._log_damage = damage
        speaker.say(logger, logging.ERROR, "%s", message)

    def _root(self) -> str | None:
        """The output root, to be opened by this process: the daemon may see another file system, and writes where this
        process looks. None: the daemon knows only its path, and says what is wrong with it."""
        if "output_root_descriptor" not in self.welcome.get("capabilities", ()):
            return None
        root: str = self._message["output_root"]
        try:
            os.makedirs(root, exist_ok=True)
        except OSError:
            return None
        return root

    def _greet(self, type_: int, message: dict[str, Any], directory: str | None = None) -> dict[str, Any]:
        """Asks a question while the connection is being opened.

        Args:
            directory: a descriptor of it is sent with the question.
        """
        limit = ending.within(ANSWER_SECONDS)
        asked_at = time.monotonic()
        deadline = asked_at + limit
        is_said = False
        connection = self.core.connection
        number = self.core.ask(type_, json.dumps(message, ensure_ascii=False).encode(), True, directory)
        while True:
            generation = self.core.generation
            if (answer := self.core.answer(number)) is not None:
                frame = frames.Frame(answer[0], number, answer[1])
                if frame.type == frames.ERROR:
                    raise of_wire(frame.json())
                return frame.json()
            if not self.core.is_connected or self.core.connection != connection:
                raise self._lost()
            if (left := deadline - time.monotonic()) <= 0:
                raise WaitTimeout(f"the daemon has not answered within {limit:.3g} s; it still works")
            if not is_said and time.monotonic() - asked_at >= QUIET_SECONDS:
                is_said = True
                speaker.say(
                    logger,
                    logging.WARNING,
                    "%s: the daemon at %s has not answered for %.3g s: it is stopped, busy, or waits for storage; "
                    "waiting for it, %.0f s at most",
                    self.title,
                    daemon_launcher.socket_path(),
                    QUIET_SECONDS,
                    limit,
                )
            self.core.wait(generation, left if is_said else min(left, QUIET_SECONDS))

    def _lost(self) -> NoetherWriterError:
        """An error that says why the connection has ended."""
        words = self.core.last_words()
        if words is None:
            return DaemonUnavailable("the daemon closed the connection; what it had accepted is safe with it")
        is_json, text = words
        if is_json:
            return of_wire(json.loads(text))
        kind, _, rest = text.partition(" ")
        if kind == "errno":
            return DaemonUnavailable(
                f"the connection to the daemon is lost: {os.strerror(int(rest))}; what the daemon had accepted is safe "
                "with it"
            )
        version, length = (int(number) for number in rest.split())
        return frames.wrong_header(kind, version, length)

    def _come_back(self) -> None:
        """Tries to reconnect, if it is time, with a daemon that is there. It starts one only if there is something to
        send or to ask."""
        now = time.monotonic()
        if self._ended != self._opened:
            self._ended = self._opened
            # If a connection ends as soon as it is made, the pauses continue to grow.
            if self.core.open_seconds > _PAUSES[-1]:
                self._attempt = 0
                self._retry_at = now
            else:
                self._wait_longer()
        is_idle = not (self.core.has_work or self.core.is_wanted)
        if now < self._retry_at and (is_idle or not self._is_idle):
            return
        self._is_idle = is_idle
        try:
            if is_idle and not daemon_launcher.is_alive():
                self._retry_at = now + _IDLE_SECONDS
                return
            self._connect(daemon_launcher.connect if is_idle else daemon_launcher.connect_or_start)
        except Exception as error:
            if is_foreign(error):
                raise
            self._has_failed(error)
            self._wait_longer()
            return
        self._has_warned_of_absence = False
        self._said = ""
        if gap := self.gap():
            speaker.say(logger, logging.ERROR, "%s", gap)

    def _wait_longer(self) -> None:
        self._retry_at = time.monotonic() + _PAUSES[min(self._attempt, len(_PAUSES) - 1)]
        self._attempt += 1

    def _has_failed(self, error: Exception) -> None:
        """Says why the daemon cannot be reached again, each reason once."""
        if self.core.is_over or ending.has_begun():
            # At the end of a process it is said what is lost.
            return
        if self._attempt >= len(_PAUSES) and not self._has_warned_of_absence:
            self._has_warned_of_absence = True
            speaker.say(
                logger,
                logging.WARNING,
                "the daemon is away (%s); training continues, %s and %s are kept and sent when it is back",
                str(error),
                count_of(self.core.kept_rows, "update"),
                count_of(self.core.saves, "save"),
            )
        is_known = isinstance(error, NoetherWriterError | OSError) and not isinstance(error, ProtocolError)
        if not is_known and self._said != str(error):
            self._said = str(error)
            speaker.say(logger, logging.ERROR, "the daemon cannot be reached again: %s", str(error))

    # What a keeper does

    def serve(self) -> int:
        """Serves the connection until there is something to do."""
        if self.core.is_open:
            return self.core.serve(max(_SLICE_SECONDS, pool().idle_s / 2), False)
        # While the daemon is away it tries again when it is time, or, if it had nothing to send, as soon as it has.
        left = max(0.0, self._retry_at - time.monotonic())
        return self.core.serve(left, self._is_idle or left == 0)

    def send_pending(self) -> None:
        """Makes the frames of saves that were handed over without one."""
        while (save := self.core.pending()) is not None:
            try:
                self.core.send(*save.frame())
            except Exception as error:
                if is_foreign(error):
                    raise
                if save.is_sent:
                    # Another thread has sent it in the meantime.
                    continue
                save.fail(error)
                self.core.fail(save)
            save.forget()

    def hear(self) -> None:
        """Returns when the news that have come so far were said, so that they are said before what the caller says."""
        until = time.monotonic() + 1.0
        while self.core.has_news and time.monotonic() < until:
            if not self.core.is_kept:
                self.read_news()
            else:
                self.core.wait(self.core.generation, _SLICE_SECONDS)
        speaker.hear(until)

    def read_news(self) -> None:
        """Says what has come: in the log of this process, or to the next caller."""
        while (news := self.core.news()) is not None:
            number, is_event, text = news
            message = _object(text)
            try:
                if is_event:
                    _say(message)
                elif message.get("code") == "log-full":
                    self._end_log(message)
                else:
                    # An older daemon does not say which update it was: that one stays, and is never acknowledged.
                    self._was_refused |= "sequence" not in message
                    if message.get("code") == "log-taken-over":
                        # The next connection does not ask for the log again.
                        self._message["log"] = False
                    self._add_error(message)
            finally:
                # Not earlier: whoever waits until it is said relies on this.
                self.core.drop_news(number)

    def _end_log(self, message: dict[str, Any]) -> None:
        """The daemon takes no more updates, from this one on. Training continues without a log, which is said once."""
        if self.core.log_ended:
            return
        self.core.end_log(int(message.get("sequence") or 0))
        if self.raises:
            self.errors.append(message)
        else:
            words = "%s; training continues, and nothing more is logged"
            speaker.say(logger, logging.ERROR, words, message["message"])

    def _add_error(self, message: dict[str, Any]) -> None:
        if len(self.errors) < frames.ERRORS_KEPT:
            self.errors.append(message)

    def next_error(self) -> NoetherWriterError | None:
        """The error of an update that the daemon has refused; each once."""
        self.hear()
        return of_wire(self.errors.pop(0)) if self.errors else None

    def raise_next_error(self) -> None:
        """Raises what `next_error` returns. No frame holds it: one that did would stay, with all that it knows, until
        the garbage collector comes."""
        self.hear()
        if self.errors:
            raise of_wire(self.errors.pop(0))

    def raise_log_damage(self) -> None:
        """Raises `LogDamaged` once for each time that acknowledged updates were found missing."""
        damage, self._log_damage = self._log_damage, None
        if damage is not None:
            raise of_wire(damage)

    def gap(self) -> str | None:
        """In words: how many updates are missing in the log, once for each time that the daemon was away; None: none
        is."""
        if not (not_kept := self.core.take_not_kept()):
            return None
        missing = count_of(not_kept, "update")
        return f"the log of run {self.run_id} has a gap: {missing} could not be kept while the daemon took nothing"

    def say_gap(self) -> None:
        if gap := self.gap():
            logger.error("%s", gap)


def _keep(session: Session) -> None:
    """The thread of a session. It runs until everything has arrived and the run is closed or forgotten."""
    core = session.core
    if not core.claim():
        return
    sessions.add(session)
    _keeping.add(session)
    try:
        while not (why := session.serve()) & _core.OVER:
            if why & _core.DISMISSED:
                # It stays one of `sessions`, with what it has; whoever waits for that does this thread's work.
                return
            # A handler of the process's log may raise anything; the session continues.
            with contextlib.suppress(BaseException):
                session.help()
            pool().shrink()
        core.drop_saves()
        sessions.discard(session)
        if not sessions:
            pool().shrink(0)
    finally:
        # From here on this thread touches nothing that is torch's.
        _keeping.discard(session)
        core.unclaim()


def dismiss() -> None:
    """Returns when no thread keeps a session, or after DISMISS_SECONDS; none will be kept again. At the end the
    interpreter stops a thread in the middle of what it does; in torch's C++ that would end the process by SIGABRT."""
    ending.is_last = True
    kept = [session for session in list(_keeping) if not session.core.is_forked]
    for session in kept:
        session.core.dismiss()
    until = time.monotonic() + DISMISS_SECONDS
    for session in kept:
        while session.core.is_kept and (left := until - time.monotonic()) > 0:
            session.core.wait(session.core.generation, min(_SLICE_SECONDS, left))


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object. If the daemon sent something else, which is a defect, it is said as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"code": "bad-frame", "message": f"the daemon said {text!r}"}


def _say(event: dict[str, Any]) -> None:
    kind, error = event.get("event"), event.get("error") or {}
    if kind == "stalled":
        speaker.say(logger, logging.WARNING, "storage refuses for now: %s. %s", error.get("message"), STALLED)
    elif kind == "durable":
        speaker.say(logger, logging.WARNING, "storage accepts again: %s is durable", event.get("path"))


def count_of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
