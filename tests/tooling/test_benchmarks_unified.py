# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss's benchmark: its plain components, what is checked before timing, its aims."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import agreement, harness, report, tables, unified  # noqa: E402
from benchmarks import repetition_plain as plain  # noqa: E402
from benchmarks import unified_problems as problems  # noqa: E402

SHAPE = (4, 64, 300)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """What torch.compile makes of a formula is the business of the benchmark's own check."""
    monkeypatch.setattr(problems, "compiled", lambda formula: formula)


@pytest.fixture(scope="module", params=["targets", "model"])
def checked(request):
    """A small problem and what the components give in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "compiled", lambda formula: formula)
        made = problems.loss_problem(SHAPE, request.param, "cpu")
    return made, agreement.truth_of(made)


# --- repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [plain.looped_counts, plain.sorted_counts])
def test_counts_by_hand(counts):
    tokens = torch.tensor([[1, 1, 1, 1, 2], [3, 4, 3, 4, 3], [7, 7, 7, 7, 7]])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[2, 2] = False
    # 11 11 11 12; 34 43 34 43; 77 and 77 beside the masked one
    pairs, windows, distinct, longest = counts(tokens, valid, 2)
    assert pairs.tolist() == [3, 2, 1] and windows.tolist() == [4, 4, 2]
    assert distinct.tolist() == [2, 2, 1] and longest.tolist() == [4, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sorting_counts_what_the_loop_counts(size):
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(3, (20, 17), generator=generator)
    valid = torch.rand(20, 17, generator=generator) < 0.8
    both = zip(
        plain.looped_counts(tokens, valid, size),
        plain.sorted_counts(tokens, valid, size),
        strict=True,
    )
    assert all(torch.equal(looped, by_sorting) for looped, by_sorting in both)


def test_candidates_by_hand():
    # At 5 the context 1 2 stood before 3 (at 2) and now stands before 4; at 8 it stood before both.
    tokens = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2, 5, 9, 1, 2, 3]])
    found = plain.repeated_ngram_candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), 3)
    assert found.nonzero()[:, 1:].tolist() == [[5, 2], [8, 2], [8, 5], [12, 5], [12, 8]]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[0, 1] = False  # the first 1 2 3 is gone
    found = plain.repeated_ngram_candidates(tokens, valid, 3)
    assert found.nonzero()[:, 1:].tolist() == [[8, 5], [12, 5], [12, 8]]


# --- data ----------------------------------------------------------------------------------------


def test_a_quarter_is_padding_and_every_penalty_has_something_to_find():
    tokens, mask = problems.text_data(4, 512, 1000)
    assert mask.float().mean().item() == 0.75 and not (mask[:, 1:] & ~mask[:, :-1]).any()
    pairs, _, _, longest = plain.sorted_counts(tokens, mask, problems.NGRAM)
    assert pairs.min() >= 50 and longest.min() >= 4
    assert (tokens[:, :20] == 0).any(1).tolist() == [True, False, True, False]
    assert plain.repeated_ngram_candidates(tokens, mask, problems.NGRAM).any()


# --- agreement -----------------------------------------------------------------------------------


def test_all_contenders_agree_in_every_component_and_gradient(checked):
    made, truth = checked
    assert len(truth[0]) == len(problems.COMPONENTS) + 2
    assert len(truth[1]) == 2 + problems.EXPERTS
    assert all(gradient.abs().max() > 0 for gradient in truth[1])
    refusals = {one.name: agreement.check(one, truth, made).refusal for one in made.contenders}
    assert refusals == dict.fromkeys(("ours", "eager", "eager, one softmax", "compile"), "")


def test_a_call_does_not_change_the_next_one(checked):
    made, _ = checked
    for one in made.contenders[:2]:
        (first, gradients), (second, again) = agreement.run_once(one), agreement.run_once(one)
        for before, after in zip((*first, *gradients), (*second, *again), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("place", range(1, len(problems.COMPONENTS) + 2))
def test_a_wrong_component_is_refused(checked, place):
    made, truth = checked
    ours = made.contenders[0]

    def wrong(*inputs):
        results = list(ours.call(*inputs))
        results[place] = results[place] * 1.001 + 1e-12
        return tuple(results)

    one = harness.Contender("wrong", wrong, ours.inputs, prepare=ours.prepare)
    assert agreement.check(one, truth, made).refusal.startswith("loss is off by")


@pytest.mark.parametrize(("place", "name"), [(0, "logits"), (3, "gates"), (7, "an expert")])
def test_a_wrong_gradient_in_any_input_is_refused(checked, place, name):
    made, truth = checked
    ours = made.contenders[0]

    def wrong(*inputs):
        total, *parts = ours.call(*inputs)
        extra = 1e-3 * inputs[place].flatten()[:7].sum()
        return total + extra - extra.detach(), *parts

    one = harness.Contender("wrong", wrong, ours.inputs, prepare=ours.prepare)
    assert agreement.check(one, truth, made).refusal.startswith("gradient is off by"), name


def test_a_gradient_that_is_missing_is_refused(checked):
    made, truth = checked
    ours = made.contenders[0]

    def detached(logits, targets, mask, gates, chosen, *experts):
        return ours.call(logits, targets, mask, gates, chosen, *(one.detach() for one in experts))

    one = harness.Contender("wrong", detached, ours.inputs, prepare=ours.prepare)
    assert agreement.check(one, truth, made).refusal.startswith("gradients of shapes [(4, 64, 300)")


# --- cases, aims, peaks --------------------------------------------------------------------------


def test_aims_are_promises_for_the_cpu_and_the_full_shapes():
    targets, model, counts = (case.tables()[0] for case in unified.cases("cpu"))
    assert targets.targets == model.targets == {"eager": 8}
    assert targets.peak_shares == model.peak_shares == {problems.ALONE: 0.5}
    assert counts.targets == {"Python loop": 50}
    for cases in (unified.cases("cpu", quick=True), unified.cases("cuda")):
        views = [case.tables()[0] for case in cases]
        assert not any(view.targets or view.peak_shares for view in views)


@pytest.mark.parametrize(("peak", "met"), [(50, "yes"), (51, "no")])
def test_a_peak_is_set_beside_that_of_another_call(peak, met, tmp_path):
    ours = harness.Contender("ours", len, [])
    beside = harness.Contender("alone", len, [], role="information")
    problem = harness.Problem([ours], len, bytes_moved=0, gradient_bytes=40, beside=[beside])
    view = harness.View("toy", "", peak_shares={"alone": 0.5})
    case = harness.Case("toy", "", (1,), torch.float32, lambda: problem, views=[view])
    timed = {name: harness.Samples(1, [time], [time]) for name, time in (("ours", 1), ("alone", 2))}
    agreed, peaks = {"ours": agreement.Agreement(0.0, 0.0)}, {"ours": peak, "alone": 100}
    rows = report.case_rows("toy", case, view, problem, agreed, timed, peaks)
    assert (rows[1]["peak_share"], rows[1]["peak_met"]) == (peak / 100, met)
    assert "peak_met" not in rows[0]
    assert f"{peak / 100:.2f} <= 0.5 {met}" in report.case_table(rows)
    setting = {"processor": "abacus", "capability": "beads", "threads": 2, "torch": "2.x"}
    report.write_csv(tmp_path / "toy_cpu.csv", [{**row, **setting} for row in rows])
    made = tables.regenerate("<!-- benchmark toy_cpu -->\n<!-- /benchmark -->", tmp_path)
    assert f"{peak / 40:.2f}, {peak / 100:.2f} of alone's (aim at most 0.5) |" in made


def test_a_quick_run_times_the_counts(tmp_path):
    path, threads = tmp_path / "out.csv", torch.get_num_threads()
    line = ["unified", "--quick", "--cases", "repetition_counts", "--csv", str(path)]
    try:
        command.main(line)
    finally:
        torch.set_num_threads(threads)
    rows = report.read_csv(path)
    names = ["ours", "Python loop", "eager, sorted", "compile, sorted"]
    assert [(row["contender"], row["status"]) for row in rows] == [
        (name, "timed") for name in names
    ]
    assert all(float(row["loss_error"]) == 0 for row in rows)
