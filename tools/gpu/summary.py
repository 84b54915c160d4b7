# SPDX-License-Identifier: BSD-3-Clause
"""The ten lines at the end."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import targets

from . import reading
from .reading import Outcome
from .steps import FIGURES, SANITIZERS

LINES = 10
WIDTH = 200


def said(outcomes: Sequence[Outcome]) -> str:
    return "\n".join(one.text for one in outcomes)


def troubles(outcomes: Sequence[Outcome]) -> str:
    """Statuses that are not ok, each once."""
    found = dict.fromkeys(one.status for one in outcomes if one.status != "ok")
    return f" ({', '.join(found)})" if found else ""


def step_line(name: str, outcomes: Sequence[Outcome], reader) -> str:
    if not outcomes:
        return f"{name}: not run"
    seconds = sum(one.seconds for one in outcomes)
    return f"{name}: {reader(outcomes)}{troubles(outcomes)}, {seconds:.0f} s"


def tests_text(outcomes: Sequence[Outcome]) -> str:
    suites = [one for one in outcomes if "pytest" in one.line]
    return " + ".join(reading.pytest_line(one.text) for one in suites)


def sanitizer_text(outcomes: Sequence[Outcome]) -> str:
    pairs = zip(SANITIZERS, outcomes, strict=False)
    return ", ".join(reading.sanitizer_line(tool, one.text) for tool, one in pairs)


READERS = {
    "build": lambda outcomes: reading.compiled_line(said(outcomes)),
    "questions": lambda outcomes: reading.questions_line(said(outcomes)),
    "tests": tests_text,
    "sanitizer": sanitizer_text,
    "benchmarks": lambda outcomes: f"{len(outcomes)} run",
}


def figure_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """How many targets are met, and those that are not."""
    verdicts = [one for row in rows for one in targets.verdicts_of(row)]
    missed = [one for one in verdicts if not one.met]
    lines = [f"targets: {len(verdicts) - len(missed)} met, {len(missed)} missed"]
    if missed:
        worst = sorted(missed, key=lambda one: one.shortfall, reverse=True)
        lines.append("missed: " + "; ".join(one.text() for one in worst))
    return lines


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of(
    gpus: Sequence[str], outcomes: Mapping[str, Sequence[Outcome]], results: Path, seconds: float
) -> list[str]:
    """At most ten, each cut to what a terminal can show in two."""
    lines = [f"GPU: {'; '.join(gpus) or 'none'}"]
    lines += [step_line(name, outcomes.get(name, ()), reader) for name, reader in READERS.items()]
    rows = read_rows(results / FIGURES)
    lines += figure_lines(rows) if rows else ["targets: no figures were written"]
    lines.append(f"{seconds:.0f} s in all; logs and figures: {results}")
    return [line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..." for line in lines[:LINES]]
