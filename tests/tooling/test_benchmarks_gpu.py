# SPDX-License-Identifier: BSD-3-Clause
"""What is measured on a GPU, run on the CPU beside a clock that is not one."""

import itertools
import shutil
import sys
import types

import pytest
import torch

from benchmarks import (
    BENCHMARKS,
    CUDA_BENCHMARKS,
    agreement,
    cases_of,
    contenders,
    cuda_cases,
    harness,
    measure,
    report,
    rivals,
    tables,
    targets,
)
from benchmarks import __main__ as command

pytestmark = pytest.mark.slow

NAMES = {
    "squared_error": ["tokens_c64", "tokens_c16"],
    "block_mask": ["plan_64k"],
    "cross_entropy": [
        "forward_128k", "train_128k", "forward_128k_ignored_40", "train_128k_ignored_40",
        "forward_32k", "train_32k", "forward_256k", "train_256k",
    ],
    "linear_cross_entropy": [
        "linear_152k", "linear_152k_ignored_40", "linear_statistics_152k", "linear_128k",
    ],
}  # fmt: skip


class StepClock:
    """Each reading is one microsecond after the one before."""

    most_calls = 2

    def __init__(self):
        self.now, self.held, self.finished = itertools.count(), [], 0

    def hold(self, host_us):
        self.held.append(host_us)

    def mark(self):
        return next(self.now)

    def finish(self):
        self.finished += 1

    def elapsed_us(self, begin, end):
        return float(end - begin)


@pytest.fixture
def clock(monkeypatch):
    made = StepClock()
    monkeypatch.setattr(harness, "clock_for", lambda device: made)
    return made


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(cuda_cases, "compiled", lambda formula: formula)
    monkeypatch.setattr(cuda_cases.squared_error, "compiled", lambda formula: formula)


def quick_cases(benchmark):
    return cuda_cases.cases(benchmark, "cpu", quick=True)


def test_a_gpu_has_cases_of_its_own():
    assert tuple(cuda_cases.CASES) == tuple(NAMES) == CUDA_BENCHMARKS
    assert set(CUDA_BENCHMARKS) <= set(BENCHMARKS)
    names = [case.name for case in cases_of("cross_entropy", "cuda")]
    assert names == NAMES["cross_entropy"]
    assert command.parser().parse_args(["gpu", "--csv", "x.csv"]).device == "cuda"
    with pytest.raises(SystemExit):
        command.parser().parse_args(["gpu", "--csv", "x.csv", "--only", "unified"])


@pytest.mark.parametrize("benchmark", NAMES)
def test_cases_and_their_shapes(benchmark):
    assert [case.name for case in cuda_cases.cases(benchmark)] == NAMES[benchmark]
    for case in cuda_cases.cases(benchmark):
        size = torch.Size(case.shape).numel() * case.dtype.itemsize
        if benchmark == "cross_entropy":
            assert 1.0e9 < size < 1.1e9  # twenty times the L2 cache


def test_every_target():
    found = {}
    for benchmark in NAMES:
        for case in cuda_cases.cases(benchmark):
            for view in case.tables():
                limits = view.limits.items()
                shares = {name: most and round(1 / most, 6) for name, most in limits}
                found[view.name] = (view.part, {**view.targets, **shares}, view.time_limit_us)
    read = {"compile": 1, "liger": 1, "quack": 1, "one read": 0.95}
    for end in ("128k", "128k_ignored_40", "32k", "256k"):
        assert found.pop(f"forward_{end}") == ("total", read, None)
        assert found.pop(f"backward_{end}") == ("backward", {"copy": 0.9}, None)
        assert found.pop(f"fused_{end}") == ("total", {"copy": 0.9}, None)
        assert found.pop(f"train_{end}") == ("total", {}, None)
    assert found.pop("tokens_c64") == ("total", {"compile": 2, "copy": 0.85}, None)
    assert found.pop("tokens_c16") == ("total", {"compile": 2, "copy": 0.85}, None)
    beside = {"products": None, "count asked": None}
    for end in ("152k", "152k_ignored_40"):
        assert found.pop(f"linear_{end}") == ("total", beside, 60_000)
    statistics = {"full logits": 2, **beside}
    assert found.pop("linear_statistics_152k") == ("total", statistics, None)
    assert found.pop("linear_128k") == ("total", beside, None)
    assert found == {"plan_64k": ("total", {}, 60)}


@pytest.mark.parametrize("benchmark", NAMES)
def test_every_case_agrees_with_the_reference(benchmark, not_compiled):
    for case in quick_cases(benchmark):
        problem = case.make()
        truth = agreement.truth_of(problem)
        names = {one.name for one in [*problem.contenders, *problem.beside]}
        for view in case.tables():
            assert {view.base, *(view.beside or ()), *view.targets, *view.limits} <= names
        for one in problem.contenders:
            if not one.skip:
                assert agreement.check(one, truth, problem).refusal == "", (case.name, one.name)


def test_what_a_floor_moves(not_compiled):
    rows, classes = 32, 2048
    whole = rows * classes * 2
    counted = whole * 19 // 32  # 13 of 32 rows are ignored
    made = {case.name: case for case in quick_cases("cross_entropy")}
    (read,) = made["forward_128k_ignored_40"].make().beside
    assert read.bytes_moved == read.inputs[0][0].nbytes == counted
    case = made["train_128k_ignored_40"]
    (copy,) = case.make().beside
    source, target = copy.inputs[0]
    assert source.nbytes + target.nbytes == copy.bytes_moved == counted + whole
    assert case.tables()[1].bytes_moved == counted + whole
    assert case.make().bytes_moved == 2 * counted + whole
    problem = quick_cases("squared_error")[0].make()
    (copy,) = [one for one in problem.beside if one.name == contenders.COPY]
    assert sum(one.nbytes for one in copy.inputs[0]) == problem.bytes_moved // 2 * 2


def test_a_run_from_its_samples_to_its_verdicts(clock, not_compiled, tmp_path, capsys, monkeypatch):
    """And to the README, which has a table for each GPU."""
    monkeypatch.setattr(command, "cases_of", lambda name, device, quick: quick_cases(name)[:2])
    path = tmp_path / "abacus" / "figures.csv"
    command.main(["gpu", "--device", "cpu", "--quick", "--rounds", "1", "--csv", str(path)])
    rows = report.read_csv(path)
    assert {row["benchmark"] for row in rows} == set(NAMES)
    views = {row["case"] for row in rows}
    assert "backward_128k" in views and "plan_64k" in views
    verdicts = {(v.case, v.what): v for row in rows for v in targets.verdicts_of(row)}
    # Between the readings of a call: 1 us of forward, 1 us of backward.
    assert verdicts["forward_128k", "one read"].value == 100
    assert verdicts["backward_128k", "copy"].value == 200
    assert verdicts["backward_128k", "copy"].met and verdicts["forward_128k", "compile"].met
    assert not verdicts["tokens_c64", "compile"].met
    assert verdicts["plan_64k", "of time"].value == 2
    said = capsys.readouterr().out
    assert "tokens_c64 1.00x compile (>= 2 wanted): missed by 50.0%" in said
    assert "liger not attempted: liger_kernel is not installed" in said
    assert clock.held and all(time > 0 for time in clock.held) and clock.finished > 0
    assert max(int(row["calls_per_sample"]) for row in rows if row["calls_per_sample"]) == 2

    text = "<!-- benchmark gpu -->\n<!-- /benchmark -->"
    assert tables.NO_FIGURES in tables.regenerate(text, tmp_path / "none")
    shutil.copytree(path.parent, tmp_path / "rule")
    made = tables.regenerate(text, tmp_path)
    assert made.count("| `backward_128k` |") == 2 and made.count("Reprint with `make gpu`") == 2
    assert "1.0x one read (aim at most 1.05263x)" in made


def test_one_benchmark_alone_and_its_verdicts(clock, tmp_path, capsys, monkeypatch):
    """On a GPU memory is asked of the allocator, in this process."""
    monkeypatch.setattr(command, "cases_of", lambda name, device, quick: quick_cases(name)[:1])
    monkeypatch.setattr(measure.memory, "peak_of", lambda one, device: 3 << 30)
    monkeypatch.setattr(measure, "prepare", lambda wanted: None)
    monkeypatch.setattr(
        measure.machine, "environment", lambda *about: {"device": "cuda", "capability": "sm_0"}
    )
    path = tmp_path / "figures.csv"
    line = ["gpu", "--device", "cuda", "--rounds", "1", "--csv", str(path)]
    command.main([*line, "--only", "linear_cross_entropy"])
    rows = report.read_csv(path)
    assert {row["benchmark"] for row in rows} == {"linear_cross_entropy"}
    verdicts = {(v.case, v.what): v for row in rows for v in targets.verdicts_of(row)}
    assert verdicts["linear_152k", "of time"].met
    memory = verdicts["linear_152k", "of memory"]
    assert not memory.met and memory.wanted == 2048 and 2900 < memory.value < 3072
    assert "MiB of memory (<= 2048 wanted): missed by" in capsys.readouterr().out


def test_parts_of_a_sample():
    samples = harness.Samples(1, [10.0, 12.0], [4.0, 5.0])
    assert samples.part("total") is samples
    assert samples.part("forward").total_us == [4, 5]
    assert samples.part("backward").total_us == [6, 7]


# --- kernels of others ---------------------------------------------------------------------------


def overwriting(logits, target):
    """As some do: the gradient replaces the logits while the loss is computed."""
    loss = torch.nn.functional.cross_entropy(logits.float(), target)
    with torch.no_grad():
        logits.mul_(0)
    return loss


def test_an_installed_rival_has_logits_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "apes", types.ModuleType("apes"))
    sys.modules["apes"].__spec__ = types.SimpleNamespace(name="apes")
    logits, target = torch.randn(4, 9), torch.tensor([1, 2, -100, 8])
    libraries = {
        "apes": rivals.Library(("apes",), lambda: overwriting),
        "bees": rivals.Library(("no_bees_here",), None),
    }

    def broken():
        raise ImportError("no kernels for this GPU\nat all")

    libraries["wasps"] = rivals.Library(("apes",), broken)
    apes, bees, wasps = rivals.contenders(logits, target, libraries)
    assert bees.skip == "no_bees_here is not installed"
    assert wasps.skip == "ImportError: no kernels for this GPU"
    before = logits.clone()
    losses = [agreement.run_once(apes)[0][0] for _ in range(2)]
    assert losses[0] == losses[1] and torch.equal(logits, before)


def test_a_rival_in_half_precision_is_given_slack():
    logits, target = torch.randn(4, 9), torch.tensor([1, 2, -100, 8])
    exact = torch.nn.functional.cross_entropy
    data = [(logits, target)]
    problem = harness.Problem([harness.Contender("ours", exact, data)], exact, 0, 0)
    truth = agreement.truth_of(problem)

    def off(logits, target):
        return exact(logits, target) * 1.01

    for slack, refused in ((0.0, True), (rivals.SLACK, False)):
        one = harness.Contender("other", off, data, slack=slack)
        assert bool(agreement.check(one, truth, problem).refusal) == refused
