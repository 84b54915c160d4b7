# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy's CUDA kernel for loss and gradient in one sweep, under the simulator, and
on a GPU where there is one.

Up to 256 packs of 16 bytes a row belongs to 8 to 32 lanes, up to 512 to a block of 128 threads,
then to one of 256, to one of 512 where a multiprocessor holds no two of them, and where shared
memory does not hold the row (here 99 KB) it is read twice.
"""

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import ORDERS, compiler
from gpu_device import DEVICES, device_named

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated_cross_entropy import check_sweep, simulated_sweep

from tests.cross_entropy.test_hand_worked import MASK, TARGET, WEIGHT, logits
from tests.cross_entropy.test_sweep import on_paper
from tests.cuda.test_cross_entropy import OPTIONS, columns, every_dtype, filled, make
from tests.cuda.test_cross_entropy_cluster import HALF, WHOLE
from tests.cuda.test_cross_entropy_memory import in_pieces

NAN = float("nan")
SCALAR = [name for name, o in OPTIONS.items() if o.get("reduction") != "none"]
SMALL = [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 3), (31, 1), (32, 1), (64, 1), (128, 1)]
BORDERS = [(256, 0), (256, 1), (512, 0), (512, 1)]
BORDERS += [(HALF, 0), (HALF, 1), (WHOLE, 0), (WHOLE, 1)]


@pytest.fixture(scope="module", params=DEVICES)
def sweep(request):
    return simulated_sweep(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_device(sweep):
    yield
    sweep.sim.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_on_paper(sweep, in_place):
    for weights, options in (
        ([1 / 3] * 3, {}),
        ([1.0] * 3, {"reduction": "sum"}),
        ([1 / 4] * 3, {"normalizer": 4}),
        ([5 / 10, 3 / 10, 2 / 10], {"weight": WEIGHT}),
        ([0.5 / 3, 0.0, 2 / 3], {"token_weight": torch.tensor([0.5, 0, 2, 9])}),
        ([0.0] * 3, {"normalizer": 0}),
    ):
        _, gradient = sweep(logits(), TARGET, MASK, in_place=in_place, **options)
        expected = torch.tensor(on_paper(weights), dtype=torch.float64)
        gradient = sweep.sim.download(gradient)
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", SMALL, ids=str)
@every_dtype
def test_every_short_length(sweep, length, dtype):
    turn = SMALL.index(length) * 5 + FLOATING.index(dtype) * 2
    inputs = make((2, 3, columns(length, dtype)), dtype)
    for name in ("everything", SCALAR[turn % (len(SCALAR) - 1)]):
        check_sweep(sweep, *inputs, **filled(OPTIONS[name], inputs[0]))


@pytest.mark.parametrize("length", BORDERS, ids=str)
def test_both_sides_of_every_border(sweep, length):
    dtype = FLOATING[BORDERS.index(length) // 2]
    inputs = make((2, columns(length, dtype)), dtype)
    for name, order in (("everything", ORDERS[1]), ("plain", ORDERS[2])):
        options = filled(OPTIONS[name], inputs[0]) | {"shift": 0}
        check_sweep(sweep, *inputs, order=order, **options)


def test_launches_of_a_call(sweep):
    kinds = ("totals", "sweep", "scale")

    def found():
        lines = sweep.sim.launches()
        names = [k for line in lines for k in kinds if f"cross_entropy_{k}" in line]
        assert len(names) == len(lines)
        sweep.sim.reset()
        return names

    _, gradient = sweep(*make((3, 40)))
    sweep.scale(gradient, 2.0)
    assert found() == ["totals", "sweep", "totals", "scale"]
    sweep(*make((1025, 2)))
    assert found() == ["totals", "totals", "sweep", "totals", "totals"]
    sweep(*make((3, 40)), weight=torch.rand(40), label_smoothing=0.1)
    assert found() == ["totals", "sweep", "totals"]
    sweep(*make((0, 2)))
    assert found() == ["totals", "totals"]


@pytest.mark.parametrize("name", SCALAR)
@every_dtype
def test_every_option(sweep, name, dtype):
    inputs = make((3, 4, 37), dtype)
    check_sweep(sweep, *inputs, **filled(OPTIONS[name], inputs[0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows(sweep, reduction):
    check_sweep(sweep, *make((3, 231, 5), torch.bfloat16), reduction=reduction)


@every_dtype
def test_rows_anywhere(sweep, dtype):
    for packs, cut, gap in ((9, 1, 0), (9, 3, 5), (300, 1, 1)):
        length = columns((packs, 1), dtype)
        storage = torch.full((4, length + cut + gap), NAN, dtype=dtype)
        inputs = make((4, length), dtype)
        view = storage[:, cut : cut + length].copy_(inputs[0])
        check_sweep(sweep, view, *inputs[1:], **filled(OPTIONS["smoothing"], view))


@pytest.mark.parametrize("length", [(5, 1), (300, 1), (WHOLE, 2)], ids=str)
def test_every_order_gives_the_same_bits(sweep, length):
    inputs = make((4, columns(length, torch.float32)))
    options = filled(OPTIONS["everything"], inputs[0]) | {"shift": 0}
    expected = [sweep.sim.download(t) for t in sweep(*inputs, **options)]
    for order in ORDERS[1:]:
        for ours, first in zip(sweep(*inputs, order=order, **options), expected, strict=True):
            assert_same_bits(sweep.sim.download(ours), first)


@pytest.mark.parametrize("length", [(0, 3), (5, 1), (300, 1), (WHOLE, 2)], ids=str)
def test_rows_that_do_not_count_are_never_touched(sweep, length):
    dtype = torch.float32
    logits, target, _ = make((6, columns(length, dtype)), dtype)
    mask = torch.tensor([1, 0, 0, 1, 0, 1])
    options = filled(OPTIONS["focal_half"], logits)
    whole = sweep(in_pieces(sweep, logits, [1] * 6), target, mask, **options)
    pieces = sweep(in_pieces(sweep, logits, mask), target, mask, order=ORDERS[2], **options)
    for ours, expected in zip(pieces, whole, strict=True):
        assert_same_bits(sweep.sim.download(ours), sweep.sim.download(expected))
    zeros = sweep.sim.download(pieces[1])[mask == 0]
    assert_same_bits(zeros, torch.zeros_like(zeros))


def test_a_bad_label_shows(sweep):
    for length in (40, 1500):
        logits, target, _ = make((4, length))
        target[1] = length
        for options in ({}, {"normalizer": 0.0}, {"weight": torch.ones(length)}):
            loss, gradient = map(sweep.sim.download, sweep(logits, target, **options))
            assert loss.isnan()
            assert gradient.isnan().all(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_logit_that_is_not_a_number_shows(sweep, value):
    for length in (40, 1500, WHOLE * 4 + 9):
        logits, target, _ = make((3, length))
        logits[1, length // 2] = value
        loss, gradient = map(sweep.sim.download, sweep(logits, target))
        assert loss.isnan() and gradient.isnan().any(-1).tolist() == [False, True, False]


def test_banned_classes_and_rows_of_nothing_else(sweep):
    logits, target, _ = make((3, 50))
    logits[:, 7:30] = -float("inf")
    target[target < 30] = 40
    _, gradient = check_sweep(sweep, logits, target)
    assert_same_bits(gradient[:, 7:30], torch.zeros(3, 23))
    logits[1] = -float("inf")
    gradient = sweep.sim.download(sweep(logits, target, reduction="sum")[1])
    assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_everything_ignored(sweep):
    logits, target, _ = make((5, 70))
    logits.fill_(NAN)
    for reduction in ("mean", "sum"):
        results = sweep(logits, target.fill_(-100), reduction=reduction, label_smoothing=0.1)
        for result in map(sweep.sim.download, results):
            assert_same_bits(result, torch.zeros_like(result))


def test_offsets_beyond_32_bits(sweep):
    for length in ((0, 3), (300, 1)):
        logits, target, _ = make((3, columns(length, torch.bfloat16)), torch.bfloat16)
        try:
            far = in_pieces(sweep, logits, [1, 1, 1], logits.element_size() << 31)
        except RuntimeError as error:
            pytest.skip(f"no room for rows so far apart: {error}")
        assert far.stride(0) > 1 << 31
        for ours, near in zip(sweep(far, target), sweep(logits, target), strict=True):
            torch.testing.assert_close(sweep.sim.download(ours), sweep.sim.download(near))
        sweep.sim.reset()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 5), (2, 3, 300), (2, 40000)], ids=str)
def test_scaling(sweep, shape, dtype):
    logits, target, mask = make(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one = sweep.sim.download(sweep(logits, target, mask)[1])
    for factor, order in ((1.0, ORDERS[0]), (0.3, ORDERS[1]), (-7.0, ORDERS[2])):
        gradient = sweep(logits, target, mask, order=order)[1]
        sweep.scale(gradient, factor, order)
        expected = (one.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype)
        assert torch.equal(sweep.sim.download(gradient), expected)
    gradient = sweep(logits, target, mask)[1]
    sweep.scale(gradient, float("inf"))
    assert torch.equal(sweep.sim.download(gradient) == 0, one == 0)


def test_scaling_leaves_what_lies_between_rows(sweep):
    storage = torch.full((3, 60), -7.0)
    storage[:, 3:52] = torch.randn(3, 49)
    gradient = sweep.sim.upload(storage[:, 3:52], writable=True)
    sweep.scale(gradient, 2.0)
    scaled = sweep.sim.download(gradient)
    assert_same_bits(scaled.contiguous(), storage[:, 3:52] * 2)
    whole = torch.empty(0).set_(scaled.untyped_storage(), 0, (3, 60))
    assert (whole[:, :3] == -7).all() and (whole[:, 52:] == -7).all()
