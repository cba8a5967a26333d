# SPDX-License-Identifier: Apache-2.0
"""A training that saves or logs, in turn with the same training that does neither."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import bench
import torch
from peers import State, TorchSave


class AfterUpdate(Protocol):
    def after(self, update: int) -> object: ...

    def finish(self) -> object:
        """Behind the training, and not timed."""


class Saves:
    """A checkpoint each `every` updates."""

    def __init__(self, way: TorchSave, state: Callable[[], State], every: int, path: Path) -> None:
        self.way, self.state, self.every, self.path = way, state, every, path
        self.calls: list[float] = []
        self._waits: list[Callable[[], object]] = []

    def after(self, update: int) -> None:
        if update % self.every:
            return
        state = self.state()
        start = time.perf_counter()
        if not self.way.queues:
            self.finish()
        self._waits.append(self.way.begin(state, self.path))
        self.calls.append(time.perf_counter() - start)

    def finish(self) -> None:
        while self._waits:
            self._waits.pop()()

    def check(self, update: Callable[[], object]) -> None:
        """That a checkpoint taken in the middle of the training has the values of its moment. This warms up, too."""
        for _ in range(2):
            self.finish()
            update()
            before = {key: value.detach().clone() for key, value in self.state().items()}
            self.after(0)
            for _ in range(3):
                update()
        self.finish()
        assert bench.is_same(self.way.load(before, self.path), before), self.way.name
        self.calls.clear()


class Training:
    def __init__(self, update: Callable[[], object], updates: int, device: torch.device) -> None:
        self._update, self._updates, self._device = update, updates, device
        self.seconds(None)

    def seconds(self, way: AfterUpdate | None) -> float:
        bench.synchronize(self._device)
        start = time.perf_counter()
        for number in range(self._updates):
            self._update()
            if way is not None:
                way.after(number)
        bench.synchronize(self._device)
        taken = time.perf_counter() - start
        if way is not None:
            way.finish()
        return taken

    def slow_downs(
        self, ways: Mapping[str, AfterUpdate], rounds: Iterable[int]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(seconds without, each way's times what the training took without it right before)"""
        never: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for _ in rounds:
            for name, way in ways.items():
                never.append(self.seconds(None))
                ratios[name].append(self.seconds(way) / never[-1])
        return never, ratios
