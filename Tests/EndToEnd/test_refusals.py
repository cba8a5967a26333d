# SPDX-License-Identifier: Apache-2.0
"""A refusal says which frame it is about, by its request and its number; what is wrong with one save or one update ends
neither the connection nor another one; and nothing that a client did wrong is answered with silence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunningDaemon, faulty_daemon
from harness import until
from hostile import Raw, definition_payload, header, log_payload, memfd, save_payload, target
from noether_writer import frames
from test_wire_rules import answers, codes, opened

CONTENT = b"x" * 128 + b"\x80\x02N."
ENTRIES = "r/tracker/entries.th"


def log(sequence: int, update: int, *ids: int, request: int = 77) -> bytes:
    return frames.pack(frames.LOG, log_payload(sequence, update, ids or (0,)), request)


def save(sequence: int, request: int = 55, **members: Any) -> bytes:
    payload = save_payload([100], 128, [target(pickle_length=4, **members)], sequence)
    return frames.pack(frames.SAVE, payload, request, fds=1)


def errors(found: list[frames.Frame]) -> list[tuple[str, int, int | None]]:
    """The code of each error frame, its request and its number."""
    said = [(frame.json(), frame.request) for frame in found if frame.type == frames.ERROR]
    return [(error["code"], request, error.get("sequence")) for error, request in said]


def acknowledged(client: Raw, sequence: int) -> None:
    while frames.unpack_log_ack(client.receive_type(frames.LOG_ACK).payload)[0] < sequence:
        pass


def again(client: Raw, path: str, root: Path, session: str, *keys: bytes) -> Raw:
    """The same session on another connection."""
    client.close()
    client = Raw(path, timeout=10)
    client.opened = client.open_run(root, session=session)  # type: ignore[attr-defined]
    if keys:
        client.define(0, keys)
    return client


@pytest.fixture
def fd() -> Iterator[int]:
    number = memfd(content=CONTENT)
    yield number
    os.close(number)


# Numbers of updates


def test_numbers_of_updates_grow(daemon: RunningDaemon, tmp_path: Path) -> None:
    """One that is 0, that comes again or goes back is refused by its number; what was taken stays as it was."""
    client = opened(daemon.socket, tmp_path, b"a")
    assert errors(answers(client, log(0, 1))) == [("bad-sequence", 77, 0)]
    assert errors(answers(client, log(1, 1), log(3, 2), log(3, 3), log(2, 4), log(1, 5))) == [
        ("bad-sequence", 77, 3),
        ("bad-sequence", 77, 2),
        ("bad-sequence", 77, 1),
    ]
    # Saves have numbers between those of updates.
    assert errors(answers(client, log(9, 6))) == []
    client.send(frames.pack_json(frames.FINISH, {"sequence": 10}, 3))
    assert client.receive_type(frames.FINISHED).json()["entries"] == 3
    client.close()
    assert list(torch.load(tmp_path / ENTRIES)["a"]) == [1, 2, 6]


def test_what_comes_again_after_a_reconnect_is_dropped_and_acknowledged(daemon: RunningDaemon, tmp_path: Path) -> None:
    session = os.urandom(16).hex()
    client = Raw(daemon.socket, timeout=10)
    client.open_run(tmp_path, session=session)
    client.define(0, [b"a"])
    client.send(b"".join(log(number, number) for number in range(1, 6)))
    acknowledged(client, 5)
    for is_finished in (False, True):
        client = again(client, daemon.socket, tmp_path, session, b"a")
        found = answers(client, *(log(number, number) for number in range(1, 6)))
        assert errors(found) == []
        if not any(frame.type == frames.LOG_ACK for frame in found):
            acknowledged(client, 5)
        # But not on the same connection.
        assert errors(answers(client, log(5, 9))) == [("bad-sequence", 77, 5)]
        if not is_finished:
            client.send(frames.pack_json(frames.FINISH, {"sequence": 6}, 3))
            assert client.receive_type(frames.FINISHED).json()["entries"] == 5
    client.close()


def test_a_refused_update_between_two_good_ones(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Its error comes before an acknowledgement of a later number. A client that has lost its connection before it
    heard of it is told again when it comes back."""
    session = os.urandom(16).hex()
    client = Raw(daemon.socket, timeout=10)
    assert "refused" not in client.open_run(tmp_path, session=session)
    client.define(0, [b"a"])
    client.send(log(1, 1) + log(2, 2, 9) + log(3, 0) + log(4, 4))
    found = [client.receive()]
    while found[-1].type != frames.LOG_ACK or frames.unpack_log_ack(found[-1].payload)[0] < 4:
        found.append(client.receive())
    assert errors(found) == [("bad-key", 77, 2), ("update-order", 77, 3)]
    before = [frame.type for frame in found].index(frames.LOG_ACK)
    assert len(errors(found[:before])) == 2 or frames.unpack_log_ack(found[before].payload)[0] < 2
    client = again(client, daemon.socket, tmp_path, session, b"a")
    refused = client.opened["refused"]  # type: ignore[attr-defined]
    assert [(error["code"], error["sequence"]) for error in refused] == [("bad-key", 2), ("update-order", 3)]
    client.send(frames.pack_json(frames.FINISH, {"sequence": 5}, 3))
    assert client.receive_type(frames.FINISHED).json()["entries"] == 2
    client.close()
    assert list(torch.load(tmp_path / ENTRIES)["a"]) == [1, 4]


def test_a_number_that_was_refused_may_come_again(daemon: RunningDaemon, tmp_path: Path) -> None:
    session = os.urandom(16).hex()
    client = Raw(daemon.socket, timeout=10)
    client.open_run(tmp_path, session=session)
    client.define(0, [b"a"])
    found = answers(client, log(1, 1, 9), log(1, 1))
    assert errors(found) == [("bad-key", 77, 1)]
    # A daemon tells a client that comes back only of what is in the journal.
    if not any(frame.type == frames.LOG_ACK for frame in found):
        acknowledged(client, 1)
    client = again(client, daemon.socket, tmp_path, session)
    assert client.opened["last_sequence"] == 1 and "refused" not in client.opened  # type: ignore[attr-defined]
    client.close()


# Numbers of saves


@pytest.mark.parametrize(
    "members", [{}, {"tag": "u"}, {"name": "m"}, {"kind": "trainer"}, {"info": "i"}, {"pickle_offset": 192}]
)
def test_a_number_of_a_save_that_has_ended(
    members: dict[str, Any], daemon: RunningDaemon, tmp_path: Path, fd: int
) -> None:
    """On the same connection whatever comes under it is another save. After a reconnect it may be the same one, which
    is answered as it ended; another one is never called durable."""
    session = os.urandom(16).hex()
    client = Raw(daemon.socket, timeout=10)
    client.open_run(tmp_path, session=session)
    first = save_payload([100], 128, [target(pickle_length=4)], 7)
    assert [event["event"] for event in client.save(first, [fd])] == ["accepted", "written", "durable", "released"]
    file = tmp_path / "r/checkpoints/n_cp=t_model.th"
    before = file.stat()
    os.pwrite(fd, b"\x80\x02N.", 192)
    other = save_payload([100], 128, [target(**{"pickle_length": 4, **members})], 7)
    for is_new in (False, True):
        if is_new:
            client = again(client, daemon.socket, tmp_path, session)
        events = client.save(other, [fd])
        if is_new and not members:
            assert [event["event"] for event in events] == ["accepted", "durable", "released"]
        else:
            assert [event["event"] for event in events] == ["failed", "released"]
            assert (events[0]["error"]["code"], events[0]["error"]["sequence"]) == ("bad-sequence", 7)
            assert events[1]["buffer"] == 1
    client.close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_number_of_a_save_that_is_on_its_way(
    short_directory: Path, tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events under that number are the first one's: the second is refused in an error of its own."""
    daemon = faulty_daemon(str(short_directory / "s"), "checkpoint.created=ENOSPC@1", monkeypatch)
    client = opened(daemon.socket, tmp_path)
    client.send(save(7), [fd])
    assert client.receive().json()["event"] == "accepted"
    client.send(save(7, tag="u"), [fd])
    found = [client.receive()]
    while found[-1].type != frames.CHECKPOINT_EVENT or found[-1].json()["event"] != "released":
        found.append(client.receive())
    assert errors(found) == [("bad-sequence", 55, 7)]
    events = [frame.json()["event"] for frame in found if frame.type == frames.CHECKPOINT_EVENT]
    assert "failed" not in events and events[-2:] == ["durable", "released"]
    client.close()
    assert [path.name for path in (tmp_path / "r/checkpoints").iterdir()] == ["n_cp=t_model.th"]
    assert daemon.stop() == 0


def test_a_save_without_a_number(daemon: RunningDaemon, tmp_path: Path, fd: int) -> None:
    client = opened(daemon.socket, tmp_path)
    events = client.save(save_payload([100], 128, [target(pickle_length=4)], 0), [fd])
    assert [event["event"] for event in events] == ["failed", "released"]
    assert events[0]["error"]["code"] == "bad-sequence"
    client.close()
    assert list((tmp_path / "r/checkpoints").iterdir()) == []


# One save


def with_targets(count: int) -> bytes:
    return save_payload([100], 128, [target(tag=str(n), pickle_offset=128 + 8 * n) for n in range(count)], 7)


def without(member: str) -> bytes:
    return save_payload([100], 128, [{key: value for key, value in target().items() if key != member}], 7)


def with_json(text: bytes) -> bytes:
    return struct.pack("<QII", 7, 0, len(text)) + text


@pytest.mark.parametrize(
    ("payload", "code", "words"),
    [
        pytest.param(with_targets(0), "bad-layout", "0 targets", id="no target"),
        pytest.param(with_targets(5), "too-large", "5 targets; at most 4", id="5 targets"),
        pytest.param(
            save_payload([100], 128, [target(kind="weights")], 7),
            "bad-layout",
            'targets[0].kind is "weights"',
            id="kind",
        ),
        pytest.param(
            save_payload([100], 128, [target(pickle_offset=-1)], 7),
            "bad-layout",
            "targets[0].pickle_offset",
            id="negative",
        ),
        pytest.param(
            save_payload([100], 128, [target(pickle_length=2**64)], 7),
            "bad-layout",
            "targets[0].pickle_length",
            id="2^64",
        ),
        pytest.param(save_payload([100], -1, [target()], 7), "bad-layout", "storages_length", id="negative length"),
        pytest.param(save_payload([100], 128, [target(name=5)], 7), "bad-layout", "targets[0].name", id="type"),
        pytest.param(without("tag"), "bad-layout", "targets[0].tag is missing", id="no tag"),
        pytest.param(with_json(b"{"), "bad-layout", "not JSON", id="no JSON"),
        pytest.param(with_json(b"[]"), "bad-layout", "the JSON has the wrong type: an array", id="an array"),
        pytest.param(struct.pack("<QII", 7, 9, 0), "bad-frame", "72 bytes too early", id="cut"),
        pytest.param(with_targets(1) + b" ", "bad-frame", "1 bytes after", id="more behind it"),
        pytest.param(save_payload([0] * 100_001, 0, [target()], 7), "too-large", "at most 100000", id="storages"),
        pytest.param(save_payload([1 << 41], 1 << 41, [target()], 7), "too-large", "at most 10995", id="2 TiB"),
    ],
)
def test_what_is_wrong_with_a_save_ends_that_save_only(
    payload: bytes, code: str, words: str, daemon: RunningDaemon, tmp_path: Path, fd: int
) -> None:
    """Under its own number, with its buffer where that can be read, in the words of the protocol."""
    client = opened(daemon.socket, tmp_path)
    client.send(frames.pack(frames.SAVE, payload, 55, fds=1), [fd])
    found = answers(client)
    assert [frame.request for frame in found] == [55, 55]
    failed, released = (frame.json() for frame in found)
    assert (failed["event"], failed["sequence"], failed["target"]) == ("failed", 7, 0)
    error = failed["error"]
    assert (error["code"], error["fatal"], error["sequence"]) == (code, False, 7)
    assert words in error["message"] and "Swift" not in error["message"], error
    assert (released["event"], released["sequence"]) == ("released", 7)
    assert released.get("buffer") == (1 if b'"buffer"' in payload and code != "bad-frame" else released.get("buffer"))
    # Its number was not taken, and the connection serves the next one.
    events = client.save(save_payload([100], 128, [target(pickle_length=4)], 7), [fd])
    assert [event["event"] for event in events][-2:] == ["durable", "released"]
    client.close()


# Which frame it was


@pytest.mark.parametrize(
    ("data", "code", "sequence"),
    [
        pytest.param(log(5, 9, 4), "bad-key", 5, id="an unknown key"),
        pytest.param(log(5, 9, 0, 0), "bad-key", 5, id="a key twice"),
        pytest.param(log(5, -1), "update-order", 5, id="order"),
        pytest.param(frames.pack(frames.LOG, log_payload(5, 9, [0])[:-1], 77), "bad-frame", 5, id="cut"),
        pytest.param(frames.pack(frames.LOG, log_payload(5, 9, range(16_385)), 77), "too-large", 5, id="many values"),
        pytest.param(
            frames.pack(frames.DEFINE_KEYS, definition_payload(1, [b""]), 77), "bad-key", None, id="an empty key"
        ),
        pytest.param(frames.pack(200, b"", 77), "unknown-type", None, id="type"),
        pytest.param(frames.pack(frames.FINISH, b"{}", 77), "bad-frame", None, id="finish"),
        pytest.param(frames.pack(frames.FINISH, b'{"sequence": 0}', 77), "bad-sequence", 0, id="finish 0"),
        pytest.param(frames.pack_json(frames.WAIT, {"run_id": "nobody"}, 77), "unknown-run", None, id="wait"),
        pytest.param(
            frames.pack_json(frames.HELLO, {"versions": [1], "client": ""}, 77), "handshake", None, id="hello"
        ),
    ],
)
def test_an_error_names_its_frame(
    data: bytes, code: str, sequence: int | None, daemon: RunningDaemon, tmp_path: Path
) -> None:
    client = opened(daemon.socket, tmp_path, b"a")
    client.log(1, 1, [0])
    assert errors(answers(client, data)) == [(code, 77, sequence)]
    client.close()


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"magic": 1}, "bad-frame"),
        ({"version": 2}, "unsupported-version"),
        ({"reserved": 1}, "bad-frame"),
        ({"fds": 2}, "bad-frame"),
        ({"fds": 1}, "bad-frame"),
        ({"length": 1 << 21}, "too-large"),
    ],
)
def test_an_error_of_a_header_names_its_request(members: dict[str, int], code: str, daemon: RunningDaemon) -> None:
    client = Raw(daemon.socket)
    data = bytearray(header(frames.STATUS, members.pop("length", 2), **members) + b"{}")
    data[4:8] = struct.pack("<I", 0x01020304)
    assert errors(answers(client, bytes(data))) == [(code, 0x01020304, None)]
    client.close()


def test_an_error_for_a_missing_descriptor_names_its_request(daemon: RunningDaemon, tmp_path: Path) -> None:
    client = opened(daemon.socket, tmp_path)
    assert errors(answers(client, save(7))) == [("bad-frame", 55, 7)]
    client.close()


def test_a_log_that_is_full_names_its_request(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_LOG_BYTES_PER_RUN", "100000")
    daemon = RunningDaemon(str(short_directory / "s"))
    client = opened(daemon.socket, tmp_path, b"a")
    found = errors(answers(client, *(log(number, number, request=number) for number in range(1, 8001))))
    first = found[0][1]
    assert 1000 < first < 8000 and found == [("log-full", number, number) for number in range(first, 8001)]
    client.close()
    assert daemon.stop() == 0


# What was answered with silence


def test_waiting_for_an_unknown_run_is_an_error(daemon: RunningDaemon, tmp_path: Path) -> None:
    client = opened(daemon.socket, tmp_path)
    assert client.ask(frames.WAIT, {"run_id": "other", "timeout_s": 5})["code"] == "unknown-run"
    assert client.ask(frames.WAIT, {"run_id": "r", "timeout_s": 5})["done"]
    client.close()


def test_a_descriptor_on_a_type_that_is_not_known(daemon: RunningDaemon, fd: int) -> None:
    """As a newer client may send one: the type is refused, the descriptor is closed, the connection goes on."""
    client = Raw(daemon.socket)
    client.send(header(200, 2, fds=1) + b"{}", [fd])
    assert errors(answers(client)) == [("unknown-type", 1, None)]
    assert "memfd" not in " ".join(os.readlink(entry) for entry in links(daemon))
    client.close()


def links(daemon: RunningDaemon) -> Iterator[Path]:
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        if entry.is_symlink():
            yield entry


@pytest.mark.parametrize(("rank", "world_size"), [(-1, None), (-1, 2), (2, 2), (5, 2), (0, 0), (0, -3)])
def test_a_rank_outside_of_its_job(rank: int, world_size: int | None, daemon: RunningDaemon, tmp_path: Path) -> None:
    client = Raw(daemon.socket)
    answer = client.open_run(tmp_path, rank=rank, world_size=world_size, log=False)
    assert answer["code"] == "bad-rank" and not answer["fatal"]
    assert list(tmp_path.iterdir()) == []
    # Who knows of no job says that it has one process.
    assert "run_directory" in client.open_run(tmp_path, rank=abs(rank), world_size=1, log=False)
    client.close()


def test_a_client_that_does_not_read_is_told_so(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Behind what it has not read, in whole frames: the rest of its answers is dropped."""
    client = opened(daemon.socket, tmp_path, *(b"k%d" % number for number in range(1000)))
    client.send(b"".join(log(number, number, *range(1000)) for number in range(1, 61)))
    question = frames.pack_json(frames.ENTRIES, {"from": 0, "limit": 60}, 9)
    client.send(question * 50)
    until(client.is_read)
    found = client.rest()
    assert errors(found[-1:]) == [("too-many", 0, None)] and found[-1].json()["fatal"]
    assert "were not read" in found[-1].json()["message"]
    pages = [frame for frame in found if frame.type == frames.ENTRIES_PAGE]
    assert 0 < len(pages) < 50
    assert all(frames.unpack_entries_page(page.payload)[0] == 60 for page in pages)
    client.close()


WRONG: list[Callable[[], bytes]] = [lambda: log(0, 2), lambda: log(1, 2), lambda: log(2, 0), lambda: log(2, 2, 9)]


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_of_what_was_refused_is_in_a_file(
    wrong: Callable[[], bytes], daemon: RunningDaemon, tmp_path: Path
) -> None:
    client = opened(daemon.socket, tmp_path, b"a")
    assert len(codes(answers(client, log(1, 1), wrong()))) == 1
    client.close()
    until(lambda: (tmp_path / ENTRIES).exists())
    assert torch.load(tmp_path / ENTRIES) == {"a": {1: 0.5}}
