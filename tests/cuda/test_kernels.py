# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under the simulator, and on a GPU where there is one: every case, dtype and
reduction by the accuracy rule.

What each lane reads changes with the row's length (lanes per row, packs of 16 bytes and their tail,
4096 columns to an item), with alignment and strides, and with the number of rows (2048 blocks).
"""

import pytest
import torch
from accuracy import Expected, assert_all_accurate, assert_same_bits
from cases import BY_NAME, CASES, FLOATING, REDUCTIONS, Case, make, stored_as
from cuda_sim import ORDERS, compiler
from gpu_device import DEVICES, device_named

from tests.elementwise.test_values import grad_loss_for, loss_shape

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated import simulated_operator

WEIGHTS = {"foreground_weight": 3.0, "background_weight": 0.25}
SCALARS = ("mean", "sum", "batch_mean", "token_sum")
LARGE = 1 << 15  # elements; beyond, what each dtype and reduction do is known from the small ones

# Both sides of a pack (2, 4 or 8 elements), of 1 to 32 lanes with each of these, and of an item.
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130)
COLUMNS += (255, 256, 257, 4095, 4096, 4097, 8193)
ROWS = [
    Case(f"rows_of_{c}", "rows one below the other", (2, 5, c), weighting=(2, 5, 1), edit="tokens")
    for c in COLUMNS
]
ROWS += [
    Case(f"one_row_of_{c}", "always aligned, so that tails follow packs", (c,), mask="elements")
    for c in COLUMNS
]
MANY_ROWS = [
    Case("rows_of_17", "16384 rows to a turn of 2048 blocks", (3, 5500, 17), "random", "tokens"),
    Case("rows_of_5", "65536 rows to a turn", (3, 22000, 5), "random", "tokens"),
]
POSITION = {case.name: i for i, case in enumerate(CASES + ROWS)}

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_operator(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


def reductions_of(case, dtype):
    """Scalar ones differ in the divisor alone, so they take turns over cases and dtypes."""
    scalar = SCALARS[(POSITION[case.name] + FLOATING.index(dtype)) % len(SCALARS)]
    if torch.Size(case.shape).numel() >= LARGE:
        return (scalar, "token") if dtype in (torch.float32, torch.bfloat16) else ()
    return (scalar, "token", "none") if case.shape else (scalar, "none")


def selected(inputs):
    """Elements that the mask keeps."""
    mask, prediction = inputs["mask"], inputs["prediction"]
    if mask is None:
        return prediction.numel()
    rest = (1,) * (prediction.dim() - mask.dim())
    return int((mask != 0).reshape(*mask.shape, *rest).expand(prediction.shape).sum())


def check(op, inputs, grad_loss=None, what="", **options):
    options = {**WEIGHTS, **options}
    results, count = op(inputs, grad_loss, **options)
    assert_all_accurate(results, Expected(inputs, grad_loss, **options), f"{what} {options}")
    assert count == selected(inputs), what
    return results


@pytest.mark.parametrize("case", CASES + ROWS, ids=lambda c: c.name)
@every_dtype
def test_agrees_with_reference(op, case, dtype):
    inputs = make(case, dtype)
    for reduction in reductions_of(case, dtype):
        check(op, inputs, what=case.name, reduction=reduction)


@pytest.mark.parametrize("case", MANY_ROWS, ids=lambda c: c.name)
def test_more_rows_than_the_grid_takes_at_once(op, case):
    inputs = make(case, torch.float32)
    check(op, inputs, reduction="token_sum")
    assert any("grid (2048,1,1)" in launch for launch in op.sim.launches())


@pytest.mark.parametrize("case", [c for c in CASES + ROWS if c.shape], ids=lambda c: c.name)
def test_grad_loss_of_any_strides(op, case):
    reduction = ("token", "none", "mean")[POSITION[case.name] % 3]
    if torch.Size(case.shape).numel() >= LARGE:
        reduction = "mean"
    grad_loss = grad_loss_for(loss_shape(case, reduction), torch.float32)
    check(op, make(case, torch.float32), grad_loss, case.name, reduction=reduction)


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_expanded_grad_loss(op, reduction):
    case = BY_NAME["weight_all"]
    grad_loss = torch.full((), 0.5).expand(loss_shape(case, reduction))
    check(op, make(case, torch.float32), grad_loss, reduction=reduction)
    rows = torch.rand(loss_shape(case, reduction)[:1] + (1,) * (len(case.shape) - 1))
    grad_loss = (rows if reduction == "none" else rows[..., 0]).expand_as(grad_loss)
    check(op, make(case, torch.float32), grad_loss, reduction=reduction)


@pytest.mark.parametrize("reduction", SCALARS)
@pytest.mark.parametrize("case", ["empty_rows", "all_dropped", "one_kept", "rank_1", "no_channels"])
def test_every_divisor(op, case, reduction):
    check(op, make(BY_NAME[case], torch.float32), torch.tensor(-1.75), case, reduction=reduction)


@pytest.mark.parametrize("shape", [(3, 0, 1), (0, 3, 1), (0,), (2, 0), (3, 2, 0, 1)], ids=str)
@pytest.mark.parametrize("mask", [None, "padded"])
def test_sizes_of_zero(op, shape, mask):
    mask = "samples" if mask and len(shape) == 1 else mask
    inputs = make(Case("empty", "", shape, mask, weighting=(1,) * len(shape)), torch.float32)
    for reduction in REDUCTIONS:
        check(op, inputs, what=str(shape), reduction=reduction)


@pytest.mark.parametrize(
    "wants", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0)]
)
@pytest.mark.parametrize("case", ["weight_element", "weight_sample", "one_vector"])
def test_only_the_gradients_that_are_asked_for(op, case, wants):
    inputs = make(BY_NAME[case], torch.float32)
    everything, _ = op(inputs)
    results, _ = op(inputs, needs=tuple(map(bool, wants)))
    assert len(results) == 1 + sum(wants)
    for key, result in results.items():
        assert_same_bits(result, everything[key], key)


# Which of the ways of reading is taken; wrong results and misaligned packs would end other tests.


def readers_of(op, inputs, **options):
    op.sim.reset()
    check(op, inputs, **options)
    return op.readers()


@pytest.mark.parametrize("dtype, pack", [
    (torch.float16, "Half, 8"), (torch.bfloat16, "BFloat16, 8"), (torch.float32, "float, 4"),
    (torch.float64, "double, 2")], ids=str)  # fmt: skip
def test_aligned_rows_are_read_by_packs(op, dtype, pack):
    single = pack.replace(pack[-1], "1")
    size = int(pack[-1])
    for reduction in ("mean", "token", "none"):
        inputs = make(Case("aligned", "", (2, 5, 8 * size)), dtype)
        assert readers_of(op, inputs, reduction=reduction) == [f"Direct {pack}"] * 2
        inputs = make(Case("rows", "one element too long", (2, 5, 8 * size + 1)), dtype)
        assert readers_of(op, inputs, reduction=reduction) == [f"Direct {single}"] * 2
        inputs = make(Case("flat", "one row, so its length is free", (1, 1, 8 * size + 1)), dtype)
        assert readers_of(op, inputs, reduction=reduction) == [f"Direct {pack}"] * 2
        inputs = make(Case("short", "shorter than a pack", (1, 1, size - 1)), dtype)
        assert readers_of(op, inputs, reduction=reduction) == [f"Direct {single}"] * 2
        for offset in (1, size - 1, size):
            inputs = shifted(make(Case("aligned", "", (2, 5, 8 * size)), dtype), offset)
            way = pack if offset == size else single
            assert readers_of(op, inputs, reduction=reduction) == [f"Direct {way}"] * 2


def shifted(inputs, offset, name="prediction"):
    """`name` starts `offset` elements late in its storage."""
    tensor = inputs[name]
    storage = torch.full((tensor.numel() + offset,), float("nan"), dtype=tensor.dtype)
    return {**inputs, name: storage[offset:].view(tensor.shape).copy_(tensor)}


def test_one_misaligned_tensor_is_enough(op):
    inputs = make(Case("aligned", "", (2, 5, 64), weighting=(2, 5, 64)), torch.float32)
    assert readers_of(op, shifted(inputs, 1, "target")) == ["Direct float, 1"] * 2
    assert readers_of(op, shifted(inputs, 1, "weighting")) == ["Direct float, 4"] * 2


def test_tails_of_aligned_rows_with_gaps(op):
    # 65 of 80 columns: forward reads packs and a tail in each row, gradients lie without gaps
    inputs = make(Case("rows", "", (2, 5, 65), edit="tokens"), torch.float32)
    for name in ("prediction", "target"):
        storage = torch.full((2, 5, 80), float("nan"))
        inputs[name] = storage[..., :65].copy_(inputs[name])
    for reduction in ("sum", "token", "none"):
        readers = readers_of(op, inputs, reduction=reduction)
        assert readers == ["Direct float, 4", "Direct float, 1"]


@pytest.mark.parametrize("target, way", [
    (torch.float16, "Any float"), (torch.float32, "Any float"), (torch.float64, "Any double"),
    (torch.bfloat16, "Direct BFloat16, 8")], ids=str)  # fmt: skip
def test_unlike_dtypes_are_read_by_elements(op, target, way):
    case = Case("aligned", "", (2, 5, 64), target_dtype=target)
    assert readers_of(op, make(case, torch.bfloat16)) == [way] * 2


def test_columns_apart_are_read_by_elements(op):
    inputs = make(Case("aligned", "", (4, 8, 16)), torch.float32)
    for layout in ("transposed", "sliced"):
        for name in ("prediction", "target"):
            odd = {**inputs, name: stored_as(inputs[name], layout)}
            assert readers_of(op, odd) == ["Any float"] * 2
    column = inputs["target"][..., :1].expand(4, 8, 16)  # one number for a whole row
    assert readers_of(op, {**inputs, "target": column}) == ["Any float"] * 2


# Sums in a fixed order


@pytest.mark.parametrize("case", CASES + ROWS, ids=lambda c: c.name)
def test_same_bits_in_every_order(op, case):
    dtype = FLOATING[POSITION[case.name] % 4]
    inputs = make(case, dtype)
    reduction = ("mean", "token", "none")[POSITION[case.name] % 3 if case.shape else 0]
    if torch.Size(case.shape).numel() > LARGE:
        reduction = "mean"
    first, count = op(inputs, reduction=reduction)
    for order in ORDERS[1:]:
        results, again = op(inputs, order=order, reduction=reduction)
        assert again == count
        for key, result in results.items():
            assert_same_bits(result, first[key], f"{case.name} {reduction} {order} {key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_that_show_their_order(op, dtype):
    # terms over eight decades: added in another order, as below, they give other bits
    values = torch.randn(40, 4096, dtype=dtype) * torch.logspace(-2, 2, 4096, dtype=dtype)
    inputs = {**make(Case("rows", "", (40, 4096), "samples"), dtype), "prediction": values}
    orders = (*ORDERS, ORDERS[0])
    sums = {op(inputs, order=order, reduction="sum")[0]["loss"].item() for order in orders}
    assert len(sums) == 1
    if dtype == torch.float64:  # a float32 result is rounded and may hide it
        target = inputs["target"]
        for columns in (torch.randperm(4096) for _ in range(20)):
            shuffled = dict(inputs, prediction=values[:, columns], target=target[:, columns])
            sums.add(op(shuffled, reduction="sum")[0]["loss"].item())
        assert len(sums) > 1
