# SPDX-License-Identifier: BSD-3-Clause
"""For pytest: writes the name of the first test that fails to the file that is asked for; until one
has, that of the test that runs, which is the one if the process crashes."""

import os
from pathlib import Path

FILE = Path(os.environ["MUTATION_FAILURE"])
failed = False


def _note(name, failure):
    global failed
    if not failed:
        FILE.write_text(name)
    failed = failed or failure


def pytest_runtest_logstart(nodeid):
    _note(nodeid, False)


def pytest_runtest_logreport(report):
    if report.failed:
        _note(report.nodeid, True)


def pytest_collectreport(report):
    if report.failed:
        _note(report.nodeid, True)
