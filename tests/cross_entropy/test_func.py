# SPDX-License-Identifier: BSD-3-Clause
"""torch.func (grad, vmap, jacobians, hessians) and forward-mode differentiation."""

import pytest
import torch
from cases_cross_entropy import EVERYTHING
from torch.autograd import forward_ad, gradcheck

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.cross_entropy.test_autograd import MASK, OPTIONS, TARGET, leaves

STATISTICS = ("lse", "entropy", "log_prob")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs)


def loss_of(module, **options):
    def loss(x, target=TARGET, mask=MASK, t=None):
        return module.masked_cross_entropy(x, target, mask, token_weight=t, **options)

    return loss


def outputs_of(module, **options):
    def outputs(x, target=TARGET, mask=MASK, t=None):
        loss, stats = module.masked_cross_entropy(
            x, target, mask, token_weight=t, **options, return_stats=True
        )
        return loss, *stats[:3]

    return outputs


def samples():
    x = torch.stack([leaves()[0].detach() * s for s in (1, -2, 0.5)])
    t = torch.stack([leaves()[1].detach() * s for s in (1, 2, -1)])
    target = torch.stack([TARGET, TARGET.roll(1, 0), torch.full_like(TARGET, -100)])
    mask = torch.stack([MASK, 1 - MASK, MASK])
    target = target.masked_fill(target == 77, 1)
    return x, target, mask, t


@pytest.mark.parametrize("name", OPTIONS)
def test_func_grad(name):
    x, t = (v.detach() for v in leaves())
    gradients = [
        torch.func.grad(lambda x, t, m=m: loss_of(m, **OPTIONS[name])(x, t=t).sum(), (0, 1))(x, t)
        for m in (mle, reference)
    ]
    close(*gradients)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (0, 0, None, 0)])
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"reduction": "none", "shift": 1}], ids=str)
def test_vmap_is_a_loop(in_dims, options):
    """Of the loss with its statistics; one of the samples has nothing that counts."""
    args = [s if d is not None else s[0] for s, d in zip(samples(), in_dims, strict=True)]
    function = outputs_of(mle, **options)
    ours = torch.vmap(function, in_dims)(*args)
    theirs = [
        function(*(a if d is None else a[i] for a, d in zip(args, in_dims, strict=True)))
        for i in range(3)
    ]
    for a, b in zip(ours, zip(*theirs, strict=True), strict=True):
        close(a, torch.stack(b))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_gradients_per_sample(options):
    args = samples()
    ours = torch.vmap(torch.func.grad(loss_of(mle, **options), (0, 3)))(*args)
    theirs = [
        torch.func.grad(loss_of(reference, **options), (0, 3))(*(a[i] for a in args))
        for i in range(3)
    ]
    for a, b in zip(ours, zip(*theirs, strict=True), strict=True):
        close(a, torch.stack(b))


def test_vmap_over_another_dimension():
    x, target, mask, t = samples()
    ours = torch.vmap(loss_of(mle), (2, 1, 1, 1))(
        *(s.movedim(0, d) for s, d in ((x, 2), (target, 1), (mask, 1), (t, 1)))
    )
    close(ours, torch.stack([loss_of(mle)(x[i], target[i], mask[i], t[i]) for i in range(3)]))


def test_vmap_of_statistics():
    x, target, mask, _ = samples()
    ours = torch.vmap(lambda *a: tuple(mle.row_statistics(*a)))(x, target, mask)
    theirs = mle.row_statistics(x, target, mask)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_mode(name):
    primals = tuple(v.detach() for v in leaves())
    tangents = tuple(torch.randn_like(v) for v in primals)
    functions = [lambda x, t, m=m: outputs_of(m, **OPTIONS[name])(x, t=t) for m in (mle, reference)]
    ours, theirs = (torch.func.jvp(function, primals, tangents) for function in functions)
    close(ours, theirs)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        for output, expected in zip(functions[0](*duals), theirs[1], strict=True):
            close(forward_ad.unpack_dual(output).tangent, expected)


@pytest.mark.parametrize("only", [0, 1])
def test_forward_mode_in_one_argument(only):
    primals = [v.detach() for v in leaves()]

    def of_one(module):
        def function(value):
            x, t = (value if i == only else p for i, p in enumerate(primals))
            return loss_of(module, label_smoothing=0.1)(x, t=t)

        return function

    arguments = (primals[only],), (torch.ones_like(primals[only]),)
    close(torch.func.jvp(of_one(mle), *arguments), torch.func.jvp(of_one(reference), *arguments))


def test_poison_in_forward_mode():
    x = leaves()[0].detach()
    off = ~((MASK != 0) & (TARGET != -100))[..., None]

    def tangent(fill):
        arguments = (x.masked_fill(off, fill),), (torch.ones_like(x).masked_fill(off, fill),)
        return torch.func.jvp(loss_of(mle, z_loss=0.1), *arguments)

    for a, b in zip(tangent(0.0), tangent(float("nan")), strict=True):
        assert torch.equal(a, b)


def test_jacobians_and_hessians():
    x = leaves()[0].detach()[:, :3]
    target, mask = TARGET[:, :3], MASK[:, :3]

    def each(module):
        return lambda x: module.masked_cross_entropy(x, target, mask, reduction="none")

    expected = torch.func.jacrev(each(reference))(x)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        close(jacobian(each(mle))(x), expected)

    def loss(module):
        return lambda x: module.masked_cross_entropy(x, target, mask, focal_gamma=2.0)

    hessian = torch.func.hessian(loss(reference))(x)
    close(torch.func.hessian(loss(mle))(x), hessian)
    close(torch.func.jacrev(torch.func.jacrev(loss(mle)))(x), hessian)


def test_gradcheck_of_forward_mode_and_batched_gradients():
    assert gradcheck(
        lambda x, t: outputs_of(mle, **OPTIONS["everything"])(x, t=t),
        leaves(),
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_under_compile(transform):
    x, target, mask, _ = (s[0] for s in samples())

    def transformed(x, target, mask):
        if transform == "jvp":
            return torch.func.jvp(lambda v: loss_of(mle)(v, target, mask), (x,), (x,))
        return getattr(torch.func, transform)(loss_of(mle))(x, target, mask)

    torch._dynamo.reset()
    compiled = torch.compile(transformed, backend="aot_eager")
    close(compiled(x, target, mask), transformed(x, target, mask))
    torch._dynamo.reset()


def test_arguments_are_checked_under_vmap():
    x = torch.randn(4, 2, 5)
    target = torch.zeros(2, dtype=torch.long)
    for bad, text in (
        (lambda a: mle.masked_cross_entropy(a, target[:1]), "target must have the shape"),
        (lambda a: mle.masked_cross_entropy(a.long(), target), "logits must be"),
        (lambda a: mle.masked_cross_entropy(a, target.float()), "soft labels"),
        (lambda a: mle.masked_cross_entropy(a, target, label_smoothing=2.0), "label_smoothing"),
    ):
        with pytest.raises(ValueError, match=f"masked_cross_entropy: .*{text}"):
            torch.vmap(bad)(x)
