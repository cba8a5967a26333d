# SPDX-License-Identifier: Apache-2.0
"""What Noether's own tracker writes, recorded for `test_summary.py`: `Summaries/<case>.yaml`, `Summaries/config.yaml`.

    pip download --no-deps --ignore-requires-python emmiai-noether==2026.4.0 emmiai-noether==2.0.0
    python Tests/EndToEnd/record_summaries.py emmiai_noether-2026.4.0-*.whl emmiai_noether-2.0.0-*.whl

BaseTracker and MetricPropertyProvider are the wheel's own files, run as they are; of the package around them, which
needs Python 3.12 and more, only the three functions about ranks are stood in for. All wheels must agree.
"""

from __future__ import annotations

import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "Summaries"

# As entries.th holds them, without NaN, infinities, and values that have no order: there BaseTracker is not followed.
LOGS: dict[str, dict[str, dict[int, Any]]] = {
    "directions": {
        "epoch": {1: 0, 2: 1},
        "sample": {1: 4, 2: 8},
        "loss/online/total/U1": {1: 0.5, 2: 0.25},
        "Loss": {1: 3.0, 2: 2.0, 3: 2.5},
        "val/L1_ERROR": {1: 1.5, 2: 1.75},
        "Accuracy1": {1: 0.1, 2: 0.9, 3: 0.8},
        "accuracy_loss": {1: 0.1, 2: 0.9, 3: 0.8},
        "error/accuracy": {1: 0.1, 2: 0.9},
        "plain": {1: 1.0, 2: -1.0},
        "optim/lr": {1: 0.1},
        "OPTIM/lr": {1: 0.1},
        "profiling/forward": {1: 0.1},
        "profiler/x": {1: 0.1},
        "ctx/x": {1: 0.1},
        "loss_weight/x": {1: 0.1},
        "gradient/x": {1: 0.1},
        "detach/x": {1: 0.1},
        "lossdiff/x": {1: 0.1},
        "train_time/x": {1: 0.1},
        "lossdiffs/x": {1: 0.1, 2: 0.05},
        "x/optim/": {1: 2.0},
        "Epoch": {1: 1},
    },
    "numbers": {
        "small": {1: 1e-05, 2: 1e-300},
        "loss/small": {1: 1e-05, 2: 5e-324},
        "large": {1: 1e16, 2: 1.5e300, 3: 9007199254740993.0},
        "loss/large": {1: 1e16, 2: 9999999999999998.0, 3: 123456789012345680.0},
        "zero": {1: -0.0, 2: 0.0},
        "third": {1: 1 / 3, 2: 0.1 + 0.2},
        "ints": {1: 3, 2: -5, 3: 2**62},
        "loss/ints": {1: -(2**63), 2: 2**63 - 1},
        "bools": {1: True, 2: False},
        "error/bools": {1: True, 2: False},
        "bool_and_int": {1: True, 2: 1, 3: 0},
        "int_and_float": {1: 2**53 + 1, 2: 9007199254740992.0, 3: 9007199254740994.0},
        "loss/int_and_float": {1: 3, 2: 3.5, 3: 2.5, 4: 2},
        "first_of_equals": {1: 1, 2: 1.0},
        "big": {1: 2**64, 2: -(2**70), 3: 2**200 + 7, 4: 12},
        "loss/big": {1: -(2**64), 2: -(2**70), 3: -(2**70) - 1, 4: 1e30},
        "hundred_digits": {1: 10**100},
    },
    "texts": {
        "note": {1: "warmup", 2: "decay"},
        "error/note": {1: "b", 2: "a", 3: "aa"},
        "word": {1: "yes", 2: "true"},
        "sentence": {1: "learning rate is lower now"},
        "quote": {1: "it's"},
        "colon": {1: "a: b"},
        "comment": {1: "a #b"},
        "umlaut": {1: "\u00fcber", 2: "\u00e4"},
        "empty": {1: ""},
        "nothing": {1: None},
    },
    "keys": {
        "with space": {1: 1.0},
        " leading": {1: 1.0},
        "trailing:": {1: 1.0},
        "co: lon": {1: 1.0},
        "hash #x": {1: 1.0},
        "'quoted'": {1: 1.0},
        '"double"': {1: 1.0},
        "- dash": {1: 1.0},
        "?": {1: 1.0},
        "-minus": {1: 1.0},
        "1st": {1: 1.0},
        "~": {1: 1.0},
        "--- marker": {1: 1.0},
        "a:b": {1: 1.0},
        "a#b": {1: 1.0},
        "{flow}": {1: 1.0},
        "@at": {1: 1.0},
        "*star": {1: 1.0},
        "a,b[0]": {1: 1.0},
        "Z": {1: 1.0},
        "\u00fcml\u00e4ut": {1: 1.0},
        "\U0001f600": {1: 1.0},
        "loss\u0301": {1: 2.0, 2: 1.0},
        "\ufb00": {1: 1.0},
        "tab\tulator": {1: 1.0},
        "long/" + "x" * 200: {1: 1.0},
        "b" * 118: {1: 1.0},
        "\u00e4" * 117: {1: 1.0},
    },
    # The same when read; in looks, not folded.
    "looks": {
        "newline": {1: "a\nb"},
        "digits": {1: "12 apples"},
        "long": {1: "word " * 30},
        "key " * 40: {1: 1.0},
        "new\nline": {1: 1.0},
        "\u00e4" * 119: {1: 1.0},
    },
    "only_progress": {"epoch": {1: 0}, "sample": {1: 0}},
}

CONFIG: dict[str, Any] = {
    "lr": 1e-05,
    "model": {"kind": "transformer", "layers": [1, 2, {"deep": [3]}], "empty": {}, "none": []},
    "name": "it's: a name",
    "amp": True,
    "seed": None,
    "note": "yes",
    "tags": ["a", "b"],
    "long": "word " * 30,
    "path": "\u00fcber/alles",
}


def load(wheel: str) -> Any:
    """BaseTracker, and the provider that it asks."""
    archive = zipfile.ZipFile(wheel)
    distributed = types.ModuleType("noether.core.distributed")
    distributed.__dict__.update(get_num_nodes=lambda: 1, get_world_size=lambda: 1, is_rank0=lambda: True)
    properties = types.ModuleType("noether.core.providers")
    properties.__dict__.update(PathProvider=object)
    sys.modules |= {name: types.ModuleType(name) for name in ("noether", "noether.core")}
    sys.modules |= {"noether.core.distributed": distributed, "noether.core.providers": properties}
    exec(archive.read("noether/core/providers/metric_property.py"), properties.__dict__)
    base = types.ModuleType("base")
    exec(archive.read("noether/core/trackers/base.py"), base.__dict__)

    class Tracker(base.BaseTracker):  # type: ignore[name-defined,misc]
        def _init(self, **_: Any) -> None: ...
        def _close(self) -> None: ...
        def _update_summary(self, data: Any) -> None: ...

    return lambda paths: Tracker(properties.MetricPropertyProvider(), paths)  # type: ignore[attr-defined]


def main() -> None:
    written: list[dict[str, str]] = []
    for wheel in sys.argv[1:]:
        make = load(wheel)
        files: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            paths = types.SimpleNamespace(
                basetracker_entries_uri=root / "entries.th",
                basetracker_summary_uri=root / "summary.yaml",
                basetracker_config_uri=root / "config.yaml",
            )
            for case, log in LOGS.items():
                torch.save(log, paths.basetracker_entries_uri)
                tracker = make(paths)
                tracker.summarize_logvalues()
                tracker.close()
                files[case] = paths.basetracker_summary_uri.read_text()
            make(paths).init("cpu", "r", "train", CONFIG, "r", "")
            files["config"] = paths.basetracker_config_uri.read_text()
        written.append(files)
    assert all(files == written[0] for files in written), "the versions differ"
    for name, text in written[0].items():
        (FOLDER / f"{name}.yaml").write_text(text)


if __name__ == "__main__":
    main()
