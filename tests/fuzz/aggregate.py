# SPDX-License-Identifier: BSD-3-Clause
"""Properties of what makes one number of many: reductions over sequences, by whatever function."""

import torch
from accuracy_cross_entropy import converted, evaluate
from cases_linear import linear
from simulated_cross_entropy import assert_close

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.fuzz import squared_error
from tests.fuzz.agreement import assert_bits
from tests.fuzz.choices import CONVERTED, INTEGERS, laid, mask_values, poisoned
from tests.fuzz.cross_entropy import moved
from tests.fuzz.linear import LinearProblem
from tests.fuzz.rows import Problem, row_shape

AGGREGATIONS = ("sequence_mean", "sequence_sum", "weighted_mean")
REDUCTIONS = ("mean", "sum", "none", *AGGREGATIONS)


def with_gradients(function, leaves, factor):
    """{"result": ..., "grad <name>": ...} of function(**leaves)."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    result = function(**leaves)
    grads = torch.autograd.grad(
        result, list(leaves.values()), torch.full_like(result, factor), materialize_grads=True
    )
    found = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"result": result.detach(), **found}


def assert_agrees(actual, function, leaves, factor, what):
    """By the rule of simulated_cross_entropy.py; function: the reference."""
    half = next(iter(leaves.values())).dtype
    wide = torch.float64 if half == torch.float64 else torch.float32
    truth, in_dtype = (
        with_gradients(function, {n: x.to(dtype) for n, x in leaves.items()}, factor)
        for dtype in (torch.float64, wide)
    )
    size = max((x.detach().abs().max().item() for x in leaves.values() if x.numel()), default=0.0)
    for name, result in actual.items():
        own = size if name == "result" else 0.0
        assert_close(result, truth[name], in_dtype[name], f"{what} {name}", own)


def aggregate_tokens(c):
    """Losses of tokens that the caller has made."""
    shape = row_shape(c) or (3,)
    g, dtype, layout = c.generator(), c.dtype(), c.layout()
    reduction, kind = c.pick(REDUCTIONS), c.mask_dtype()
    wanted, share, factor = c.byte(), c.pick((0.6, 0.9, 0.0, 1.0)), c.pick((1.0, -0.5, 3.0))
    leaves = {"loss": torch.randn(shape, generator=g).to(dtype)}
    weighted = bool(wanted & 2) or reduction == "weighted_mean"
    if weighted:
        weight = torch.rand(shape, generator=g) + 0.1
        leaves["token_weight"] = weight.to(c.pick((dtype, torch.float32)))
    keywords, on = {}, torch.ones(shape, dtype=torch.bool)
    ids = (torch.rand(shape, generator=g) < 0.4).cumsum(-1)
    if wanted & 1:
        on = torch.rand(shape, generator=g) < share
    id_dtype, normalizer = c.pick((*INTEGERS, *CONVERTED)), c.pick((7.5, 1, 0.25, 0.0))
    plain = {"mask": on if wanted & 1 else None}
    if wanted & 4:
        plain["segment_ids"] = ids
        keywords["segment_ids"] = laid(ids.to(id_dtype), layout)
    if wanted & 8 and reduction not in ("sum", "none"):
        plain["normalizer"] = keywords["normalizer"] = normalizer
    if wanted & 1:
        keywords["mask"] = laid(mask_values(on, kind), layout)
    c.said |= {"shape": shape, "dtype": dtype, "reduction": reduction, **plain}
    given = {name: laid(x, layout) for name, x in leaves.items()}

    def ours(**tensors):
        return mle.aggregate_tokens(reduction=reduction, **tensors, **keywords)

    def theirs(loss, token_weight=None):
        return reference.aggregate_tokens(
            loss, reduction=reduction, token_weight=token_weight, **plain
        )

    actual = with_gradients(ours, given, factor)
    assert_agrees(actual, theirs, leaves, factor, "aggregate_tokens")
    bad = {name: poisoned(x, ~on, c.poison()) for name, x in given.items()}
    assert_bits(with_gradients(ours, bad, factor), actual, "garbage")


def rows_by_name(c):
    """masked_cross_entropy and masked_linear_cross_entropy, in float64, where their rows are right
    to the last digits: what is compared are the denominators."""
    wanted = c.below(2)
    problem = LinearProblem(c, AGGREGATIONS) if wanted else Problem(c, AGGREGATIONS)
    if not problem.rows:
        return
    problem.options["reduction"] = c.pick(AGGREGATIONS)
    if problem.options["reduction"] == "weighted_mean":
        weight = torch.rand(problem.rows, generator=problem.g).add(0.1).to(problem.dtype)
        problem.put("token_weight", weight)
    problem.say()
    ours = linear(mle) if wanted else moved(mle.masked_cross_entropy, c)
    theirs = linear(reference) if wanted else reference.masked_cross_entropy
    leaves = ("hidden", "head", "bias") if wanted else ("logits",)
    keywords = {"stats": False, "differentiable": leaves, **problem.options}
    up = {"loss": torch.tensor(c.pick((1.0, -0.5, 3.0)))}
    bad = problem.with_garbage(c.poison())
    actual = evaluate(ours, problem.given, up, **keywords)
    assert_bits(evaluate(ours, bad, up, **keywords), actual, "garbage")
    doubled = converted(problem.plain, torch.float64)
    truth = evaluate(theirs, doubled, up, **keywords)
    found = evaluate(ours, doubled, up, **keywords)
    for name, result in found.items():
        close = {
            "rtol": 1e-9,
            "atol": 1e-9 * max(1.0, truth[name].abs().nan_to_num(0).sum().item()),
        }
        torch.testing.assert_close(result, truth[name], **close, equal_nan=True)


def tokens_by_name(c):
    """The token losses: mean over channels first; weighted_mean goes by the values of the mask."""
    shape, g = squared_error.some_shape(c, 3), c.generator()
    inputs, on = squared_error.tensors(c, g, shape, mask_shape=shape[:2], edit_shape=shape[:2])
    how, reduction, which = squared_error.element_loss(c), c.pick(AGGREGATIONS), c.below(2)
    normalizer, factor, kind = c.pick((None, None, 7, 0.5, 0)), c.pick((1.0, -0.5)), c.poison()
    fg, bg = c.pick((2.0, 1.0, 0.5)), c.pick((1.0, 0.0, 3.0))
    grey = torch.rand(shape[:2], generator=g) * (torch.rand(shape[:2], generator=g) < 0.7)
    if inputs["mask"] is not None:
        inputs["mask"], on = grey, (grey != 0)[..., None].expand(shape)
    squared_error.say(c, inputs, {**how, "reduction": reduction, "which": which, "fg": fg})
    c.said |= {"normalizer": normalizer, "bg": bg}
    fixed = {"edit_mask": inputs["edit_mask"]}
    names = [n for n in ("prediction", "target", "weighting") if inputs[n] is not None]
    module = mle.AttentionMaskMseLoss(fg, bg, reduction=reduction, **how)
    other = mle.MaskEditLoss(fg, bg, **how)

    def ours(prediction, target, weighting=None, edit_mask=fixed["edit_mask"]):
        given = {"weighting": weighting, "edit_mask": edit_mask, "normalizer": normalizer}
        given["attention_mask"] = inputs["mask"]
        if which:
            return other(prediction, target, reduction=reduction, **given)
        return module(prediction, target, **given)

    def theirs(prediction, target, weighting=None):
        loss = reference.masked_edit_token_mean_loss(
            prediction, target, inputs["mask"], inputs["edit_mask"], weighting, fg, bg, **how,
            reduction="none", edit_mask_default="foreground" if which else "unit",
        )  # fmt: skip
        mask = inputs["mask"]
        weight = mask.to(loss.dtype) if reduction == "weighted_mean" and mask is not None else None
        return reference.aggregate_tokens(
            loss, mask, reduction, token_weight=weight, normalizer=normalizer
        )

    leaves = {name: inputs[name] for name in names}
    actual = with_gradients(ours, leaves, factor)
    wide = reference.accumulate_dtype(inputs["prediction"], inputs["target"])
    truth, in_dtype = (
        with_gradients(theirs, {n: x.to(dtype) for n, x in leaves.items()}, factor)
        for dtype in (torch.float64, wide)
    )
    for name, result in actual.items():
        if result.itemsize > wide.itemsize:  # of wider weights: no more exact for that
            result = result.to(wide)
        assert_close(result, truth[name], in_dtype[name], name)
    bad = squared_error.with_poison(inputs, on, kind)
    fixed["edit_mask"] = bad["edit_mask"]
    again = with_gradients(
        lambda **x: ours(**x, edit_mask=bad["edit_mask"]), {n: bad[n] for n in names}, factor
    )
    assert_bits(again, actual, "garbage")
