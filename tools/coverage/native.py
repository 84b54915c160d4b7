# SPDX-License-Identifier: BSD-3-Clause
"""Lines of csrc by gcov: those of the library that Python loads, and of the CUDA sources that the
simulator runs. A line of a header is covered where any source that includes it has run it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ..instrument import ROOT, Instrument

# Optimised as little as tests can wait for: lines that are merged with others are not counted.
COVERAGE = Instrument("coverage", ("-O1", "--coverage"), settings={"MASKED_LOSS_EXT_CUDA": "0"})
CSRC = ROOT / "csrc"
SIMULATOR = ROOT / "build" / "cuda_sim"
Lines = dict[Path, dict[int, bool]]  # of a file -> whether each line that has code was run


def counters() -> list[Path]:
    """gcc's files, one for each object that has run."""
    return [*COVERAGE.folder.rglob("*.gcda"), *SIMULATOR.glob("*.gcda")]


def forget() -> None:
    for path in counters():
        path.unlink()


def ours(path: Path) -> bool:
    return CSRC in path.parents


def merge(into: Lines, documents: Iterable[dict]) -> None:
    """gcov's JSON, one document for each object."""
    for document in documents:
        start = Path(document["current_working_directory"])
        for file in document["files"]:
            path = (start / file["file"]).resolve()
            if not ours(path):
                continue
            found = into.setdefault(path, {})
            for line in file["lines"]:
                number = line["line_number"]
                found[number] = found.get(number, False) or line["count"] > 0


def documents(counter: Path) -> list[dict]:
    command = ["gcov", "--json-format", "--stdout", str(counter)]
    asked = subprocess.run(command, cwd=counter.parent, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("{")]


def lines() -> Lines:
    found: Lines = {}
    for counter in counters():
        merge(found, documents(counter))
    return found
