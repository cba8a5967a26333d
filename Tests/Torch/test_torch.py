# SPDX-License-Identifier: Apache-2.0
"""What a trainer does, with the lowest and the highest torch, and with numpy 1 and 2: what is saved is what this torch
would have saved, and this torch loads it."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import noether_writer
import numpy
import pytest
import torch

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(288, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def objects() -> dict[str, Any]:
    model, optimizer = trained()
    base = torch.arange(100, dtype=torch.float32)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]
    kinds += [torch.complex64, torch.float8_e4m3fn]
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "whole_model": model,
        "dtypes": {str(kind): torch.ones(7).to(kind) for kind in kinds},
        "views": [base, base[10:20], base.reshape(10, 10).t(), base[::3]],
        "empty": [torch.empty(0), torch.empty(3, 0), torch.tensor(1.5)],
        "parameter": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "sparse": torch.eye(5).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 2, torch.qint8),
        "plain": {"a": [1, 2.5, "x", None, True, 2**70], "b": OrderedDict(c=(1, 2))},
        "numpy": {"array": numpy.arange(6).reshape(2, 3)},
        "generator": torch.get_rng_state(),
    }


OBJECTS = objects()


@pytest.fixture(scope="module")
def run(daemon: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with noether_writer.open_run(tmp_path_factory.mktemp("runs"), "r") as run:
        yield run


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("mode", ["copy", "overlap"])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_file_is_this_torchs(name: str, mode: Any, run: Any, tmp_path: Path) -> None:
    ticket = run.save(name, mode, OBJECTS[name], snapshot=mode)
    ticket.wait(60)
    own = tmp_path / Path(ticket.path).name
    torch.save(OBJECTS[name], own)
    ours, theirs = records(Path(ticket.path)), records(own)
    # One that is random in some versions.
    for each in (ours, theirs):
        each.pop(".data/serialization_id", None)
    # The format of 2.13 says more of itself than older ones do; data.pkl, the storages and all else are the same bytes.
    more = {".format_version", ".storage_alignment"} - set(theirs)
    assert set(ours) - more == set(theirs)
    assert {key: ours[key] for key in theirs} == theirs
    same = Path(ticket.path).stat().st_size == own.stat().st_size
    assert same == (not more), "docs/GUIDE.md says when whole files are the same"
    loaded = torch.load(ticket.path, weights_only=False)
    again = torch.load(own, weights_only=False)
    assert repr(loaded) == repr(again)


def test_weights_only_and_mapped(run: Any) -> None:
    ticket = run.save("net", "U1", OBJECTS["model"])
    ticket.wait(60)
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}):
        loaded = torch.load(ticket.path, **options)
        assert all(torch.equal(loaded[key], value) for key, value in OBJECTS["model"].items())


def test_a_trainer_that_resumes(daemon: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    for end in (10, 20):
        with noether_writer.open_run(tmp_path, "r", resume="auto", config={"lr": numpy.float64(0.1)}) as run:
            if last := noether_writer.latest(run.directory):
                model.load_state_dict(torch.load(last.path)["model"])
            for update in range((run.resumed_at or 0) + 1, end + 1):
                loss = model(torch.randn(4, 3, 8, 8)).square().mean()
                loss.backward()
                optimizer.step()
                run.log({"loss": loss, "n": numpy.float32(0.5), "i": numpy.int64(update), "a": numpy.ones(1)}, update)
            run.save("net", f"U{end}", {"model": model.state_dict(), "optim": optimizer.state_dict()}).wait(60)
    entries = torch.load(run.directory / "tracker/entries.th", weights_only=True)
    assert list(entries["loss"]) == list(range(1, 21)) and entries["i"][20] == 20


def test_any_file(daemon: str, tmp_path: Path) -> None:
    noether_writer.save(OBJECTS["model"], tmp_path / "net.pt")
    loaded = noether_writer.load(tmp_path / "net.pt")
    assert all(torch.equal(loaded[key], value) for key, value in OBJECTS["model"].items())
    noether_writer.wait(60)
