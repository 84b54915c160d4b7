# SPDX-License-Identifier: BSD-3-Clause
"""Run the tests, or those that pytest's arguments pick, and print which lines of Python, C++ and
CUDA they have run, room by room. CUDA's are those that the simulator runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import records
from ..instrument import ROOT
from . import tables
from .native import COVERAGE, Lines, forget, lines

FOLDER = COVERAGE.folder / "python"
# Of every process that a test starts, however it ends.
SETTINGS = f"""
[run]
source = {tables.PACKAGE}
data_file = {FOLDER / "data"}
parallel = True
patch = subprocess, fork, _exit
disable_warnings = no-data-collected, module-not-measured
[report]
exclude_also =
    if TYPE_CHECKING:
"""


def coverage(*words: str) -> list[str]:
    return [sys.executable, "-m", "coverage", *words]


def run_tests(words: Sequence[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("data*"):
        old.unlink()
    forget()
    settings = FOLDER / "settings"
    settings.write_text(SETTINGS)
    COVERAGE.imported_library()
    processes = [
        "-n",
        str(len(os.sched_getaffinity(0))),
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
    ]
    line = coverage("run", f"--rcfile={settings}", "-m", "pytest", "-q", *processes, *words)
    return subprocess.run(line, cwd=ROOT, env=COVERAGE.environment()).returncode


def python_lines() -> Lines:
    from coverage import Coverage

    found = Coverage(config_file=str(FOLDER / "settings"))
    found.combine(keep=True)
    lines: Lines = {}
    for path in sorted(tables.PACKAGE.rglob("*.py")):
        _, statements, _, missing, _ = found.analysis2(str(path))
        lines[path] = {number: number not in missing for number in statements}
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.coverage", description=__doc__)
    parser.add_argument("--missing", action="store_true", help="list the lines that were not run")
    parser.add_argument("--write", action="store_true", help="into docs/trust/coverage.csv")
    parser.add_argument("--again", action="store_true", help="print what the last run has counted")
    asked, words = parser.parse_known_args(arguments)
    code = 0 if asked.again else run_tests(words)
    found = {**python_lines(), **lines()}
    table = tables.rows(found)
    if asked.missing:
        print(tables.missing(found))
    print(tables.text(table))
    if asked.write:
        print(records.write("coverage", table).relative_to(Path.cwd()))
    return code


if __name__ == "__main__":
    sys.exit(main())
