# SPDX-License-Identifier: Apache-2.0
"""Prints each failure when it happens, so that a run that is cut off has said what failed until then.

pytest would print the failures when all tests are over. That part of its output is left out: each failure stands in the
output once, and the summary at the end has a line for each.
"""

from __future__ import annotations

import pytest


class FailuresAtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    # After pytest's own reporter, which prints the letter of the outcome.
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed or self.config.option.tbstyle == "no":
            return
        phase = "" if report.when == "call" else f"{report.when} of "
        writer = self.config.get_terminal_writer()
        writer.line()
        writer.sep("_", f"{phase}{report.nodeid}", red=True, bold=True)
        report.toterminal(writer)
        for title, text in report.sections:
            writer.sep("-", title)
            writer.line(text.rstrip("\n"))
        writer.flush()

    # Before pytest's own reporter prints its summary, which it does when every other plugin has finished.
    def pytest_sessionfinish(self) -> None:
        self.config.option.tbstyle = "no"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config), "failures-at-once")
