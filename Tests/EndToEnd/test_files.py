# SPDX-License-Identifier: Apache-2.0
"""Files are torch.save's: byte for byte but for the serialization id, and as trees."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import noether_writer
import numpy
import pytest
import torch
from noether_writer import tensors

# Every dtype that torch.save itself takes.
NAMES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
ALL_DTYPES = [getattr(torch, name) for name in NAMES]


def every_dtype() -> dict[str, Any]:
    bits = torch.arange(64, dtype=torch.uint8)
    return {str(dtype): (bits % 2).bool() if dtype == torch.bool else bits.clone().view(dtype) for dtype in ALL_DTYPES}


def shared() -> dict[str, Any]:
    base = torch.arange(100.0)
    return {"a": base[10:20], "b": {"c": base.view(10, 10).t(), "again": base}}


def state_with_metadata() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return model.state_dict()


def tied() -> Any:
    embedding, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    return torch.nn.ModuleList([embedding, head]).state_dict()


def optimizers() -> dict[str, Any]:
    model = torch.nn.Linear(5, 2)
    adam = torch.optim.Adam(model.parameters())
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    empty = torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict()
    model(torch.ones(1, 5)).sum().backward()
    adam.step()
    momentum.step()
    return {"adam": adam.state_dict(), "sgd": momentum.state_dict(), "empty": empty}


def quantized() -> dict[str, Any]:
    return {"q": torch.quantize_per_tensor(torch.randn(8), 0.1, 3, torch.quint8)}


CASES: dict[str, Any] = {
    "dtypes": every_dtype,
    "zero_dim_empty_strided": lambda: {
        "zero": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "empty_part": torch.arange(12.0).reshape(3, 4)[1:1, 2:],
        "end": torch.arange(5)[3:],
        "strided": torch.arange(20)[::2],
        "transposed": torch.randn(3, 4).t(),
        "expanded": torch.ones(1, 3).expand(5, 3),
    },
    "shared": shared,
    "parameters": lambda: {
        "p": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "grad": torch.randn(2, requires_grad=True),
    },
    "metadata": state_with_metadata,
    "tied": tied,
    "optimizers": optimizers,
    "python": lambda: {
        "none": None,
        "bytes": b"\0x",
        "tuple": (1, (2.5, "ä")),
        "set": {1, 2},
        "big": 2**100,
        "ordered": collections.OrderedDict(z=1, a=[True, False]),
    },
    "sparse": lambda: {"s": torch.eye(4).to_sparse(), "csr": torch.eye(3).to_sparse_csr()},
    "quantized": quantized,
    "many": lambda: {f"t{i}": torch.full((7,), float(i)) for i in range(5000)},
    "no_tensor": lambda: {"only": "words"},
    "array": lambda: {"array": numpy.arange(6).reshape(2, 3)},
}


def without_serialization_id(path: Path) -> bytes:
    """The file with the one record that may differ, and its checksum, zeroed."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[-1]
        assert info.filename.endswith(".data/serialization_id")
        content = archive.read(info)
    start = data.rindex(content)
    descriptor = data.index(b"PK\7\x08", start)
    entry = data.rindex(b"PK\1\2")
    out = bytearray(data)
    out[start : start + 40] = bytes(40)
    for crc in (descriptor + 4, entry + 16):
        out[crc : crc + 4] = bytes(4)
    return bytes(out)


@pytest.fixture(params=["from a table", "one by one"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's table of tensors, and as it goes with a torch that has none."""
    if request.param == "one by one":
        monkeypatch.setattr(tensors, "_read", lambda by_id: None)


@pytest.mark.parametrize("case", CASES)
def test_file_equals_torch_save(case: str, client: None, daemon: Any, tmp_path: Path) -> None:
    obj = CASES[case]()
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        ticket = run.save("net", "E1_U2_S3", obj)
        ticket.wait(60)
    ours, theirs = Path(ticket.paths[0]), tmp_path / "net_cp=E1_U2_S3_model.th"
    torch.save(obj, theirs)
    assert without_serialization_id(ours) == without_serialization_id(theirs)
    subprocess.run(["unzip", "-tqq", ours], check=True)
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("mmap", [False, True])
def test_shared_storages_stay_shared(mmap: bool, daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "latest", shared())
        ticket.wait(60)
    loaded = torch.load(ticket.paths[0], weights_only=True, mmap=mmap)
    assert loaded["a"].untyped_storage()._cdata == loaded["b"]["c"].untyped_storage()._cdata
    assert torch.equal(loaded["a"], torch.arange(10.0, 20.0))


def test_numpy_scalars_become_python_numbers(daemon: Any, tmp_path: Path) -> None:
    obj = collections.OrderedDict(a=[numpy.float32(0.1), (numpy.int64(3), numpy.bool_(True))])
    obj._metadata = {"version": numpy.int32(1)}  # type: ignore[attr-defined]
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save("net", "x", {"state": obj, "kept": "y"})
        ticket.wait(60)
    loaded = torch.load(ticket.paths[0], weights_only=False)
    assert loaded["state"]["a"] == [float(numpy.float32(0.1)), (3, True)]
    assert type(loaded["state"]["a"][0]) is float


def test_a_pickling_error_raises_in_save_and_sends_nothing(daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        with pytest.raises((AttributeError, TypeError, Exception), match=r"pickle|lambda"):
            run.save("net", "x", {"f": lambda: None})
        run.save("net", "y", {"fine": 1}).wait(60)
    assert [p.name for p in (tmp_path / "r/checkpoints").iterdir()] == ["net_cp=y_model.th"]


def equal(a: Any, b: Any) -> bool:
    """The same tree: types, orders, tensors bit for bit with their strides."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.layout != torch.strided:
            parts = ("indices", "values") if a.layout == torch.sparse_coo else ("crow_indices", "col_indices", "values")
            a = a.coalesce() if a.layout == torch.sparse_coo else a
            b = b.coalesce() if b.layout == torch.sparse_coo else b
            return all(equal(getattr(a, part)(), getattr(b, part)()) for part in parts)
        place = (a.dtype, a.shape, a.stride(), a.storage_offset(), a.requires_grad, a.is_quantized)
        if place != (b.dtype, b.shape, b.stride(), b.storage_offset(), b.requires_grad, b.is_quantized):
            return False
        return bytes(a.untyped_storage()) == bytes(b.untyped_storage())
    if isinstance(a, dict):
        same = list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
        return same and getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and numpy.array_equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize(
    "arguments", [{"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_trees_equal_torch_saves(case: str, arguments: dict[str, bool], daemon: Any, tmp_path: Path) -> None:
    obj = CASES[case]()
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        ticket = run.save("net", "t", obj)
        ticket.wait(60)
    theirs = tmp_path / "net_cp=t_model.th"
    torch.save(obj, theirs)
    try:
        expected = torch.load(theirs, **arguments)
    except Exception as error:
        # What torch can't load from its own file, it can't from ours.
        with pytest.raises(type(error)):
            torch.load(ticket.paths[0], **arguments)
        return
    assert equal(torch.load(ticket.paths[0], **arguments), expected)


def test_different_tensors_under_two_names_at_once(daemon: Any, tmp_path: Path) -> None:
    first, second = {"w": torch.ones(1000)}, {"w": torch.zeros(2000)}
    targets = [noether_writer.Target("a", "t", first), noether_writer.Target("a", "latest", first)]
    targets.append(noether_writer.Target("b", "t", second))
    with noether_writer.open_run(tmp_path, "r") as run:
        ticket = run.save_as(targets)
        ticket.wait(60)
    assert ticket.accepted and ticket.written and ticket.durable and ticket.done
    assert [Path(path).name for path in ticket.paths] == [f"{target.archive}.th" for target in targets]
    for path, target in zip(ticket.paths, targets, strict=True):
        assert torch.equal(torch.load(path)["w"], target.obj["w"])  # type: ignore[index]


def room_for(need_bytes: int, folder: Path) -> str:
    """Why there is not enough memory and disk, or nothing."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}
    available = max(available, memory["MemAvailable"])
    disk = shutil.disk_usage(folder).free
    if available < 2 * need_bytes + (1 << 30) or disk < 2 * need_bytes + (1 << 30):
        return f"{available >> 30} GiB of memory and {disk >> 30} GiB of disk are too little"
    return ""


def test_a_file_over_4_gib(daemon: Any, tmp_path: Path) -> None:
    """zip64: a storage beyond 2^32 bytes, and one whose offset is."""
    if why := room_for((1 << 32) + (1 << 20), tmp_path):
        pytest.skip(why)
    big = torch.zeros((1 << 29) + 5, dtype=torch.float64)
    big[:: 1 << 20] = torch.arange(513, dtype=torch.float64)
    obj = {"big": big, "behind": torch.arange(1000)}
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        ticket = run.save("net", "t", obj)
        ticket.wait(300)
    ours, theirs = Path(ticket.paths[0]), tmp_path / "net_cp=t_model.th"
    loaded = torch.load(ours, weights_only=True, mmap=True)
    assert torch.equal(loaded["big"], big) and torch.equal(loaded["behind"], obj["behind"])
    del loaded
    torch.save(obj, theirs)
    assert ours.stat().st_size == theirs.stat().st_size
    different = 0
    with ours.open("rb") as a, theirs.open("rb") as b:
        while piece := a.read(1 << 26):
            other = b.read(1 << 26)
            if piece != other:
                different += int((numpy.frombuffer(piece, "u1") != numpy.frombuffer(other, "u1")).sum())
    # The serialization id, and its CRC twice: behind it and in the directory.
    assert different <= 40 + 2 * 4
    subprocess.run(["unzip", "-tqq", ours], check=True)
    ours.unlink()
    theirs.unlink()
