# SPDX-License-Identifier: BSD-3-Clause
"""What check_padding leaves behind, tolerates, prints and refuses."""

import itertools

import pytest
import torch
from padding_steps import (
    RIGHT,
    B,
    D,
    T,
    TinyEncoder,
    V,
    ignored_cross_entropy,
    leaking,
    pair_batch,
)
from torch import nn

import masked_loss_ext as mle
from masked_loss_ext.diagnostics import PaddingLeak, check_padding
from masked_loss_ext.diagnostics._report import Tolerance

# --- what it leaves behind -----------------------------------------------------------------------


def test_everything_is_put_back():
    model = TinyEncoder(dropout=0.3).train()
    model.norm = nn.BatchNorm1d(V)
    batch = {"x": torch.randn(B, T, D), "labels": torch.randint(V, (B, T)), "attention_mask": RIGHT}
    batch["x"].requires_grad_()
    model(batch).sum().backward()

    def step(batch):
        loss = ignored_cross_entropy(model.norm(model(batch).mT).mT, batch)
        loss.backward()
        with torch.no_grad():  # what optimisers do
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
            batch["x"].zero_()
        batch["labels"].zero_()
        return loss

    tensors = {**model.state_dict(keep_vars=True), **batch}
    before = {n: (t.detach().clone(), t.grad, t._version) for n, t in tensors.items()}
    gradients = {n: t.grad.clone() for n, t in tensors.items() if t.grad is not None}
    state = torch.get_rng_state()
    report = check_padding(step, batch, RIGHT, parameters=model.parameters())
    assert report.reproducible and "the step updates its parameters" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    for name, (value, gradient, version) in before.items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name].grad is gradient, name
        if gradient is not None:
            assert torch.equal(gradient, gradients[name]), name
        if name in batch:
            assert tensors[name]._version == version, name


def test_numpy_and_python_random_states_too():
    import random

    numpy = pytest.importorskip("numpy")

    def step(batch):
        scale = random.random() + numpy.random.rand()
        return mle.masked_mse(batch["pred"], batch["target"], batch["mask"]) * scale

    states = random.getstate(), numpy.random.get_state()[1].tolist()
    report = check_padding(step, pair_batch(), RIGHT)
    assert report and report.reproducible
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_everything_is_put_back_after_an_error():
    model = nn.Linear(D, 1)

    def step(batch):
        model(batch["x"]).sum().backward()
        torch.rand(3)
        raise RuntimeError("the user's own")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the user's own"):
        check_padding(step, {"x": torch.randn(B, T, D)}, RIGHT, parameters=model)
    assert model.weight.grad is None
    torch.randn(B, T, D)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_step_that_is_not_reproducible():
    noise = itertools.cycle([0.0, 1e-3, -1e-3])

    def step(batch):
        loss = mle.masked_mse(batch["pred"], batch["target"], batch["mask"])
        return loss * (1 + next(noise))

    report = check_padding(step, pair_batch(), RIGHT, rtol=0)
    assert not report.reproducible and "runs of the unchanged batch differ" in str(report)
    assert report.raise_if_leaking() and "noise" in {c.verdict for c in report.changes}
    report = check_padding(lambda b: step(b) + b["pred"].sum(), pair_batch(), RIGHT)
    assert ("pred", "random values") in leaking(report)


# --- tolerance, report, misuse -------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, rtol, atol, noise, verdict",
    [
        (0.0, None, 0.0, 0.0, "same"),
        (1e-7, None, 0.0, 0.0, "rounding"),
        (1e-7, 0.0, 0.0, 0.0, "LEAK"),
        (1e-7, 0.0, 1e-3, 0.0, "rounding"),
        (1e-3, None, 0.0, 0.0, "LEAK"),
        (1e-3, 1e-2, 0.0, 0.0, "rounding"),
        (2e-3, None, 0.0, 1e-3, "noise"),
        (4e-3, None, 0.0, 1e-3, "LEAK"),
        (float("nan"), 1.0, 1.0, 1.0, "LEAK"),
    ],
)
def test_verdicts(size, rtol, atol, noise, verdict):
    before = torch.tensor([1.0, -4.0], dtype=torch.float64)
    after = before + torch.tensor([0.0, 4 * size], dtype=torch.float64)
    judge = Tolerance(rtol, atol)
    judge.noise["w"] = 4 * noise
    shift = judge.shift("w", before, after)
    assert shift.verdict == verdict
    if size == size:
        assert shift.relative == pytest.approx(size, rel=1e-6)


def test_gradients_that_are_zero_but_for_rounding():
    judge = Tolerance(None, 0.0)
    tiny = torch.tensor([1e-12])
    assert judge.shift("key bias", tiny, -tiny).verdict == "LEAK"
    judge.set_gradients([torch.tensor([3.0]), tiny, None])
    assert judge.shift("key bias", tiny, -tiny).verdict == "rounding"
    assert judge.shift("key bias", tiny, tiny + 1e-6).verdict == "LEAK"
    assert judge.shift("loss", tiny, -tiny).verdict == "LEAK"


def test_half_precision_is_judged_by_its_own_rounding():
    one = torch.ones(1, dtype=torch.bfloat16)
    judge = Tolerance(None, 0.0)
    assert judge.shift("w", one, one + 2**-7).verdict == "rounding"
    assert judge.shift("w", one, one + 2**-6).verdict == "LEAK"
    assert judge.shift("w", one.float(), one.float() + 2**-7).verdict == "LEAK"


def test_report_is_a_table():
    report = check_padding(lambda b: b["x"].square().mean(), {"x": torch.ones(B, T)}, RIGHT)
    lines = str(report).splitlines()
    assert lines[0].startswith("check_padding: the step reads its padding. 4 of 4 runs leak; the")
    head = lines[2]
    assert head.split("  ")[0] == "entry" and head.endswith("verdict")
    for line in lines[4:8]:
        assert line[head.index("verdict") :] == "LEAK", line
    assert repr(report).startswith("<PaddingReport: LEAK through batch, x;")
    with pytest.raises(PaddingLeak, match="padding holds") as caught:
        report.raise_if_leaking()
    assert isinstance(caught.value, AssertionError)


@pytest.mark.parametrize(
    "batch, mask, error, text",
    [
        ({"x": torch.ones(2, 3)}, torch.ones(2, 3), ValueError, "there is nothing to check"),
        ({"x": torch.ones(2, 3)}, torch.zeros(3, 2), ValueError, r"first dimensions of an entry.*"),
        ({"m": RIGHT}, RIGHT, ValueError, r"taken for the mask: \['m'\]"),
        ({"x": torch.ones(2, 3)}, [[1, 0]], TypeError, "mask must be a torch.Tensor, got list"),
        ({"x": torch.ones(3)}, torch.tensor(0), ValueError, "mask must have the first"),
        ({"x": torch.ones(2)}, torch.tensor([0.0, -1e9]), ValueError, "additive mask"),
        ({"x": torch.full((B, T), 4)}, RIGHT, ValueError, "padding can be changed"),
    ],
)
def test_misuse(batch, mask, error, text):
    with pytest.raises(error, match="check_padding: .*" + text):
        check_padding(lambda b: torch.zeros(()), batch, mask)


@pytest.mark.parametrize(
    "result, error, text",
    [
        (lambda b: b["pred"], ValueError, r"scalar loss, got \[3, 6, 8\]"),
        (lambda b: (b["pred"].sum(), {}), TypeError, "scalar loss, got tuple; lambda batch"),
        (lambda b: None, TypeError, "scalar loss, got NoneType"),
        (lambda b: b["mask"].sum() / 0, ValueError, "finite loss, got inf whatever stands"),
    ],
)
def test_results_that_are_no_loss(result, error, text):
    with pytest.raises(error, match=text):
        check_padding(result, pair_batch(), RIGHT)


@pytest.mark.parametrize("parameters", [torch.ones(2), "weight", 3, ["weight"]])
def test_parameters_of_the_wrong_kind(parameters):
    with pytest.raises(TypeError, match="check_padding: parameters"):
        check_padding(lambda b: b["pred"].sum(), pair_batch(), RIGHT, parameters=parameters)
