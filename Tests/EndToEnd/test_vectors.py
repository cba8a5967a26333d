"""The Python client reads and writes the vectors that the daemon's code is tested on too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from noether_writer import frames
from noether_writer.errors import ProtocolError

VECTORS = Path(__file__).parent.parent / "Vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.bin"))


def vector(name: str) -> tuple[bytes, dict[str, Any]]:
    return (VECTORS / f"{name}.bin").read_bytes(), json.loads((VECTORS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_vector_decodes(name: str, piece: int) -> None:
    data, meaning = vector(name)
    decoder, found = frames.FrameDecoder(), []

    def feed() -> None:
        for start in range(0, len(data), piece):
            found.extend(decoder.feed(data[start : start + piece]))

    if "error" in meaning:
        with pytest.raises(ProtocolError):
            feed()
    else:
        feed()
    expected = [(f["type"], f["request"], bytes.fromhex(f["payload"])) for f in meaning["frames"]]
    assert [(f.type, f.request, f.payload) for f in found] == expected
    if not expected:
        return
    assert b"".join(frames.pack(kind, payload, request) for kind, request, payload in expected) == data


def test_scalars_of_the_log_vector() -> None:
    for value in vector("log")[1]["log"]["values"]:
        tag, bits, tail = value["tag"], int(value["bits"], 16), bytes.fromhex(value["tail"])
        assert frames.tag_scalar(frames.untag_scalar(tag, bits, tail)) == (tag, bits, tail)


def test_keys_of_the_stream_vector() -> None:
    _, meaning = vector("stream")
    assert frames.pack_keys(0, meaning["keys"]).hex() == meaning["frames"][1]["payload"]
