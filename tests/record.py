"""`--record FILE`: what has passed is not run again, and failures are printed as they come.

For runs that may be cut, as on a GPU that is lent for some minutes: the next one with the same file goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="note each test's outcome in this file; skip those that passed")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.record is not None:
        config.pluginmanager.register(Record(config), "record")


class Record:
    """The outcomes of the tests, a line of JSON each, written as they end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._path: Path = config.option.record
        self._writes = not hasattr(config, "workerinput")  # pytest-xdist's workers report to the process that does
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._passed = {entry["test"] for entry in map(json.loads, lines) if entry["outcome"] == "passed"}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._passed]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._writes or (report.when != "call" and report.passed):
            return
        entry: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
        if report.failed:
            entry["error"] = report.longreprtext
            print(f"\n{report.outcome.upper()} {report.nodeid}\n{report.longreprtext}", flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")
