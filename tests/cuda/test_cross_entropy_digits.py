# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under the simulator: what is beside a confident class, gradients of large
logits, a logit of +inf, shifts beyond the row."""

from math import inf, nan

import pytest
import torch
from cuda_sim import compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cases_digits import (
    FLOATING,
    LARGE,
    OPTIONS,
    assert_as_good_as_torch,
    assert_relative,
    confident,
    large,
    truth_beside,
)
from simulated_cross_entropy import simulated_cross_entropy, simulated_sweep
from simulated_terms import SimulatedTerms

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
# lanes of a warp; a block; several blocks, of which each has a part of a row
SHAPES = [(3, 37), (3, 997), (3, 20001)]


@pytest.fixture(scope="module")
def op():
    return simulated_cross_entropy()


@pytest.fixture(scope="module")
def sweep():
    return simulated_sweep()


@pytest.fixture(scope="module")
def terms():
    return SimulatedTerms()


def gradient_of(op, x, y, **options):
    call = op(x, y, reduction="none", **options)
    return call.results, call.backward({"loss": torch.ones(len(y))}, needs=(True, False))["logits"]


@every_dtype
@pytest.mark.parametrize("margin", [5.0, 30.0, 80.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_confident_rows(op, sweep, terms, dtype, margin, shape):
    x, best = confident(margin, dtype, shape)
    log_p, entropy, gradient = truth_beside(x, best)
    for statistics in (False, True):
        results, grad = gradient_of(op, x, best, statistics=statistics)
        assert_relative(results["loss"], -log_p)
        assert_relative(results["log_prob"], log_p)
        assert_relative(grad, gradient)
    assert_relative(results["entropy"], entropy)
    for target in ((best + 1) % shape[1], None):
        assert_relative(op(x, target).results["entropy"], entropy)
    loss, grad = map(sweep.sim.download, sweep(x, best, reduction="sum"))
    assert_relative(loss, -log_p.sum())
    assert_relative(grad, gradient)
    for unscaled in (True, False):
        asked = {"logits": x, "target": best, "unscaled": unscaled}
        found = terms(asked, {"scaled_log_prob": -torch.ones(3)})
        assert_relative(found["scaled_log_prob"], log_p)
        assert_relative(found["grad logits"], gradient)
    asked = {"logits": x, "target": (best + 1) % shape[1], "classes": best[:, None]}
    for temperature in (None, 2.0):
        found = terms({**asked, "temperature": temperature})
        assert_relative(found["entropy"], entropy)
        assert_relative(found["class_log_prob"][:, 0], log_p)


@every_dtype
@pytest.mark.parametrize("name", LARGE)
def test_large_logits(op, sweep, terms, name, dtype):
    x, y = large(name, dtype)
    if not x.isfinite().all():
        x, y = large("wide", dtype)  # 1e6 is no float16
    for options in ("plain", "cold", "smooth", "focal", "z_loss"):
        o = OPTIONS[options]
        assert_as_good_as_torch(gradient_of(op, x, y, **o)[1], x, y, o)
        grad = sweep.sim.download(sweep(x, y, reduction="sum", **o)[1])
        assert_as_good_as_torch(grad, x, y, o)
    asked = {"logits": x, "target": y}
    grad = terms(asked, {"log_prob": -torch.ones(32)})["grad logits"]
    assert_as_good_as_torch(grad, x, y, {})


@every_dtype
@pytest.mark.parametrize("classes", [2, 40, 3001])
def test_a_logit_of_infinity(op, sweep, terms, classes, dtype):
    x = torch.zeros(3, classes, dtype=dtype)
    x[1, -1] = inf
    x[2, 0] = -inf
    for label in (0, classes - 1):
        y = torch.full((3,), label)
        for statistics in (True, False):
            results, grad = gradient_of(op, x, y, statistics=statistics)
            assert results["lse"][1] == inf and results["lse"][0].isfinite()
            for name in ("loss", "log_prob") + ("entropy",) * statistics:
                assert results[name].isnan().tolist() == [False, True, False], name
            assert grad.isnan().all(1).tolist() == [False, True, False]
        loss, grad = map(sweep.sim.download, sweep(x, y))
        assert loss.isnan() and grad.isnan().all(1).tolist() == [False, True, False]
        found = terms({"logits": x, "target": y})
        for name in ("scaled_log_prob", "log_prob", "entropy"):
            assert found[name][:2].isnan().tolist() == [False, True], name
    assert op(x, None).results["lse"][1] == inf
    x[1, 0] = nan
    assert op(x, None).results["lse"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shift", [4, 5, 2**48, 2**63 - 1])
def test_a_shift_beyond_the_row_scores_nothing(op, sweep, shift):
    x, y = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)
    options = {"mask": torch.ones(2, 4), "shift": shift, "token_weight": torch.ones(2, 4)}
    for reduction in ("mean", "none"):
        call = op(x, y, reduction=reduction, **options)
        assert not call.results["loss"].any()
        grads = call.backward({"loss": torch.ones(call.results["loss"].shape)})
        assert not any(grad.any() for grad in grads.values())
    loss, grad = map(sweep.sim.download, sweep(x, y, **options))
    assert loss.item() == 0 and not grad.any()


def test_numbers_that_are_refused_on_any_device(op):
    x, y = torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    for name in ("softcap", "z_loss", "focal_gamma"):
        for value in (-1.0, inf, nan):
            with pytest.raises(ValueError, match=f"{name} must be finite and not negative"):
                op(x, y, **{name: value})


def test_nothing_is_written_over_memory_that_rows_share(op, sweep):
    x, y = torch.randn(1, 8), torch.zeros(4, dtype=torch.long)
    shared = op.sim.upload(x).expand(4, 8)
    fused = sweep.overwriting_op
    numbers = op(x, y[:1]).device
    with pytest.raises(ValueError, match="must not be expanded or overlap to be written over"):
        fused(shared, op.upload(y), *[None] * 6, -100, 0.0, 0.0, 0.0, 0.0, 0, "mean")
    with pytest.raises(ValueError, match="must not be expanded or overlap to be written over"):
        sweep.scale_op(shared, op.upload(torch.ones(())))
    assert numbers["loss"].numel() == 1
