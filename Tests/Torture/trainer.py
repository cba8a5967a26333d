# SPDX-License-Identifier: Apache-2.0
"""What a trainer of the torture program does, and what it writes down as seen.

Everything that it logs and saves follows from (seed, run, update), so that whoever finds a file knows what must be in
it.
"""

from __future__ import annotations

import os
import struct
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import noether_writer
import torch
from noether_writer import Target, Ticket

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """64 bits that look like chance (splitmix64)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def tensor(count: int, *parts: int) -> torch.Tensor:
    """int64, `count` of them, all different."""
    return torch.arange(count, dtype=torch.int64) * (mix(*parts) >> 2 | 1) + (mix(*parts, 1) >> 1)


def scalars(seed: int, run: int, update: int) -> dict[str, Any]:
    """Any 64 bits as a float (NaNs with payloads, infinities, -0.0), and every other type."""
    bits = mix(seed, run, update)
    special = (0x8000000000000000, 0x7FF0000000000000, 0x7FF8000000000123)
    floats = special[bits % 3] if bits % 7 == 0 else bits
    values: dict[str, Any] = {
        "loss": struct.unpack("<d", struct.pack("<Q", floats))[0],
        "n": struct.unpack("<q", struct.pack("<Q", mix(bits)))[0],
        "flag": bits & 16 == 0,
    }
    if update % 5 == 0:
        values |= {"text": f"ä{bits}", "big": bits << 70, "none": None}
    return values


def exact(value: Any) -> tuple[type, Any]:
    """Equal only where type and bits are."""
    return type(value), struct.pack("<d", value) if isinstance(value, float) else value


@dataclass(frozen=True)
class Plan:
    """One run of a round."""

    seed: int
    run: int
    updates: int
    every: int
    count: int
    pause_s: float

    @property
    def name(self) -> str:
        return f"run{self.run}"

    def model(self, update: int) -> dict[str, Any]:
        return {"update": update, "w": tensor(self.count, self.seed, self.run, update), "b": torch.full((3,), update)}

    def optim(self, update: int) -> dict[str, Any]:
        return {"update": update, "m": tensor(self.count // 2 + 1, self.seed, self.run, update, 7)}


class Record:
    """Lines that survive the SIGKILL of who wrote them: what has been seen, before anything later is done."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        os.write(self._fd, (" ".join(str(word) for word in words) + "\n").encode())


class Trainer:
    def __init__(self, plan: Plan, root: Path, record: Record) -> None:
        self.plan, self.record = plan, record
        latest = root / plan.name / "checkpoints" / "net_cp=latest_model.th"
        self.start: int | None = None
        if latest.exists():
            # As a training that is resumed: from the newest checkpoint, and the log cut back to it.
            self.start = int(torch.load(latest)["update"])
        record.write("begin", "fresh" if self.start is None else self.start)
        self.run = noether_writer.open_run(root, plan.name, resume_at=self.start)
        record.write("opened")
        self.sent: list[tuple[int, int]] = []
        self.acked = 0
        self.durable: int | None = None
        self.open: list[tuple[int, Ticket]] = []
        self.accepted: set[int] = set()

    def look(self) -> None:
        """Writes down what has been acknowledged."""
        taken = self.run._core.taken
        acked = max((update for sequence, update in self.sent if sequence <= taken), default=0)
        if acked > self.acked:
            self.acked = acked
            self.record.write("acked", acked)
        if self.run.log_durable_update != self.durable:
            self.durable = self.run.log_durable_update
            self.record.write("log-durable", self.durable)
        for update, ticket in list(self.open):
            if ticket.error is not None:
                self.record.write("error", update, repr(ticket.error))
            if ticket.accepted and update not in self.accepted:
                self.accepted.add(update)
                self.record.write("accepted", update)
            if ticket.durable:
                self.record.write("durable", update)
            if ticket.done:
                self.open.remove((update, ticket))

    def train(self) -> None:
        plan = self.plan
        for update in range((self.start or 0) + 1, plan.updates + 1):
            # In the record first: what was logged and lived is never more than this.
            self.record.write("logging", update)
            self.run.log(scalars(plan.seed, plan.run, update), update=update, epoch=update // 10, sample=update * 4)
            self.sent.append((self.run._core.sequence, update))
            if update % plan.every == 0 or update == plan.updates:
                self.save(update)
            self.look()
            time.sleep(plan.pause_s)
        self.run.finish(90)
        self.look()
        self.record.write("finished")
        self.run.close()

    def save(self, update: int) -> None:
        model, optim = self.plan.model(update), self.plan.optim(update)
        self.record.write("saving", update)
        # The model twice from one copy, the optimizer as a save of its own behind one ticket.
        targets = [
            Target("net", f"U{update}", model),
            Target("net", "latest", model),
            Target("net", f"U{update}", optim, "optim"),
        ]
        self.open.append((update, self.run.save_as(targets)))


def main(plan: Plan, root: Path, record_path: Path) -> None:
    """The whole life of a trainer; never returns to the program that it was forked from."""
    record = Record(record_path)
    status = 1
    try:
        Trainer(plan, root, record).train()
        status = 0
    except BaseException:
        record.write("died", repr(traceback.format_exc()))
    finally:
        os._exit(status)
