# SPDX-License-Identifier: Apache-2.0
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
from noether_writer import _core, copying, saves, tree
from noether_writer.buffers import BufferPool, memory_of, pin
from noether_writer.errors import SnapshotChanged

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


def stream_copy(sources: list[torch.Tensor]) -> tuple[copying._StreamCopy, list[torch.Tensor]]:
    """Of storages 10, 11 and so on, into a buffer; and the places there."""
    pool = BufferPool(1 << 30)
    offsets = [0]
    for source in sources:
        offsets.append((offsets[-1] + source.numel() + 63) & -64)
    buffer = pool.reserve(offsets.pop())
    memory = memory_of(buffer)
    places = [(10 + i, offset, source.numel()) for i, (offset, source) in enumerate(zip(offsets, sources, strict=True))]
    targets = [torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=at) for _, at, count in places]
    views = list(zip(targets, sources, strict=True))
    return copying._StreamCopy(torch.device("cuda:0"), views, buffer, places), targets


SIZES = [1, 7, 8, 9, 64, 1000, 4095, (1 << 20) - 3, 1 << 20, (1 << 20) + 1, (3 << 20) + 5]


def test_sums_of_a_device_are_those_of_the_copy() -> None:
    torch.manual_seed(1)
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in SIZES * 8]
    # Where no word begins, as memory of another library's may.
    pieces.append(torch.randint(0, 256, (4099,), dtype=torch.uint8)[3:])
    sums = copying.Sums(pieces)
    assert sorted(row for rows in sums.groups for row in rows) == list(range(len(pieces)))
    assert len(sums.groups) < len(pieces)
    buffer = BufferPool(1 << 30).reserve(max(map(len, pieces)))
    memory = torch.frombuffer(memory_of(buffer), dtype=torch.uint8)
    single = []
    for piece in pieces:
        memory[: len(piece)] = piece
        single.append(_core.sum_of(buffer, 0, len(piece)))
        assert copying.Sums([piece]).values() == [single[-1]]
    assert sums.values() == [sum(single[row] for row in rows) % (1 << 64) for rows in sums.groups]
    with pytest.raises(ValueError, match="not in the buffer"):
        _core.sum_of(buffer, buffer.capacity, 1)


@pytest.mark.parametrize("changed", [0, 5, len(SIZES) - 1])
def test_a_tensor_changed_between_the_save_and_the_copy_is_detected(
    changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorded(monkeypatch)
    sources = [torch.ones(size, dtype=torch.uint8) for size in SIZES]
    copy, _ = stream_copy(sources)
    on = torch.cuda.stream

    def written_by_another_stream(stream: Any) -> Any:
        sources[changed][-1] = 0
        return on(stream)

    monkeypatch.setattr(torch.cuda, "stream", written_by_another_stream)
    copy.start()
    copy.wait()
    found = copy.changed()
    assert 10 + changed in found
    # Those that are small are told of together.
    assert all(SIZES[number - 10] <= 1 << 20 for number in found) or found == {10 + changed}


@pytest.mark.parametrize("mode", ["copy", "overlap"])
def test_a_copy_that_is_not_what_the_device_had_is_not_sent(
    mode: Any, daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    state = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}
    monkeypatch.setattr(copying.Copy, "is_on_devices", True)
    monkeypatch.setattr(copying.Copy, "changed_on_devices", lambda _self: frozenset([1]))
    ticket = run.save("net", "t", state, snapshot=mode)
    with pytest.raises(SnapshotChanged, match=r"^b changed .*net_cp=t_model\.th was not sent"):
        ticket.wait(60)
    run.close()


def test_the_replay_of_a_graph_waits_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class CUDAGraph:
        def replay(self) -> None:
            calls.append("replayed")

    class Saving:
        def before_change(self) -> None:
            calls.append("waits for the copy")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    saves._wait_in_replays()
    saves._wait_in_replays()
    saving: Any = Saving()
    saves._overlapping.add(saving)
    CUDAGraph().replay()
    saves._overlapping.discard(saving)
    CUDAGraph().replay()
    assert calls == ["waits for the copy", "replayed", "replayed"]


def test_copies_wait_for_the_stream_and_the_stream_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    source = torch.arange(8, dtype=torch.uint8)
    copy, target = stream_copy([source])
    copy.start()
    assert torch.equal(target[0], source)
    copy.order()
    copy.wait()
    calls = list(recorded.calls)
    assert copy.changed() == set()
    assert calls == [
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
    given_up, _ = stream_copy([source])
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
    buffer = pool.reserve(1000)
    address, capacity = buffer.address, buffer.capacity
    pin(buffer)
    pin(buffer)
    del buffer
    again = pool.reserve(1000)
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
