"""Tensors on CUDA devices: on a real one where there is one, else as far as the way goes on the CPU: what the pickle
says of their place, and in which order streams, copies and events are asked for.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from noether_writer import copying, tree
from noether_writer.buffers import BufferPool, pin

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("places", [["cuda:0"] * 3, ["cuda:0", "cpu", "cuda:1"]])
def test_location_tags_are_kept(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that torch.save makes of tensors that it takes to be there."""
    tensors = [torch.randn(4, 3), torch.nn.Parameter(torch.ones(5)), torch.arange(6)]
    where = {t.untyped_storage().data_ptr(): place for t, place in zip(tensors, places, strict=True)}
    state = {f"t{i}": tensor for i, tensor in enumerate(tensors)}
    [found] = tree.capture([state])
    found.tensors.on_cpu = False
    found.tensors.devices = [torch.device(place) for place in places]
    found.describe()
    # A new string each time, as of a device: the memo of the pickle sees that.
    monkeypatch.setattr(
        "torch.serialization.location_tag",
        lambda storage: "cpu" if (p := where[storage.data_ptr()]) == "cpu" else f"{p.split(':')[0]}:{p.split(':')[1]}",
    )
    out = io.BytesIO()
    torch.save(state, out)
    assert found.encode() == pickle_of(out.getvalue())


class Recorded:
    """Stands in for torch.cuda's streams and events, of which there are none without a device: writes down what is
    asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.calls = list[str]()

        class Stream:
            def __init__(self, device: object, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                calls.append(f"{self.name} waits for {other.name}")

            def synchronize(self) -> None:
                calls.append(f"the host waits for {self.name}")

            def wait_event(self, _event: object) -> None:
                calls.append(f"{self.name} waits for the copy")

        class Event:
            def record(self, stream: Stream) -> None:
                calls.append(f"copied, on {stream.name}")

            def synchronize(self) -> None:
                calls.append("the host waits")

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            calls.append(f"on {stream.name}")
            yield
            calls.append("off")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream(None, "the trainer's"))
        monkeypatch.setattr(copying, "_streams", {})


def test_copies_wait_for_the_stream_and_the_stream_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    source, target = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    copy = copying._StreamCopy(torch.device("cuda:0"), [(target, source)])
    copy.start()
    assert torch.equal(target, source)
    copy.order()
    copy.wait()
    assert recorded.calls == [
        # What the trainer has queued is in the snapshot, and nothing behind it.
        "side waits for the trainer's",
        "on side",
        "off",
        "copied, on side",
        # A step: no wait of the host.
        "the trainer's waits for the copy",
        "the host waits",
    ]
    # One that is given up in the middle lets go of its buffer when the device has.
    recorded.calls.clear()
    given_up = copying._StreamCopy(torch.device("cuda:0"), [(target, source)])
    given_up.start()
    del given_up
    assert recorded.calls[-1] == "the host waits for side"
    assert len(copying._streams) == 1


def test_a_buffer_is_made_known_to_the_driver_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
            calls.append(("register", address, nbytes))
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            calls.append(("unregister", address))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    pool = BufferPool(1 << 30)
    buffer = pool.take(1000)
    address, capacity = buffer.address, buffer.capacity
    pin(buffer)
    pin(buffer)
    del buffer
    again = pool.take(1000)
    assert again.address == address and again.pinned
    del again
    pool.shrink(0)
    assert pool.nbytes == 0
    assert calls == [("register", address, capacity), ("unregister", address)]


@needs_cuda
@pytest.mark.parametrize("mode", ["copy", "overlap"])
def test_a_save_from_a_device(mode: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    net = torch.nn.Linear(1000, 1000).cuda()
    before = {key: value.cpu() for key, value in net.state_dict().items()}
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "t", net.state_dict(), snapshot=mode)
        ticket.wait_snapshot()
        with torch.no_grad():
            net.weight.zero_()
        ticket.wait(60)
    loaded = torch.load(ticket.paths[0], weights_only=True)
    assert loaded["weight"].device == torch.device("cuda:0")
    assert all(torch.equal(loaded[key].cpu(), before[key]) for key in before)
