# SPDX-License-Identifier: BSD-3-Clause
"""What masked_cross_entropy's CUDA kernels touch, under the simulator: no row that does not count,
nothing beyond a row, every element of every output.

A pack across a 16-byte boundary, a read beyond a tensor and a write to an input end the process in
the tests of test_cuda_cross_entropy.py as well.
"""

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import ORDERS, compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cuda_sim.probing import message_of_abort
from simulated_cross_entropy import random_upstream, simulated_cross_entropy, simulated_sweep

from masked_loss_ext import reference
from tests.cuda.test_cross_entropy import OPTIONS, columns, filled, make

NAN = float("nan")
# lanes of a warp, a block per row, a row in parts
LENGTHS = [(0, 3), (5, 1), (300, 1), (1100, -1)]

every_length = pytest.mark.parametrize("length", LENGTHS, ids=str)


@pytest.fixture(scope="module")
def op():
    return simulated_cross_entropy()


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


def in_pieces(op, logits, counts, gap=0):
    """Uploaded row by row, the rows that do not count without any memory; each on a boundary."""
    rows = [row if on else None for row, on in zip(logits, counts, strict=True)]
    return op.sim.upload_rows(rows, gap)


def run(op, logits, target, mask, upstream, order=ORDERS[0], **options):
    call = op(logits, target, mask, order=order, **options)
    grads = call.backward(upstream, order)
    return call.results | {f"grad {name}": grad for name, grad in grads.items()}


def assert_all_same(results, expected, what=""):
    for name, result in results.items():
        assert_same_bits(result, expected[name], f"{what} {name}")


@every_length
@pytest.mark.parametrize("by", ["mask", "ignore_index"])
def test_rows_that_do_not_count_are_never_touched(op, length, by):
    dtype = FLOATING[LENGTHS.index(length)]
    logits, target, _ = make((6, columns(length, dtype)), dtype)
    mask = torch.tensor([1, 0, 0, 1, 0, 1])
    if by == "ignore_index":
        target, mask, counts = target.masked_fill(mask == 0, -100), None, mask
    else:
        counts = mask
    for name, order in zip(("plain", "focal_half", "none"), ORDERS, strict=False):
        options = filled(OPTIONS[name], logits)
        upstream = random_upstream(logits, options.get("reduction"), True)
        whole = in_pieces(op, logits, [1] * 6)
        expected = run(op, whole, target, mask, upstream, **options)
        pieces = in_pieces(op, logits, counts)
        results = run(op, pieces, target, mask, upstream, order, **options)
        assert_all_same(results, expected, name)
        zeros = results["grad logits"][counts == 0]
        assert_same_bits(zeros, torch.zeros_like(zeros))


@every_length
def test_reading_one_of_them_ends_the_process(op, length):
    # the same without a mask: shows that the test above can fail
    logits, target, _ = make((6, columns(length, torch.float32)))
    pieces = in_pieces(op, logits, [1, 0, 0, 1, 0, 1])
    text = message_of_abort(lambda: op(pieces, target))
    assert "out of bounds: read" in text and "cross_entropy_sums_kernel" in text


def test_a_row_with_a_bad_label_is_not_read_either(op):
    logits, target, _ = make((3, 300))
    target[1] = 300
    call = op(in_pieces(op, logits, [1, 0, 1]), target)
    assert call.results["lse"].isnan().tolist() == [False, True, False]
    grad = call.backward({"loss": torch.tensor(1.0)})["logits"]
    assert grad[1].isnan().all()


@every_length
def test_offsets_beyond_32_bits(op, length):
    logits, target, _ = make((3, columns(length, torch.bfloat16)), torch.bfloat16)
    gap = logits.element_size() << 31
    try:
        far = in_pieces(op, logits, [1, 1, 1], gap)
    except RuntimeError as error:
        pytest.skip(f"no room for rows so far apart: {error}")
    assert far.stride(0) > 1 << 31
    upstream = random_upstream(logits, "mean", True)
    near = in_pieces(op, logits, [1, 1, 1])
    assert_all_same(run(op, far, target, None, upstream), run(op, near, target, None, upstream))


@every_length
def test_poison_changes_no_bit(op, length):
    dtype = FLOATING[LENGTHS.index(length) - 1]
    logits, target, mask = make((2, 4, columns(length, dtype)), dtype, keep=0.5)
    mask[0, 2], mask[1, 1] = False, False
    for name in ("plain", "none", "everything"):
        options = filled(OPTIONS[name], logits) | {"shift": 1}
        upstream = random_upstream(logits, options.get("reduction"), True)
        clean = run(op, logits, target, mask, upstream, **options)
        off = torch.ones(2, 4, dtype=torch.bool)
        off[:, :-1] = ~mask[:, 1:]
        if "segment_ids" in options:
            off[:, :-1] |= options["segment_ids"][:, 1:] != options["segment_ids"][:, :-1]
        label_off = torch.ones(2, 4, dtype=torch.bool)
        label_off[:, 1:] = off[:, :-1]
        for value in (NAN, -float("inf")):
            bad = logits.masked_fill(off[..., None], value)
            labels = target.masked_fill(label_off, 2**31 - 1)
            if "token_weight" in options:
                options["token_weight"] = options["token_weight"].masked_fill(label_off, value)
            dirty = {
                k: g if g.dim() == 0 else g.masked_fill(off, value) for k, g in upstream.items()
            }
            if "segment_ids" not in options:  # there labels are left out by segment, not by mask
                bad_results = run(op, bad, labels, mask, dirty, **options)
            else:
                bad_results = run(op, bad, target, mask, dirty, **options)
            assert_all_same(bad_results, clean, f"{name} {value}")


def test_poison_in_a_row_that_counts_shows(op):
    logits, target, _ = make((3, 40))
    logits[1, 5] = NAN
    call = op(logits, target, reduction="none")
    assert call.results["loss"].isnan().tolist() == [False, True, False]
    grad = call.backward({"loss": torch.ones(3)})["logits"]
    assert grad.isnan().all(-1).tolist() == [False, True, False]


def test_a_gradient_that_is_not_given_is_not_missed(op):
    logits, target, mask = make((4, 70))
    call = op(logits, target, mask)
    upstream = random_upstream(logits, "mean", True)
    for name in upstream:
        zeros = {k: v if k == name else torch.zeros_like(v) for k, v in upstream.items()}
        alone = call.backward({name: upstream[name]})["logits"]
        torch.testing.assert_close(alone, call.backward(zeros)["logits"], rtol=1e-6, atol=1e-8)


def test_launches_of_a_call(op):
    # One forward where a block has all rows, one more that adds the totals of several, one more
    # that merges the parts of a row. Two backward, one for token weights alone. None for the sum of
    # the class weights.
    kinds = ("sums", "rows_kernel", "totals", "row_gradients", "gradient_kernel")

    def launches():
        lines = op.sim.launches()
        found = [k for line in lines for k in kinds if f"cross_entropy_{k}" in line]
        assert len(found) == len(lines)
        op.sim.reset()
        return found

    logits, target, mask = make((3, 40))
    one = {"loss": torch.tensor(1.0)}
    op(logits, target, mask).backward(one)
    assert launches() == ["sums", "row_gradients", "gradient_kernel"]
    op(logits, target, mask, token_weight=torch.ones(3)).backward(one, needs=(False, True))
    assert launches() == ["sums", "row_gradients"]
    weighted = {"weight": torch.rand(40), "label_smoothing": 0.1}
    op(logits, target, mask, **weighted).backward(one)
    assert launches() == ["sums", "row_gradients", "gradient_kernel"]
    op(*make((300, 2))).backward(one)
    assert launches() == ["sums", "totals", "row_gradients", "gradient_kernel"]
    op(*make((20_000, 257))).backward(one, needs=(False, False))
    assert launches() == ["sums", "totals"]
    op(*make((2, columns((2048, 1), torch.float32)))).backward(one)
    assert launches() == ["sums", "rows_kernel", "row_gradients", "gradient_kernel"]
    op(*make((0, 2))[:2]).backward(one)
    assert launches() == ["sums"]
    op(*make((0, 20_000))[:2], **{**weighted, "weight": torch.rand(20_000)}).backward(one)
    assert launches() == ["sums", "rows_kernel"]


@pytest.mark.parametrize("length", [40, 5000, 20_000])
def test_the_sum_of_the_class_weights_is_saved(op, length):
    logits, target, mask = make((3, length))
    weight = torch.rand(length)
    for smoothing, expected in ((0.1, weight.double().sum().item()), (0.0, length)):
        totals = op(logits, target, mask, weight=weight, label_smoothing=smoothing).results[
            "totals"
        ]
        assert totals[1].item() == pytest.approx(expected, rel=1e-12)


def test_more_totals_than_a_block_adds(op):
    """A block per row, and more rows than 16384: two launches add them."""
    logits = torch.randn(1, columns((257, 0), torch.float32)).expand(16_400, -1)
    target = torch.full((16_400,), -100)
    target[-20:] = torch.arange(20)
    call = op(logits, target, statistics=False)
    expected = reference.masked_cross_entropy(logits[-20:], target[-20:])
    torch.testing.assert_close(call.results["loss"], expected)
    assert sum("cross_entropy_totals" in line for line in op.sim.launches()) == 2


def test_scaling_by_1_touches_nothing(op):
    gradient = op.sim.upload(torch.randn(4, 50))  # a write to it would end the process
    before = op.sim.download(gradient)
    simulated_sweep().scale(gradient, 1.0)
    assert_same_bits(op.sim.download(gradient), before)
