# SPDX-License-Identifier: Apache-2.0
"""What must be true after a round, whatever was killed: read from the disk, against what the trainers saw."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from noether_writer import _restore
from trainer import Plan, exact, scalars

_NAME = re.compile(r"net_cp=(U(\d+)|latest)_(model|optim)\.th")


@dataclass
class Life:
    """One trainer process of a run, by its record."""

    start: int | None = None
    finished: bool = False
    acked: int = 0
    log_durable: int = 0
    logging: int = 0
    saving: list[int] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)
    durable: set[int] = field(default_factory=set)
    #: Whose files somebody has removed since.
    removed: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def lives(record: Path) -> list[Life]:
    found: list[Life] = []
    if not record.exists():
        return found
    for line in record.read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "begin":
            found.append(Life(start=None if rest == "fresh" else int(rest)))
            continue
        life = found[-1]
        match word:
            case "finished":
                life.finished = True
            case "acked":
                life.acked = int(rest)
            case "log-durable":
                life.log_durable = 0 if rest == "None" else int(rest)
            case "logging":
                life.logging = int(rest)
            case "saving":
                life.saving.append(int(rest))
            case "accepted":
                life.accepted.add(int(rest))
            case "durable":
                life.durable.add(int(rest))
            case "removed":
                for each in found:
                    each.removed |= set(each.saving)
            case "opened" | "refused":
                pass
            case "error" | "died":
                life.problems.append(line)
            case _:
                raise AssertionError(f"a record has the line {line!r}")
    return found


@dataclass
class Counts:
    """What a check has looked at: a check that looks at nothing proves nothing."""

    files: int = 0
    images: int = 0
    scalars: int = 0
    acked_updates: int = 0
    durable_saves: int = 0
    accepted_saves: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def check(
    plan: Plan, root: Path, record: Path, *, daemon_died: bool, store: bool, counts: Counts, verify: str
) -> list[str]:
    """
    Args:
        daemon_died: a daemon was killed in this round.
        store: something kept its descriptors when it was.

    Returns:
        what is wrong, in words.
    """
    wrong: list[str] = []
    directory = root / plan.name
    history = lives(record)
    for life in history:
        wrong += life.problems
    files = sorted(directory.rglob("*")) if directory.exists() else []
    names = [path for path in files if path.is_file()]
    whole = [path for path in names if path.suffix == ".th"]
    if whole:
        result = subprocess.run([verify, "verify", *map(str, whole)], capture_output=True, text=True)
        if result.returncode != 0:
            wrong.append(result.stdout + result.stderr)
    found: dict[str, int] = {}
    for path in whole:
        if path.parent.name == "checkpoints":
            wrong += _checkpoint(plan, path, found)
            wrong += _image(path, counts)
    counts.files += len(whole)

    # Saves.
    latest = found.get("latest_model", 0)
    for index, life in enumerate(history):
        # Who holds what was accepted: the daemon as long as it lives, the store, or the client as long as it lives.
        held = life.finished or store or not daemon_died
        must = ((life.durable | life.accepted) if held else life.durable) - life.removed
        for update in must:
            for name in (f"U{update}_model", f"U{update}_optim"):
                if name not in found:
                    kind = "durable" if update in life.durable else "accepted"
                    wrong.append(f"{plan.name}, life {index}: update {update} was {kind}, and {name} is not there")
        counts.durable_saves += len(life.durable)
        counts.accepted_saves += len(life.accepted) if held else 0
        newest = max(must, default=0)
        if index == len(history) - 1 and latest < newest:
            wrong.append(f"{plan.name}: latest is of update {latest}, and {newest} was acknowledged")
    if history and history[-1].finished and latest != plan.updates and plan.updates not in history[-1].removed:
        wrong.append(f"{plan.name}: finished, and latest is of update {latest} of {plan.updates}")

    # The log.
    sure: set[int] = set()
    possible: set[int] = set()
    for life in history:
        # Whoever was killed as it opened has cut the log too, where its request was on the way: no answer is no proof.
        sure = {update for update in sure if life.start is not None and update <= life.start}
        # Nothing of a session acknowledged: entries.th may still be that of the one before.
        if life.acked or life.finished:
            possible = {update for update in possible if life.start is not None and update <= life.start}
        first = (life.start or 0) + 1
        sure |= set(range(first, max(life.acked, life.log_durable) + 1))
        possible |= set(range(first, life.logging + 1))
        if life.finished:
            sure |= set(range(first, plan.updates + 1))
    wrong += _entries(plan, directory / "tracker/entries.th", sure, possible, counts)
    return wrong


def _checkpoint(plan: Plan, path: Path, found: dict[str, int]) -> list[str]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [f"{path} is a name that nobody gave"]
    try:
        content = torch.load(path, weights_only=True, mmap=True)
    except Exception as error:
        return [f"{path} does not load: {error!r}"]
    update = int(content["update"])
    if match[2] is not None and int(match[2]) != update:
        return [f"{path} holds update {update}"]
    expected = plan.model(update) if match[3] == "model" else plan.optim(update)
    found[f"{match[1]}_{match[3]}"] = update
    if content.keys() != expected.keys():
        return [f"{path} holds {sorted(content)}"]
    return [
        f"{path}: {key} is not what was saved"
        for key, value in expected.items()
        if not (torch.equal(content[key], value) if isinstance(value, torch.Tensor) else content[key] == value)
    ]


def _image(path: Path, counts: Counts) -> list[str]:
    """What the daemon has of the file in memory is the file."""
    with open(path, "rb") as file:
        if (image := _restore.image_of(file.fileno())) is None:
            return []
        counts.images += 1
        with open(image, "rb") as other:
            return [] if other.read() == file.read() else [f"{path}: the daemon's image is another file"]


def _entries(plan: Plan, path: Path, sure: set[int], possible: set[int], counts: Counts) -> list[str]:
    if not path.exists():
        return [f"{path} is missing, and {len(sure)} updates were acknowledged"] if sure else []
    entries: dict[str, dict[int, Any]] = torch.load(path, weights_only=True)
    updates: set[int] = set().union(*entries.values()) if entries else set()
    wrong = []
    if missing := sorted(sure - updates):
        wrong.append(f"{path}: {len(missing)} acknowledged updates are missing: {missing[:5]}")
    if strange := sorted(updates - possible):
        wrong.append(f"{path}: {len(strange)} updates are there that nobody logged: {strange[:5]}")
    for update in sorted(updates & possible):
        expected = scalars(plan.seed, plan.run, update) | {"epoch": update // 10, "sample": update * 4}
        row = {key: values[update] for key, values in entries.items() if update in values}
        if {k: exact(v) for k, v in row.items()} != {k: exact(v) for k, v in expected.items()}:
            wrong.append(f"{path}: update {update} is {row}, and {expected} was logged")
        counts.scalars += len(row)
    summary = path.with_name("summary.yaml")
    lasts = yaml.safe_load(summary.read_text()) if summary.exists() else {}
    for key in entries.keys() - {"epoch", "sample"}:
        found, last = lasts.get(f"{key}/last"), list(entries[key].values())[-1]
        # YAML has one NaN.
        if exact(found) != exact(last) and not (found != found and last != last):
            wrong.append(f"{summary}: {key}/last is {found}, and {last} in entries.th")
    counts.acked_updates += len(sure)
    return wrong
