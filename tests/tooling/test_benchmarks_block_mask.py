# SPDX-License-Identifier: BSD-3-Clause
"""The block mask benchmark: equality before timing, aims, what is not attempted, compaction."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import agreement, block_mask, compaction, harness, measure, report, tables  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """What torch.compile makes of create_block_mask is the business of the benchmark's check."""
    monkeypatch.setattr(block_mask, "compiled", lambda create: create)


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", block_mask.MODES)
def test_ours_equals_create_block_mask_in_all_eight_tensors(mode):
    made = block_mask.problem_of(3000, mode, True, "cpu")  # ragged: 2560 tokens and padding
    truth = agreement.truth_of(made)
    assert len(truth[0]) == 8
    for one in made.contenders:
        found = agreement.check(one, truth, made)
        assert (found.refusal, found.loss_error) == ("", 0.0)


@pytest.mark.parametrize("place", range(8))
def test_one_wrong_index_in_any_tensor_is_refused(place):
    made = block_mask.problem_of(1280, "causal", False, "cpu")
    ours = made.contenders[0]

    def wrong(keep_k):
        found = [tensor.clone() for tensor in ours.call(keep_k)]
        found[place].view(-1)[-1] += 1
        return tuple(found)

    truth = agreement.truth_of(made)
    refusal = agreement.check(harness.Contender("wrong", wrong, ours.inputs), truth, made).refusal
    assert refusal.startswith("loss is off by")


# --- cases and aims ------------------------------------------------------------------------------


def test_aims_are_promises_for_the_cpu_the_full_sizes_and_mode_full():
    views = {case.name: case.tables()[0] for case in block_mask.cases("cpu")}
    assert len(views) == 9
    assert views["full_4k"].targets == {"eager": 300}
    assert views["full_16k"].targets == {"eager": 3000, "compile": 100}
    limits = {name: view.time_limit_us for name, view in views.items() if view.time_limit_us}
    assert limits == {"full_4k": 100, "full_16k": 400, "full_64k": 5000}
    assert views["full_64k"].peak_limit_bytes == 16 << 20
    for cases in (block_mask.cases("cpu", quick=True), block_mask.cases("cuda")):
        for case in cases:
            (view,) = case.tables()
            assert not view.targets and view.time_limit_us is None
            assert view.peak_limit_bytes is None


def test_eager_is_not_attempted_where_it_would_allocate_34_gb():
    case = next(case for case in block_mask.cases("cpu") if case.name == "causal_64k")
    made = case.make()
    ours, eager, other = made.contenders
    assert eager.skip == "one allocation of 34.4 GB" and not ours.skip and not other.skip
    assert made.reference is other.call and made.reference is not eager.call


@pytest.mark.parametrize(("limit", "met"), [(10.0, "yes"), (9.9, "no"), (None, None)])
def test_the_tables_tell_times_sizes_and_their_aims(limit, met, tmp_path):
    data = [(torch.ones(1, dtype=torch.int64),)]
    ours = harness.Contender("ours", len, data)
    huge = harness.Contender("huge", len, data, skip="too large")
    problem = harness.Problem([ours, huge], len, bytes_moved=0, gradient_bytes=0)
    size = None if limit is None else 2 << 20
    view = harness.View("toy", "", time_limit_us=limit, peak_limit_bytes=size)
    case = harness.Case("toy", "", (1,), torch.bool, lambda: problem, views=[view])
    agreed = {"ours": agreement.Agreement(0.0, float("nan"))}
    timed = {"ours": harness.Samples(1, [10.0], [10.0])}
    peaks = {"ours": 3 << 20}
    rows = report.case_rows("toy", case, view, problem, agreed, timed, peaks)
    assert rows[0].get("time_met") == met
    assert rows[0].get("peak_met") == (None if limit is None else "no")
    assert not measure.is_refused(rows[1]) and "median_us" not in rows[1]
    table = report.case_table(rows)
    assert "3.0 MiB" in table and "huge not attempted: too large" in table
    setting = {"processor": "abacus", "capability": "beads", "threads": 2, "torch": "2.x"}
    report.write_csv(tmp_path / "toy_cpu.csv", [{**row, **setting} for row in rows])
    made = tables.regenerate("<!-- benchmark toy_cpu -->\n<!-- /benchmark -->", tmp_path)
    aims = (
        ("", "")
        if limit is None
        else (f" (aim at most {limit / 1e3:g} ms)", " (aim at most 2.0 MiB)")
    )
    assert f"| 10.0 us{aims[0]} | huge not attempted (too large) | ours 3.0 MiB{aims[1]} |" in made


def test_a_quick_run_times_the_masks_and_skips_nothing(tmp_path):
    path = tmp_path / "out.csv"
    line = ["block_mask", "--quick", "--cases", "causal_4k", "causal_last_16k"]
    threads = torch.get_num_threads()
    try:
        command.main([*line, "--csv", str(path)])
    finally:
        torch.set_num_threads(threads)
    rows = report.read_csv(path)
    assert [(row["case"], row["contender"]) for row in rows] == [
        (case, one) for case in ("causal_4k", "causal_last_16k") for one in ("ours", "eager")
    ]
    assert {row["status"] for row in rows} == {"timed"}
    assert all(float(row["median_us"]) > 0 and row["gb_per_s"] == "" for row in rows)


# --- compaction ----------------------------------------------------------------------------------


def test_counts_of_one_draw_by_hand():
    # 2 samples of 128 + 128; the first keeps 128 + 128, the second 128 + 64.
    found = compaction.draw_counts([[128, 128]] * 2, [128, 64], "full", 128)
    # Sample 1: 4 full blocks. Sample 2: 1 full block, 3 partial ones. Nothing moves when compacted.
    for form in compaction.FORMS:
        assert (found[f"{form}_blocks"], found[f"{form}_partial"]) == (8, 3)
    assert (found["compact_tokens"], found["aligned_tokens"]) == (448, 512)
    assert found["pairs"] == 256**2 + 192**2


def test_compaction_moves_samples_off_the_blocks_and_alignment_puts_them_back():
    found = compaction.draw_counts([[128, 128]] * 2, [64, 128], "full", 128)
    # 192 and 256 tokens: sample 2 lies in blocks 1 to 3 instead of 2 and 3.
    assert found["masked_blocks"] == found["aligned_blocks"] == 8
    assert found["compact_blocks"] == 4 + 9 - 1  # block (1, 1) is of both samples
    assert (found["compact_tokens"], found["aligned_tokens"]) == (448, 512)


def test_layer_cost_by_hand():
    assert compaction.layer_cost(10, 3, 2, 5) == 24 * 25 * 10 + 4 * 5 * 3 * 4


def test_the_committed_counts_are_what_is_counted():
    plan = compaction.PLANS[5]  # the smallest
    row = compaction.plan_row(plan)
    committed = report.read_csv(compaction.PATH)
    assert len(committed) == len(compaction.PLANS)
    assert committed[5] == {name: report.as_text(row.get(name)) for name in compaction.COLUMNS}


def test_compaction_of_wide_networks_saves_what_the_docstring_says():
    rows = report.read_csv(compaction.PATH)
    shares = {
        row["layout"]: [float(row[f"{form}_layer_saved"]) for form in ("masked", "compact")]
        for row in rows
        if (row["width"], row["keep_k"], row["mode"]) == ("1792", "uniform", "full")
        and row["block"] == "128"
    }
    assert shares["1024+256 x8"] == pytest.approx([0.01, 0.10], abs=0.01)
    assert shares["256+256 x8"] == pytest.approx([0.01, 0.24], abs=0.01)


def test_the_tables_hold_a_line_for_each_plan_and_no_varlen_for_causal_last():
    row = compaction.plan_row((64, 64, 2, "pow2", "causal_last", 128, 32), draws=2)
    text = compaction.tables([row])
    assert text.count("64+64 x2 pow2") == 2 and text.endswith("/ -")
    assert row["pairs_saved"] > 0 and "varlen_layer_saved" not in row
