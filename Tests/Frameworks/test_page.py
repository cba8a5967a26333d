# SPDX-License-Identifier: Apache-2.0
"""docs/FRAMEWORKS.md: its programs run as they stand there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Daemon

PAGE = (Path(__file__).parents[2] / "docs/FRAMEWORKS.md").read_text()
PROGRAMS = dict(re.findall(r"^## (\w+)\n\n```python\n(.*?)^```$", PAGE, re.S | re.M))


def test_each_framework_has_a_program() -> None:
    assert set(PROGRAMS) == {"Lightning", "Transformers", "Accelerate", "Ignite"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(
    name: str, daemon: Daemon, run_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_script(PROGRAMS[name])
    assert result.returncode == 0, result.stderr
    expected = {
        "Lightning": ["models/last.ckpt"],
        "Transformers": ["out/checkpoint-6/model.safetensors", "out/checkpoint-8/optimizer.pt"],
        "Accelerate": ["runs/accelerated/tracker/entries.th"],
        "Ignite": ["ignited/model_10.pt"],
    }
    for path in expected[name]:
        assert (tmp_path / path).stat().st_size > 0
    if name == "Transformers":
        assert list(torch.load(tmp_path / "runs/bert/tracker/entries.th")["loss"]) == list(range(1, 9))
