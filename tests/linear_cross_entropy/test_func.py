# SPDX-License-Identifier: BSD-3-Clause
"""torch.func (grad, vmap, jvp, their compositions) and forward mode: by plain PyTorch."""

import pytest
import torch
from torch.autograd import forward_ad

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.linear_cross_entropy.test_autograd import (
    MASK,
    OPTIONS,
    TARGET,
    leaves,
    loss_of,
    outputs_of,
)

every_option = pytest.mark.parametrize("name", OPTIONS)
ALL = (0, 1, 2, 3)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs)


def values():
    return tuple(x.detach() for x in leaves())


def samples():
    """Three of each argument."""
    return tuple(torch.stack([x, -2 * x, 0.5 * x]) for x in values())


def total(module, name):
    return lambda *x: loss_of(module, name)(*x).sum()


@every_option
def test_grad(name):
    close(*[torch.func.grad(total(m, name), ALL)(*values()) for m in (mle, reference)])
    ours = torch.func.grad(total(mle, name), 1)(*values())  # a frozen trunk
    close(ours, torch.func.grad(total(reference, name), ALL)(*values())[1])


@every_option
def test_grad_of_grad(name):
    def norm(module):
        def function(*x):
            grads = torch.func.grad(total(module, name), ALL)(*x)
            return sum(g.square().sum() for g in grads)

        return function

    close(*[torch.func.grad(norm(m), ALL)(*values()) for m in (mle, reference)])


@every_option
def test_vmap(name):
    ours = torch.vmap(outputs_of(mle, name))(*samples())
    theirs = [outputs_of(reference, name)(*(x[i] for x in samples())) for i in range(3)]
    for a, b in zip(ours, zip(*theirs, strict=True), strict=True):
        close(a, torch.stack(b))
    close(torch.vmap(loss_of(mle, name))(*samples()), torch.stack([t[0] for t in theirs]))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (None, 0, None, None), (2, 1, 0, 1)])
def test_vmap_over_some_arguments(in_dims):
    """Samples for one head, an ensemble of heads, and other dimensions."""
    args = [x[0] if d is None else x.movedim(0, d) for x, d in zip(samples(), in_dims, strict=True)]
    ours = torch.vmap(loss_of(), in_dims)(*args)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
        close(ours[i], loss_of(reference)(*one))


@every_option
def test_gradients_per_sample(name):
    ours = torch.vmap(torch.func.grad(total(mle, name), ALL))(*samples())
    theirs = [
        torch.func.grad(total(reference, name), ALL)(*(x[i] for x in samples())) for i in range(3)
    ]
    for a, b in zip(ours, zip(*theirs, strict=True), strict=True):
        close(a, torch.stack(b))


@every_option
def test_forward_mode(name):
    primals, tangents = values(), tuple(torch.randn_like(x) for x in values())
    ours, theirs = (
        torch.func.jvp(outputs_of(m, name), primals, tangents) for m in (mle, reference)
    )
    close(ours, theirs)
    ours, theirs = (torch.func.jvp(loss_of(m, name), primals, tangents) for m in (mle, reference))
    close(ours, theirs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        close(forward_ad.unpack_dual(loss_of(mle, name)(*duals)).tangent, theirs[1])


@pytest.mark.parametrize("name", ["plain", "none"])
def test_a_backward_inside_forward_mode(name):
    """Forward over reverse: the loss was called inside, or before, and its gradient is a dual."""
    found = []
    for module in (mle, reference):
        h, *rest = values()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(h.clone().requires_grad_(), torch.ones_like(h))
            loss = total(module, name)(dual, *rest)
            (grad,) = torch.autograd.grad(loss, dual)
            found.append(forward_ad.unpack_dual(grad).tangent)
    close(*found)


def test_the_one_backward_with_a_tangent_that_comes_in():
    h, w, b, t = leaves()
    loss = loss_of()(h, w, b, t)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3.0))
        (grad,) = torch.autograd.grad(loss, h, factor)
        value, tangent = forward_ad.unpack_dual(grad)
        close(tangent, 3 * value)


def test_jacobians_and_hessians():
    h, w, b, _ = values()

    def each(module):
        return lambda h: loss_of(module, "none")(h, w, b)

    expected = torch.func.jacrev(each(reference))(h)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        close(jacobian(each(mle))(h), expected)

    def loss(module):
        return lambda w: loss_of(module)(h, w, b)

    close(torch.func.hessian(loss(mle))(w), torch.func.hessian(loss(reference))(w))


def test_statistics():
    h, w, b, _ = values()

    def entropy(module):
        def function(h, w, b):
            return module.linear_row_statistics(h, w, TARGET, MASK, bias=b).entropy.sum()

        return function

    close(*[torch.func.grad(entropy(m), (0, 1, 2))(h, w, b) for m in (mle, reference)])
    hs = torch.stack([h, 2 * h])
    ours = torch.vmap(torch.func.grad(entropy(mle)), (0, None, None))(hs, w, b)
    close(ours[1], torch.func.grad(entropy(reference))(2 * h, w, b))


def test_poison_in_forward_mode():
    h, w, b, t = values()
    off = ~((MASK != 0) & (TARGET != -100)).unsqueeze(-1)
    found = []
    for fill in (0.0, float("nan")):
        primal, tangent = h.masked_fill(off, fill), torch.ones_like(h).masked_fill(off, fill)
        found.append(torch.func.jvp(lambda x: loss_of()(x, w, b, t), (primal,), (tangent,)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_functional_call_and_ensembles():
    layer = torch.nn.Linear(3, 5)
    h = values()[0].float()

    def loss(parameters):
        w, b = parameters["weight"], parameters["bias"]
        return mle.masked_linear_cross_entropy(h, w, TARGET, MASK, bias=b)

    grads = torch.func.grad(loss)(dict(layer.named_parameters()))
    expected = torch.autograd.grad(loss(dict(layer.named_parameters())), list(layer.parameters()))
    close(tuple(grads.values()), expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_under_compile(transform):
    h, w, b, _ = values()

    def transformed(h, w):
        if transform == "jvp":
            return torch.func.jvp(lambda x: loss_of()(x, w, b), (h,), (h,))
        if transform == "vmap":
            return torch.vmap(lambda x: loss_of()(x, w, b))(torch.stack([h, 2 * h]))
        return torch.func.grad(lambda x: loss_of()(x, w, b))(h)

    torch._dynamo.reset()
    close(torch.compile(transformed, backend="aot_eager")(h, w), transformed(h, w))
    torch._dynamo.reset()
