# SPDX-License-Identifier: BSD-3-Clause
"""What a mismatch comes to: it is found, made small, told how to be made again, and counted."""

import re

import pytest
import torch

import masked_loss_ext as mle
from tests.fuzz.choices import LENGTH, Choices
from tests.fuzz.engine import Mismatch, Property, run_code, run_seed
from tests.fuzz.properties import BY_NAME
from tools.fuzz import __main__ as command
from tools.fuzz import counts


def wrong_at_three(c):
    """Of three choices the second is wrong where it is above 40."""
    c.said["values"] = values = [c.byte() for _ in range(3)]
    assert values[1] <= 40
    c.saw("an_operator")


def test_a_mismatch_is_made_small_and_can_be_made_again():
    prop = Property("three", wrong_at_three)
    outcome = run_seed(prop, 1, 200)
    assert "values=[0, 41, 0]" in outcome.failure
    code = re.search(r"--only three --code (\w+)", outcome.failure)[1]
    assert code == "0029"
    with pytest.raises(Mismatch, match="three: AssertionError"):
        run_code(prop, bytes.fromhex(code).ljust(LENGTH, b"\0"))
    assert run_seed(prop, 1, 200).failure == outcome.failure


def test_bytes_that_are_not_there_are_the_plainest_choice():
    c = Choices(b"\x05")
    assert c.pick("abc") == "c" and c.pick("abc") == "a" and not c.chance(0.9)


def broken(monkeypatch, change):
    """masked_cross_entropy with another loss: change(loss, logits)."""
    right = mle.masked_cross_entropy

    def wrong(logits, *args, **keywords):
        result = right(logits, *args, **keywords)
        if isinstance(result, tuple):
            return (change(result[0], logits), *result[1:])
        return change(result, logits)

    monkeypatch.setattr(mle, "masked_cross_entropy", wrong)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_sweep"])
def test_a_loss_that_is_off_by_a_ten_thousandth_is_noticed(name, monkeypatch):
    broken(monkeypatch, lambda loss, logits: loss * (1 + 1e-4))
    assert " loss at (): got " in run_seed(BY_NAME[name], 1, 30).failure


def test_a_product_with_0_of_what_is_excluded_is_noticed(monkeypatch):
    """Which is 0 where that is a number."""

    def change(loss, logits):
        return loss + (0 * torch.where(logits == -torch.inf, 0, logits).double().sum()).to(loss)

    broken(monkeypatch, change)
    assert "garbage: loss" in run_seed(BY_NAME["cross_entropy"], 1, 60).failure


# --- the command ---------------------------------------------------------------------------------


def test_a_run_ends_after_so_many_cases(capsys):
    given = ["--only", "padding", "--cases", "50", "--problems", "5", "--seed", "3"]
    assert command.main(given) == 0
    out = capsys.readouterr().out
    assert "seeds from 3 on" in out
    assert re.search(r"property +padding +5 cases +0 mismatches", out)


def test_a_mismatch_ends_with_1_and_is_told(capsys, monkeypatch):
    props = (Property("three", wrong_at_three, ("an_operator",)),)
    monkeypatch.setattr(command, "PROPERTIES", props)
    monkeypatch.setattr(command, "BY_NAME", {"three": props[0]})
    assert command.main(["--cases", "300"]) == 1
    out = capsys.readouterr().out
    assert "--only three --code 0029" in out and "1 mismatches" in out
    with pytest.raises(AssertionError):
        command.main(["--only", "three", "--code", "0029"])
    assert command.main(["--only", "three", "--code", "0028"]) == 0


def test_runs_add_up(tmp_path):
    props = [Property("a", wrong_at_three, ("an_operator",)), Property("b", wrong_at_three)]
    for first in (7, 9, 9):
        found = counts.Counts(first, props)
        found.add(props[0], run_seed(props[0], 5, 1))
        path = counts.add(found, tmp_path)
    lines = path.read_text().splitlines()
    assert lines[0] == "kind,name,problems,cases,mismatches,seconds,seeds"
    assert lines[1:] == ["operator,an_operator,3,3,0,0,7 9", "property,a,3,3,0,0,7 9"]
    assert counts.add(counts.Counts(1, props), tmp_path) == path
    assert path.read_text().splitlines() == lines
