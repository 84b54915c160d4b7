# SPDX-License-Identifier: BSD-3-Clause
"""The logit-free cross entropy on CUDA, under the simulator and on a GPU where there is one: which
rows take part, the loop over chunks, the products and what is added beside them.
"""

import math

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import ORDERS, compiler
from gpu_device import DEVICES, device_named

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated import simulator
from simulated_cross_entropy import random_upstream
from simulated_linear import check, simulated_linear

from tests.cuda.test_cross_entropy import OPTIONS, every_dtype

NAN, INF = float("nan"), float("inf")
BF16 = torch.bfloat16


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_linear(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


def make(rows=(3, 4), width=6, classes=19, dtype=torch.float32, kept=0.6):
    """hidden, weight, target, mask; kept: a share, or the places of those that count."""
    hidden = torch.randn(*rows, width).to(dtype)
    weight = torch.randn(classes, width).to(dtype)
    target = torch.randint(0, classes, rows)
    if isinstance(kept, float):
        return hidden, weight, target, torch.rand(rows) < kept
    mask = torch.zeros(rows, dtype=torch.bool)
    mask.view(-1)[list(kept)] = True
    return hidden, weight, target, mask


def filled(name, hidden, weight):
    """Options of the cross entropy with their tensors."""
    options, rows, classes = dict(OPTIONS[name]), hidden.shape[:-1], weight.shape[0]
    if "weight" in options:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        del options["weight"]
        options["class_weight"] = torch.rand(classes, dtype=wide) * (torch.rand(classes) < 0.9)
    if "token_weight" in options:
        options["token_weight"] = torch.rand(rows)
    if "segment_ids" in options:
        options["segment_ids"] = torch.randint(0, 2, rows, dtype=torch.int32)
    return options


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 1])
def test_on_paper(op, chunk_rows):
    ln2 = math.log(2)
    hidden = torch.tensor([[ln2, 0], [NAN, INF], [0, ln2]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    target, mask = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    # p is (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4), so the losses are ln 2 and 2 ln 2
    results = op.sweep(hidden, weight, target, mask, reduction="sum", chunk_rows=chunk_rows)
    expected = {
        "loss": torch.tensor(3 * ln2),
        "grad hidden": torch.tensor([[-1 / 2, 1 / 4], [0, 0], [1 / 4, 1 / 2]]),
        "grad weight": ln2 * torch.tensor([[-1 / 2, 1 / 4], [1 / 4, 1 / 2], [1 / 4, -3 / 4]]),
    }
    for name, one in expected.items():
        torch.testing.assert_close(results[name], one.double(), rtol=1e-7, atol=1e-15)
    one = {"loss": torch.tensor(1.0)}
    call = op(hidden, weight, target, mask, reduction="sum", chunk_rows=chunk_rows)
    grads = call.backward(one)
    for name in ("grad hidden", "grad weight"):
        torch.testing.assert_close(grads[name], results[name])


@pytest.mark.parametrize("name", OPTIONS)
@every_dtype
def test_every_option(op, name, dtype):
    inputs = make(dtype=dtype)
    turn = list(OPTIONS).index(name) + FLOATING.index(dtype)
    more = {"bias": torch.randn(19).to(dtype)} if turn % 2 else {}
    check(op, *inputs, **filled(name, *inputs[:2]), chunk_rows=(None, 3)[turn % 3 == 0], **more)


KEPT = {"none": [], "one": [5], "first": [0], "last": [11], "ends": [0, 11], "all": range(12)}


@pytest.mark.parametrize("chunk_rows", [1, 2, 11, 12, 13, None])
@pytest.mark.parametrize("kept", KEPT)
@every_dtype
def test_kept_rows_and_chunks(op, kept, chunk_rows, dtype):
    inputs = make(dtype=dtype, kept=KEPT[kept])
    bias = torch.randn(19).to(dtype)
    results, swept = check(op, *inputs, bias=bias, chunk_rows=chunk_rows)
    dropped = ~inputs[3]
    for gradients in (results, swept):
        rows = gradients["grad hidden"][dropped]
        assert_same_bits(rows, torch.zeros_like(rows))
    if kept == "none":
        assert results["loss"] == 0 and (swept["grad weight"] == 0).all()


@pytest.mark.parametrize(
    "width, classes", [(0, 5), (1, 1), (1, 7), (8, 1), (3, 33), (16, 40), (4, 130)]
)
@every_dtype
def test_sizes(op, width, classes, dtype):
    inputs = make((2, 5), width, classes, dtype)
    bias = torch.randn(classes).to(dtype)
    check(op, *inputs, bias=bias, label_smoothing=0.1, chunk_rows=4)
    check(op, *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_more_classes_than_a_tile(op, dtype):
    # the second chunk's part of the weight's gradient is added tile by tile
    inputs = make((6,), 2, 8192 + 5, dtype, kept=range(6))
    check(op, *inputs, bias=torch.randn(8192 + 5).to(dtype), chunk_rows=2)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_logits(op, dtype, bias):
    inputs = make((5, 6), 8, 70, dtype)
    options = {"bias": torch.randn(70).to(dtype)} if bias else {}
    for chunk_rows in (None, 4):
        results, swept = check(op, *inputs, **options, fp32_logits=True, chunk_rows=chunk_rows)
        wide = {name: one.float() for name, one in options.items()}
        exact, _ = check(op, inputs[0].float(), inputs[1].float(), *inputs[2:], **wide)
        for name in ("loss", "lse", "entropy", "log_prob"):  # no rounding of the logits
            torch.testing.assert_close(results[name], exact[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(swept["loss"], exact["loss"], rtol=1e-5, atol=1e-5)


def test_banned_classes(op):
    hidden, weight, target, mask = make()
    bias = torch.zeros(19)
    bias[7:11] = -INF
    target[(target >= 7) & (target < 11)] = 0
    results, swept = check(op, hidden, weight, target, mask, bias=bias, chunk_rows=3)
    for gradients in (results, swept):
        assert (gradients["grad bias"][7:11] == 0).all()


@every_dtype
def test_rows_that_do_not_count_are_not_read(op, dtype):
    hidden, weight, target, mask = make(dtype=dtype)
    mask[0, 0], mask[1, 2] = True, False
    poisoned = hidden.clone()
    poisoned[~mask], target[~mask] = NAN, 2**31 - 1
    for num_valid in (None, int(mask.sum()), 12):
        options = {"chunk_rows": 2, "num_valid": num_valid}
        upstream = random_upstream(hidden, "mean", True)
        clean = op(hidden, weight, target, mask, **options)
        dirty = op(poisoned, weight, target, mask, **options)
        for name, result in clean.results.items():
            assert_same_bits(dirty.results[name], result, name)
        grads = clean.backward(upstream)
        for name, grad in dirty.backward(upstream).items():
            assert_same_bits(grad, grads[name], name)
        swept = op.sweep(hidden, weight, target, mask, **options)
        for name, result in op.sweep(poisoned, weight, target, mask, **options).items():
            assert_same_bits(result, swept[name], f"swept {name}")
            assert result.isfinite().all()


def test_any_strides(op):
    hidden, weight, target, mask = make((3, 4), 8, 19, BF16)
    wide = torch.full((4, 3, 11), NAN, dtype=BF16)
    for view in (
        wide[..., 1:9].transpose(0, 1),
        wide[..., :8].transpose(0, 1),
        torch.full((3, 4, 8, 2), NAN, dtype=BF16)[..., 1],
    ):
        view.copy_(hidden)
        if view.stride(-1) == 1:
            check(op, view, weight, target, mask, chunk_rows=5)
        else:
            results = op.sweep(view, weight, target, mask)
            expected = op.sweep(hidden, weight, target, mask)
            assert_same_bits(results["grad weight"], expected["grad weight"])
    check(op, hidden[:1, :1].expand(3, 4, 8), weight, target, mask)
    check(op, hidden, weight.T.contiguous().T, target, mask)
    every_second = torch.full((38, 16), NAN, dtype=BF16)[::2, ::2].copy_(weight)
    results = op.sweep(hidden, every_second, target, mask)
    assert_same_bits(results["loss"], op.sweep(hidden, weight, target, mask)["loss"])


def test_no_target(op):
    hidden, weight, target, mask = make()
    call = op(hidden, weight, None, mask, reduction="none", chunk_rows=4)
    labelled = op(hidden, weight, target, mask, reduction="none", chunk_rows=4)
    assert call.results["loss"] == 0 and call.results["log_prob"].shape == (0,)
    for name in ("lse", "entropy"):
        close = torch.testing.assert_close
        close(call.results[name], labelled.results[name], rtol=1e-6, atol=1e-6, msg=name)
    upstream = random_upstream(hidden, "none", True)
    del upstream["loss"], upstream["log_prob"]
    expected = labelled.backward(upstream)
    for name, grad in call.backward(upstream).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_one_row_without_dimensions(op):
    check(op, torch.randn(7), torch.randn(5, 7), torch.tensor(3))


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows(op, rows):
    inputs = make(rows)
    for num_valid in (None, 0):
        results, swept = check(op, *inputs, num_valid=num_valid)
        assert swept["grad weight"].shape == (19, 6) and (swept["grad weight"] == 0).all()


@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0,) * 4]
)
def test_only_the_gradients_that_are_asked_for(op, needs):
    needs = tuple(map(bool, needs))
    hidden, weight, target, mask = make()
    options = {"bias": torch.randn(19), "token_weight": torch.rand(3, 4), "chunk_rows": 5}
    everything = op.sweep(hidden, weight, target, mask, **options)
    some = op.sweep(hidden, weight, target, mask, needs=needs, **options)
    call = op(hidden, weight, target, mask, **options)
    upstream = {"loss": torch.tensor(1.0)}
    for needed, name in zip(needs, list(everything)[1:], strict=True):
        if needed:
            assert_same_bits(some[name], everything[name], name)
        for grad in (some[name], call.backward(upstream, needs=needs)[name]):
            assert needed or grad.shape == (0,), name


# --- which rows take part ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [255, 1024, 1025, 3000])
def test_many_rows_keep_their_order(op, rows):
    for kept in (0.03, 0.5, 1.0):
        inputs = make((rows,), 2, 5, kept=kept)
        expected = None
        for order in ORDERS[:1] if op.sim is not simulator() else ORDERS:
            results = op(*inputs, reduction="none", order=order)
            if expected is None:
                expected = results
                check(op, *inputs, reduction="none")
                check(op, *inputs, num_valid=rows)
            for name, result in results.results.items():
                assert_same_bits(result, expected.results[name], f"{kept} {order} {name}")


@pytest.mark.parametrize("more", [0, 1, 4, 99])
@pytest.mark.parametrize("chunk_rows", [None, 2])
@every_dtype
def test_num_valid(op, more, chunk_rows, dtype):
    inputs = make(dtype=dtype, kept=[1, 2, 5, 10])
    check(op, *inputs, num_valid=4 + more, chunk_rows=chunk_rows, label_smoothing=0.1)


@pytest.mark.parametrize("num_valid", [0, 1, 3])
def test_more_rows_than_num_valid_are_not_a_number(op, num_valid):
    inputs = make(kept=[1, 2, 5, 10])
    swept = op.sweep(*inputs, num_valid=num_valid)
    assert swept["loss"].isnan() and swept["grad weight"].isnan().any()
    for reduction in ("mean", "sum"):
        assert op(*inputs, num_valid=num_valid, reduction=reduction).results["loss"].isnan()
    call = op(*inputs, num_valid=num_valid, reduction="none")
    right = op(*inputs, reduction="none").results
    for name in ("loss", "lse", "entropy", "log_prob"):
        found = call.results[name].view(-1)
        lost = found.isnan().nonzero().view(-1).tolist()
        assert lost == [1, 2, 5, 10][max(num_valid - 1, 0) :], name
        there = ~found.isnan()
        torch.testing.assert_close(found[there], right[name].view(-1)[there], msg=name)
    grads = call.backward(random_upstream(inputs[0], "none", True))
    assert grads["grad weight"].isnan().any()


@pytest.mark.parametrize("num_valid", [None, 5])
def test_rows_without_an_incoming_gradient(op, num_valid):
    hidden, weight, target, mask = make(kept=[0, 1, 4, 7, 11])
    for name in ("loss", "lse", "entropy", "log_prob"):
        upstream = {name: torch.zeros(3, 4)}
        upstream[name].view(-1)[[1, 2, 7]] = torch.tensor([0.5, 3.0, -2.0])
        options = {"reduction": "none", "num_valid": num_valid, "chunk_rows": 2}
        results, _ = check(op, hidden, weight, target, mask, upstream=upstream, **options)
        given = results["grad hidden"].view(12, -1)
        assert (given != 0).any(-1).nonzero().view(-1).tolist() == [1, 7]


def test_nothing_comes_in(op):
    hidden, weight, target, mask = make()
    call = op(hidden, weight, target, mask, bias=torch.randn(19))
    for upstream in ({}, {"loss": torch.tensor(0.0)}):
        for name, grad in call.backward(upstream).items():
            assert_same_bits(grad, torch.zeros_like(grad), name)


@pytest.mark.parametrize("label", [19, -1, 2**31 - 1])
def test_bad_label(op, label):
    hidden, weight, target, mask = make(kept=[0, 3, 5])
    target.view(-1)[[3, 4]] = label
    assert op.sweep(hidden, weight, target, mask)["loss"].isnan()
    call = op(hidden, weight, target, mask, reduction="none")
    assert call.results["loss"].view(-1).isnan().nonzero().tolist() == [[3]]
    assert op(hidden, weight, target, mask).results["loss"].isnan()


@pytest.mark.parametrize("shift", [1, 3, 9])
def test_shift(op, shift):
    hidden, weight, target, mask = make((3, 5))
    target[1, 3] = -100
    for name in ("token_weight", "everything"):
        options = filled(name, hidden, weight) | {"shift": shift}
        check(op, hidden, weight, target, mask, **options, chunk_rows=2)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_same_bits_in_every_order(op, dtype):
    inputs = make((4, 300), 4, 9, dtype)
    options = {"bias": torch.randn(9).to(dtype), "chunk_rows": 100, "fp32_logits": dtype == BF16}
    upstream = random_upstream(inputs[0], "mean", True)
    first, swept = op(*inputs, **options), op.sweep(*inputs, **options)
    grads = first.backward(upstream)
    for order in ORDERS[1:]:
        again = op(*inputs, order=order, **options)
        for name, result in again.results.items():
            assert_same_bits(result, first.results[name], f"{order} {name}")
        for name, grad in again.backward(upstream, order).items():
            assert_same_bits(grad, grads[name], f"{order} {name}")
        for name, result in op.sweep(*inputs, order=order, **options).items():
            assert_same_bits(result, swept[name], f"{order} swept {name}")


# --- what is launched, what is waited for --------------------------------------------------------


@pytest.fixture
def sim_op():
    return simulated_linear()


def asked(op, word):
    return [line for line in op.sim.launches() if word in line]


@pytest.mark.parametrize("num_valid, rows", [(None, 4), (4, 4), (6, 6), (99, 12)])
def test_rows_that_do_not_count_are_not_multiplied(sim_op, num_valid, rows):
    inputs = make(kept=[1, 2, 5, 10])
    sim_op.sim.reset()
    sim_op.sweep(*inputs, num_valid=num_valid)
    assert asked(sim_op, "aten") == [
        f"aten::mm [{rows}, 6] [6, 19]",
        f"aten::mm [{rows}, 19] [19, 6]",
        f"aten::mm [19, {rows}] [{rows}, 6]",
    ]
    assert len(asked(sim_op, "cudaStreamSynchronize")) == (num_valid is None)
    assert asked(sim_op, "cudaMemcpyAsync") == ["cudaMemcpyAsync 8"] * (num_valid is None)


def test_rows_into_which_nothing_flows_are_not_multiplied(sim_op):
    inputs = make(kept=[1, 2, 5, 10])
    for num_valid, rows in ((None, 2), (4, 4)):
        call = sim_op(*inputs, reduction="none", num_valid=num_valid)
        loss = torch.zeros(3, 4)
        loss.view(-1)[[0, 2, 10]] = 1.0
        before = len(sim_op.sim.launches())
        call.backward({"loss": loss})
        found = [line for line in sim_op.sim.launches()[before:] if "aten" in line]
        assert found[0] == f"aten::mm [{rows}, 6] [6, 19]" and len(found) == 3


def test_what_needs_no_gradient_takes_no_product(sim_op):
    inputs = make(kept=[1, 2, 5, 10])
    for needs, products in (((True, False, False, False), 2), ((False,) * 4, 1)):
        sim_op.sim.reset()
        sim_op.sweep(*inputs, needs=needs)
        assert len(asked(sim_op, "aten")) == products
    sim_op.sim.reset()
    sim_op(*inputs)
    assert len(asked(sim_op, "aten")) == 1


def test_the_weight_is_summed_in_float32_where_there_are_chunks(sim_op):
    inputs = make(dtype=BF16, kept=[1, 2, 5, 10])
    sim_op.sweep(*inputs)
    assert not asked(sim_op, "copy_") and not asked(sim_op, "linear_add")
    sim_op.sim.reset()
    sim_op.sweep(*inputs, chunk_rows=2)
    assert asked(sim_op, "copy_") == ["aten::copy_ [19, 6] [19, 6]"]
    assert len(asked(sim_op, "linear_add_kernel")) == 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_while_a_graph_is_captured_all_rows_are_multiplied(sim_op, dtype):
    hidden, weight, target, mask = make(dtype=dtype, kept=[1, 2, 5, 10])
    hidden[~mask] = NAN
    expected = sim_op.sweep(hidden, weight, target, mask)
    sim_op.sim.reset()
    with sim_op.sim.capturing():
        results = sim_op.sweep(hidden, weight, target, mask)
        check(sim_op, hidden, weight, target, mask, bias=torch.randn(19).to(dtype))
    assert asked(sim_op, "aten")[0] == "aten::mm [12, 6] [6, 19]"
    assert not asked(sim_op, "cudaMemcpy") and not asked(sim_op, "Synchronize")
    for name, result in results.items():
        close = torch.testing.assert_close
        close(result, expected[name], rtol=2e-2, atol=1e-3, msg=name)
