"""Settings of the whole test run, and the tables that it ends with."""

import os
from typing import Any

import pytest

from tests import tables

# Threads that spin at barriers take the cores from each other where other processes run too. Read when torch is
# imported, so it has to be here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand this process' tables to the one that prints them (pytest-xdist)."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = tables.TABLES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the tables of a process that has ended."""
    tables.merge(getattr(node, "workeroutput", {}).get("tables", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables."""
    for title in tables.TABLES:
        terminalreporter.section(title)
        terminalreporter.write("\n".join(tables.lines(title)) + "\n")
