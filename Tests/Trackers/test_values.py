# SPDX-License-Identifier: Apache-2.0
"""Values, keys and hyperparameters that not every tracker takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import noether_writer
import pytest
from conftest import TRACKERS, Store
from harness import Daemon

ODD = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "int": 2**40 + 1,
    "big": 2**70,
    "bool": True,
    "text": "ä ö",
    "none": None,
}
CONFIG = {
    "lr": 0.1,
    "model": {"name": "net", "layers": [16, 32], "act": {"kind": "gelu", "approximate": True}},
    "none": None,
    "tuple": (1, 2),
    "inf": math.inf,
    "päth": Path("/data"),
}


def test_values_that_are_no_plain_numbers(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        for update in (1, 2):
            run.log(ODD, update=update)
    said = store.bridge(run.directory).wait()
    found: dict[int, dict[str, Any]] = {1: {}, 2: {}}
    for step, key, value, _ in store.runs()["r"]:
        found[step][key] = value
    assert repr(sorted(found[1].items())) == repr(sorted(found[2].items()))
    row = found[1]
    assert row["int"] == 2**40 + 1 and float(row["big"]) == 2.0**70 and float(row["bool"]) == 1.0
    if store.tracker == "mlflow":
        assert set(row) == set(ODD) - {"text", "none"}
        assert math.isnan(row["nan"]) and row["inf"] == sys.float_info.max == -row["-inf"]
        assert said.count("keep an infinite value as 1.79") == 1
        assert said.count("a text of 'text' is left out") == 1 == said.count("no value (None) of 'none' is left out")
    else:
        assert set(row) == set(ODD) and row["text"] == "ä ö" and row["none"] is None
        assert [float(row[key]) for key in ("inf", "-inf")] == [math.inf, -math.inf] and math.isnan(float(row["nan"]))
    if store.tracker == "trackio":
        assert said.count("which trackio has as floats") == 1


def test_updates_below_zero(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        for update in (-2, -1, 0, 1):
            run.log({"loss": float(update)}, update=update)
    said = store.bridge(run.directory).wait()
    steps = [step for step, *_ in store.runs()["r"]]
    assert steps == ([0, 1] if store.tracker == "wandb" else [-2, -1, 0, 1])
    assert said.count("takes no step -2") == (store.tracker == "wandb")


def test_keys_that_not_every_tracker_takes(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    keys = ["a#b", "a*b", "a.b", "/lead", "x//y", "ü", "step", "_step", "_timestamp", "timestamp", "k" * 300, "a b:c"]
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        for update in (1, 2):
            run.log(dict.fromkeys(keys, 0.5), update=update)
    said = store.bridge(run.directory).wait()
    points = store.runs()["r"]
    assert len(points) == 2 * len(keys) == 2 * len({key for _, key, _, _ in points}), points
    changed = set(keys) - {key for _, key, _, _ in points}
    assert (
        changed
        == {
            "trackio": {"step", "timestamp"},
            "mlflow": {"a#b", "a*b", "/lead", "x//y", "k" * 300},
            "wandb": {"_step", "_timestamp"},
        }[store.tracker]
    )
    assert all(said.count(repr(key)) == 1 for key in changed)


def test_hyperparameters_with_nested_dicts(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r", config=CONFIG) as run:
        run.log({"loss": 1.0}, update=1)
    store.bridge(run.directory).wait()
    config = store.configs()["r"]
    if store.tracker == "mlflow":
        assert config["lr"] == "0.1" and config["model.act.kind"] == "gelu" and config["model.layers.1"] == "32"
    else:
        assert config["lr"] == 0.1 and config["model"]["act"] == {"kind": "gelu", "approximate": True}
        assert config["model"]["layers"] == {"0": 16, "1": 32} and config["tuple"] == [1, 2]
    # They may change when the run is opened again.
    with noether_writer.open_run(tmp_path / "runs", "r", config=CONFIG | {"lr": 0.2}, resume_at=1) as run:
        run.log({"loss": 1.0}, update=2)
    said = store.bridge(run.directory).wait()
    config = store.configs()["r"]
    if store.tracker == "mlflow":
        assert config["lr"] == "0.1" and "lr stay as they were" in said
        [found] = store.mlflow_runs()
        assert found.data.tags["config.lr"] == "0.2"
    else:
        assert config["lr"] == 0.2
    assert len(store.runs()["r"]) == 2


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_package_that_is_missing_is_named(tracker: str, tmp_path: Path) -> None:
    # Without site-packages.
    command = [sys.executable, "-S", "-m", "noether_writer.bridges", tracker, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f'pip install "noether-writer[{tracker}]"' in result.stderr


@pytest.mark.parametrize("tracker", TRACKERS)
def test_only_its_own_tracker_is_imported(tracker: str, daemon: Daemon, tmp_path: Path) -> None:
    program = (
        "import sys; from noether_writer.bridges.__main__ import main, TRACKERS; "
        f"assert not {set(TRACKERS)} & set(sys.modules); "
        f"assert main(['{tracker}', sys.argv[1], '--once']) == 0; "
        f"print(sorted({set(TRACKERS)} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert result.stdout == f"['{tracker}']\n", result.stderr
