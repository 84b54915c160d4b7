# SPDX-License-Identifier: BSD-3-Clause
"""Properties of torch.func and torch.compile: the same numbers by every way to an operator."""

import torch
from cases_linear import linear

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from tests.fuzz import squared_error
from tests.fuzz.linear import LinearProblem
from tests.fuzz.rows import Problem


def _squared(c):
    shape = squared_error.some_shape(c, 3)
    g = c.generator()
    inputs, _ = squared_error.tensors(c, g, shape, mask_shape=shape[:2], edit_shape=shape[:2])
    how, reduction = squared_error.element_loss(c), c.pick(("mean", "sum", "none"))
    names = ("target", "mask", "edit_mask", "weighting")
    fixed = {
        n: x.double() if n in ("target", "weighting") and x is not None else x
        for n, x in inputs.items()
        if n in names
    }
    if how.get("loss", "mse") != "pseudo_huber":  # whose slope bends, which forward mode may meet
        how = {"loss": "mse"}

    def of(function):
        return lambda x: function(
            x, fixed["target"], fixed["mask"], fixed["edit_mask"], fixed["weighting"],
            reduction=reduction, **how,
        )  # fmt: skip

    squared_error.say(c, inputs, {**how, "reduction": reduction})
    ours, theirs = mle.masked_edit_token_mean_loss, reference.masked_edit_token_mean_loss
    return of(ours), of(theirs), inputs["prediction"].double()


def _rows(c):
    problem = Problem(c)
    return _of_problem(problem, mle.masked_cross_entropy, reference.masked_cross_entropy, "logits")


def _linear(c):
    problem = LinearProblem(c)
    return _of_problem(problem, linear(mle), linear(reference), "hidden")


def _of_problem(problem, ours, theirs, first):
    problem.say()
    given, options = dict(problem.given), problem.options
    for name in ("logits", "hidden", "head", "bias", "token_weight", "weight"):
        if name in given:
            given[name] = problem.plain[name].double()
    x = given.pop(first)
    plain = {**problem.plain, **{n: given[n] for n in given if given[n].is_floating_point()}}
    plain.pop(first)
    if "mask" in plain:
        plain["mask"] = problem.plain["mask"]
    return (
        lambda x: ours(x, **given, **options),
        lambda x: theirs(x, **plain, **options),
        x,
    )


def _terms(c):
    g, shape = c.generator(), (c.pick((2, 1, 3)), c.pick((4, 1)), c.pick((5, 2, 9)))
    target = torch.randint(0, shape[-1], shape[:-1], generator=g)
    mask = torch.rand(shape[:-1], generator=g) < 0.7
    how = {"temperature": c.pick((None, 0.7)), "unscaled": bool(c.below(2))}
    c.said |= {"terms": shape, **how}

    def of(function):
        def total(x):
            found = function(x, target, mask, **how)
            return sum((i + 1) * term for i, term in enumerate(found[:4]) if term is not None)

        return total

    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return of(cross_entropy_terms), of(reference.cross_entropy_terms), x


FAMILIES = (_squared, _rows, _linear, _terms)


def _close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, equal_nan=True)


def transforms(c):
    """grad, vmap, vmap of grad, jvp and jvp of grad, in float64."""
    kind, way = c.pick(FAMILIES), c.below(5)
    ours, theirs, x = kind(c)
    g = c.generator()
    c.said["way"] = ("grad", "vmap", "vmap of grad", "jvp", "jvp of grad")[way]
    batch = torch.stack([x, x * 0.5 + 0.1, -x])
    tangent = torch.randn(x.shape, generator=g, dtype=torch.float64)
    tangent = torch.where(x.isfinite(), tangent, 0)
    func, summed = torch.func, lambda f: lambda x: f(x).sum()
    if way == 0:
        _close(func.grad(summed(ours))(x), func.grad(summed(theirs))(x))
    elif way == 1:
        _close(func.vmap(ours)(batch), torch.stack([theirs(one) for one in batch]))
    elif way == 2:
        expected = torch.stack([func.grad(summed(theirs))(one) for one in batch])
        _close(func.vmap(func.grad(summed(ours)))(batch), expected)
    else:
        a, b = (ours, theirs) if way == 3 else (func.grad(summed(f)) for f in (ours, theirs))
        for mine, other in zip(
            func.jvp(a, (x,), (tangent,)), func.jvp(b, (x,), (tangent,)), strict=True
        ):
            _close(mine, other)


def compiled(c):
    """torch.compile, fullgraph, with the backend that traces forward and backward and compiles
    nothing: seconds a case, so that they are a small share of a run."""
    ours, theirs, x = c.pick(FAMILIES)(c)
    dynamic = c.pick((None, True))
    c.said["dynamic"] = dynamic
    torch._dynamo.reset()
    function = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for f in (function, theirs):
        leaf = x.detach().clone().requires_grad_()
        loss = f(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for mine, other in zip(*results, strict=True):
        _close(mine, other)
