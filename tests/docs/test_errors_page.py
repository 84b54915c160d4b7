# SPDX-License-Identifier: BSD-3-Clause
"""docs/guide/errors.md has what is said of wrong calls, and what to do about each."""

import os
import random
import re

import pytest

from tools import error_advice, errors

pytestmark = pytest.mark.slow
EVERY = os.environ.get("MASKED_LOSS_EXT_INVALID") == "all"
TEXT = errors.PAGE.read_text()


def listed():
    """The rules of each function and argument that the page has; those of all tensors are one."""
    found, function = {}, ""
    for line in TEXT.partition("## By function")[2].splitlines():
        row = re.fullmatch(r"\| (?:`([\w.]+)`)? ?\| `(\w+)` \| (.*) \|", line)
        if row:
            function = row[1] or function
            found[function, row[2]] = set(re.findall(r"`([^`]*)`", row[3]))
            if "a tensor" in row[3]:
                found[function, row[2]].add("a tensor")
    return found


def test_what_is_said_of_wrong_calls_is_on_the_page():
    page, wrong, calls = listed(), [], 0
    for entry, argument in errors.entries():
        ways = errors.wrong_ways(entry, argument)
        for way in random.Random(f"{entry.id} {argument}").sample(ways, min(1, len(ways))):
            found = errors.said(entry, argument, way)
            if found:
                calls += 1
                named, rule = found
                rules = page.get((entry.name, named), set())
                said = "a tensor" if errors.OF_TENSORS.fullmatch(rule) else rule
                if said not in rules:
                    wrong.append(f"{entry.name}: {named} must {rule}")
                assert f"`{errors.of_any(rule)}`" in TEXT.partition("## By function")[0], rule
    assert calls > 400
    assert not wrong, "python -m tools.errors --write: " + "; ".join(wrong)


@pytest.mark.skipif(not EVERY, reason="a minute: MASKED_LOSS_EXT_INVALID=all")
def test_the_page_is_made_of_every_wrong_call():
    errors.main(["--check"])


def test_every_advice_is_given():
    """A pattern that fits no rule is one that is gone."""
    rules = re.findall(r"`([^`]*)`", TEXT.partition("## By function")[0])
    patterns = [pattern for pattern, _ in error_advice.ADVICE]
    unused = [p for p in patterns if not any(re.fullmatch(p, rule) for rule in rules)]
    assert not unused
    with pytest.raises(ValueError, match="says nothing"):
        error_advice.advice("be lucky")


def test_numbers_of_one_call_are_not_in_a_rule():
    assert errors.normal("have the shape of logits [2, 4, 5]") == "have the shape of logits [...]"
    assert errors.normal("be on the device of x (cpu)") == "be on the device of x"
    assert (
        errors.normal("be in [0, 11) or ignore_index -100") == "be in [0, n) or ignore_index -100"
    )
