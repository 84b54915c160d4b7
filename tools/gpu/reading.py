# SPDX-License-Identifier: BSD-3-Clause
"""What the logs of the steps say, as one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PYTEST_END = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in ([\d.]+)s.*$", re.M)
QUESTION = re.compile(
    r"^\S*::(\w+)(?:\[(.*?)\])? (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\)\s+\[)?", re.M
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
    """Answers question by question: how many yes, which are not, and why one was not asked."""
    asked: dict[str, list[tuple[str, str, str]]] = {}
    for name, *answer in QUESTION.findall(text):
        asked.setdefault(name.removeprefix("test_"), []).append(tuple(answer))
    return "; ".join(f"{name} {answers_text(them)}" for name, them in asked.items()) or "no answers"


def answers_text(answers: Sequence[tuple[str, str, str]]) -> str:
    yes = sum(answer == "PASSED" for _, answer, _ in answers)
    no = [case or "it" for case, answer, _ in answers if answer in ("FAILED", "ERROR")]
    reasons = dict.fromkeys(reason for _, answer, reason in answers if answer == "SKIPPED")
    parts = [f"{yes} yes"] if yes else []
    parts += [f"{len(no)} NO ({', '.join(no)})"] if no else []
    parts += [f"not asked ({', '.join(reasons)})"] if reasons else []
    return ", ".join(parts)


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
