# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks: statistics by hand, wrong contenders refused, the CSV, the README's table."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    agreement,
    contenders,
    harness,
    machine,
    measure,
    memory,
    report,
    squared_error,
)


@pytest.fixture(autouse=True)
def same_thread_count_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- statistics --------------------------------------------------------------------------------


def test_summary_of_five_samples_with_an_outlier():
    assert harness.summarize([100.0, 1.0, 3.0, 2.0, 4.0]) == harness.Summary(3.0, 1.0, 2.0)


def test_summary_of_one_sample_has_no_spread():
    assert harness.summarize([7.0]) == harness.Summary(7.0, 7.0, 0.0)


@pytest.mark.parametrize(
    ("call_us", "calls"),
    [(5000.0, 1), (2000.0, 1), (1999.0, 2), (30.0, 67), (0.5, 1000), (0.0, 1000)],
)
def test_short_calls_are_repeated_until_a_sample_is_long_enough(call_us, calls):
    assert harness.calls_needed(call_us) == calls


@pytest.mark.parametrize(("target", "met"), [(2.5, "yes"), (2.6, "no"), (None, None)])
def test_ratios_are_taken_against_ours(target, met):
    ours = harness.Samples(1, [10.0, 12.0, 14.0], [5.0, 5.0, 5.0])
    rival = harness.Samples(1, [40.0, 20.0, 30.0], [9.0, 8.0, 7.0])
    row = report.contender_row("rival", rival, ours, target)
    assert (row["ratio_of_medians"], row["ratio_of_minima"]) == (2.5, 2.0)
    assert row["forward_median_us"] == 8.0
    assert row.get("met") == met
    assert "ratio_of_medians" not in report.contender_row("ours", ours, ours, None)


def test_relative_error_asks_for_an_exact_zero_where_the_truth_is_zero():
    truth = torch.tensor([2.0, 0.0, -4.0], dtype=torch.float64)
    assert agreement.relative_error(torch.tensor([2.0, 0.0, -5.0]), truth) == 0.25
    assert agreement.relative_error(torch.tensor([2.0, 1e-20, -4.0]), truth) > 1e6
    assert math.isnan(agreement.relative_error(torch.tensor([2.0, 0.0, math.nan]), truth))


# --- what is timed, and in which order ---------------------------------------------------------


def square(x):
    return (x**2).sum()


def problem_with(rival) -> harness.Problem:
    data = (torch.tensor([1.0, -2.0, 3.0], requires_grad=True),)
    calls = {"ours": square, "rival": rival}
    contenders = [harness.Contender(name, call, [data]) for name, call in calls.items()]
    return harness.Problem(contenders, square, bytes_moved=48, gradient_bytes=12)


WRONG = {
    "shifted": (lambda x: square(x) + 0.01, "loss is off by 7.1e-04"),
    "nan": (lambda x: square(x) * math.nan, "loss is off by nan"),
    "wrong_gradient": (lambda x: square(x) + x[0] - x[0].detach(), "gradient is off by 5.0e-01"),
    "does_not_run": (lambda x: x @ torch.ones(2), "RuntimeError"),
    "no_gradient": (lambda x: square(x.detach()), "RuntimeError"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_contender_with_a_wrong_result_is_refused_and_not_timed(wrong):
    rival, reason = WRONG[wrong]
    case = harness.Case("toy", "3 numbers", (3,), torch.float32, lambda: problem_with(rival))
    wanted = command.parser().parse_args(["squared_error", "--quick"])
    (table,) = measure.measure_case(case, wanted)
    rows = {row["contender"]: row for row in table}
    assert rows["rival"]["status"].startswith(f"refused: {reason}")
    assert "median_us" not in rows["rival"]
    assert rows["ours"]["median_us"] > 0
    assert "rival refused" in report.case_table(list(rows.values()))


def test_a_run_with_a_refusal_fails_after_it_has_written_what_it_has(monkeypatch, tmp_path):
    rival, _ = WRONG["shifted"]
    case = harness.Case("toy", "3 numbers", (3,), torch.float32, lambda: problem_with(rival))
    monkeypatch.setattr(command, "chosen_cases", lambda *_: [case])
    path = tmp_path / "out.csv"
    with pytest.raises(SystemExit, match="refused, so not timed: rival in toy"):
        command.main(["squared_error", "--quick", "--csv", str(path)])
    refused = [row["contender"] for row in report.read_csv(path) if row["status"] != "timed"]
    assert refused == ["rival"]


def test_rounds_are_interleaved_in_changing_order_and_gradients_never_accumulate(monkeypatch):
    monkeypatch.setattr(harness, "REGION_US", 0.0)  # one timed call a sample
    seen = []
    data = torch.ones(4, requires_grad=True)

    def named(name):
        def call(x):
            assert x.grad is None
            seen.append(name)
            return square(x)

        return harness.Contender(name, call, [(data,)])

    samples = harness.interleave([named(name) for name in "abc"], "cpu", rounds=8)
    turns = seen[-2 * 24 :]  # each is a call that warms the caches and one that is timed
    assert turns[::2] == turns[1::2]
    rounds = [tuple(turns[i : i + 6 : 2]) for i in range(0, len(turns), 6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(one.total_us) == 8 for one in samples.values())
    assert all(
        0 < forward < total
        for one in samples.values()
        for forward, total in zip(one.forward_us, one.total_us, strict=True)
    )
    assert data.grad is None


def test_the_copy_moves_as_many_bytes_as_the_formula_says():
    copy = contenders.plain_copy(1000, "cpu")
    source, target = copy.inputs[0]
    target.zero_()
    copy.call(source, target)
    assert source.nbytes + target.nbytes == 1000 and torch.equal(source, target)


def test_a_machine_without_a_free_core_is_called_crowded():
    cores = len(os.sched_getaffinity(0))
    meter = machine.NeighbourMeter()
    meter.other_cores = 0.05
    assert not meter.crowded(cores)
    meter.other_cores = 0.5
    assert meter.crowded(cores)


# --- squared_error -----------------------------------------------------------------------------


def test_bytes_of_a_token_case_by_hand():
    # 2 tokens of 3 channels, 1 valid: a pass reads 2 bytes of mask, 2 rows of 12, 2 weights of 4.
    rows, weights = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    mask = torch.tensor([[True, False]])
    assert squared_error.token_bytes(rows, rows, mask, weights, weights) == 2 * (2 + 24 + 8) + 24


def test_bytes_of_a_masked_mse_case_by_hand():
    values, mask = torch.zeros(1, 4), torch.tensor([[True, False, True, False]])
    assert squared_error.half_selected_bytes(values, values, mask) == 2 * (4 + 2 * 8) + 16


def test_right_padded_rows_are_unequal_and_60_percent_valid():
    mask = squared_error.token_data((32, 4096, 4), "right", torch.float32)[2]
    assert mask.float().mean().item() == pytest.approx(0.6, abs=1e-3)
    assert mask.sum(1).unique().numel() == 32
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "out.csv"
    line = [sys.executable, "-m", "benchmarks", "squared_error", "--quick", "--csv", str(path)]
    line += ["--cases", "token_small", "masked_mse_bf16"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "token_small" in done.stdout and "masked_mse_bf16" in done.stdout
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_quick_run_times_every_contender(quick_rows):
    names = {(row["case"], row["contender"]) for row in quick_rows}
    token = {"ours", "eager", "compile", "copy", "fresh fill"}
    half = {"ours", "boolean indexing", "where", "compiled where", "ours in fp32"}
    half |= {"copy", "fresh fill"}
    wanted = {("token_small", one) for one in token} | {("masked_mse_bf16", one) for one in half}
    assert names == wanted
    assert [row["status"] for row in quick_rows] == ["timed"] * len(wanted)


def test_quick_run_writes_sane_columns(quick_rows):
    for row in quick_rows:
        assert tuple(row) == report.COLUMNS
        assert 0 < float(row["min_us"]) <= float(row["median_us"])
        assert 0 < float(row["forward_median_us"]) <= 2 * float(row["median_us"])
        assert row["rounds"] == str(measure.QUICK_ROUNDS) and int(row["calls_per_sample"]) >= 1
        assert row["threads"] == "2" and row["torch"] == torch.__version__
        assert row["processor"] and row["capability"] and row["date"]
        if row["contender"] not in ("ours", "copy", "fresh fill"):
            assert float(row["ratio_of_medians"]) > 0 and float(row["gradient_error"]) < 2**-8
    ours = next(row for row in quick_rows if row["contender"] == "ours")
    rate = float(ours["bytes_moved"]) / float(ours["median_us"]) / 1e3
    assert float(ours["gb_per_s"]) == pytest.approx(rate, rel=1e-4)


def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(SystemExit, match="among token_large, .*, masked_mse_bf16, got nonsense"):
        command.main(["squared_error", "--cases", "nonsense"])


@pytest.mark.parametrize("partial", [["--quick"], ["--cases", "a"], ["--rounds", "2"]])
def test_a_partial_run_leaves_the_committed_figures_alone(partial):
    assert command.csv_path(command.parser().parse_args(["squared_error", *partial])) is None
    full = command.csv_path(command.parser().parse_args(["squared_error"]))
    assert full == ROOT / "benchmarks" / "results" / "squared_error_cpu.csv"


# --- memory ------------------------------------------------------------------------------------

needs_high_water_mark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="this system does not let a process reset its memory high-water mark",
)


@needs_high_water_mark
def test_peak_sees_memory_that_is_gone_when_the_step_returns():
    def step():
        one = torch.ones(16 << 20)  # 64 MiB each, both alive at once
        return (one + 1).sum().item()

    assert memory.peak_extra_bytes(step) == pytest.approx(128 << 20, rel=0.1)


@needs_high_water_mark
def test_ours_needs_the_gradient_and_nothing_else_of_its_size():
    gradient = 64 * 16384 * 4
    peaks = {}
    for name in ("ours", "where"):
        peaks[name], trouble = memory.measure_apart("squared_error", "masked_mse", name, "cpu", 2)
        assert trouble == ""
    assert 0.9 < peaks["ours"] / gradient < 1.3
    assert peaks["where"] / gradient > 2
