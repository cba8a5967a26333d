# SPDX-License-Identifier: Apache-2.0
"""The vectors and the daemon: it refuses what is in `Tests/Vectors/refused_*`, and says what the files of
`Tests/Vectors/transcripts` say."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunningDaemon
from hostile import Raw, memfd
from noether_writer import frames
from test_refusals import log
from test_vectors import VECTORS, vector
from test_wire_rules import answers, opened

REFUSED = sorted(path.stem for path in VECTORS.glob("refused_*.bin"))
TRANSCRIPTS = sorted(path.stem for path in VECTORS.glob("transcripts/*.json"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_refused(name: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    """By its code, its request and its number; the connection ends only where it says so."""
    data, meaning = vector(name)
    [frame], refused = meaning["frames"], meaning["refused"]
    client = opened(daemon.socket, tmp_path, b"a", b"b")
    assert answers(client, log(1, 5)) == []
    fds = [memfd() for _ in range(frame["fds"])]
    client.send(data, fds)
    for fd in fds:
        os.close(fd)
    found = [answer for answer in answers(client) if answer.type != frames.LOG_ACK]
    assert {answer.request for answer in found} == {frame["request"]}
    error = found[0].json()
    if frame["type"] == frames.SAVE:
        assert [answer.json()["event"] for answer in found] == ["failed", "released"]
        assert {answer.json()["sequence"] for answer in found} == {refused["sequence"]}
        error = error["error"]
    else:
        assert [answer.type for answer in found] == [frames.ERROR]
    assert {key: error[key] for key in ("code", "fatal", "sequence") if key in error} == refused
    client.close()


class Replay:
    """Plays the clients of a transcript, and compares what the daemon says."""

    def __init__(self, path: str, root: Path) -> None:
        self.path, self.root = path, root
        self.daemon: RunningDaemon | None = None
        self.clients: dict[str, Raw] = {}

    def step(self, step: dict[str, Any]) -> None:
        if "daemon" in step:
            assert self.daemon is not None
            self.daemon.process.send_signal(signal.SIGKILL)
            self.daemon.process.wait()
            self.daemon = RunningDaemon(self.path)
        elif "file" in step:
            found = torch.load(self.root / "r" / step["file"])
            assert found == {key: {int(u): value for u, value in row.items()} for key, row in step["holds"].items()}
        elif "connects" in step:
            self.close(step["client"])
            self.clients[step["client"]] = Raw(self.path, hello=False)
        elif "closes" in step:
            self.close(step["client"])
        elif "sends" in step:
            self.send(self.clients[step["client"]], step["sends"])
        else:
            self.get(self.clients[step["client"]], step["gets"])

    def close(self, client: str) -> None:
        if client in self.clients:
            self.clients.pop(client).close()

    def send(self, client: Raw, frame: dict[str, Any]) -> None:
        payload = bytes.fromhex(frame.get("payload", ""))
        if "json" in frame:
            payload = json.dumps(frame["json"]).replace("$ROOT", str(self.root)).encode()
        fds = [memfd(content=bytes.fromhex(frame["memfd"]))] if "memfd" in frame else []
        client.send(frames.pack(frame["type"], payload, frame.get("request", 0), len(fds)), fds)
        for fd in fds:
            os.close(fd)

    def get(self, client: Raw, wanted: dict[str, Any]) -> None:
        while True:
            frame = client.receive()
            if frame.type == frames.LOG_ACK:
                # They come when they come: not one that is ahead of what stands here.
                if "log_ack" in wanted:
                    sequence = frames.unpack_log_ack(frame.payload)[0]
                    assert sequence <= wanted["log_ack"]["sequence"]
                    if sequence == wanted["log_ack"]["sequence"]:
                        return
            elif frame.type != frames.CHECKPOINT_EVENT or frame.json()["event"] not in ("written", "progress"):
                break
        assert (frame.type, frame.request) == (wanted["type"], wanted.get("request", 0)), frame
        if "json" in wanted:
            assert holds(frame.json(), json.loads(json.dumps(wanted["json"]).replace("$ROOT", str(self.root))))


def holds(found: Any, wanted: Any) -> bool:
    """Whether each member that stands there has that value; others may be there too."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(holds(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(holds, found, wanted))
    return bool(found == wanted)


@pytest.fixture
def replay(short_directory: Path, tmp_path: Path) -> Iterator[Replay]:
    made = Replay(str(short_directory / "s"), tmp_path)
    made.daemon = RunningDaemon(made.path)
    yield made
    for client in list(made.clients):
        made.close(client)
    assert made.daemon.stop() == 0


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(name: str, replay: Replay) -> None:
    for number, step in enumerate(json.loads((VECTORS / f"transcripts/{name}.json").read_text())["steps"]):
        try:
            replay.step(step)
        except AssertionError as error:
            raise AssertionError(f"step {number} of {name}: {step}") from error


def test_the_transcripts_are_there() -> None:
    assert TRANSCRIPTS == ["finish_after_restart", "reconnect", "refused_log", "repeated_save", "takeover"]
    assert len(REFUSED) > 20
