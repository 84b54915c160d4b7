# SPDX-License-Identifier: BSD-3-Clause
"""The logit-free benchmark: its data, floors and truth, its contenders' agreement, its aims."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

import masked_loss_ext as mle  # noqa: E402
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    agreement,
    harness,
    linear_cross_entropy,
    linear_rivals,
    measure,
    report,
    rivals,
    tables,
)
from benchmarks import linear_problems as problems  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = (10, 8, 300)
MADE = {
    "train_fp32": lambda: problems.train_problem(SHAPE, FP32, 0.4, "cpu", ()),
    "train_bf16": lambda: problems.train_problem(SHAPE, BF16, 0.4, "cpu", ()),
    "memory": lambda: problems.memory_problem(SHAPE, FP32, 0.0, "cpu"),
    "statistics": lambda: problems.statistics_problem(
        SHAPE, FP32, 0.7, "cpu", problems.STATISTICS_CALLS
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """What torch.compile makes of a formula is the business of the benchmark's own check."""
    monkeypatch.setattr(problems, "compiled", lambda formula: formula)


# --- data ----------------------------------------------------------------------------------------


def test_the_data_of_a_layer():
    hidden, weight, target = problems.layer_data(SHAPE, FP32, 0.4)
    assert (hidden.shape, weight.shape, target.shape) == ((10, 8), (300, 8), (10,))
    assert hidden.requires_grad and weight.requires_grad and hidden.is_leaf and weight.is_leaf
    counted = target != problems.IGNORED
    assert int(counted.sum()) == 6 and 0 <= target[counted].min() and target[counted].max() < 300
    rows, head, _ = problems.layer_data((500, 64, 400), FP32, 0.0)
    assert (rows @ head.T).std().item() == pytest.approx(problems.SPREAD, rel=0.05)


def test_what_flows_into_the_rows():
    log_prob, entropy = problems.upstream_data(8, 0.75, "cpu")
    assert int((log_prob == 0).sum()) == 6 and log_prob.max() <= 1.5
    assert torch.equal(entropy, 0.01 * log_prob)


# --- agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_all_contenders_agree_with_the_reference(name):
    made = MADE[name]()
    truth = agreement.truth_of(made)
    refusals = {one.name: agreement.check(one, truth, made).refusal for one in made.contenders}
    assert refusals == dict.fromkeys(refusals, "") and list(refusals)[0] == "ours"
    gradients = [gradient for gradient in truth[1] if gradient is not None]
    assert [one.shape for one in gradients] == [(10, 8), (300, 8)]


@pytest.mark.parametrize("name", MADE)
def test_a_wrong_gradient_is_refused(name):
    made = MADE[name]()

    def wrong(hidden, weight, *others):
        returned = made.contenders[0].call(hidden, weight + 0 * weight.detach(), *others)
        first, *more = returned if isinstance(returned, tuple) else (returned,)
        return (first + 0.1 * (weight - weight.detach()).sum(), *more)

    ours = made.contenders[0]
    one = harness.Contender("wrong", wrong, ours.inputs, slack=ours.slack)
    assert "gradient is off" in agreement.check(one, agreement.truth_of(made), made).refusal


def test_the_truth_is_the_reference_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(problems, "TRUE_ROWS", 4)
    hidden, weight, target = (x.detach() for x in problems.layer_data(SHAPE, FP32, 0.4))
    leaves = [x.double().requires_grad_(True) for x in (hidden, weight)]
    value = problems.true_mean(*leaves, target)
    whole = mle.reference.masked_linear_cross_entropy(*leaves, target)
    pairs = zip(torch.autograd.grad(value, leaves), torch.autograd.grad(whole, leaves), strict=True)
    torch.testing.assert_close(value, whole)
    for some, every in pairs:
        torch.testing.assert_close(some, every)

    labels = target.clamp_min(0)
    upstream = problems.upstream_data(10, 0.5, "cpu")
    value, log_prob, entropy = problems.true_statistics(*leaves, labels, *upstream)
    stats = mle.reference.linear_row_statistics(*leaves, labels)
    torch.testing.assert_close((log_prob, entropy), (stats.log_prob, stats.entropy))
    expected = (stats.log_prob * upstream[0] + stats.entropy * upstream[1]).sum()
    torch.testing.assert_close(value, expected)


# --- floors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [3, 2])
def test_the_products_are_what_a_step_cannot_do_without(backward):
    hidden, weight, _ = (x.detach() for x in problems.layer_data((5, 4, 7), FP32, 0.0))
    floor = problems.products_floor(hidden, weight, 3, backward)
    made = floor.call(*floor.inputs[0])
    logits = hidden[:backward] @ weight.T
    torch.testing.assert_close(made, logits.T @ hidden[:backward])
    assert floor.role == "floor"


def test_peaks_are_beyond_the_gradients(monkeypatch):
    made = MADE["train_fp32"]()
    assert made.left_bytes == (10 * 8 + 300 * 8) * 4
    case = harness.Case("some", "all", SHAPE, FP32, lambda: made)
    monkeypatch.setattr(measure.memory, "measure_apart", lambda *about: (50_000, ""))
    wanted = command.parser().parse_args(["linear_cross_entropy"])
    peaks = measure.peaks_of(case, made, made.contenders[:1], wanted)
    assert peaks == {"ours": 50_000 - made.left_bytes}


# --- rivals --------------------------------------------------------------------------------------


def test_a_rival_that_is_not_there_is_left_out_by_name():
    def broken():
        raise ImportError("PyTorch 0.1 has none\nat all")

    libraries = {
        "bees": rivals.Library(("no_bees_here",), None),
        "wasps": rivals.Library((), broken),
        "ants": rivals.Library((), lambda: problems.eager, on_gpus_alone=True),
    }
    data = [problems.layer_data(SHAPE, FP32, 0.0)]
    bees, wasps, ants = linear_rivals.contenders(tuple(libraries), libraries, data, 0.0)
    assert bees.skip == "no_bees_here is not installed" and not bees.inputs
    assert wasps.skip == "ImportError: PyTorch 0.1 has none"
    assert ants.skip == "its kernels run on a GPU alone" and not ants.inputs


def test_pytorchs_own_chunked_form_agrees_where_there_is_one():
    made = problems.train_problem(SHAPE, FP32, 0.4, "cpu", (linear_rivals.TORCH,))
    one = made.contenders[-1]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert agreement.check(one, agreement.truth_of(made), made).refusal == ""
    else:
        assert "has no LinearCrossEntropyOptions" in one.skip


# --- cases ---------------------------------------------------------------------------------------


def test_every_aim():
    found = {}
    for case in linear_cross_entropy.cases():
        (view,) = case.tables()
        found[case.name] = (view.targets, view.limits["products"], view.peak_shares)
        assert case.weigh == (case.name != "train_ignored_90")
        limited = case.name == "statistics" or case.name.startswith("memory")
        assert view.peak_limit_bytes == (152 << 20 if limited else None)
    nothing = ({}, None, {})
    assert found == {
        "train": ({"eager": 2.2, "compile": 2, "torch chunked": 4}, 1.12, {"eager": 0.125}),
        "train_ignored_90": ({"eager": 12}, None, {}),
        "train_bf16": ({"eager": 2}, None, {}),
        "statistics": ({"full logits": 2}, None, {}),
        "memory_32k": nothing,
        "memory_128k": nothing,
        "memory_256k": nothing,
    }


@pytest.mark.parametrize("device, quick", [("cpu", True), ("cuda:0", False)])
def test_nothing_is_promised_elsewhere(device, quick):
    for case in linear_cross_entropy.cases(device, quick):
        (view,) = case.tables()
        assert not view.targets and not view.peak_shares and view.peak_limit_bytes is None
        assert view.limits == {"products": None}


def test_a_quick_run_and_its_table(tmp_path, capsys):
    path = tmp_path / "linear_cross_entropy_cpu.csv"
    line = ["linear_cross_entropy", "--quick", "--rounds", "1", "--csv", str(path)]
    command.main([*line, "--cases", "train", "statistics", "--contenders", "eager", "full logits"])
    assert "train  [64x32x500] float32, 40 % ignored" in capsys.readouterr().out
    rows = report.read_csv(path)
    roles = {(row["case"], row["contender"]): row["role"] for row in rows}
    assert roles["train", "products"] == "floor" and roles["statistics", "full logits"] == "rival"
    text = "<!-- benchmark linear_cross_entropy_cpu -->\n<!-- /benchmark -->"
    made = tables.regenerate(text, tmp_path)
    assert "| `train` | [64, 32, 500] float32, 40 % ignored |" in made and "x products" in made


def test_shares_of_memory_stand_beside_sizes():
    row = {column: "" for column in report.COLUMNS}
    row |= {"case": "train", "shape": "2x3", "dtype": "float32", "summary": "all"}
    ours = row | {"contender": "ours", "role": "ours", "peak_extra_bytes": str(3 << 20)}
    other = row | {"contender": "eager", "role": "rival", "peak_extra_bytes": str(12 << 20)}
    other |= {"peak_share": "0.25", "peak_share_limit": "0.5"}
    cells = tables.case_cells([ours, other])
    assert cells["peak memory"] == "ours 3.0 MiB, eager 12.0 MiB, 0.25 of eager's (aim at most 0.5)"
    assert cells["peak memory / gradient"] == ""
