# SPDX-License-Identifier: Apache-2.0
"""docs/TRACKERS.md: its programs run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Store
from harness import Daemon

PAGE = (Path(__file__).parents[2] / "docs/TRACKERS.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([\w&]+)\n\n```python\n(.*?)^```$", PAGE, re.S | re.M))


def test_each_tracker_has_a_program() -> None:
    assert set(PROGRAMS) == {"trackio", "MLflow", "W&B"}


@pytest.mark.parametrize("store", ["trackio", "mlflow", "wandb"], indirect=True)
def test_program(store: Store, daemon: Daemon, tmp_path: Path) -> None:
    program = PROGRAMS[{"trackio": "trackio", "mlflow": "MLflow", "wandb": "W&B"}[store.tracker]]
    variables = {name: value for name, value in store.variables.items() if name != "WANDB_MODE"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(store.runs()["tracked"]) == 100
