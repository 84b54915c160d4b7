# SPDX-License-Identifier: BSD-3-Clause
"""Workloads: how much of a shape is run, that all contenders agree, who is left out or refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    agreement,
    block_mask,
    cross_entropy_problems,
    curves,
    linear_problems,
    linear_rivals,
    linear_truth,
    memory,
    report,
    rivals,
    squared_error,
    sweep,
    workload_command,
    workload_problems,
    workloads,
)

GIB = 1 << 30
MODULES = (cross_entropy_problems, linear_problems, squared_error, workload_problems)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """What torch.compile makes of a formula is the business of the benchmark's own check."""
    threads = torch.get_num_threads()
    for module in MODULES:
        monkeypatch.setattr(module, "compiled", lambda formula: formula)
    monkeypatch.setattr(block_mask, "compiled", lambda create: create)
    yield
    torch.set_num_threads(threads)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "threads", "gib", "shape"),
    [
        ("gpt2", 2, 24, (1024, 768, 50257)),  # 0.2316e9 flop a row, 250e9 for two threads
        ("gpt2", 1, 24, (512, 768, 50257)),
        ("gemma2_2b", 2, 24, (64, 2304, 256000)),  # 3.54e9 a row
        ("llama3_logits", 2, 24, (1024, 128256)),  # 0.5 MB a row, 0.75 GiB for the logits
        ("llama3_logits", 2, 12, (512, 128256)),
        ("rl_qwen2.5_0.5b", 2, 24, (8, 16, 32, 896, 151936)),  # 0.817e9 a token
        ("mae", 2, 24, (64, 196, 768)),
    ],
)
def test_so_much_of_a_workload_is_run(name, threads, gib, shape):
    whole = workloads.by_name(name)
    assert workloads.scaled(whole, "cpu", threads, gib * GIB).shape == shape
    assert workloads.scaled(whole, "cuda", threads, gib * GIB) == whole


def test_a_head_that_does_not_fit_is_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setattr(workload_command.machine, "memory_bytes", lambda device: 8 * GIB)
    every = [workloads.here(workloads.by_name(name), "cpu", 2) for name in ("gemma2_2b", "gpt2")]
    kept = workload_command.that_fit(every, "cpu")
    assert [one.name for one in kept] == ["gpt2"]
    said = "gemma2_2b left out: needs about 12 GiB of memory, 8 are there"
    assert said in capsys.readouterr().err


def test_every_workload_says_where_its_shape_comes_from():
    assert len(set(workloads.NAMES)) == len(workloads.WORKLOADS)
    for one in workloads.WORKLOADS:
        assert len(one.origin) > 20 and len(one.shape) == len(workloads.KINDS[one.kind].axes)
    assert {one.kind for one in workloads.WORKLOADS} == set(workloads.KINDS)


# --- data and truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [64, 300, 1000])
def test_the_truth_of_a_large_head_is_the_reference(classes):
    data = hidden, weight, target = linear_problems.layer_data((20, 8, 300), torch.float32, 0.4)
    (value,), (rows, head) = linear_truth.head_truth(*data, classes)
    leaves = [one.detach().double().requires_grad_(True) for one in (hidden, weight)]
    exact = linear_problems.true_mean(*leaves, target)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-13, atol=0)
    expected = torch.autograd.grad(exact, leaves)
    torch.testing.assert_close(rows, expected[0], rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(head, expected[1].float(), rtol=1e-6, atol=1e-12)


def test_pytorchs_chunked_form_is_left_out_where_it_would_multiply_row_by_row(monkeypatch):
    chunked = rivals.Library((), lambda: linear_problems.eager)  # of a PyTorch that has it
    monkeypatch.setattr(linear_rivals, "MEANS", {linear_rivals.TORCH: chunked})

    def skip(*shape):
        problem = workload_problems.head_problem(shape, torch.float32, 0.0, "cpu")
        return next(one.skip for one in problem.contenders if one.name == linear_rivals.TORCH)

    assert skip(64, 10, 1000) == "it would take 1 of these rows at a time"
    assert skip(800, 10, 1000) == ""


def test_a_batch_for_reinforcement_learning():
    hidden, weight, target, mask, advantages = workload_problems.policy_data(
        (5, 3, 10, 4, 30), torch.float32, "cpu"
    )
    assert (hidden.shape, weight.shape, target.shape) == ((65, 4), (30, 4), (65,))
    on, of = mask.view(5, 13), advantages.view(5, 13)
    assert not on[:, :3].any() and sorted(on.sum(1).tolist()) == [2, 4, 6, 8, 10]
    assert not (on[:, 4:] & ~on[:, 3:-1]).any()  # a completion ends once
    assert (of == of[:, :1]).all() and of[:, 0].unique().numel() == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", workloads.KINDS)
def test_all_contenders_agree_with_the_reference(kind, dtype):
    first = next(one for one in workloads.WORKLOADS if one.kind == kind)
    quick = replace(workloads.quick_form(first), dtype=dtype)
    problem = workloads.case_of(quick, "cpu").make()
    truth = agreement.truth_of(problem)
    tried = [one for one in problem.contenders if not one.skip]
    refusals = {one.name: agreement.check(one, truth, problem).refusal for one in tried}
    assert refusals == dict.fromkeys(refusals, "") and list(refusals)[0] == "ours"
    assert len(refusals) > 2


def test_a_case_is_made_again_from_its_text():
    one = replace(workloads.by_name("mae"), ignored=0.5, dtype="bfloat16")
    case = workloads.case_of(one, "cpu")
    again = workloads.made_again(case.made_of, "cpu")
    assert (again.name, again.shape, again.dtype) == ("mae", (64, 196, 768), torch.bfloat16)
    assert again.summary == case.summary == "squared error of hidden patches, 50 % ignored"


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="this system does not let a process reset its memory high-water mark",
)
def test_the_memory_of_a_shape_of_ones_own_is_measured_in_another_process():
    case = workloads.case_of(workloads.Workload("own", "logits", (512, 8192), "flags", 0.5), "cpu")
    about = (workload_command.COMMAND, "own", "ours", "cpu", 2)
    peak, trouble = memory.measure_apart(*about, case.made_of)
    assert trouble == "" and 0.9 < peak / (512 * 8192 * 4) < 1.3


# --- the program ---------------------------------------------------------------------------------


def wrong_mean() -> object:
    return lambda hidden, weight, target: 1.01 * linear_problems.eager(hidden, weight, target)


def test_a_run_refuses_the_wrong_and_names_the_missing(monkeypatch, tmp_path, capsys):
    libraries = {
        "wrong": rivals.Library((), wrong_mean),
        "bees": rivals.Library(("no_bees_here",), None),
        "ants": rivals.Library((), wrong_mean, on_gpus_alone=True),
    }
    monkeypatch.setattr(linear_rivals, "MEANS", libraries)
    path = tmp_path / "out.csv"
    line = ["--workload", "gpt2", "--quick", "--rounds", "1", "--csv", str(path)]
    with pytest.raises(SystemExit, match="refused, so not timed: wrong in gpt2"):
        command.main(line)
    said = capsys.readouterr().out
    assert "wrong refused: loss is off by 1.0e-02" in said
    assert "bees not attempted: no_bees_here is not installed" in said
    assert "ants not attempted: its kernels run on a GPU alone" in said
    rows = {row["contender"]: row for row in report.read_csv(path)}
    timed = [name for name, row in rows.items() if row["median_us"]]
    assert timed == ["ours", "ours of logits", "eager", "compile", "products"]
    assert rows["eager"]["commit"] == report.read_csv(path)[0]["commit"] != ""
    assert rows["ours"]["shape"] == "64x32x500" and rows["products"]["role"] == "floor"


def test_the_list(monkeypatch, capsys):
    command.main(["--list", "--threads", "1"])
    said = capsys.readouterr().out
    assert all(f"\n  {name}: " in said for name in workloads.NAMES)
    assert "rows (of 8192), 2304 hidden, 256000 classes; 40 % ignored" in said
    assert "  cut-cross-entropy: left out: " in said and "\n  eager, compile: here" not in said


def test_a_sweep_of_a_shape_of_ones_own_and_its_curves(monkeypatch, tmp_path):
    monkeypatch.setattr(linear_rivals, "MEANS", {"bees": rivals.Library(("no_bees_here",), None)})
    table, picture = tmp_path / "scale.csv", tmp_path / "scale.svg"
    line = ["--rows", "8", "--classes", "40", "--hidden", "4", "--quick", "--rounds", "1"]
    line += ["--scale", "N", "share", "--csv", str(table), "--plot", str(picture)]
    command.main(line)
    rows = report.read_csv(table)
    of = {(row["scale"], float(row["at"])): row["shape"] for row in rows}
    assert [at for axis, at in of if axis == "N"] == [2, 4, 8, 16]
    assert of["N", 16] == "16x4x40" and of["share", 0.1] == "8x4x40"
    assert next(row for row in rows if row["at"] == "0.25")["summary"].endswith("75 % ignored")
    drawn = picture.read_text()
    for words in ("rows", "share of rows that count", "eager", "products", "bees (no_"):
        assert words in drawn
    assert "peak memory" not in drawn  # of a quick run


def test_a_contender_that_is_faster_than_ours_is_drawn():
    setting = {"scale": "N", "role": "rival", "status": "timed"}
    rows = [
        {"contender": "ours", "at": 2, "median_us": 3000.0, **setting},
        {"contender": "fast", "at": 4, "median_us": "1000", **setting},
        {"contender": "fast", "at": 2, "median_us": "500", **setting},
        {"contender": "huge", "at": 2, **setting, "status": "refused: loss is off"},
    ]
    lines = curves.lines_of(rows, "N", "median_us", 1e-3)
    assert lines == {"ours": [(2, 3)], "fast": [(2, 0.5), (4, 1)]}
    assert curves.left_out(rows) == "left out: huge (loss is off)"


def test_the_points_of_an_axis(monkeypatch):
    base = sweep.BASE_WORKLOAD
    found = sweep.points(base, "V", 2)
    assert [(at, one.shape) for at, one, _ in found] == [
        (classes, (512, 512, classes)) for classes in (8192, 16384, 32768, 65536)
    ]
    assert [one.ignored for _, one, _ in sweep.points(base, "share", 2)] == [0, 0.5, 0.75, 0.9]
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda which: set(range(6)), raising=False)
    found = sweep.points(base, "threads", 2)
    assert [(at, threads) for at, _, threads in found] == [(1, 1), (2, 2), (4, 4)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--quick"], "name a --workload, give a shape, or ask for the --list"),
        (["--rows", "0", "--classes", "5"], "--rows must be at least 1, got 0"),
        (["--rows", "5"], "a shape of your own must have --classes too"),
        (["--workload", "mae", "--classes", "5"], "mae has no place for --classes"),
        (["--workload", "flux", "--ignored", "0.5"], "flux has no place for --ignored"),
        (["--workload", "gpt2", "--ignored", "1"], "--ignored must be at least 0 and below 1"),
        (["--workload", "gpt2", "--plot", "x.svg"], "--plot must come with --scale"),
        (["--workload", "gpt2", "mae", "--scale", "N"], "--scale must have one workload"),
        (["--workload", "mae", "--scale", "V", "--quick"], "mae cannot be scaled by V"),
        (["--workload", "gpt2", "--contenders", "bees"], "--contenders must be among"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_sentence(line, said):
    with pytest.raises(SystemExit, match=said):
        command.main(line)


@pytest.mark.parametrize("more", [["--quick"], ["--ignored", "0"], ["--rounds", "2"]])
def test_a_partial_run_leaves_the_committed_figures_alone(more):
    wanted = command.parser().parse_args(["workloads", "--workload", "all", *more])
    assert workload_command.csv_path(wanted) is None
    full = workload_command.csv_path(
        command.parser().parse_args(["workloads", "--workload", "all"])
    )
    assert full == ROOT / "benchmarks" / "results" / "workloads_cpu.csv"
