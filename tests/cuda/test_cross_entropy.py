# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy's CUDA kernels under the simulator, and on a GPU where there is one: every
launch regime, dtype and option.

In packs of 16 bytes per row: up to 256 a row belongs to 8 to 32 lanes (4 packs each), up to 512 to
a block of 128 threads, beyond to one of 256; from 1025 on a row is cut where rows are few.
"""

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import ORDERS, compiler
from gpu_device import DEVICES, device_named

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated_cross_entropy import check, random_upstream, simulated_cross_entropy

NAN = float("nan")
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 7.5},
    "normalizer_0": {"normalizer": 0},
    "weight": {"weight": "random"},
    "token_weight": {"token_weight": "random", "reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_weight": {"label_smoothing": 0.3, "weight": "random"},
    "all_smooth": {"label_smoothing": 1.0, "reduction": "sum"},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "random"},
    "softcap": {"softcap": 5.0, "temperature": 1.5},
    "z_loss": {"z_loss": 0.1, "token_weight": "random"},
    "focal": {"focal_gamma": 2.0},
    "focal_half": {"focal_gamma": 0.5, "weight": "random", "label_smoothing": 0.1},
    "everything": {
        "weight": "random", "token_weight": "random", "label_smoothing": 0.2, "temperature": 1.3,
        "softcap": 8.0, "z_loss": 0.05, "focal_gamma": 1.5, "shift": 1, "segment_ids": "random",
    },
    "everything_by_row": {
        "weight": "random", "token_weight": "random", "label_smoothing": 0.2, "softcap": 8.0,
        "temperature": "random", "z_loss": 0.05, "focal_gamma": 1.5, "shift": 1,
    },
}  # fmt: skip
NAMES = list(OPTIONS)
# packs of 16 bytes, and elements more or less than that
LENGTHS = [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 3), (31, 1), (32, 0), (32, 1), (64, 1)]
LENGTHS += [(128, -1), (256, 0), (256, 1), (512, 0), (512, 1), (1024, 0), (1024, 1), (3000, 1)]

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_cross_entropy(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


def make(shape, dtype=torch.float32, keep=0.7, spread=3.0):
    """logits, target, mask; the first row counts."""
    logits = (torch.randn(shape) * spread).to(dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    mask = torch.rand(shape[:-1]) < keep
    if mask.numel() > 0:
        mask.view(-1)[0] = True
    return logits, target, mask


def filled(options, logits):
    """Options with their tensors."""
    options, rows = dict(options), logits.shape[:-1]
    if "weight" in options:
        options["weight"] = torch.rand(logits.shape[-1]) * (torch.rand(logits.shape[-1]) < 0.9)
    if "token_weight" in options:
        options["token_weight"] = torch.rand(rows)
    if options.get("temperature") == "random":
        options["temperature"] = torch.rand(rows) + 0.5
    if "segment_ids" in options:
        options["segment_ids"] = torch.randint(0, 2, rows, dtype=torch.int32)
    return options


def columns(length, dtype):
    packs, more = length
    return max(packs * 16 // dtype.itemsize + more, 1)


@pytest.mark.parametrize("length", LENGTHS, ids=str)
@every_dtype
def test_every_length(op, length, dtype):
    turn = LENGTHS.index(length) * 5 + FLOATING.index(dtype) * 2
    inputs = make((2, 2, columns(length, dtype)), dtype)
    check(op, *inputs, **filled(OPTIONS["everything"], inputs[0]))
    name = NAMES[turn % (len(NAMES) - 1)]
    upstream = random_upstream(inputs[0], OPTIONS[name].get("reduction"), False)
    check(op, *inputs, upstream=upstream, **filled(OPTIONS[name], inputs[0]))


@pytest.mark.parametrize("name", NAMES)
@every_dtype
def test_every_option(op, name, dtype):
    for shape, statistics in (((3, 4, 37), True), ((5, 70), False)):
        inputs = make(shape, dtype)
        upstream = random_upstream(inputs[0], OPTIONS[name].get("reduction"), statistics)
        check(op, *inputs, upstream=upstream, **filled(OPTIONS[name], inputs[0]))


def test_launches_are_what_the_lengths_stand_for(op):
    def launches(length, rows=2):
        op.sim.reset()
        logits, target, mask = make((rows, columns(length, torch.float32)))
        op(logits, target, mask).backward({"loss": torch.tensor(1.0)})
        return [line.split(" shared")[0].rpartition(">")[2] for line in op.sim.launches()]

    def grids(length, rows=2):
        return [line[line.index("grid") :] for line in launches(length, rows)]

    def grid(blocks, threads):
        return f"grid ({blocks},1,1) block ({threads},1,1)"

    one = grid(1, 256)
    assert grids((256, 0)) == [one, one, one]
    # several blocks, whose totals are added
    assert grids((256, 1)) == [grid(2, 128), one, one, grid(2, 128)]
    assert grids((512, 1)) == [grid(2, 256), one, one, grid(2, 256)]
    assert grids((1, 0), rows=64) == [one, one, one]
    assert grids((1, 0), rows=65) == [grid(2, 256), one, one, grid(2, 256)]
    assert grids((1, 0), rows=257) == [grid(5, 256), one, grid(2, 256), grid(5, 256)]
    # rows in parts, which a thread per row merges
    assert grids((1024, 1)) == [grid(4, 256), one, one, grid(4, 256)]
    cut = [grid(1028, 256), grid(3, 256), one, grid(3, 256), grid(1028, 256)]
    assert grids((1024, 1), rows=514) == cut


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_rows(op, reduction):
    inputs = make((3, 231, 5), torch.bfloat16)
    results = check(op, *inputs, reduction=reduction)
    counted = inputs[2].sum().item()
    assert results["totals"][0].item() == (counted if reduction == "mean" else 1)


@every_dtype
def test_rows_anywhere(op, dtype):
    # starts off the 16-byte boundaries, each its own; the gradient's rows begin elsewhere
    for packs, cut, gap in ((9, 1, 0), (9, 3, 5), (300, 1, 1), (1100, 1, 3)):
        length = columns((packs, 1), dtype)
        storage = torch.full((4, length + cut + gap), NAN, dtype=dtype)
        logits, target, mask = make((4, length), dtype)
        view = storage[:, cut : cut + length].copy_(logits)
        expected = check(op, logits, target, mask, **filled(OPTIONS["smoothing"], logits))
        results = check(op, view, target, mask, **filled(OPTIONS["smoothing"], logits))
        assert_same_bits(results["hit"], expected["hit"])
    logits, target, mask = make((2, 3, 17), dtype)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    check(op, turned, target.T.contiguous().T.contiguous(), mask)
    check(op, logits[:, :1].expand(2, 3, 17).contiguous(), target, mask)


def test_overwriting_leaves_what_lies_between_rows(op):
    storage = torch.full((3, 60), -7.0)
    logits, target, mask = make((3, 49))
    view = storage[:, 3:52].copy_(logits)
    call = op(view, target, mask)
    upstream = random_upstream(logits, "mean", True)
    over = call.backward(upstream, in_place=True)["logits"]
    assert over.stride() == (60, 1)
    assert_same_bits(over.contiguous(), call.backward(upstream)["logits"])
    whole = torch.empty(0).set_(over.untyped_storage(), 0, (3, 60))
    assert (whole[:, :3] == -7).all() and (whole[:, 52:] == -7).all()


def test_logits_that_are_one_row(op):
    # forward accepts rows that share memory
    logits, target, mask = make((4, 33))
    shared = logits[:1].expand(4, 33)
    expected = op(shared.contiguous(), target, mask).results
    results = op(op.sim.upload(shared), target, mask).results
    for name, result in results.items():  # the last bits depend on where a row begins
        torch.testing.assert_close(result, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("length", [(1, 1), (200, 1), (300, 1), (1100, 1)], ids=str)
def test_same_bits_in_every_order(op, length):
    dtype = FLOATING[length[0] % 3]
    inputs = make((5, columns(length, dtype)), dtype)
    options = filled(OPTIONS["focal_half"], inputs[0])
    upstream = random_upstream(inputs[0], "mean", True)
    first = op(*inputs, **options)
    grads = first.backward(upstream)
    for order in ORDERS[1:]:
        again = op(*inputs, order=order, **options)
        for name, result in again.results.items():
            assert_same_bits(result, first.results[name], f"{order} {name}")
        for name, grad in again.backward(upstream, order).items():
            assert_same_bits(grad, grads[name], f"{order} grad {name}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_target(op, dtype):
    logits, target, _ = make((2, 3, 21))
    target[0, 1] = 5
    check(op, logits, target.to(dtype), ignore_index=5, shift=1)
    segments = torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=dtype)
    check(op, logits, target.to(dtype), shift=1, segment_ids=segments)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_every_mask(op, dtype):
    logits, target, mask = make((2, 3, 21))
    mask = mask.to(dtype) * (1 if dtype == torch.bool else 3)
    check(op, logits, target, mask)


@pytest.mark.parametrize("shift", [1, 2, 4, 5, 9])
def test_shift(op, shift):
    logits, target, mask = make((3, 5, 19))
    target[1, 3] = -100
    for name in ("token_weight", "everything"):
        options = filled(OPTIONS[name], logits) | {"shift": shift}
        results = check(op, logits, target, mask, **options)
        assert (results["grad token_weight"][:, :shift] == 0).all()


def test_no_target(op):
    logits, _, mask = make((4, 70))
    call = op(logits, None, mask, reduction="none", label_smoothing=0.1)
    assert torch.equal(call.results["argmax"], logits.argmax(-1) * mask)
    assert call.results["loss"].item() == 0
    for name in ("log_prob", "hit", "smooth_distance"):
        assert call.results[name].shape == (0,)
    zero = torch.zeros(4, dtype=torch.int64)
    expected = op(logits, zero, mask, reduction="none")
    upstream = random_upstream(logits, "none", True)
    del upstream["loss"], upstream["log_prob"]
    for name in ("lse", "entropy"):  # without a label all of its column's share is in the sums
        close = torch.testing.assert_close
        close(call.results[name], expected.results[name], rtol=1e-6, atol=1e-6, msg=name)
    grads = call.backward(upstream)
    label = expected.backward(upstream)["logits"]
    torch.testing.assert_close(grads["logits"], label, rtol=1e-5, atol=1e-7)


def test_no_statistics(op):
    logits, target, mask = make((4, 70))
    every, lean = op(logits, target, mask), op(logits, target, mask, statistics=False)
    for name, result in lean.results.items():
        if name in ("entropy", "hit", "argmax"):
            assert result.shape == (0,)
        elif name != "smooth_distance":
            close = torch.testing.assert_close
            close(result, every.results[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_asked_for(op, needs):
    logits, target, mask = make((4, 70))
    call = op(logits, target, mask, token_weight=torch.rand(4))
    upstream = random_upstream(logits, "mean", False)
    everything = call.backward(upstream)
    for needed, (name, grad) in zip(
        needs, call.backward(upstream, needs=needs).items(), strict=True
    ):
        if needed:
            assert_same_bits(grad, everything[name], name)
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(op, shape, reduction):
    logits, target, _ = make(shape)
    for weight in (None, torch.rand(shape[-1])):
        results = check(op, logits, target, reduction=reduction, weight=weight)
        assert results["grad logits"].shape == shape


def test_one_row_without_dimensions(op):
    check(op, torch.randn(19), torch.tensor(3))
