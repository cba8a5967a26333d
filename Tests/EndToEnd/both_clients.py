# SPDX-License-Identifier: Apache-2.0
"""Does what each line of its input asks, and answers with a line: what came of it, or the kind and the words of the
error. Tests/SwiftTrainer/Driver.swift does the same with the Swift library."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import noether_writer
import torch
from noether_writer import _files, errors
from noether_writer.saves import Target

# The type of an error, and the code that Swift has for it.
CODES: dict[type[Exception], str] = {
    errors.CheckpointStalled: "checkpointStalled",
    errors.WaitTimeout: "waitTimeout",
    errors.DaemonNotFound: "daemonNotFound",
    errors.WrongSocket: "wrongSocket",
    errors.DaemonUnavailable: "daemonUnavailable",
    errors.NameInUse: "nameInUse",
    errors.RefusedName: "refusedName",
    errors.UnknownRun: "unknownRun",
    errors.RunInUse: "runInUse",
    errors.LogTakenOver: "logTakenOver",
    errors.LogFull: "logFull",
    errors.LogDamaged: "logDamaged",
    errors.UpdateOrderError: "updateOrder",
    errors.UnsupportedValue: "unsupportedValue",
    errors.PoolExhausted: "poolExhausted",
    errors.StorageError: "storage",
    errors.ProtocolError: "protocolError",
    ValueError: "invalidVariable",
}


def code_of(error: Exception) -> str:
    # Python has no type of its own for a run that was closed.
    if isinstance(error, errors.DaemonUnavailable) and "this run is closed" in str(error):
        return "runClosed"
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return f"{value.bit_length() // 8 + 1} bytes"
    return "none" if value is None else str(value)


def scalar(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("float:"):
        return float(value[6:])
    if isinstance(value, str) and value.startswith("bytes:"):
        return int.from_bytes(b"\1" * int(value[6:]), "little")
    return value


def state(number: float, count: int = 4, update: int | None = None) -> dict[str, Any]:
    iteration = None if update is None else {"epoch": 0, "update": update, "sample": 0}
    return {"state_dict": {"weight": torch.full((count,), number)}, "training_iteration": iteration}


def words(found: noether_writer.Checkpoint) -> str:
    numbers = [text(number) for number in (found.update, found.epoch, found.sample)]
    return " ".join([str(found.path), found.name, found.kind, text(found.info), found.tag, *numbers, str(found.nbytes)])


class Driver:
    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.tickets: list[Any] = []

    def perform(self, request: dict[str, Any]) -> str | None:
        call = getattr(self, request.pop("call"))
        if "run" in request:
            request["run"] = self.runs[request["run"]]
        if "ticket" in request:
            request["ticket"] = self.tickets[request["ticket"]]
        result: str | None = call(**request)
        return result

    def open(self, root: str, id: str = "r", stage: str | None = None, resume: bool = False, **options: Any) -> str:
        names = {"resumeAt": "resume_at", "keepLast": "keep_last", "keepEvery": "keep_every"}
        arguments = {names.get(name, name): value for name, value in options.items()}
        run = noether_writer.open_run(root, id, stage, resume="auto" if resume else None, **arguments)
        self.runs.append(run)
        return f"{run.directory} {text(run.resumed_at)}"

    def log(self, values: list[tuple[str, Any]], update: int | None = None, run: Any = None, **more: int) -> str:
        run = run or self.runs[-1]
        run.log({key: scalar(value) for key, value in values}, update, **more)
        return text(run.last_update)

    def save(self, names: list[dict[str, str]], state: dict[str, Any], run: Any = None) -> None:
        value = globals()["state"](**state)
        targets = [Target(name.pop("name"), name.pop("tag"), value, **name) for name in names]
        self.tickets.append((run or self.runs[-1]).save_as(targets))

    def wait(self, ticket: Any = None, timeout: float | None = None) -> None:
        (ticket or self.tickets[-1]).wait(timeout)

    def ticket(self, ticket: Any = None) -> str:
        ticket = ticket or self.tickets[-1]
        failure = "none" if ticket.error is None else code_of(ticket.error)
        return f"{text(ticket.done)} {text(ticket.durable)} {failure} {json.dumps(ticket.paths)}"

    def wait_run(self, timeout: float | None = None) -> None:
        self.runs[-1].wait(timeout)

    def values(self, key: str) -> str:
        found = self.runs[-1].values(key)
        return " ".join(f"{update}={text(value)}" for update, value in zip(found.updates, found, strict=True))

    def finish(self, timeout: float | None = None, run: Any = None) -> None:
        (run or self.runs[-1]).finish(timeout)

    def flush(self, timeout: float | None = None) -> None:
        self.runs[-1].flush(timeout)

    def close(self, run: Any = None) -> None:
        (run or self.runs[-1]).close()

    def log_update(self, path: str) -> str:
        return text(noether_writer.log_update(path))

    def checkpoints(self, path: str) -> str:
        return ", ".join(map(words, noether_writer.checkpoints(path)))

    def latest(self, path: str) -> str | None:
        found = noether_writer.latest(path)
        return None if found is None else words(found)

    def best(self, path: str, key: str, mode: Any = "min") -> str | None:
        found = noether_writer.best(path, key, mode)
        return None if found is None else words(found)

    def load(self, path: str) -> str:
        weight = torch.load(path)["state_dict"]["weight"]
        return f"{len(weight)} {float(weight[0])}"

    def save_file(self, path: str, state: dict[str, Any]) -> None:
        self.tickets.append(noether_writer.save(globals()["state"](**state), path))

    def remove_file(self, path: str, recursive: bool = False, after: tuple[str, ...] = ()) -> None:
        self.tickets.append(_files.remove(path, recursive=recursive, after=after))

    def wait_files(self, timeout: float | None = None) -> None:
        noether_writer.wait(timeout)

    def load_file(self, path: str) -> str:
        weight = noether_writer.load(path)["state_dict"]["weight"]
        return f"{len(weight)} {float(weight[0])}"

    def subscribe(self, id: str) -> None:
        self.subscription = noether_writer.subscribe(id)

    def events(self) -> str:
        said = []
        for event in self.subscription:
            if isinstance(event, noether_writer.subscription.Row):
                values = (f"{key}={text(value)}" for key, value in event.values.items())
                said.append(f"{event.update} {' '.join(values)}")
            elif isinstance(event, noether_writer.subscription.Ended):
                said.append(event.state)
        return ", ".join(said)


if __name__ == "__main__":
    logging.basicConfig(format="noether-writer: %(message)s")
    driver = Driver()
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        try:
            value = driver.perform(json.loads(line))
            if value is not None:
                answer["value"] = value
        except Exception as error:
            if "DEBUG" in os.environ:
                raise
            answer = {"code": code_of(error), "words": str(error)}
        print(json.dumps(answer), flush=True)
