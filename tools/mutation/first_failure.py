# SPDX-License-Identifier: BSD-3-Clause
"""For pytest: writes the name of the first test that fails to the file that is asked for."""

import os
from pathlib import Path


def _note(name):
    path = Path(os.environ["MUTATION_FAILURE"])
    if not path.exists():
        path.write_text(name)


def pytest_runtest_logreport(report):
    if report.failed:
        _note(report.nodeid)


def pytest_collectreport(report):
    if report.failed:
        _note(report.nodeid)
