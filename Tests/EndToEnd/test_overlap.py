"""Overlap mode: `save` returns before the copy has ended, and the file holds what the tensors held then, whatever the
trainer does next. The tensors are large enough that the copy is far from done when they are changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from noether_writer import saves
from noether_writer.errors import SnapshotChanged

ELEMENTS = 32 << 20


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finishing thread comes late: what is not waited for by the trainer is copied after its change."""
    monkeypatch.setattr(saves.Save, "frame", _late(saves.Save.frame))


class Training:
    def __init__(self, make: Callable[..., Any], **settings: Any) -> None:
        torch.manual_seed(1)
        self.net = torch.nn.Linear(1, ELEMENTS)
        self.optimizer = make(self.net.parameters(), **settings)
        self.backward()
        self.optimizer.step()
        self.backward()

    def backward(self) -> None:
        for parameter in self.net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


def copied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
        (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    ],
)
def test_an_optimizers_step_waits_for_the_copy(
    daemon: RunningDaemon, tmp_path: Path, slow_copy: None, make: Callable[..., Any], settings: dict[str, Any]
) -> None:
    run = noether_writer.open_run(tmp_path, "r", snapshot="overlap")
    training = Training(make, **settings)
    before = copied(training.state())
    ticket = run.save("net", "a", training.state())
    training.optimizer.step()
    assert not same(before, training.state())
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "ema", "data", "another optimizer"])
def test_other_changes_wait_for_the_snapshot(daemon: RunningDaemon, tmp_path: Path, slow_copy: None, how: str) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    training = Training(torch.optim.SGD, lr=0.1)
    before = copied(training.state())
    ticket = run.save("net", "a", training.state(), snapshot="overlap")
    weight = training.net.weight
    if how == "another optimizer":
        # Any optimizer's step waits: what it changes may be shared.
        other = torch.optim.SGD([weight], lr=1.0)
        other.step()
    else:
        ticket.wait_snapshot()
    with torch.no_grad():
        if how == "in place":
            weight.zero_()
        elif how == "load_state_dict":
            training.net.load_state_dict({key: value + 1 for key, value in training.net.state_dict().items()})
        elif how == "ema":
            weight.lerp_(torch.ones_like(weight), 0.1)
        elif how == "data":
            weight.data.add_(1.0)
    assert not same(before, training.state())
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


def test_running_statistics_are_copied_before_the_call_returns(
    daemon: RunningDaemon, tmp_path: Path, slow_copy: None
) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    net = torch.nn.Sequential(torch.nn.Linear(8, 4 << 20, bias=False), torch.nn.BatchNorm1d(64))
    before = copied(net.state_dict())
    ticket = run.save("net", "a", net.state_dict(), snapshot="overlap")
    net[1](torch.randn(16, 64))
    assert not same(before, net.state_dict())
    # torch counts the change; that it came after the copy of these is known.
    ticket.wait(60)
    assert same(before, torch.load(ticket.paths[0], weights_only=True))
    run.close()


def test_a_change_that_does_not_wait_fails_the_save_and_no_file(daemon: RunningDaemon, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    weight = torch.zeros(ELEMENTS)
    run.save("net", "a", {"w": weight}).wait(60)
    # The finishing thread does not begin before the change.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saves.Save, "frame", _late(saves.Save.frame))
        ticket = run.save("net", "a", {"w": weight}, snapshot="overlap")
        weight.add_(1)
        with pytest.raises(SnapshotChanged, match="wait_snapshot"):
            ticket.wait(60)
    assert torch.equal(torch.load(tmp_path / "r/checkpoints/net_cp=a_model.th")["w"], torch.zeros(ELEMENTS))
    # Said once: the next save is done.
    run.save("net", "b", {"w": weight}).wait(60)
    run.close()


def _late(frame: Callable[[saves.Save], Any]) -> Callable[[saves.Save], Any]:
    def late(self: saves.Save) -> Any:
        time.sleep(0.3)
        return frame(self)

    return late
