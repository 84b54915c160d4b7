# SPDX-License-Identifier: BSD-3-Clause
"""Every case in every dtype against the reference, by the accuracy rule of accuracy.py."""

import pytest
import torch
from accuracy import Expected, assert_all_accurate, assert_same_bits, evaluate
from cases import BY_NAME, CASES, FLOATING, REDUCTIONS, make
from gpu_device import PLACES, at

from masked_loss_ext.ops.masked_squared_error import masked_squared_error

WEIGHTS = {"foreground_weight": 3.0, "background_weight": 0.25}
# Cases whose size costs time, not insight, in every reduction.
LARGE = 1 << 19
VARIED = ["flat_chunks", "many_rows", "one_chunk", "unlike", "weight_all", "target_f64"]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
varied_case = pytest.mark.parametrize("name", VARIED)


def reductions_of(case):
    size = torch.Size(case.shape).numel()
    if size >= LARGE:
        return ("mean", "token")
    return [r for r in REDUCTIONS if case.shape or r != "token"]


def grad_loss_for(loss_shape, dtype=torch.float64):
    """Not contiguous, and of both signs; 0-d where the loss is."""
    g = torch.Generator().manual_seed(7)
    values = torch.randn((*loss_shape, 2), generator=g, dtype=torch.float64)
    return values.add(values.sign()).to(dtype)[..., 1]


def loss_shape(case, reduction):
    return {"none": case.shape, "token": case.shape[:-1]}.get(reduction, ())


@pytest.mark.parametrize("place", PLACES)
@every_case
@every_dtype
def test_agrees_with_reference(case, dtype, place):
    inputs = make(case, dtype)
    for reduction in reductions_of(case):
        options = {**WEIGHTS, "reduction": reduction}
        expected = Expected(inputs, **options)
        actual = evaluate(at(place, masked_squared_error), inputs, **options)
        assert_all_accurate(actual, expected, f"{case.name} {reduction}")


@every_case
@pytest.mark.parametrize("reduction", ["token", "none", "mean"])
def test_grad_loss_of_any_strides(case, reduction):
    if reduction not in reductions_of(case):
        pytest.skip(f"{case.name}: {reduction} needs a dimension or would only cost time here")
    inputs = make(case, torch.float32)
    options = {**WEIGHTS, "reduction": reduction}
    # float32 values in all three, or the references would see another grad_loss
    grad_loss = grad_loss_for(loss_shape(case, reduction), torch.float32)
    expected = Expected(inputs, grad_loss, **options)
    actual = evaluate(masked_squared_error, inputs, grad_loss, **options)
    assert_all_accurate(actual, expected, f"{case.name} {reduction}")


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_expanded_grad_loss(reduction):
    # what loss.sum().backward() sends
    inputs = make(BY_NAME["three_channels"], torch.float32)
    options = {**WEIGHTS, "reduction": reduction}
    grad_loss = torch.full((), 0.5).expand(loss_shape(BY_NAME["three_channels"], reduction))
    expected = Expected(inputs, grad_loss, **options)
    actual = evaluate(masked_squared_error, inputs, grad_loss, **options)
    assert_all_accurate(actual, expected, reduction)


@varied_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_for_any_number_of_threads(name, reduction):
    inputs = make(BY_NAME[name], torch.float32)
    results = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        results.append(evaluate(masked_squared_error, inputs, reduction=reduction))
    for result in results[1:]:
        for key, value in result.items():
            assert_same_bits(value, results[0][key], f"{name} {reduction} {key}")


@varied_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_never_written(name, reduction):
    inputs = make(BY_NAME[name], torch.float32)
    grad_loss = grad_loss_for(loss_shape(BY_NAME[name], reduction))
    tensors = {k: v for k, v in [*inputs.items(), ("grad_loss", grad_loss)] if v is not None}
    before = {k: (v.clone(), v._version) for k, v in tensors.items()}
    storages = {k: bytes(v.untyped_storage()) for k, v in tensors.items() if v.numel() < 1 << 12}
    evaluate(masked_squared_error, inputs, grad_loss, reduction=reduction)
    for key, value in tensors.items():
        assert_same_bits(value, before[key][0], key)
        assert value._version == before[key][1], key
        assert key not in storages or bytes(value.untyped_storage()) == storages[key], key


@pytest.mark.parametrize("wants", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("name", ["weight_element", "weight_sample", "unlike"])
def test_only_the_gradients_that_are_asked_for(name, wants):
    inputs = make(BY_NAME[name], torch.float32)
    if inputs["weighting"] is None:
        inputs["weighting"] = torch.full((), 1.5)
    all_of_them = evaluate(masked_squared_error, inputs)
    leaves = {}
    for wanted, key in zip(wants, ("prediction", "target", "weighting"), strict=True):
        leaves[key] = inputs[key].detach().requires_grad_(bool(wanted))
    masked_squared_error(**{**inputs, **leaves}).backward()
    for wanted, (key, leaf) in zip(wants, leaves.items(), strict=True):
        assert (leaf.grad is not None) == bool(wanted)
        if wanted:
            assert_same_bits(leaf.grad, all_of_them[f"grad {key}"], key)


def test_count_is_exact_above_2_to_24():
    rows = (1 << 24) + 3
    prediction = torch.ones(1, 1).expand(rows, 1)  # one element in memory
    mask = torch.ones(1, 1, dtype=torch.bool).expand(rows, 1)
    loss, count = torch.ops.masked_loss_ext.masked_squared_error(
        prediction, prediction * 0, mask, None, None, 2.0, 1.0, "mean"
    )
    assert count.dtype == torch.int64 and count.item() == rows
    assert loss.item() == 1.0


@pytest.mark.parametrize("columns", [1 << 20, 3_000_001])
def test_long_rows_keep_float32_accuracy(columns):
    # partial sums of one row added up in float32 were off by 6e-7 here
    prediction = torch.rand(1, 1, columns)
    weighting = torch.ones(1, 1, 1, requires_grad=True)
    loss = masked_squared_error(
        prediction, torch.zeros_like(prediction), weighting=weighting, reduction="token"
    )
    loss.sum().backward()
    exact = prediction.double().square().mean().item()
    assert loss.item() == pytest.approx(exact, rel=1.5e-7)
    assert weighting.grad.item() == pytest.approx(exact, rel=1.5e-7)


def test_half_counts_past_65504():
    # a count or a sum kept in float16 would be inf, and in bfloat16 rounded to a multiple of 512
    for dtype in (torch.float16, torch.bfloat16):
        prediction = torch.full((1, 70001, 1), 3.0, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 70001)
        mask[0, 7] = 0
        loss = masked_squared_error(prediction, torch.zeros_like(prediction), mask)
        assert loss.dtype == torch.float32 and loss.item() == 9.0
        total = masked_squared_error(
            prediction, torch.zeros_like(prediction), mask, reduction="sum"
        )
        assert total.item() == 9.0 * 70000
        total.backward()
        assert prediction.grad[0, 0].item() == 6.0 and prediction.grad[0, 7].item() == 0


def test_squares_that_overflow_float16():
    prediction = torch.full((1, 4, 2), 300.0, dtype=torch.float16, requires_grad=True)
    loss = masked_squared_error(prediction, torch.zeros_like(prediction))
    assert loss.item() == 90000.0
    loss.backward()
    assert prediction.grad.eq(600 / 8).all()


def test_every_float16_number():
    # conversions by bit tricks: all numbers, subnormals and inf among them, there and back
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    number = bits.view(torch.float16).clone().requires_grad_()
    ones = torch.ones((), dtype=torch.float32)
    loss = masked_squared_error(number, torch.zeros_like(number), reduction="none")
    finite = ~number.detach().isnan()
    assert_same_bits(loss.detach()[finite], number.detach().float().square()[finite])
    assert torch.equal(loss.isnan(), ~finite)
    loss.backward(ones.expand(1 << 16) / 2)  # d loss / d number = number
    assert_same_bits(number.grad[finite], number.detach()[finite])
    assert torch.equal(number.grad.isnan(), ~finite)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_round_to_nearest_even(dtype):
    # float32 values between two neighbours, at the middle and beside it
    g = torch.Generator().manual_seed(3)
    wide = torch.randn(4096, generator=g) * torch.logspace(-9, 5, 4096)
    middle = wide.to(dtype).float()
    spacing = (middle.abs() * torch.finfo(dtype).eps / 2).clamp(min=2.0**-25)
    numbers = torch.cat([wide, middle, middle + spacing, middle + spacing / 2, middle - spacing])
    one = torch.ones(numbers.shape, dtype=dtype, requires_grad=True)
    loss = masked_squared_error(one, torch.zeros_like(one), reduction="none")
    (grad,) = torch.autograd.grad(loss, one, numbers / 2)  # 2 * (numbers / 2) * (1 - 0)
    assert_same_bits(grad, numbers.to(dtype))
