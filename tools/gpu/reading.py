# SPDX-License-Identifier: BSD-3-Clause
"""What the logs of the steps say, as one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PYTEST_END = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in ([\d.]+)s.*$", re.M)
QUESTION = re.compile(
    r"^\S*::(\w+)(?:\[(.*?)\])? (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*?)\))?", re.M
)
ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.M)
HAZARDS = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?", re.M)


@dataclass(frozen=True)
class Outcome:
    """How one command of a step ended."""

    line: Sequence[str]
    status: str  # "ok", "failed (N)", "out of time after N s", "missing: NAME", "no time left"
    seconds: float
    text: str  # what it printed


def pytest_line(text: str) -> str:
    """The last of pytest's totals in a log."""
    ends = PYTEST_END.findall(text)
    return f"{ends[-1][0]} in {float(ends[-1][1]):.0f} s" if ends else "no total: it did not finish"


def questions_line(text: str) -> str:
    """Answers by name; what is not a yes is named, a skipped one with its reason."""
    answers = QUESTION.findall(text)
    yes = sum(answer == "PASSED" for _, _, answer, _ in answers)
    others = []
    for name, case, answer, reason in answers:
        if answer == "PASSED":
            continue
        what = name.removeprefix("test_") + (f"[{case}]" if case else "")
        others.append(f"{what}: {'not asked, ' + reason if answer == 'SKIPPED' else 'NO'}")
    return "; ".join([f"{yes} yes", *others]) if answers else "no answers"


def sanitizer_line(tool: str, text: str) -> str:
    if hazards := HAZARDS.findall(text):
        shown, errors = hazards[-1]
        return f"{tool} {shown} hazards, {errors} errors"
    if errors := ERRORS.findall(text):
        return f"{tool} {errors[-1]} errors"
    return f"{tool} no summary"


def compiled_line(text: str) -> str:
    kind = re.findall(r"^library: (.+)$", text, re.M)
    seconds = re.findall(r"compiled in (\d+) s", text)
    parts = [f"library {kind[-1]}" if kind else "no library that can be loaded"]
    return ", ".join([*parts, *(f"compiled in {one} s" for one in seconds)])
