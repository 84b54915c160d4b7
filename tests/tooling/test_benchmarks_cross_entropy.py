# SPDX-License-Identifier: BSD-3-Clause
"""The cross entropy benchmark: its data, its contenders' agreement, floors, views and levels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    BENCHMARKS,
    agreement,
    contenders,
    cross_entropy,
    harness,
    machine,
    memory,
    report,
    tables,
)
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import cross_entropy_problems as problems  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = (10, 300)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """What torch.compile makes of a formula is the business of the benchmark's own check."""
    monkeypatch.setattr(problems, "compiled", lambda formula: formula)


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ignored", "rows"), [(0.0, 0), (0.4, 4), (0.9, 9)])
def test_the_share_of_ignored_rows_is_exact_and_labels_are_in_range(ignored, rows):
    logits, target = problems.row_data(SHAPE, FP32, ignored)
    counted = target != problems.IGNORED
    assert logits.shape == SHAPE and int((~counted).sum()) == rows
    assert target[counted].min() >= 0 and target[counted].max() < 300


def test_bytes_of_a_case_by_hand():
    # 6 of 10 rows of 300 classes in 2 bytes are read twice, all 10 are written.
    made = problems.small_problem(SHAPE, BF16, 0.4, "cpu")
    assert made.bytes_moved == 2 * 6 * 300 * 2 + 10 * 300 * 2
    assert made.gradient_bytes == 10 * 300 * 2
    assert problems.forward_problem(SHAPE, FP32, 0.4, "cpu").bytes_moved == 6 * 300 * 4


# --- agreement -----------------------------------------------------------------------------------

MADE = {
    "train_fp32": lambda: problems.train_problem(SHAPE, FP32, 0.4, "cpu"),
    "train_bf16": lambda: problems.train_problem(SHAPE, BF16, 0.4, "cpu"),
    "train_none_ignored": lambda: problems.train_problem(SHAPE, FP32, 0.0, "cpu"),
    "forward": lambda: problems.forward_problem(SHAPE, FP32, 0.4, "cpu"),
    "statistics": lambda: problems.statistics_problem(SHAPE, FP32, 0.4, "cpu"),
}


@pytest.mark.parametrize("name", MADE)
def test_all_contenders_agree_with_the_reference(name):
    made = MADE[name]()
    truth = agreement.truth_of(made)
    refusals = {one.name: agreement.check(one, truth, made).refusal for one in made.contenders}
    assert refusals == dict.fromkeys(refusals, "") and list(refusals)[0] == "ours"
    assert len(truth[1]) == name.startswith("train")


def test_the_call_in_place_finds_its_logits_again_and_leaves_those_of_the_others():
    made = problems.train_problem(SHAPE, FP32, 0.4, "cpu")
    in_place = next(one for one in made.contenders if one.name == "ours in place")
    scratch, logits = in_place.inputs[0][0], made.contenders[0].inputs[0][0]
    before = logits.detach().clone()
    first, (gradient,) = agreement.run_once(in_place)
    assert gradient.data_ptr() == scratch.data_ptr()
    gradient = gradient.clone()
    second, (again,) = agreement.run_once(in_place)
    assert torch.equal(first[0], second[0]) and torch.equal(gradient, again)
    assert torch.equal(logits, before)
    in_place.prepare(scratch)
    assert torch.equal(scratch, before)


def statistics_of_a_wrong_row(logits, mask):
    lse, entropy = problems.eager_statistics(logits, mask)
    return lse, entropy + (entropy == entropy.max()) * 0.01


WRONG = {
    "entropy": (statistics_of_a_wrong_row, "loss is off by"),
    "unmasked": (lambda x, mask: torch.logsumexp(x, -1), "loss is off by"),
    "shape": (lambda x, mask: torch.logsumexp(x, -1)[1:], "results of shapes [(9,)]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_statistic_is_refused(wrong):
    made = problems.statistics_problem(SHAPE, FP32, 0.4, "cpu")
    call, refusal = WRONG[wrong]
    found = agreement.check(
        harness.Contender("wrong", call, made.contenders[0].inputs), agreement.truth_of(made), made
    )
    assert found.refusal.startswith(refusal)


def test_an_element_below_the_unit_may_be_off_by_as_much_as_one_of_it():
    truth = torch.tensor([1e-3, 1e-9, 0.0], dtype=torch.float64)
    value = truth + torch.tensor([0.0, 1e-9, 0.0])
    assert agreement.relative_error(value, truth) == pytest.approx(1.0)
    assert agreement.relative_error(value, truth, unit=1e-4) == pytest.approx(1e-5)
    # The gradient of a row that is ignored is exactly 0, whatever the unit.
    assert agreement.relative_error(truth + 1e-12, truth, unit=1e-4) > 1e6


# --- floors --------------------------------------------------------------------------------------


def test_fresh_memory_begins_at_a_huge_page_and_can_be_written():
    size = contenders.HUGE_PAGE + 12
    fresh = contenders.huge_empty(size, "cpu")
    assert fresh.numel() == size and fresh.data_ptr() % contenders.HUGE_PAGE == 0
    assert fresh.fill_(1).sum() == size


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_floor_reads_as_many_bytes_as_count(dtype):
    made = problems.train_problem(SHAPE, dtype, 0.4, "cpu")
    for floor in made.beside:
        (words,) = floor.inputs[0]
        assert floor.role == "floor" and words.nbytes == 6 * 300 * dtype.itemsize
        assert floor.call(words).nbytes == made.gradient_bytes


def test_the_read_that_is_timed_is_a_full_reduction():
    words = torch.tensor([1.0, 2.0, 3.0])
    assert contenders.fastest_read(words)(words).item() in (6.0, 3.0, 14.0)


# --- views ---------------------------------------------------------------------------------------


def toy_rows(view: harness.View, peaks=None) -> dict[str, dict]:
    times = {"ours": 10.0, "ours in place": 5.0, "slow": 40.0, "floor": 4.0}
    made = [harness.Contender(name, len, []) for name in list(times)[:3]]
    floor = harness.Contender("floor", len, [], role="floor")
    problem = harness.Problem(made, len, bytes_moved=100, gradient_bytes=50, beside=[floor])
    case = harness.Case("toy", "", (1,), FP32, lambda: problem, views=[view])
    timed = {name: harness.Samples(1, [time], [time]) for name, time in times.items()}
    agreed = {one.name: agreement.Agreement(0.0, 0.0) for one in made}
    rows = report.case_rows("toy", case, view, problem, agreed, timed, peaks or {})
    return {row["contender"]: row for row in rows}


def test_a_view_sets_its_base_beside_the_chosen_ones():
    view = harness.View(
        "toy_inplace", "in place", "ours in place", ("slow",), {"slow": 9}, peak_limit=0.01
    )
    rows = toy_rows(view, {"ours in place": 1, "slow": 100})
    assert list(rows) == ["ours in place", "slow"]
    assert (rows["slow"]["ratio_of_medians"], rows["slow"]["met"]) == (8.0, "no")
    assert rows["ours in place"]["role"] == "ours" and rows["slow"]["case"] == "toy_inplace"
    assert (rows["ours in place"]["peak_over_gradient"], rows["slow"]["peak_over_gradient"]) == (
        0.02,
        2.0,
    )
    assert rows["ours in place"]["peak_met"] == "no" and "peak_met" not in rows["slow"]


@pytest.mark.parametrize(("most", "met"), [(2.6, "yes"), (2.4, "no"), (None, None)])
def test_from_a_floor_the_distance_is_told_and_has_an_upper_limit(most, met):
    row = toy_rows(harness.View("toy", "", limits={"floor": most}))["floor"]
    assert (row["distance"], row["ratio_of_medians"], row.get("met")) == (2.5, 0.4, met)
    assert row["role"] == "floor"


def test_a_contender_with_a_limit_is_a_floor_under_a_name_of_its_own():
    view = harness.View(
        "toy",
        "",
        beside=("ours in place",),
        limits={"ours in place": 2},
        names={"ours in place": "x"},
    )
    row = toy_rows(view)["x"]
    assert (row["role"], row["distance"], row["met"]) == ("floor", 2.0, "yes")


def test_a_table_tells_distances_and_small_peaks(tmp_path):
    view = harness.View("toy", "in place", limits={"floor": 2.2}, peak_limit=0.01)
    rows = list(toy_rows(view, {"ours": 0.1}).values())
    setting = {"processor": "abacus", "capability": "beads", "threads": 2, "torch": "2.x"}
    rows = [{**row, **setting, "date": "today"} for row in rows]
    rows[1]["rounds"] = 7
    report.write_csv(tmp_path / "toy_cpu.csv", rows)
    made = tables.regenerate("<!-- benchmark toy_cpu -->\n<!-- /benchmark -->", tmp_path)
    cells = ("ours in place 0.5x, slow 4.0x", "2.5x floor (aim at most 2.2x)", "0.0")
    assert " | ".join(cells) in made and "0.002 (aim at most 0.01)" in made
    assert "Median of 1 to 7 rounds" in made


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="this system does not let a process reset its memory high-water mark",
)
def test_the_call_in_place_needs_next_to_nothing_beside_the_logits():
    peak, trouble = memory.measure_apart("cross_entropy", "train_32k", "ours in place", "cpu", 2)
    assert trouble == "" and peak < 512 * 32000 * 4 / 100


# --- cases and levels ----------------------------------------------------------------------------


def aims(case: harness.Case) -> list:
    views = case.tables()
    found = [aim for view in views for aim in (*view.targets.values(), *view.limits.values())]
    return [aim for aim in [*found, *(view.peak_limit for view in views)] if aim is not None]


def test_aims_are_promises_for_the_cpu_the_full_shapes_and_the_best_level():
    full = {case.name: case for case in cross_entropy.cases("cpu")}
    assert full["train_128k"].tables()[0].targets == {"eager": 6, "compile": 3}
    assert full["train_128k"].tables()[1].targets == {"eager": 12, "compile": 6}
    assert not any(aims(case) for case in full.values() if case.level)
    assert not any(aims(case) for case in cross_entropy.cases("cpu", quick=True))
    cuda = cross_entropy.cases("cuda")
    assert not any(aims(case) or case.level for case in cuda)
    tables = [view.name for case in full.values() for view in case.tables()]
    assert len(tables) == len(set(tables))


def test_every_name_in_a_view_is_one_of_its_contenders():
    for case in cross_entropy.cases("cpu", quick=True):
        made = case.make()
        names = {one.name for one in [*made.contenders, *made.beside]}
        for view in case.tables():
            assert {view.base, *(view.beside or ()), *view.targets, *view.limits} <= names


def test_a_level_that_this_process_cannot_have_is_refused(monkeypatch):
    current = torch.ops.masked_loss_ext.cpu_capability()
    other = "avx2" if current != "avx2" else "default"
    monkeypatch.setenv(machine.LEVEL, current)
    with pytest.raises(SystemExit, match=f"--level: level {other} cannot be had, only {current}"):
        command.main(["cross_entropy", "--quick", "--level", other])


def test_figures_of_a_level_have_a_file_of_their_own():
    wanted = command.parser().parse_args(["cross_entropy", "--level", "avx2"])
    assert command.csv_path(wanted).name == "cross_entropy_cpu_avx2.csv"


def test_all_runs_every_benchmark_with_the_same_switches(monkeypatch):
    lines = []

    def run(line, **_):
        lines.append(line[3:])
        return subprocess.CompletedProcess(line, returncode=len(lines) == 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="failed: squared_error"):
        command.main(["all", "--quick", "--rounds", "2"])
    assert lines == [[name, "--quick", "--rounds", "2"] for name in BENCHMARKS]


def test_a_quick_run_measures_lower_levels_in_a_process_of_their_own(tmp_path):
    if torch.ops.masked_loss_ext.cpu_capability() != "avx512":
        pytest.skip("this processor has no level above avx2")
    path = tmp_path / "out.csv"
    line = [sys.executable, "-m", "benchmarks", "cross_entropy", "--quick", "--csv", str(path)]
    line += ["--cases", "forward_32k_avx2", "train_16", "--contenders", "eager"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {row["case"]: row["capability"] for row in report.read_csv(path)}
    level = {"forward_32k_avx2": "avx2", "forward_32k_avx2_stats": "avx2"}
    assert found == {"train_16": "avx512", **level}
    assert "forward_32k_avx2_stats" in done.stdout and "without statistics" in done.stdout
