"""A pytest plugin: says the first failure and ends the process. What fixtures do at their end may take long then, and
does not matter."""

from __future__ import annotations

import os
from typing import Any

import pytest

_reporter: Any = None


def pytest_configure(config: pytest.Config) -> None:
    global _reporter
    _reporter = config.pluginmanager.get_plugin("terminalreporter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        words = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
        kind = "FAILED" if report.when == "call" else "ERROR"
        _reporter.write_line(f"\n{report.longreprtext}\n{kind} {report.nodeid} - {(words.splitlines() or [''])[0]}")
        _reporter.flush()
        os._exit(1)
