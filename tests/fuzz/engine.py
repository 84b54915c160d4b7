# SPDX-License-Identifier: BSD-3-Clause
"""A property is a function of Choices that raises where an operator is wrong; here hypothesis runs
it, on bytes of a seed, and makes what fails as small as it can."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.choices import LENGTH, Choices

CODES = st.binary(min_size=LENGTH, max_size=LENGTH)


@dataclass(frozen=True)
class Property:
    name: str
    check: Callable[[Choices], None]
    operators: tuple[str, ...] = ()  # native ones that its cases compare
    share: float = 1.0  # of the cases of a run; less where a case takes long
    examples: int = 150  # in `make test`


@dataclass
class Outcome:
    """Of one seed. calls: of operators that were compared; problems: those that had any; failure:
    what is told of a mismatch, or nothing."""

    calls: Counter
    problems: Counter
    cases: int
    seconds: float
    failure: str = ""


class Mismatch(AssertionError):
    """Carries the case in words, and the bytes that make it again."""


def run_code(prop: Property, code: bytes) -> Choices:
    """One case."""
    choices = Choices(code)
    try:
        prop.check(choices)
    except Exception as error:
        shortest = code.rstrip(b"\0").hex() or "00"
        case = ", ".join(f"{name}={value}" for name, value in choices.said.items())
        text = f"{prop.name}: {type(error).__name__}: {error}\n  case: {case}\n"
        text += f"  again: python -m tools.fuzz --only {prop.name} --code {shortest}"
        raise Mismatch(text) from error
    return choices


def run_seed(prop: Property, number: int, examples: int) -> Outcome:
    """So many cases of one seed, the same each time, and the smallest mismatch among them."""
    calls, problems, cases = Counter(), Counter(), 0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(CODES)
    def test(code):
        nonlocal cases
        choices = run_code(prop, code)
        cases += 1
        calls.update(choices.reached)
        problems.update(set(choices.reached))

    start = time.perf_counter()
    failure = ""
    try:
        test()
    except Mismatch as error:
        failure = str(error)
    return Outcome(calls, problems, cases, time.perf_counter() - start, failure)
