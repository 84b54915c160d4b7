# SPDX-License-Identifier: BSD-3-Clause
"""What single rows come to in the CUDA kernels of masked_cross_entropy, under the simulator and on
a GPU where there is one: ties, banned classes, rows of nothing else, labels that are none.
"""

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import compiler
from gpu_device import DEVICES, device_named

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated_cross_entropy import check, evaluate, random_upstream, simulated_cross_entropy

from tests.cuda.test_cross_entropy import OPTIONS, every_dtype, filled, make

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_cross_entropy(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


def test_ties_go_to_the_first(op):
    logits = torch.zeros(6, 300)
    logits[:, 1] = -1
    target = torch.tensor([0, 2, 299, 1, 299, 17])
    logits[4, 299] = 1
    logits[5, 17] = logits[5, 290] = 3
    assert check(op, logits, target)["hit"].tolist() == [True, False, False, False, True, True]
    wide = logits.repeat(1, 20)
    assert check(op, wide, target)["hit"].tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("length", [1, 2, 5, 33, 70, 1100, 2500, 9000])
@every_dtype
def test_argmax_is_that_of_torch(op, length, dtype):
    # ties, NaN, infinities, rows of nothing but -inf; off the 16-byte boundaries, in parts
    logits = torch.randint(-3, 4, (12, length + 3)).to(dtype)[:, 3:]
    for row, value in ((1, NAN), (2, NAN), (3, INF), (4, INF), (5, 9.0)):
        logits[row, torch.randint(length, (2,))] = value
    logits[2, torch.randint(length, (2,))] = INF
    logits[6], logits[7], logits[9] = -INF, NAN, -INF
    logits[8, length // 2 :] = -INF
    logits[9, -1] = -6e4
    largest = logits.argmax(-1)
    for target in (largest, (largest + 1) % length, torch.zeros(12, dtype=torch.int64)):
        results = op(logits, target, temperature=0.7).results
        assert_same_bits(results["argmax"], largest)
        assert_same_bits(results["hit"], target == largest)
    assert_same_bits(op(logits, None).results["argmax"], largest)


@pytest.mark.parametrize("length", [37, 1100, 9000])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_a_bad_temperature_spoils_its_row(op, value, length):
    logits, target, _ = make((4, length))
    mask = torch.tensor([1, 1, 0, 1])
    temperature = torch.tensor([1.5, value, value, 0.5])
    for name in ("none", "focal_half", "softcap"):
        options = filled(OPTIONS[name], logits) | {"reduction": "none", "temperature": temperature}
        call = op(logits, target, mask, **options)
        options["temperature"] = torch.tensor([1.5, 1.0, 1.0, 0.5])
        clean = op(logits, target, mask, **options)
        upstream = random_upstream(logits, "none", True)
        grads, good = call.backward(upstream)["logits"], [0, 2, 3]
        for result in ("loss", "lse", "entropy", "log_prob"):
            assert call.results[result][1].isnan()
            assert_same_bits(call.results[result][good], clean.results[result][good], result)
        assert_same_bits(call.results["argmax"], clean.results["argmax"])
        assert grads[1].isnan().all() and (grads[2] == 0).all()
        assert_same_bits(grads[good], clean.backward(upstream)["logits"][good])


@pytest.mark.parametrize("name", ["plain", "smoothing_weight", "softcap", "focal"])
def test_banned_classes(op, name):
    logits, target, mask = make((4, 50))
    logits[:, 7:30] = -INF
    logits[1, target[1]] = 1.0
    logits[2] = -INF
    logits[2, target[2]] = 0.5  # certain
    options = filled(OPTIONS[name], logits)
    if "weight" in options:
        options["weight"][7:30] = 0
    target[target < 30] = 40
    results = check(op, logits, target, mask, **options)
    if name != "softcap":
        banned = results["grad logits"][:, 7:30]
        assert_same_bits(banned, torch.zeros_like(banned))


def test_a_banned_label_and_a_row_of_nothing_else(op):
    logits, target, _ = make((3, 50))
    logits[0, target[0]] = -INF
    logits[1] = -INF
    call = op(logits, target, reduction="none")
    loss = call.results["loss"]
    assert loss[0] == INF and loss[1].isnan() and loss[2].isfinite()
    grad = call.backward({"loss": torch.ones(3)})["logits"]
    assert grad.isfinite().all() and (grad[1] == 0).all() and grad[0, target[0]] == 0
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(grad[0].double(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_logit_that_is_not_a_number_shows(op, value):
    for length in (40, 1100, 9000):
        logits, target, mask = make((3, length))
        logits[0, length // 2] = value
        results = op(logits, target, mask).results
        assert results["loss"].isnan() and results["log_prob"][0].isnan() and mask[0]
        assert str(results["lse"][0].item()) == str(value)
        assert results["lse"][1:].isfinite().all()


@pytest.mark.parametrize("offset, spread", [(1000, 3), (-1000, 3), (0, 200), (-3e4, 0.1)])
def test_large_logits(op, offset, spread):
    # a row less its maximum has the same loss, and the reference is exact there
    for dtype in FLOATING:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logits, target, _ = make((3, 1500), torch.float64, spread=spread)
        logits = (logits + offset).to(dtype)
        top = logits.double().amax(-1, keepdim=True)
        one = {"loss": torch.ones(3)}
        for options in ({}, {"label_smoothing": 0.1}):
            options = options | {"reduction": "none"}
            call = op(logits, target, **options)
            truth = evaluate(torch.float64, logits.double() - top, target, None, one, options)
            truth["lse"] += top[:, 0]
            rounding = 8 * torch.finfo(wide).eps
            at_size = rounding * truth["lse"].abs().max().item()  # of what lse is rounded to
            for name in ("lse", "entropy", "log_prob", "loss"):
                atol = at_size if name == "loss" and "label_smoothing" in options else rounding
                rtol = 8 * rounding
                torch.testing.assert_close(
                    call.results[name].double(), truth[name], rtol=rtol, atol=atol
                )
            rtol = torch.finfo(dtype).eps + at_size
            grad = call.backward(one)["logits"].double()
            torch.testing.assert_close(grad, truth["grad logits"], rtol=rtol, atol=at_size / 100)


def test_a_certain_label_keeps_its_digits(op):
    # p - 1 with p in half precision is off by 1.3 %; the sum 1 + 0.0078 in float32 by 2e-5
    for dtype in FLOATING:
        logits = torch.zeros(2, 64, dtype=dtype)
        logits[:, 3] = 9.0
        grad = op(logits, torch.tensor([3, 3]), reduction="sum").backward({"loss": torch.ones(())})
        truth = -63 / (63 + torch.tensor(9.0, dtype=torch.float64).exp())
        allowed = 1e-12 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 1e-4)
        assert abs(grad["logits"][0, 3].double() / truth - 1) < allowed


def test_everything_ignored(op):
    logits, target, mask = make((5, 70))
    target.fill_(-100)
    logits.fill_(NAN)
    for reduction in ("mean", "sum", "none"):
        for options in ({}, filled(OPTIONS["focal_half"], logits)):
            call = op(logits, target, mask, reduction=reduction, **options)
            grads = call.backward(random_upstream(logits, reduction, True))
            for name, result in (call.results | grads).items():
                if name == "totals":  # the denominator, and the sum of the class weights
                    assert result[0] == (reduction != "mean") and result[1] > 0
                else:
                    assert_same_bits(result, torch.zeros_like(result), name)


@pytest.mark.parametrize("label", [70, -1, -101, 2**31 - 1, -(2**63)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_label(op, label, reduction):
    logits, target, _ = make((4, 70))
    target[1], target[3] = label, label
    mask = torch.tensor([1, 1, 1, 0])
    options = {"token_weight": torch.rand(4), "label_smoothing": 0.1, "reduction": reduction}
    call = op(logits, target, mask, **options)
    good = torch.tensor([True, False, True, True])
    clean = op(logits, target.masked_fill(~good, -100), mask, **options)
    for name in ("lse", "entropy", "log_prob", "smooth_distance"):
        assert call.results[name][1].isnan()
        assert_same_bits(call.results[name][good], clean.results[name][good], name)
    assert not call.results["hit"][1] and call.results["argmax"][1] == 0
    upstream = random_upstream(logits, reduction, True)
    grads = call.backward(upstream)
    assert grads["logits"][1].isnan().all() and grads["token_weight"][1].isnan()
    assert grads["logits"][good].isfinite().all() and (grads["logits"][3] == 0).all()
    if reduction == "mean":
        assert call.results["loss"].isnan() and call.results["totals"].tolist() == [3, 70]
    else:
        assert call.results["loss"].isnan().tolist() == [False, True, False, False]


def test_bad_label_shows_where_the_denominator_is_0(op):
    logits, target, _ = make((2, 7))
    target.fill_(9)
    for options in ({"normalizer": 0.0}, {"weight": torch.ones(7)}):
        assert op(logits, target, **options).results["loss"].isnan()


def test_backward_refuses(op):
    logits, target, _ = make((4, 7))
    call = op(logits, target, reduction="none")
    with pytest.raises(ValueError, match=r"grad_lse must have the shape of logits \[4, 7\]"):
        call.backward({"lse": torch.ones(3)})
    with pytest.raises(ValueError, match="grad_loss must have the shape of logits"):
        call.backward({"loss": torch.ones(())})
    totals = call.device["totals"]
    for bad in (torch.ones(2), torch.ones(1, dtype=torch.float64)):
        call.device["totals"] = op.upload(bad)
        rule = r"totals must be what the forward returned, Double \[2\], got"
        with pytest.raises(ValueError, match=rule):
            call.backward({"loss": torch.ones(4)})
    call.device["totals"] = totals
    for bad in (torch.ones(4, 2, dtype=torch.float64), torch.ones(4), torch.ones(4, 3)):
        call.device["row_sums"] = op.upload(bad)
        rule = r"row_sums must be what the forward returned, Float \[..., 2\], got"
        with pytest.raises(ValueError, match=rule):
            call.backward({"loss": torch.ones(4)})
    lean = op(logits, target, statistics=False)
    with pytest.raises(ValueError, match="entropy must have the shape of logits"):
        lean.backward({"entropy": torch.ones(4)})
