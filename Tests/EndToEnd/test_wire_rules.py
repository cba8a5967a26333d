# SPDX-License-Identifier: Apache-2.0
"""Each rule of the wire, broken once: the daemon says which by its code, and goes on. One daemon for all of them."""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunningDaemon
from harness import until
from hostile import SESSION, Raw, header, log_payload, memfd, save_payload, target
from noether_writer import frames


@pytest.fixture(scope="module")
def serving() -> Iterator[str]:
    """The socket of a daemon that must outlive all of it."""
    with tempfile.TemporaryDirectory(prefix="nw-") as folder:
        before = os.environ.get("NOETHER_WRITER_SETTING_STATE_DIRECTORY")
        os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = f"{folder}/state"
        daemon = RunningDaemon(f"{folder}/socket")
        if before is None:
            del os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"]
        else:
            os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = before
        yield daemon.socket
        assert daemon.stop() == 0


def serves(path: str) -> bool:
    other = Raw(path, timeout=10)
    state = other.ask(frames.STATUS, {})["state"]
    other.close()
    return bool(state == "serving")


def opened(path: str, root: Path, *keys: bytes) -> Raw:
    client = Raw(path, timeout=10)
    assert "run_directory" in client.open_run(root, session=os.urandom(16).hex())
    if keys:
        client.define(0, keys)
    return client


def answers(client: Raw, *data: bytes) -> list[frames.Frame]:
    """What comes for these bytes, up to the answer to a question behind them or the end of the connection."""
    client.send(b"".join(data) + frames.pack_json(frames.STATUS, {}, 99))
    found: list[frames.Frame] = []
    try:
        while not found or found[-1].request != 99:
            found.append(client.receive())
    except (AssertionError, ConnectionError):
        return found
    return found[:-1]


def codes(found: Sequence[frames.Frame]) -> list[str]:
    """Of the refusals among them; those that end the connection with a `!`."""
    said = []
    for frame in found:
        message = frame.json() if frame.type in (frames.ERROR, frames.CHECKPOINT_EVENT) else {}
        if frame.type == frames.ERROR:
            said.append(message["code"] + ("!" if message.get("fatal") else ""))
        elif message.get("event") == "failed":
            said.append(message["error"]["code"])
    return said


# Frames


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(header(frames.STATUS, 2, magic=0x1234) + b"{}", "bad-frame!", id="magic"),
        pytest.param(header(frames.STATUS, 2, version=2) + b"{}", "unsupported-version!", id="version"),
        pytest.param(header(frames.STATUS, 2, reserved=1) + b"{}", "bad-frame!", id="reserved"),
        pytest.param(header(frames.STATUS, (1 << 20) + 1), "too-large!", id="length"),
        pytest.param(header(frames.SAVE, 2, fds=2) + b"{}", "bad-frame!", id="two descriptors"),
        pytest.param(
            frames.pack_json(frames.HELLO, {"versions": [1], "client": "x"}, 1), "handshake!", id="hello twice"
        ),
        pytest.param(frames.pack(200, b"{}", 1), "unknown-type", id="unknown type"),
        pytest.param(frames.pack(frames.WELCOME, b"{}", 1), "unknown-type", id="an answer"),
        pytest.param(frames.pack(frames.WAIT, b"{", 1), "bad-frame!", id="no JSON"),
        pytest.param(frames.pack(frames.LOG, log_payload(1, 1, [])), "not-open", id="no run"),
    ],
)
def test_frames(data: bytes, code: str, serving: str) -> None:
    client = Raw(serving, timeout=10)
    assert codes(answers(client, data)) == [code]
    client.close()
    assert serves(serving)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(frames.pack_json(frames.STATUS, {}, 1), "handshake!", id="no hello"),
        pytest.param(
            frames.pack_json(frames.HELLO, {"versions": [0, 2], "client": "x"}, 1),
            "unsupported-version!",
            id="versions",
        ),
    ],
)
def test_the_first_frame(data: bytes, code: str, serving: str) -> None:
    client = Raw(serving, hello=False, timeout=10)
    assert codes(answers(client, data))[:1] == [code]
    client.close()


def test_a_descriptor_on_a_frame_that_carries_none(serving: str) -> None:
    """Declared, and come with it: by its header it is no `status`."""
    client = Raw(serving, timeout=10)
    fd = memfd()
    client.send(header(frames.STATUS, 2, fds=1) + b"{}", [fd])
    os.close(fd)
    assert codes(answers(client)) == ["bad-frame!"]
    client.close()


def test_nothing_is_read_after_a_bad_header(serving: str, tmp_path: Path) -> None:
    client = Raw(serving, timeout=10)
    message = {"output_root": str(tmp_path), "run_id": "behind", "session": SESSION}
    found = answers(client, header(frames.STATUS, 0, magic=1), frames.pack_json(frames.OPEN_RUN, message, 2))
    assert codes(found) == ["bad-frame!"] and len(found) == 1
    assert not (tmp_path / "behind").exists()
    client.close()


# Runs and names


LONG = "x" * 256


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("", "is empty", id="empty"),
        pytest.param(LONG, "has 256 bytes", id="long"),
        pytest.param(".", "directory reference", id="dot"),
        pytest.param("..", "directory reference", id="dots"),
        pytest.param("a/b", "holds a slash", id="slash"),
        pytest.param("a\0b", "control character", id="NUL"),
        pytest.param("a\x1b[2J", "control character", id="escape"),
    ],
)
@pytest.mark.parametrize("where", ["run_id", "stage_name", "name", "tag", "info"])
def test_names(where: str, name: str, reason: str, serving: str, tmp_path: Path) -> None:
    """Refused by the daemon itself, whatever the client's library lets through."""
    if where in ("run_id", "stage_name"):
        client = Raw(serving, timeout=10)
        found = client.open_run(tmp_path, **{"run_id": "r", where: name})
        code, message = found.get("code"), found.get("message", "")
    else:
        client = opened(serving, tmp_path)
        fd = memfd()
        client.send(frames.pack(frames.SAVE, save_payload([100], 128, [target(**{where: name})]), fds=1), [fd])
        os.close(fd)
        event = client.receive().json()
        if (where, name) == ("info", ""):
            # As none: it adds nothing to the file's name.
            assert event["event"] == "accepted"
            client.close()
            return
        assert event["event"] == "failed" and not list((tmp_path / "r/checkpoints").iterdir())
        code, message = event["error"]["code"], event["error"]["message"]
    assert code == "bad-name" and reason in message
    client.close()


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        pytest.param("tmp", "absolute path", id="relative"),
        pytest.param("{}/" + "x" * 5000, "absolute path below 4096 bytes", id="long"),
        pytest.param("{}/a\0b", "absolute path", id="NUL"),
    ],
)
def test_output_roots(root: str, reason: str, serving: str, tmp_path: Path) -> None:
    client = Raw(serving, timeout=10)
    answer = client.open_run(root.format(tmp_path))
    assert answer["code"] == "bad-path" and reason in answer["message"]
    assert list(tmp_path.iterdir()) == []
    client.close()


@pytest.mark.parametrize("session", ["short", "g" * 32, "a" * 33])
def test_sessions(session: str, serving: str, tmp_path: Path) -> None:
    client = Raw(serving, timeout=10)
    assert client.open_run(tmp_path, session=session)["code"] == "bad-name"
    client.close()


def test_a_second_run_on_one_connection(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path)
    assert client.open_run(tmp_path, "other")["code"] == "already-open"
    assert not (tmp_path / "other").exists()
    client.close()


def test_a_run_is_released_when_its_client_hangs_up(serving: str, tmp_path: Path) -> None:
    """Also where it is opened only when its connection is gone already."""
    for number in range(50):
        client = Raw(serving, timeout=10)
        message = {"output_root": str(tmp_path), "run_id": f"gone{number}", "session": os.urandom(16).hex()}
        client.send(frames.pack_json(frames.OPEN_RUN, message, 1))
        client.close()
    other = Raw(serving, timeout=10)

    def states() -> list[str]:
        runs = other.ask(frames.STATUS, {})["runs"]
        return [run["state"] for run in runs if run["run_id"].startswith("gone")]

    until(lambda: len(states()) == 50 and "running" not in states(), 5, "a run is held by nobody")
    other.close()


def test_a_log_that_another_session_brings(serving: str, tmp_path: Path) -> None:
    first = opened(serving, tmp_path, b"a")
    second = opened(serving, tmp_path, b"a")
    assert codes(answers(first, frames.pack(frames.LOG, log_payload(1, 1, [0])))) == ["log-taken-over"]
    assert codes(answers(second, frames.pack(frames.LOG, log_payload(1, 1, [0])))) == []
    first.close()
    second.close()


# Updates


def packed(
    ids: Sequence[int], tagged: Sequence[tuple[int, int]], tail: bytes = b"", tail_length: int | None = None
) -> bytes:
    """A log's payload with these tags, bits and tail."""
    count = len(ids)
    return (
        struct.pack("<QqdII", 1, 1, 0.0, count, len(tail) if tail_length is None else tail_length)
        + struct.pack(f"<{count}Q", *(bits for _, bits in tagged))
        + struct.pack(f"<{count}I", *ids)
        + bytes(tag for tag, _ in tagged)
        + tail
    )


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(log_payload(1, 1, [0])[:-1], "bad-frame!", id="cut"),
        pytest.param(log_payload(1, 1, [0]) + b"\0", "bad-frame!", id="more behind it"),
        pytest.param(packed([0], [(6, 0)]), "bad-frame!", id="unknown tag"),
        pytest.param(packed([0], [(frames.BOOL, 2)]), "bad-frame!", id="a bool of 2"),
        pytest.param(packed([0], [(frames.NONE, 1)]), "bad-frame!", id="a None of 1"),
        pytest.param(packed([0], [(frames.STR, 5)], b"abc"), "bad-frame!", id="a text behind the tail"),
        pytest.param(packed([0], [(frames.STR, 1 << 63)], b"abc"), "bad-frame!", id="a text of 2^63 bytes"),
        pytest.param(packed([0], [(frames.STR, 2)], b"\xff\xfe"), "bad-frame!", id="a text that is no UTF-8"),
        pytest.param(packed([0], [(frames.BIG_INT, 0)]), "bad-frame!", id="an integer of no bytes"),
        pytest.param(packed([0], [(frames.BIG_INT, 256)], bytes(256)), "bad-frame!", id="an integer of 256 bytes"),
        pytest.param(packed([0], [(frames.STR, 1)], b"abc"), "bad-frame!", id="a tail of nobody"),
        pytest.param(packed([0], [(frames.FLOAT, 0)], b"", 1 << 31), "bad-frame!", id="a tail that is not there"),
        pytest.param(log_payload(1, 1, range(16_385)), "too-large!", id="too many values"),
        pytest.param(struct.pack("<QqdII", 1, 1, 0.0, (1 << 32) - 1, 0), "too-large!", id="2^32 values"),
        pytest.param(log_payload(1, 1, [2]), "bad-key", id="a key that is not defined"),
        pytest.param(log_payload(1, 1, [0, 0]), "bad-key", id="a key twice"),
    ],
)
def test_updates(payload: bytes, code: str, serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path, b"a", b"b")
    assert codes(answers(client, frames.pack(frames.LOG, payload))) == [code]
    client.close()
    assert serves(serving)
    assert not (tmp_path / "r/tracker/entries.th").exists()


def test_an_update_that_is_smaller(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path, b"a")
    later, same, before = (frames.pack(frames.LOG, log_payload(n, u, [0])) for n, u in ((1, 5), (2, 5), (3, 4)))
    assert codes(answers(client, later, same, before)) == ["update-order"]
    client.close()


def test_a_row_too_large_for_an_answer(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path)
    for first in range(0, 2000, 500):
        client.define(first, [b"%04d" % n + b"k" * 1000 for n in range(first, first + 500)])
    assert codes(answers(client, frames.pack(frames.LOG, log_payload(1, 1, range(2000))))) == ["too-many"]
    client.close()


def keys(first: int, *names: bytes, count: int | None = None) -> bytes:
    said = len(names) if count is None else count
    return struct.pack("<II", first, said) + b"".join(struct.pack("<H", len(n)) + n for n in names)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(keys(0, b"a", b""), "bad-key", id="empty"),
        pytest.param(keys(0, b"a\0"), "bad-key", id="NUL"),
        pytest.param(keys(0, b"\xc3\x28"), "bad-key", id="no UTF-8"),
        pytest.param(keys(0, b"x" * 1025), "bad-key", id="long"),
        pytest.param(keys(1, b"a"), "bad-key", id="first id"),
        pytest.param(keys(0, b"a") + b"\0", "bad-frame!", id="more behind it"),
        pytest.param(keys(0, b"a", count=2), "bad-frame!", id="fewer than it says"),
        pytest.param(keys(0, count=65_537), "too-large!", id="too many"),
    ],
)
def test_keys(payload: bytes, code: str, serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path)
    assert codes(answers(client, frames.pack(frames.DEFINE_KEYS, payload))) == [code]
    client.close()


@pytest.mark.parametrize("where", ["run", "connection"])
def test_too_many_keys(where: str, serving: str, tmp_path: Path) -> None:
    """65,536 of a run; and as many on one connection, though they may be the same ones again and again."""
    client = opened(serving, tmp_path)
    for first in range(0, 65_536, 8192):
        client.define(first, [b"%d" % (n if where == "run" else n % 8192) for n in range(first, first + 8192)])
    assert codes(answers(client, frames.pack(frames.DEFINE_KEYS, keys(65_536, b"more")))) == ["bad-key"]
    client.close()
    if where == "run":
        # Another connection of the same run has ids of its own, and no key more.
        other = Raw(serving, timeout=10)
        other.open_run(tmp_path, session=SESSION, log=False)
        assert codes(answers(other, frames.pack(frames.DEFINE_KEYS, keys(0, b"more")))) == ["bad-key"]
        other.close()


def test_what_is_sent_again_is_dropped(serving: str, tmp_path: Path) -> None:
    """By its number: as a client does that has lost its connection."""
    session = os.urandom(16).hex()
    for value in (0.5, 0.75):
        client = Raw(serving, timeout=10)
        client.open_run(tmp_path, session=session)
        client.define(0, [b"a"])
        assert codes(answers(client, frames.pack(frames.LOG, log_payload(1, 1, [0], [value])))) == []
        # Also of what was dropped.
        assert frames.unpack_log_ack(client.receive_type(frames.LOG_ACK).payload)[0] == 1
        client.close()
    client = Raw(serving, timeout=10)
    client.open_run(tmp_path, session=session)
    client.send(frames.pack_json(frames.FINISH, {"sequence": 2}, 3))
    assert client.receive_type(frames.FINISHED).json()["entries"] == 1
    client.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 0.5}}


def test_a_save_that_is_sent_again_is_written_once(serving: str, tmp_path: Path) -> None:
    session = os.urandom(16).hex()
    client = Raw(serving, timeout=10)
    client.open_run(tmp_path, session=session)
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    payload = save_payload([100], 128, [target(pickle_length=4)])
    events = client.save(payload, [fd])
    path = Path(events[2]["path"])
    before = path.stat()
    client.close()
    client = Raw(serving, timeout=10)
    client.open_run(tmp_path, session=session)
    again = client.save(payload, [fd])
    os.close(fd)
    assert [event["event"] for event in again] == ["accepted", "written", "durable", "released"] or [
        event["event"] for event in again
    ] == ["accepted", "durable", "released"]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    client.close()


SPECIAL = [
    math.nan,
    -math.inf,
    math.inf,
    -0.0,
    5e-324,
    struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF))[0],
]


def test_numbers_come_back_bit_for_bit(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path, b"a")
    for update, value in enumerate(SPECIAL, 1):
        client.send(frames.pack(frames.LOG, log_payload(update, update, [0], [value])))
    client.send(frames.pack_json(frames.FINISH, {"sequence": 20}, 3))
    client.receive_type(frames.FINISHED)
    client.close()
    loaded = torch.load(tmp_path / "r/tracker/entries.th")["a"]
    assert [struct.pack("<d", loaded[u]) for u in sorted(loaded)] == [struct.pack("<d", value) for value in SPECIAL]


@pytest.mark.parametrize("wall_time", [math.nan, math.inf, -math.inf, -1e300, 1e300])
def test_a_wall_time_that_is_not_a_number_is_only_data(wall_time: float, serving: str, tmp_path: Path) -> None:
    """And a clock that goes back between two updates."""
    client = opened(serving, tmp_path, b"a")
    for update, seconds in ((1, 2e9), (2, wall_time), (3, 1e9)):
        payload = bytearray(log_payload(update, update, [0]))
        payload[16:24] = struct.pack("<d", seconds)
        client.send(frames.pack(frames.LOG, bytes(payload)))
    client.send(frames.pack_json(frames.FINISH, {"sequence": 4}, 3))
    assert client.receive_type(frames.FINISHED).json()["entries"] == 3
    client.close()
    assert torch.load(tmp_path / "r/tracker/entries.th") == {"a": {1: 0.5, 2: 0.5, 3: 0.5}}


# Saves


def layout(**members: Any) -> Callable[[], bytes]:
    sizes, length = members.pop("sizes", [100]), members.pop("length", 128)
    targets = members.pop("targets", None) or [target(**members)]
    return lambda: save_payload(sizes, length, targets)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(layout(sizes=[(1 << 64) - 1]), "bad-layout", id="a size of 2^64"),
        pytest.param(layout(sizes=[1 << 62] * 3, length=0), "bad-layout", id="sizes that overflow"),
        pytest.param(layout(sizes=[1 << 41], length=1 << 41, pickle_offset=1 << 41), "too-large", id="2 TiB"),
        pytest.param(layout(length=192), "bad-layout", id="another sum"),
        pytest.param(layout(pickle_offset=64), "bad-layout", id="a pickle over a storage"),
        pytest.param(layout(pickle_length=0), "bad-layout", id="an empty pickle"),
        pytest.param(layout(pickle_offset=(1 << 64) - 1), "bad-layout", id="a pickle that overflows"),
        pytest.param(layout(pickle_offset=(1 << 20) - 2), "bad-buffer", id="a pickle outside"),
        pytest.param(
            layout(targets=[target(), target(tag="u", pickle_offset=130)]), "bad-layout", id="pickles over one another"
        ),
        pytest.param(layout(targets=[target(), target(pickle_offset=200)]), "bad-name", id="one name twice"),
        pytest.param(
            layout(targets=[target(tag=str(n), pickle_offset=200 + 8 * n) for n in range(5)]),
            "too-large",
            id="5 targets",
        ),
        pytest.param(lambda: save_payload([100], 128, []), "bad-layout", id="no target"),
        pytest.param(layout(name="x" * 250), "bad-name", id="a long file name"),
        pytest.param(layout(sizes=[0] * 100_001, length=0), "too-large", id="too many storages"),
        pytest.param(lambda: save_payload([100], 128, [target()]) + b" {}", "bad-frame", id="more behind it"),
    ],
)
def test_saves(payload: Callable[[], bytes], code: str, serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path)
    fd = memfd()
    client.send(frames.pack(frames.SAVE, payload(), fds=1), [fd])
    os.close(fd)
    assert codes(answers(client)) == [code]
    assert not list((tmp_path / "r/checkpoints").iterdir())
    client.close()
    assert serves(serving)


def test_a_save_without_its_descriptor(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path)
    assert codes(answers(client, frames.pack(frames.SAVE, save_payload([100], 128, [target()])))) == ["bad-buffer"]
    client.close()


def test_saves_in_flight_are_bounded(short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage takes nothing; a run has 64 saves on their way, and is told that the next one is too many."""
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", "checkpoint.created=ENOSPC")
    daemon = RunningDaemon(str(short_directory / "s"))
    client = opened(daemon.socket, tmp_path)
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    events = []
    for sequence in range(1, 67):
        payload = save_payload([100], 128, [target(tag=str(sequence), pickle_length=4)], sequence)
        client.send(frames.pack(frames.SAVE, payload, fds=1), [fd])
    os.close(fd)
    until(client.is_read)
    while len([event for event in events if event["event"] in ("accepted", "failed")]) < 66:
        events.append(client.receive_type(frames.CHECKPOINT_EVENT).json())
    failed = [event for event in events if event["event"] == "failed"]
    assert [(event["sequence"], event["error"]["code"]) for event in failed] == [(65, "busy"), (66, "busy")]
    client.close()
    daemon.process.kill()
    daemon.process.wait()


def test_questions_of_all_connections_are_bounded(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 are open, 64 on each of 64 connections, for storage that takes nothing; then another one asks."""
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", "checkpoint.created=ENOSPC")
    daemon = RunningDaemon(str(short_directory / "s"))
    client = opened(daemon.socket, tmp_path)
    fd = memfd(content=b"x" * 128 + b"\x80\x02N.")
    client.send(frames.pack(frames.SAVE, save_payload([100], 128, [target(pickle_length=4)]), fds=1), [fd])
    os.close(fd)
    client.receive_type(frames.CHECKPOINT_EVENT)
    asking = [Raw(daemon.socket, timeout=10) for _ in range(64)]
    for other in asking:
        assert codes(answers(other, *[frames.pack_json(frames.WAIT, {}, 5)] * 64)) == []
    assert codes(answers(client, frames.pack_json(frames.WAIT, {}, 5))) == ["too-many"]
    for other in (client, *asking):
        other.close()
    daemon.process.kill()
    daemon.process.wait()


# Numbers in JSON, and pages


def test_numbers_beyond_doubles_are_exact(serving: str, tmp_path: Path) -> None:
    client = opened(serving, tmp_path, b"a")
    last = (1 << 53) + 1
    client.log(last, last, [0])
    assert client.ask(frames.FINISH, {"sequence": last})["entries"] == 1
    client.send(frames.pack_json(frames.VALUES, {"key": "a", "from": 0, "limit": 9}, 3))
    assert list(frames.unpack_values_page(client.receive_type(frames.VALUES_PAGE).payload)[1]) == [last]
    payload = save_payload([100], 128, [target()], sequence=last)
    assert {event["sequence"] for event in client.save(payload, [memfd()])} == {last}
    client.close()


@pytest.mark.parametrize(
    ("from_", "expected"), [(-1, [1]), (0, [1]), (1, [2]), (2, []), ((1 << 53) + 1, []), ((1 << 63) - 1, [])]
)
def test_a_page_begins_where_it_is_asked_to(serving: str, tmp_path: Path, from_: int, expected: list[int]) -> None:
    client = opened(serving, tmp_path, b"a")
    client.log(1, 1, [0])
    client.log(2, 2, [0])
    for type_, page, unpack in (
        (frames.VALUES, frames.VALUES_PAGE, frames.unpack_values_page),
        (frames.ENTRIES, frames.ENTRIES_PAGE, frames.unpack_entries_page),
    ):
        client.send(frames.pack_json(type_, {"key": "a", "from": from_, "limit": 1}, 3))
        total, found, *_ = unpack(client.receive_type(page).payload)
        updates = [each if isinstance(each, int) else each[0] for each in found]
        assert (total, updates) == (2, expected)
    client.close()


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 1.5, "1", None, [1]])
def test_a_number_that_is_none_is_refused(serving: str, tmp_path: Path, number: Any) -> None:
    client = opened(serving, tmp_path, b"a")
    found = answers(client, frames.pack_json(frames.VALUES, {"key": "a", "from": number, "limit": 1}, 3))
    assert codes(found) == ["bad-frame!"]
    client.close()
