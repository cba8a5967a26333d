# SPDX-License-Identifier: Apache-2.0
"""The Python client reads and writes the vectors that the daemon's code is tested on too."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from noether_writer import _core, frames
from noether_writer.errors import ProtocolError

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "Tests/Vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.bin"))


def vector(name: str) -> tuple[bytes, dict[str, Any]]:
    return (VECTORS / f"{name}.bin").read_bytes(), json.loads((VECTORS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_vector_decodes(name: str, piece: int) -> None:
    data, meaning = vector(name)
    if any(f["fds"] for f in meaning["frames"] if f["type"] != frames.RESTORED) and "error" not in meaning:
        # Other descriptors go to the daemon only: the client's decoder refuses them.
        meaning = {"frames": [], "error": "bad-frame"}
    decoder, found = frames.FrameDecoder(), []

    def feed() -> None:
        for start in range(0, len(data), piece):
            found.extend(decoder.feed(data[start : start + piece]))

    if "error" in meaning:
        with pytest.raises(ProtocolError):
            feed()
    else:
        feed()
    expected = [(f["type"], f["request"], bytes.fromhex(f["payload"]), f["fds"]) for f in meaning["frames"]]
    assert [(f.type, f.request, f.payload, f.descriptors) for f in found] == expected
    if not expected:
        return
    assert b"".join(frames.pack(kind, payload, request, fds) for kind, request, payload, fds in expected) == data


def protocol_types() -> dict[int, str]:
    """The list of docs/PROTOCOL.md: type and name of each frame."""
    text = (ROOT / "docs/PROTOCOL.md").read_text()
    section = text.split("\n## 4. Frame types\n")[1].split("\n### ")[0]
    return {int(number): name for number, name in re.findall(r"^\| (\d+) \| (\w+) \|", section, re.M)}


def test_every_frame_type_of_the_protocol_has_a_vector() -> None:
    types, found = protocol_types(), dict[int, set[str]]()
    for name in NAMES:
        meaning = vector(name)[1]
        for frame in meaning["frames"] if "error" not in meaning else ():
            found.setdefault(frame["type"], set()).add(name)
    assert len(types) > 20
    assert {number: name for number, name in types.items() if number not in found} == {}
    # Beyond those of the protocol there is the one that nobody knows.
    assert {number: names for number, names in found.items() if number not in types} == {200: {"unknown_type"}}


def test_frame_types_of_this_client_are_those_of_the_protocol() -> None:
    for number, name in protocol_types().items():
        if name not in ("metrics", "metrics_text"):  # Not asked by this client.
            assert getattr(frames, name.upper()) == number


def sent(say: Callable[[_core.Session], None]) -> list[frames.Frame]:
    """What the client's core sends, as a daemon would read it."""
    ours, theirs = socket.socketpair()
    session = _core.Session(1 << 20, False, 1.0)
    assert session.attach(ours.fileno())
    session.opened(0, True)
    say(session)
    # What is not acknowledged keeps a session that is only closed.
    session.end()
    ours.close()
    with theirs:
        data = b"".join(iter(lambda: theirs.recv(1 << 16), b""))
    return frames.FrameDecoder().feed(data)


def test_the_client_sends_the_log_vector() -> None:
    log = vector("log")[1]["log"]
    values = {
        f"key{value['key_id']}": frames.scalar(
            frames.untag_scalar(value["tag"], int(value["bits"], 16), bytes.fromhex(value["tail"]))
        )
        for value in log["values"]
    }
    keys = [f"key{number}" for number in range(max(value["key_id"] for value in log["values"]) + 1)]

    def say(session: _core.Session) -> None:
        # In the order of their ids, and one row for each number before the one that is looked at.
        assert session.log(dict.fromkeys(keys), log["update"] - 1, None, None, False) == _core.LOGGED
        while session.sequence < log["sequence"] - 1:
            session.number()
        assert session.log(values, log["update"], None, None, True) == _core.LOGGED

    payload = sent(say)[2].payload
    expected = bytes.fromhex(vector("log")[1]["frames"][0]["payload"])
    # But for the wall time.
    assert payload[:16] + payload[24:] == expected[:16] + expected[24:]


def test_the_client_sends_the_keys_of_the_stream_vector() -> None:
    _, meaning = vector("stream")
    first = sent(lambda session: session.log(dict.fromkeys(meaning["keys"]), 1, None, None, False))[0]
    assert (first.type, first.payload.hex()) == (frames.DEFINE_KEYS, meaning["frames"][1]["payload"])


@pytest.mark.parametrize("name", ["save", "save_files"])
def test_save_vector(name: str) -> None:
    data, meaning = vector(name)
    save = meaning["save"]
    payload = frames.pack_save(save["sequence"], save["storage_lengths"], save["message"])
    assert frames.pack(frames.SAVE, payload, fds=1) == data


@pytest.mark.parametrize("name", ["messages", "leave", "run_opened", "files"])
def test_messages_vector(name: str) -> None:
    data, meaning = vector(name)
    found = frames.FrameDecoder().feed(data)
    assert [frame.json() for frame in found] == [message["json"] for message in meaning["messages"]]
    for frame, message in zip(found, meaning["messages"], strict=True):
        assert frames.FrameDecoder().feed(frames.pack_json(frame.type, message["json"]))[0].json() == message["json"]


def test_pages_of_the_vectors() -> None:
    data, meaning = vector("values_page")
    expected = meaning["values_page"]
    total, updates, values = frames.unpack_values_page(data[16:])
    assert (total, updates) == (expected["total"], [value["update"] for value in expected["values"]])
    for value, found in zip(expected["values"], values, strict=True):
        expected_value = frames.untag_scalar(value["tag"], int(value["bits"], 16), bytes.fromhex(value["tail"]))
        assert (type(found), repr(found)) == (type(expected_value), repr(expected_value))
    data, meaning = vector("entries_page")
    expected = meaning["entries_page"]
    rows = [(row["update"], row["values"]) for row in expected["rows"]]
    assert frames.unpack_entries_page(data[16:]) == (expected["total"], rows)
    data, meaning = vector("rows")
    expected = meaning["rows"]
    timed = [(row["update"], row["wall_time"], row["values"]) for row in expected["rows"]]
    assert frames.unpack_rows(data[16:]) == (expected["total"], timed)


def test_acknowledgements_of_the_vector() -> None:
    data, meaning = vector("log_ack")
    found = [frames.unpack_log_ack(frame.payload) for frame in frames.FrameDecoder().feed(data)]
    assert found == [(ack["sequence"], ack["update"], ack["durable"]) for ack in meaning["log_acks"]]


def test_text_of_the_vector() -> None:
    data, meaning = vector("metrics_text")
    assert frames.FrameDecoder().feed(data)[0].payload.decode() == meaning["text"]
