# SPDX-License-Identifier: BSD-3-Clause
"""Reductions by name: numbers by hand, the loops of reference/, and the laws that they share."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import gradcheck

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.losses.token_mse import aggregated
from tests.elementwise.test_errors import check

NAN = math.nan
f = mle.masked_cross_entropy
AGGREGATIONS = ("sequence_mean", "sequence_sum", "weighted_mean")
REDUCTIONS = ("mean", "sum", "none", *AGGREGATIONS)

# Two sequences, of two tokens and of one, and one without any.
LOSS = torch.tensor([[1.0, 2.0, NAN], [NAN, 6.0, NAN], [NAN, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
WEIGHT = torch.tensor([[0.5, 2.0, NAN], [NAN, 1.5, NAN], [NAN, NAN, NAN]])
SEGMENTS = torch.tensor([[4, 7, 7], [1, 1, 1], [0, 0, 0]])  # the first row holds two documents
BY_HAND = [
    ("mean", {}, 9 / 3),
    ("mean", {"token_weight": WEIGHT}, (0.5 + 4 + 9) / 3),
    ("mean", {"normalizer": 30}, 9 / 30),
    ("mean", {"segment_ids": SEGMENTS}, 9 / 3),
    ("sum", {}, 9.0),
    ("sum", {"token_weight": WEIGHT}, 13.5),
    ("sequence_mean", {}, (1.5 + 6) / 2),
    ("sequence_mean", {"token_weight": WEIGHT}, (4.5 / 2 + 9) / 2),
    ("sequence_mean", {"segment_ids": SEGMENTS}, (1 + 2 + 6) / 3),
    ("sequence_mean", {"normalizer": 8}, (1.5 + 6) / 8),
    ("sequence_sum", {}, (3 + 6) / 2),
    ("sequence_sum", {"token_weight": WEIGHT}, (4.5 + 9) / 2),
    ("sequence_sum", {"segment_ids": SEGMENTS}, 9 / 3),
    ("sequence_sum", {"normalizer": torch.tensor(3 * 1024)}, 9 / 3072),
    ("weighted_mean", {"token_weight": WEIGHT}, 13.5 / 4),
    ("weighted_mean", {"token_weight": WEIGHT, "normalizer": 27.0}, 0.5),
]


@pytest.mark.parametrize("reduction,keywords,expected", BY_HAND)
def test_by_hand(reduction, keywords, expected):
    result = mle.aggregate_tokens(LOSS, MASK, reduction, **keywords)
    assert result.dtype == torch.float32 and result.shape == ()
    torch.testing.assert_close(result, torch.tensor(float(expected)))
    torch.testing.assert_close(
        reference.aggregate_tokens(LOSS, MASK, reduction, **keywords), result
    )


def test_none_by_hand():
    each = mle.aggregate_tokens(LOSS, MASK, "none", token_weight=WEIGHT)
    assert each.tolist() == [[0.5, 4, 0], [0, 9, 0], [0, 0, 0]]
    assert mle.aggregate_tokens(LOSS, MASK, "none").tolist() == [[1, 2, 0], [0, 6, 0], [0, 0, 0]]


def test_a_run_of_one_id_is_a_document():
    """The id 5 comes back; the boundary between rows is one, whatever the ids."""
    loss = torch.tensor([[1.0, 3.0, 8.0, 4.0], [2.0, 2.0, 2.0, 6.0]])
    ids = torch.tensor([[5, 5, 9, 5], [5, 5, 5, 5]])
    expected = torch.tensor((2 + 8 + 4 + 3) / 4)
    for dtype in (torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.int32):
        result = mle.aggregate_tokens(loss, None, "sequence_mean", segment_ids=ids.to(dtype))
        torch.testing.assert_close(result, expected)
    one = mle.aggregate_tokens(loss[:1], None, "sequence_mean", segment_ids=ids[:1])
    torch.testing.assert_close(one, torch.tensor((2 + 8 + 4) / 3))


def batch(shape=(3, 4, 7), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {
        "loss": torch.randn(shape, generator=g, dtype=dtype),
        "mask": torch.rand(shape, generator=g) < 0.5,
        "token_weight": torch.rand(shape, generator=g, dtype=dtype),
        "segment_ids": torch.rand(shape, generator=g).lt(0.4).cumsum(-1),
    }


WITH = [c for n in range(4) for c in itertools.combinations(("mask", "token_weight"), n)]
WITH += [(*c, "segment_ids") for c in WITH]


ALL_WITH = [
    (reduction, names)
    for reduction in REDUCTIONS
    for names in WITH
    if reduction != "weighted_mean" or "token_weight" in names
]


@pytest.mark.parametrize("reduction,names", ALL_WITH, ids=str)
def test_equals_the_loops_of_the_reference(reduction, names):
    for shape in ((3, 4, 7), (5,), (2, 1), (2, 0), (0, 3), (1, 2, 1, 9)):
        given = batch(shape)
        loss = given["loss"]
        keywords = {name: given[name] for name in names}
        results = []
        for module in (mle, reference):
            leaf = loss.clone().requires_grad_()
            value = module.aggregate_tokens(leaf, reduction=reduction, **keywords)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            results.append((value, gradient))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, msg=str(shape))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction):
    """Of the loss and of the weights, in weighted_mean through the denominator, too."""
    given = batch((2, 3))
    leaves = [given[n].requires_grad_() for n in ("loss", "token_weight")]

    def call(loss, weight):
        return mle.aggregate_tokens(
            loss, given["mask"], reduction, token_weight=weight, segment_ids=given["segment_ids"]
        )

    assert gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counted(reduction):
    loss = torch.full((2, 3), NAN, requires_grad=True)
    weight = torch.full((2, 3), NAN, requires_grad=True)
    value = mle.aggregate_tokens(loss, torch.zeros(2, 3), reduction, token_weight=weight)
    assert (value == 0).all()
    for gradient in torch.autograd.grad(value.sum(), [loss, weight]):
        assert (gradient == 0).all()
    zero = mle.aggregate_tokens(torch.ones(2, 3), None, "sequence_sum", normalizer=0)
    assert zero == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_losses_are_counted_in_full(dtype):
    """70,000 tokens of 1 and a sum of 70,000, which float16 does not have."""
    loss = torch.ones(7, 10_000, dtype=dtype)
    for reduction, expected in (("sum", 7e4), ("mean", 1.0), ("sequence_sum", 1e4)):
        value = mle.aggregate_tokens(loss, reduction=reduction)
        assert value.dtype == torch.float32 and value.item() == expected
    ids = torch.zeros(7, 10_000, dtype=torch.uint8)
    assert mle.aggregate_tokens(loss, None, "sequence_mean", segment_ids=ids).item() == 1.0


def test_dimensions_of_size_1():
    given = batch((2, 3))
    loss, mask, weight = given["loss"], torch.tensor([[1, 0, 1]]), torch.tensor([[2.0], [3.0]])
    ids = torch.tensor([[0, 0, 1]])
    value = mle.aggregate_tokens(
        loss, mask, "sequence_mean", token_weight=weight, segment_ids=ids, normalizer=1
    )
    torch.testing.assert_close(value, (2 * loss[0, [0, 2]] + 3 * loss[1, [0, 2]]).sum())


BAD = [
    ({"loss": [1.0]}, TypeError, "loss must be a torch.Tensor, got list"),
    ({"loss": LOSS.long()}, ValueError, "loss must be a floating tensor, got torch.int64"),
    ({"loss": torch.tensor(1.0), "mask": None}, ValueError, "loss must be [..., S] for reduction"),
    ({"mask": [1]}, TypeError, "mask must be a torch.Tensor, got list"),
    ({"mask": MASK[:, :2]}, ValueError, "mask must have the shape of loss [3, 3], got [3, 2]"),
    ({"mask": MASK[0]}, ValueError, "mask must have the shape of loss [3, 3], got [3]"),
    ({"mask": -MASK.float()}, ValueError, "mask must be on where it is not 0, got negative"),
    ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of loss (cpu), got meta"),
    ({"token_weight": 2.0}, TypeError, "token_weight must be a torch.Tensor, got float"),
    ({"token_weight": MASK}, ValueError, "token_weight must be a floating tensor, got torch.int64"),
    ({"segment_ids": LOSS}, ValueError, "segment_ids must be integers, got torch.float32"),
    ({"reduction": "avg"}, ValueError, "reduction must be mean, sum, none, sequence_mean, sequ"),
    ({"reduction": "weighted_mean"}, ValueError, "token_weight must be given for reduction weight"),
    (
        {"reduction": "sum", "normalizer": 3},
        ValueError,
        "normalizer must be None for reduction 'su",
    ),
    ({"normalizer": -1}, ValueError, "normalizer must be a finite number at least 0, got -1"),
    ({"normalizer": NAN}, ValueError, "normalizer must be a finite number at least 0, got nan"),
    ({"normalizer": "3"}, TypeError, "normalizer must be a number, got str"),
    ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be a number [], got [2]"),
    (
        {"normalizer": torch.tensor(-2.0)},
        ValueError,
        "normalizer must be finite and not negative, got -2",
    ),
    (
        {"normalizer": torch.tensor(NAN)},
        ValueError,
        "normalizer must be finite and not negative, got nan",
    ),
    (
        {"normalizer": torch.tensor(2.0, requires_grad=True)},
        ValueError,
        "normalizer must not require a gradient: it would get none; detach it",
    ),
    (
        {"normalizer": torch.tensor(2j)},
        ValueError,
        "normalizer must be a real number, got torch.complex64",
    ),
]


@pytest.mark.parametrize("bad,kind,text", BAD)
def test_bad_arguments(bad, kind, text):
    arguments = {"loss": LOSS, "mask": MASK, "reduction": "sequence_mean", **bad}
    check(lambda: mle.aggregate_tokens(**arguments), kind, f"aggregate_tokens: {text}")


@pytest.mark.parametrize("reduction", ["mean", "sequence_sum"])
def test_numbers_of_any_kind(reduction):
    x, y = torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64)
    for half in (0.5, Fraction(1, 2), torch.tensor(0.5)):
        loss = mle.masked_cross_entropy(x, y, reduction=reduction, normalizer=half)
        torch.testing.assert_close(loss, torch.tensor(6 * math.log(2)))
        errors = mle.aggregate_tokens(torch.ones(1, 3), None, reduction, normalizer=half)
        assert errors == 6
        assert mle.MseLoss()(x + 2, x, half) == 2


# --- masked_cross_entropy ------------------------------------------------------------------------

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
# p = 1/2, 3/4 | - | 1/4; the last row has a sequence of one
LOGITS = torch.tensor([[[0.0, 0.0], [LN3, 0.0], [NAN, 0.0]], [[NAN, NAN], [0.0, LN3], [NAN, NAN]]])
LABELS = torch.tensor([[1, 0, 0], [-100, 0, 1]])
ON = torch.tensor([[1, 1, 0], [1, 1, 0]])
CE = (LN2, math.log(4 / 3), LN4)
CLASS_WEIGHT = torch.tensor([3.0, 5.0])  # of the three: 5, 3, 3
ROW_WEIGHT = torch.tensor([[0.5, 2.0, 9.0], [9.0, 0.25, 9.0]])
ENTROPY_BY_HAND = [
    ("sequence_mean", {}, ((CE[0] + CE[1]) / 2 + CE[2]) / 2),
    ("sequence_sum", {}, (CE[0] + CE[1] + CE[2]) / 2),
    ("sequence_sum", {"normalizer": 6}, (CE[0] + CE[1] + CE[2]) / 6),
    (
        "weighted_mean",
        {"token_weight": ROW_WEIGHT},
        (0.5 * CE[0] + 2 * CE[1] + 0.25 * CE[2]) / 2.75,
    ),
    ("sequence_mean", {"token_weight": ROW_WEIGHT}, ((CE[0] / 2 + 2 * CE[1]) / 2 + CE[2] / 4) / 2),
    ("sequence_mean", {"weight": CLASS_WEIGHT}, ((5 * CE[0] + 3 * CE[1]) / 8 + CE[2]) / 2),
    ("sequence_sum", {"weight": CLASS_WEIGHT}, (5 * CE[0] + 3 * CE[1] + 3 * CE[2]) / 2),
    (
        "weighted_mean",
        {"weight": CLASS_WEIGHT, "token_weight": ROW_WEIGHT},
        (2.5 * CE[0] + 6 * CE[1] + 0.75 * CE[2]) / (2.5 + 6 + 0.75),
    ),
    ("sequence_mean", {"segment_ids": torch.tensor([[3, 4, 4]])}, sum(CE) / 3),
]


@pytest.mark.parametrize("reduction,keywords,expected", ENTROPY_BY_HAND)
def test_cross_entropy_by_hand(reduction, keywords, expected):
    loss = f(LOGITS, LABELS, ON, reduction=reduction, **keywords)
    torch.testing.assert_close(loss, torch.tensor(expected))
    keywords = dict(keywords)
    per_call = {n: keywords.pop(n) for n in list(keywords) if n != "weight"}
    module = mle.MaskedCrossEntropyLoss(reduction=reduction, **keywords)
    assert torch.equal(module(LOGITS, LABELS, ON, **per_call), loss)
    assert f"reduction={reduction!r}" in repr(module)


def rows(seed=1, shape=(3, 6, 11), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
    labels[torch.rand(shape[:-1], generator=g) < 0.2] = -100
    return {
        "logits": torch.randn(shape, generator=g, dtype=dtype),
        "target": labels,
        "mask": torch.rand(shape[:-1], generator=g) < 0.7,
        "weight": torch.rand(shape[-1], generator=g, dtype=dtype),
        "token_weight": torch.rand(shape[:-1], generator=g, dtype=dtype),
        "segment_ids": torch.rand(shape[:-1], generator=g).lt(0.3).cumsum(-1),
    }


OPTIONS = [{}, {"shift": 1}, {"shift": 2, "z_loss": 0.1, "focal_gamma": 1.5}, {"normalizer": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("without", [(), ("weight",), ("segment_ids", "mask")], ids=str)
@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_cross_entropy_equals_the_reference(reduction, without, options):
    given = {name: value for name, value in rows().items() if name not in without}
    results = []
    for module in (mle, reference):
        leaves = {n: given[n].clone().requires_grad_() for n in ("logits", "token_weight")}
        loss, stats = module.masked_cross_entropy(
            **{**given, **leaves}, **options, reduction=reduction, return_stats=True
        )
        total = loss + (stats.entropy * 0.1).sum()
        results.append((loss, *torch.autograd.grad(total, list(leaves.values()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_laws():
    given = rows()
    whole = {**given, "segment_ids": None}
    one = {**whole, "token_weight": torch.ones_like(given["token_weight"])}
    torch.testing.assert_close(f(**one, reduction="weighted_mean"), f(**one))
    row = {n: v[:1] if v is not None and n != "weight" else v for n, v in whole.items()}
    torch.testing.assert_close(f(**row, reduction="sequence_mean"), f(**row))
    torch.testing.assert_close(f(**row, reduction="sequence_sum"), f(**row, reduction="sum"))
    torch.testing.assert_close(
        f(**whole, reduction="sequence_sum", normalizer=1.0), f(**whole, reduction="sum")
    )
    flat = {n: v.flatten(0, 1) if v is not None and v.dim() > 1 else v for n, v in whole.items()}
    ids = torch.arange(3).repeat_interleave(6)  # varlen: one row of rows, a segment for each
    packed = f(**{**flat, "segment_ids": ids}, reduction="sequence_mean")
    torch.testing.assert_close(packed, f(**whole, reduction="sequence_mean"))


@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_micro_batches_and_ranks_add_up(reduction):
    """Each part divides by what all parts have; what they return is added."""
    given = {n: v for n, v in rows(shape=(6, 5, 7)).items() if n not in ("weight", "segment_ids")}
    on = (given["mask"] & (given["target"] != -100)).double()
    total = {
        "sequence_mean": on.any(-1).sum(),
        "sequence_sum": on.any(-1).sum(),
        "weighted_mean": (on * given["token_weight"]).sum(),
    }[reduction]
    parts = [
        f(**{n: v[i : i + 2] for n, v in given.items()}, reduction=reduction, normalizer=total)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), f(**given, reduction=reduction))


def test_what_does_not_go_with_an_aggregation():
    x, y = torch.zeros(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
    for reduction in AGGREGATIONS:
        text = f"reduction must be mean or sum for gradient_in_forward, got {reduction}"
        check(lambda r=reduction: f(x, y, reduction=r, gradient_in_forward=True), ValueError, text)
    check(lambda: f(x, y, reduction="weighted_mean"), ValueError, "token_weight must be given")
    n, text = torch.tensor(2.0, requires_grad=True), "normalizer must not require a gradient"
    for reduction in ("mean", "sequence_mean", "sequence_sum"):
        check(lambda r=reduction: f(x, y, reduction=r, normalizer=n), ValueError, text)
    text = "logits must be [..., S, V] for reduction sequence_mean, got [5]"
    check(lambda: f(x[0, 0], y[0, 0], reduction="sequence_mean"), ValueError, text)
    with pytest.raises(IndexError, match=r"target at row \[1, 2\]"):
        f(x, y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(9)), reduction="mean")


def test_in_place():
    given = {n: v for n, v in rows(dtype=torch.float32).items() if n != "weight"}
    results = []
    for inplace in (False, True):
        x = given["logits"].clone().requires_grad_()
        loss = f(**{**given, "logits": x * 1}, reduction="sequence_mean", inplace_backward=inplace)
        loss.backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_torch_func(reduction):
    given = rows()
    x, u = given.pop("logits"), given.pop("token_weight")

    def loss(module, x, u):
        return module.masked_cross_entropy(x, **given, token_weight=u, reduction=reduction, shift=1)

    ours, theirs = (
        torch.func.grad(lambda x, u, m=m: loss(m, x, u), (0, 1))(x, u) for m in (mle, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    tangents = (torch.cos(x), torch.sin(u))
    _, tangent = torch.func.jvp(lambda x, u: loss(mle, x, u), (x, u), tangents)
    expected = sum((g * t).sum() for g, t in zip(theirs, tangents, strict=True))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_vmap_is_a_loop(reduction):
    given = rows(shape=(4, 3, 6, 7))
    weight = given.pop("weight")
    names = list(given)

    def loss(*values):
        return f(**dict(zip(names, values, strict=True)), weight=weight, reduction=reduction)

    for function in (loss, torch.func.grad(loss)):
        together = torch.vmap(function)(*given.values())
        apart = [function(*(v[i] for v in given.values())) for i in range(4)]
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_one_graph(reduction):
    torch._dynamo.reset()
    counters.clear()

    def loss(logits, target, mask, token_weight, segment_ids, normalizer):
        return f(
            logits,
            target,
            mask,
            token_weight=token_weight,
            segment_ids=segment_ids,
            shift=1,
            reduction=reduction,
            normalizer=normalizer,
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, shape in enumerate([(3, 5, 11), (4, 9, 30), (7, 11, 13)]):
        given = rows(seed, shape, torch.float32)
        del given["weight"]
        given["normalizer"] = torch.tensor(seed + 0.5)
        values = []
        for function in (compiled, loss):
            leaf = given["logits"].clone().requires_grad_()
            value = function(**{**given, "logits": leaf})
            values.append((value, *torch.autograd.grad(value, leaf)))
        for ours, theirs in zip(*values, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- token losses --------------------------------------------------------------------------------

# Squared errors, mean over channels: 1, 4 | 9, with grey values 0.5, 1 | 0.25
PRED = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [NAN, NAN]], [[3.0, 3.0], [NAN, 0.0], [0.0, NAN]]])
GREY = torch.tensor([[0.5, 1.0, 0.0], [0.25, 0.0, 0.0]])
EDIT = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # weights 2, 1 | 2
TOKENS_BY_HAND = [
    ("sequence_mean", {}, (2.5 + 9) / 2),
    ("sequence_sum", {}, (5 + 9) / 2),
    ("sequence_sum", {"normalizer": 7}, 2.0),
    ("weighted_mean", {}, (0.5 + 4 + 2.25) / 1.75),
    ("weighted_mean", {"normalizer": 3}, 6.75 / 3),
    ("mean", {"normalizer": 7}, 2.0),
    ("sequence_mean", {"edit_mask": EDIT}, ((2 + 4) / 2 + 18) / 2),
    ("sequence_mean", {"weighting": 3.0}, 3 * (2.5 + 9) / 2),
    ("weighted_mean", {"edit_mask": EDIT}, (1 + 4 + 4.5) / 1.75),
]


@pytest.mark.parametrize("reduction,keywords,expected", TOKENS_BY_HAND)
def test_token_losses_by_hand(reduction, keywords, expected):
    target, expected = torch.zeros_like(PRED), torch.tensor(expected)
    module = mle.AttentionMaskMseLoss(reduction=reduction)
    torch.testing.assert_close(module(PRED, target, GREY, **keywords), expected)
    function = mle.masked_edit_token_mean_loss(PRED, target, GREY, **keywords, reduction=reduction)
    torch.testing.assert_close(function, expected)
    if "normalizer" not in keywords:
        keywords = {"edit_mask": torch.zeros_like(GREY), **keywords}
        element = mle.MaskEditLoss()(
            PRED, target, attention_mask=GREY, reduction=reduction, **keywords
        )
        torch.testing.assert_close(element, expected)


@pytest.mark.parametrize("reduction", ("mean", *AGGREGATIONS))
def test_token_losses_keep_padding_out_and_the_graph(reduction):
    prediction = PRED.clone().requires_grad_()
    for mask in (GREY, torch.zeros_like(GREY)):
        loss = mle.AttentionMaskMseLoss(reduction=reduction)(prediction, torch.zeros(2, 3, 2), mask)
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert loss.isfinite() and (gradient[mask == 0] == 0).all() and gradient.isfinite().all()
        assert (loss != 0) == mask.any() == gradient.any()
    whole = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    weighting = torch.rand(2, 3, 1, dtype=torch.float64, requires_grad=True)

    def call(p, w):
        return mle.masked_edit_token_mean_loss(
            p, torch.zeros_like(p), GREY, EDIT, w, reduction=reduction, normalizer=2.5
        )

    assert gradcheck(call, [whole, weighting])


def test_a_token_mask_of_size_1_counts_for_every_sample():
    loss, mask = torch.rand(2, 3), torch.tensor([[0.5, 0, 1]])
    for reduction in ("mean", *AGGREGATIONS):
        small, whole = (
            aggregated("f", loss * (m != 0), m, reduction, 7 if reduction == "mean" else None)
            for m in (mask, mask.expand(2, 3))
        )
        assert torch.equal(small, whole)


def test_token_losses_without_a_mask():
    """All count, each with weight 1."""
    x = torch.rand(2, 3, 2)
    expected = x.square().mean()
    for reduction in ("sequence_mean", "weighted_mean"):
        loss = mle.AttentionMaskMseLoss(reduction=reduction)(x, torch.zeros_like(x))
        torch.testing.assert_close(loss, expected)


def test_a_mask_of_0_and_255_weighs_as_one_of_0_and_1():
    x, mask = torch.rand(2, 3, 2), (GREY > 0).to(torch.uint8)
    losses = [
        mle.masked_edit_token_mean_loss(x, x * 0, m, reduction="weighted_mean")
        for m in (mask, mask * 255, mask.bool())
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_token_losses_refuse():
    loss = mle.AttentionMaskMseLoss(reduction="sum")
    x = torch.zeros(2, 3, 4)
    check(lambda: loss(x, x, normalizer=3), ValueError, "AttentionMaskMseLoss: normalizer", "None")
    loss = mle.AttentionMaskMseLoss()
    check(lambda: loss(x, x, normalizer=-3), ValueError, "AttentionMaskMseLoss: normalizer", "-3")
    loss.reduction = "average"
    check(lambda: loss(x, x, normalizer=3), ValueError, "AttentionMaskMseLoss: Invalid reduction")


@pytest.mark.parametrize("reduction", AGGREGATIONS)
def test_token_losses_compiled(reduction):
    torch._dynamo.reset()
    module = mle.AttentionMaskMseLoss(reduction=reduction)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        x = torch.rand(2, tokens, 4)
        mask = torch.rand(2, tokens).round(decimals=1)
        torch.testing.assert_close(compiled(x, x * 0, mask), module(x, x * 0, mask))
    torch._dynamo.reset()
