# SPDX-License-Identifier: BSD-3-Clause
"""Random malformed calls straight at every operator, in a child: a share of what
``python -m tools.malformed`` makes, and whether it sees a child that dies."""

import sys

import pytest
from operator_calls import operators

from tools.malformed.__main__ import Run

pytestmark = pytest.mark.slow
CALLS = 200  # of each operator

BROKEN = """
import sys, time, torch
from tools.malformed import calls, child
from tools.malformed.fence import between_closed_pages

def outcome(number):
    if number == 1:
        return "unexplained", "a text of nobody"
    if number == 2:
        at_start = between_closed_pages(torch.ones(3), at_end=False)
        assert at_start.sum() == 3
        between_closed_pages(torch.ones(3)).as_strided((4,), (1,)).sum()
    if number == 3:
        time.sleep(1000)
    if number == 4:
        sys.exit(7)
    return "refused", ""

calls.malformed = lambda operator, seed, number: number
calls.outcome = outcome
calls.described = str
child.main(*sys.argv[1:])
"""


class Broken(Run):
    def command(self):
        return [sys.executable, "-c", BROKEN]


def test_what_goes_wrong_is_seen(tmp_path):
    """A read beyond a tensor, a call without an end, an exit, an error without a reason."""
    run = Broken(["repetition_counts"], 6, seed=0, patience=20)
    (row,) = run.finish(tmp_path)
    counts = {"refused": 2, "accepted": 0, "unexplained": 1, "signals": 2, "hangs": 1}
    assert row == {"operator": "repetition_counts", "calls": 6, **counts}
    assert [one.number for one in run.stopped] == [2, 3, 4]
    assert [one.why for one in run.stopped] == [
        "killed by SIGSEGV", "no end after 20 s", "ended with 7",
    ]  # fmt: skip
    assert "a text of nobody" in run.stopped[0].text and "tensor" not in run.said


def test_no_call_kills_hangs_or_fails_without_a_reason(tmp_path):
    run = Run(operators(), CALLS, seed=0, patience=60)
    rows = run.finish(tmp_path)
    assert not run.stopped, "\n".join(
        f"{one.operator} {one.number} {one.text}" for one in run.stopped
    )
    assert not run.said, run.said
    assert {row["operator"] for row in rows} == set(operators())
    for row in rows:
        assert row["refused"] + row["accepted"] == row["calls"] == CALLS
        assert row["refused"] > 0
