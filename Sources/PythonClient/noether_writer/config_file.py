# SPDX-License-Identifier: Apache-2.0
"""`tracker/config.yaml`, as Noether's BaseTracker writes it (noether/core/trackers/base.py, `init`): the run's
hyperparameters under `hp`, beside its name and where it runs."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from typing import Any

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
# Words that YAML 1.1 does not read as texts.
_NO_TEXTS = {"yes", "no", "true", "false", "on", "off", "null", "y", "n"}
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def config_yaml(config: dict[str, Any], run_id: str, stage_name: str | None, world_size: int) -> str:
    """The text of the file. `config` is not changed."""
    file: dict[str, Any] = {"run_name": run_id, "stage_name": stage_name or "default", "hp": _without_lists(config)}
    if (accelerator := _accelerator()) is not None:
        file["accelerator"] = accelerator
    file["dist/world_size"] = str(world_size)
    file["dist/nodes"] = str(int(os.environ.get("SLURM_JOB_NUM_NODES") or 1))
    file["dist/hostname"] = platform.node()
    if "SLURM_JOB_ID" in os.environ:
        file["dist/jobid"] = os.environ["SLURM_JOB_ID"]
    try:
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return "\n".join(_lines(file)) + "\n"
    return str(yaml.dump(file, sort_keys=False))


def _without_lists(config: dict[str, Any]) -> dict[str, Any]:
    """A list becomes a dict with its positions as keys (BaseTracker does it for wandb); lists within lists stay."""
    return {
        key: {str(index): item for index, item in enumerate(value)}
        if isinstance(value, list)
        else _without_lists(value)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _accelerator() -> str | None:
    """What torch computes on; None if that cannot be told without starting the device."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0)) if torch.cuda.is_initialized() else None
    return "mps" if torch.backends.mps.is_available() else "cpu"


# For when PyYAML is not installed: the same data in the same order, though not always with the same quotes.


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            below = _lines(item)
            if isinstance(item, dict) and item:
                lines += [f"{_scalar(key)}:", *("  " + line for line in below)]
            elif isinstance(item, list | tuple) and item:
                lines += [f"{_scalar(key)}:", *below]
            else:
                lines.append(f"{_scalar(key)}: {below[0]}")
        return lines
    if isinstance(value, list | tuple) and value:
        return [("  " if line else "- ") + text for item in value for line, text in enumerate(_lines(item))]
    if isinstance(value, dict | list | tuple):
        return ["{}" if isinstance(value, dict) else "[]"]
    return [_scalar(value)]


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        text = repr(float(value))
        # YAML 1.1 reads 1e-05 as a text.
        return text if "." in text else text.replace("e", ".0e", 1)
    text = str(value)
    if _WORD.fullmatch(text) and text.lower() not in _NO_TEXTS:
        return text
    if text.isascii() and text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
