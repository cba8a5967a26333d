# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: gives each test a folder in which the processes of a copy of the sources leave the names of the
guards they come to (guards.py), and writes a line for each test into tests.jsonl beside it.

The variable that names the folder leads through a link, which is turned at each test: a daemon that serves several
tests notes what it comes to under the one that runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NOW = Path(os.environ["NOETHER_WRITER_GUARD_OUT"])
_number = 0
_outcomes: dict[str, str] = {}


def point_to(folder: Path) -> None:
    folder.mkdir()
    # Some daemons are another user's.
    folder.chmod(0o777)
    link = NOW.with_name("next")
    link.symlink_to(folder.name)
    link.rename(NOW)


def pytest_sessionstart() -> None:
    point_to(NOW.with_name("before"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed" or report.nodeid not in _outcomes:
        _outcomes[report.nodeid] = report.outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _number
    _number += 1
    folder = NOW.with_name(str(_number))
    point_to(folder)
    start = time.monotonic()
    result = yield
    line = {
        "test": item.nodeid.removeprefix("Tests/"),
        "seconds": time.monotonic() - start,
        "outcome": _outcomes.get(item.nodeid, "none"),
        "reached": sorted(os.listdir(folder)),
    }
    with NOW.with_name("tests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return result
