# SPDX-License-Identifier: BSD-3-Clause
"""Every case in every dtype against the reference, by the accuracy rule; chunks of any size; and
against the logits, made and handed to masked_cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits
from accuracy_cross_entropy import assert_all_accurate, evaluate, upstream_for
from accuracy_linear import LinearExpected
from cases_cross_entropy import BY_NAME, CASES, REDUCTIONS, Case, options_of
from cases_linear import DIFFERENTIABLE, linear, logits_of, make_linear

import masked_loss_ext as mle

DTYPES = ("float32", "float64", "bfloat16", "float16", "bfloat16 to fp32", "float16 to fp32")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
function = linear(mle)


def results(inputs, upstream, options, stats=True, **how):
    return evaluate(
        function, inputs, upstream, stats=stats, differentiable=DIFFERENTIABLE, **options, **how
    )


def agrees(case, name, **how):
    """The sweep, or "none" by the operator, without statistics; then with, and all gradients."""
    dtype = getattr(torch, name.split()[0])
    rounded = dtype if name in ("bfloat16", "float16") else None
    if "fp32" in name:
        how["logits_dtype"] = torch.float32
    inputs, options = make_linear(case, dtype), options_of(case)
    upstream = upstream_for(inputs, options, statistics=False)
    expected = LinearExpected(inputs, upstream, rounded, **options)
    assert_all_accurate(results(inputs, upstream, options, False, **how), expected, case.name)
    upstream = upstream_for(inputs, options)
    expected = LinearExpected(inputs, upstream, rounded, **options)
    assert_all_accurate(results(inputs, upstream, options, **how), expected, case.name)


@every_dtype
@every_case
def test_agrees_with_reference(case, dtype):
    agrees(case, dtype)


CHUNKED = [
    *("v1", "v2", "v17", "v513", "both_weights_mean", "both_weights_none", "segments_sum"),
    *("banned_mean", "rank_4_shift", "padded", "nothing_counts", "one_counts", "few_of_many"),
    *("row_slice_mean", "permuted_none", "expanded_mean", "transposed_none", "rows_sliced"),
]


@every_dtype
@pytest.mark.parametrize("chunk_rows", [1, 2, 7])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_agree_with_reference(name, chunk_rows, dtype):
    agrees(BY_NAME[name], dtype, chunk_rows=chunk_rows)


# --- which rows count ----------------------------------------------------------------------------

ROWS, CHUNK = 12, 4
KEPT = {
    "none": [],
    "one": [5],
    "first": [0],
    "last": [ROWS - 1],
    "first and last": [0, ROWS - 1],
    "below a chunk": [1, 4, 9],
    "a chunk": [0, 3, 7, 8],
    "one above a chunk": [0, 3, 7, 8, 10],
    "two chunks": [0, 2, 3, 5, 7, 8, 9, 11],
    "all": list(range(ROWS)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("by", ["mask", "labels"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_rows_that_count(kept, by, reduction):
    case = Case("rows", "", (ROWS, 37), {"reduction": reduction}, mask=None, ignored=0.0)
    inputs = make_linear(case, torch.float32, width=11, bias=True)
    on = torch.zeros(ROWS, dtype=torch.bool)
    on[kept] = True
    if by == "mask":
        inputs["mask"] = on
    else:
        inputs["target"] = inputs["target"].masked_fill(~on, -100)
    for statistics in (False, True):
        upstream = upstream_for(inputs, case.options, statistics=statistics)
        actual = results(inputs, upstream, case.options, statistics, chunk_rows=CHUNK)
        assert_all_accurate(actual, LinearExpected(inputs, upstream, **case.options))
        assert (actual["grad hidden"][~on] == 0).all()
        assert actual["grad hidden"][on].ne(0).any(1).all()
        if not kept:
            assert all(not value.any() for value in actual.values())


@pytest.mark.parametrize("width", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("classes", [1, 2, 3, 65, 1001])
def test_any_width_and_any_number_of_classes(width, classes):
    case = Case("sizes", "", (9, classes), {"label_smoothing": 0.1})
    for bias in (False, True):
        inputs = make_linear(case, torch.float32, width=width, bias=bias)
        upstream = upstream_for(inputs, case.options)
        actual = results(inputs, upstream, case.options, chunk_rows=4)
        assert_all_accurate(actual, LinearExpected(inputs, upstream, **case.options))


# --- what else it must be equal to ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["v65", "both_weights_mean", "segments_none", "banned_sum"])
def test_agrees_with_the_logits_made(name, dtype):
    inputs, options = make_linear(BY_NAME[name], dtype), options_of(BY_NAME[name])
    logits = logits_of(inputs)
    rest = {n: v for n, v in inputs.items() if n not in ("hidden", "head", "bias")}
    theirs, stats = mle.masked_cross_entropy(logits, **rest, **options, return_stats=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {}
    if dtype == torch.bfloat16:  # where halves are not multiplied, the logits are not rounded
        tolerance = {"rtol": 2e-2, "atol": 5e-2}
    ours, found = function(**inputs, **options, return_stats=True)
    torch.testing.assert_close(ours, theirs, **tolerance)
    for a, b in zip(found[:3], stats[:3], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_row_statistics(dtype, labelled):
    """Of the loss's own statistics; with gradients of each alone and all together."""
    inputs = make_linear(BY_NAME["v65"], dtype, bias=True)
    hidden, head, bias = (inputs[n].requires_grad_() for n in ("hidden", "head", "bias"))
    target = inputs["target"] if labelled else None
    options = {"temperature": 0.7, "softcap": 15.0}
    stats = mle.linear_row_statistics(hidden, head, target, inputs["mask"], bias=bias, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truth = mle.reference.linear_row_statistics(
        *[x.detach().to(wide).requires_grad_() for x in (hidden, head)],
        target,
        inputs["mask"],
        bias=bias.detach().to(wide),
        **options,
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.1}
    assert (stats.log_prob is None) == (stats.hit is None) == (not labelled)
    for name in ("lse", "entropy", "log_prob"):
        value = getattr(stats, name)
        if value is not None:
            assert value.dtype == wide
            torch.testing.assert_close(value, getattr(truth, name), **close)
    if labelled:
        loss, same = mle.masked_linear_cross_entropy(
            hidden, head, target, inputs["mask"], bias=bias, **options, return_stats=True
        )
        for a, b in zip(stats, same, strict=True):
            assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_agrees_with_pytorch(reduction):
    g = torch.Generator().manual_seed(3)
    for rows, width, classes in ((1, 4, 5), (40, 7, 33), (9, 65, 1500)):
        leaves = [torch.randn(rows, width, generator=g), torch.randn(classes, width, generator=g)]
        leaves.append(torch.randn(classes, generator=g))
        h, w, b = (x.requires_grad_() for x in leaves)
        target = torch.randint(0, classes, (rows,), generator=g)
        target[1::4] = -100
        ours = mle.masked_linear_cross_entropy(h, w, target, bias=b, reduction=reduction)
        theirs = F.cross_entropy(F.linear(h, w, b), target, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.randn(ours.shape, generator=g)
        for x, y in zip(
            *[torch.autograd.grad(loss, (h, w, b), upstream) for loss in (ours, theirs)],
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sequence_mean", "sequence_sum", "weighted_mean"])
@pytest.mark.parametrize("normalized", [False, True])
def test_aggregations_of_row_losses(reduction, normalized):
    inputs = make_linear(BY_NAME["segments_none"], torch.float32)
    inputs["token_weight"] = inputs["token_weight"].abs()
    options = {**BY_NAME["segments_none"].options, "reduction": reduction}
    options |= {"normalizer": 3.5} if normalized else {}
    found = []
    for module in (mle, mle.reference):
        leaves = {n: inputs[n].detach().requires_grad_() for n in DIFFERENTIABLE if n in inputs}
        loss = linear(module)(**{**inputs, **leaves}, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss * 0.7, list(leaves.values()))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["both_weights_mean", "both_weights_none", "rank_4_shift"])
def test_one_call_by_both_ways(name):
    """The sweep's loss and gradients are those of the operator that makes the logits twice."""
    case = BY_NAME[name]
    inputs, options = make_linear(case, torch.float32), options_of(case)
    upstream = upstream_for(inputs, options, statistics=False)
    once = results(inputs, upstream, options, False, chunk_rows=5)
    twice = results(inputs, upstream, options, True, chunk_rows=5)
    for which, value in once.items():
        torch.testing.assert_close(value, twice[which], rtol=2e-5, atol=2e-6, msg=which)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_does_not_depend_on_the_others(reduction):
    """Beyond the rounding of the products: its loss in a batch of 50, of 3 and alone."""
    case = Case("rows", "", (50, 37), mask=None, ignored=0.0)
    inputs = make_linear(case, torch.float32, width=65)
    call = [inputs[n] for n in ("hidden", "head", "target")]
    whole = mle.masked_linear_cross_entropy(*call, reduction="none")
    for row in (0, 17, 49):
        for end in (row + 1, min(row + 3, 50)):
            h, _, t = (x[row:end] for x in (call[0], call[0], call[2]))
            alone = mle.masked_linear_cross_entropy(h, call[1], t, reduction="none")
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)
        mask = torch.zeros(50, dtype=torch.bool)
        mask[row] = True
        alone = mle.masked_linear_cross_entropy(*call, mask, reduction=reduction)
        torch.testing.assert_close(alone.sum(), whole[row], rtol=1e-5, atol=1e-6)
