# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: says the first failure and ends the process. What fixtures do at their end may take long then, and
does not matter."""

from __future__ import annotations

import os
from typing import Any

import pytest

_config: Any = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        words = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
        # A test that could not begin says nothing of the guard.
        kind = {"setup": "NOT BEGUN", "call": "FAILED"}.get(report.when or "", "ERROR")
        # Not print, which is captured.
        reporter = _config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{report.longreprtext}\n{kind} {report.nodeid} - {(words.splitlines() or [''])[0]}")
        reporter.flush()
        os._exit(1)
