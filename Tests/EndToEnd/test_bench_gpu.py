# SPDX-License-Identifier: Apache-2.0
"""The program of `make bench-gpu`: with the CPU as the device it runs all that needs no device, in small."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "Benchmarks/gpu.py"
OURS = {"noether-writer", "noether-writer, overlap"}
PEERS = {"torch.save + fsync", "clone + torch.save in a thread", "DCP async_save, thread"}
LIMITS = {"limit: pinned copy, one piece", "limit: O_DIRECT write, depth 1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "BENCH_DIRECTORY": str(folder), "PYTHONWARNINGS": "ignore"}
    result = str(folder / "gpu.json")
    return subprocess.run(
        [sys.executable, str(PROGRAM), result, *arguments], env=environ, capture_output=True, text=True, check=False
    )


def test_all_of_it_in_small(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["torch"] == torch.__version__ and "CPU" in kept["device"]
    rows = kept["rows"]
    figures: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        figures.setdefault(row["case"], {}).setdefault(row["way"], set()).add(row["figure"])
    states = [case for case in figures if case.endswith(("8 tensors", "50 tensors")) and "first" not in case]
    assert len(states) == 2
    for case in states:
        assert figures[case].keys() == OURS | PEERS | LIMITS | {"DCP async_save, pinned staging"}
        for way in OURS | PEERS:
            assert figures[case][way] >= {"stall, x pinned copy", "durable, x O_DIRECT", "CPU a GiB"}
    [first] = [case for case in figures if "first saves" in case]
    for way in OURS:
        assert figures[first][way] >= {"first save, x a later one", "a second buffer, x a later save"}
    [loop] = [case for case in figures if "a training that saves" in case]
    for way in OURS | PEERS:
        assert figures[loop][way] == {"slow-down", "a call", "a call, x the median one"}
    assert len(figures["device: a training that logs each update"]) == 4
    assert len(figures["device: the call that logs 1 scalar, the device idle"]) == 3
    assert len(figures["device: the call that logs 20 scalars, the device idle"]) == 3

    # The text has a line for each row; what could not be measured says why.
    lines = done.stdout.splitlines()
    for row in rows:
        found = [line for line in lines if line.startswith(row["way"] + " ") and row["figure"] in line]
        assert found, row
        if row["spread"]:
            smallest, median, largest = row["spread"]
            assert 0 <= smallest <= median <= largest < math.inf
        else:
            assert row["note"] and any(line.endswith(row["note"]) for line in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and "finds no CUDA device here" in done.stdout
    assert not (tmp_path / "gpu.json").exists()
    required = run(tmp_path, "--require-device")
    assert (required.returncode, required.stdout) == (1, done.stdout)
