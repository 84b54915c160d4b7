# SPDX-License-Identifier: BSD-3-Clause
"""Every order of derivatives and batches, of every loss: forward over reverse and the other three,
dual numbers around a backward, vmap over anything, gradients in batches. Beside the references in
float64; and what gets no gradient is refused, never 0 in silence."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from masked_loss_ext.ops.masked_squared_error import masked_squared_error
from masked_loss_ext.unified import FocalLoss

generator = torch.Generator().manual_seed(11)
random = partial(torch.randn, generator=generator, dtype=torch.float64)
X, V = random(3, 4), random(3, 4)  # three rows of four classes, and a direction
Y, MASK = torch.tensor([1, 3, 0]), torch.tensor([1.0, 0.0, 1.0])
WEIGHT = random(4).abs() + 0.5
OURS = {
    "cross_entropy": mle.masked_cross_entropy,
    "statistics": mle.row_statistics,
    "terms": cross_entropy_terms,
    "squared": masked_squared_error,
}
THEIRS = {
    "cross_entropy": reference.masked_cross_entropy,
    "statistics": reference.row_statistics,
    "terms": reference.cross_entropy_terms,
    "squared": reference.masked_squared_error,
}


def total(f, outputs):
    return sum((i + 1) * out.square().sum() for i, out in enumerate(outputs))


LOSSES = {
    "cross entropy": lambda f: lambda x: f["cross_entropy"](x, Y, MASK),
    "cross entropy, everything": lambda f: (
        lambda x: f["cross_entropy"](
            x,
            Y,
            MASK,
            weight=WEIGHT,
            token_weight=x[:, 0],
            label_smoothing=0.1,
            temperature=0.7,
            softcap=3.0,
            z_loss=0.1,
            focal_gamma=2.0,
            reduction="none",
        ).sum()
    ),
    "cross entropy with statistics": lambda f: (
        lambda x: (lambda loss, stats: loss.square() + total(f, stats[:3]))(
            *f["cross_entropy"](x, Y, MASK, return_stats=True)
        )
    ),
    "statistics": lambda f: lambda x: total(f, f["statistics"](x, Y, MASK, softcap=2.0)[:3]),
    "statistics without labels": lambda f: lambda x: total(f, f["statistics"](x, None, MASK)[:2]),
    "terms": lambda f: lambda x: total(f, f["terms"](x, Y, MASK, temperature=0.8)[:4]),
    "squared": lambda f: lambda x: f["squared"](x, x.roll(1, 0) * 2, MASK).square(),
    "squared, everything": lambda f: (
        lambda x: f["squared"](x, X.exp(), MASK, X.sigmoid(), x.roll(1, 1), 3.0, 0.5, "none").sum()
    ),
}
all_losses = pytest.mark.parametrize("name", LOSSES)


def both(name):
    return LOSSES[name](OURS), LOSSES[name](THEIRS)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def truth(name):
    """Gradient and Hessian by reverse mode of the reference."""
    theirs = both(name)[1]
    return grad(theirs)(X), torch.autograd.functional.hessian(theirs, X)


# --- orders ------------------------------------------------------------------------------------


@all_losses
def test_on_paper_and_four_orders(name):
    ours = both(name)[0]
    expected = truth(name)[1]
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            close(outer(inner(ours))(X), expected)
    close(hessian(ours)(X), expected)


@all_losses
def test_forward_over_reverse(name):
    ours = both(name)[0]
    gradient, matrix = truth(name)
    product = (matrix * V).sum((-2, -1))
    close(jvp(grad(ours), (X,), (V,)), (gradient, product))
    close(grad(lambda x: jvp(ours, (x,), (V,))[1])(X), product)
    close(vmap(lambda v: jvp(grad(ours), (X,), (v,))[1])(torch.stack([V, -V])), _pair(product))


def _pair(x):
    return torch.stack([x, -x])


@all_losses
@pytest.mark.parametrize("create_graph", [False, True])
def test_dual_numbers_around_a_backward(name, create_graph):
    ours = both(name)[0]
    gradient, matrix = truth(name)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(), V)
        (found,) = torch.autograd.grad(ours(x), x, create_graph=create_graph)
        close(forward_ad.unpack_dual(found).primal, gradient)
        close(forward_ad.unpack_dual(found).tangent, (matrix * V).sum((-2, -1)))


@all_losses
def test_third_derivatives(name):
    ours, theirs = both(name)
    for third in (
        lambda f: grad(lambda x: (jvp(grad(f), (x,), (V,))[1] * V).sum()),
        lambda f: lambda x: jvp(lambda z: jvp(grad(f), (z,), (V,))[1], (x,), (V,))[1],
    ):
        close(third(ours)(X), third(theirs)(X))


@all_losses
def test_a_gradient_with_a_tangent_reaches_an_eager_graph(name):
    """The graph is made before any transform; (3 g)' = 3 g'."""
    x = X.clone().requires_grad_()
    loss = both(name)[0](x)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3))
        (found,) = torch.autograd.grad(loss, x, upstream)
        gradient, tangent = forward_ad.unpack_dual(found)
        close(gradient, truth(name)[0])
        close(tangent, 3 * gradient)


def test_the_curvature_of_cross_entropy_on_paper():
    """One row, two equal logits: p = 1/2, so that v' H v = p (1 - p) (v_0 - v_1)^2 = 1."""
    x, v, y = torch.zeros(1, 2).double(), torch.tensor([[2.0, 0.0]]).double(), torch.tensor([0])
    _, product = jvp(grad(lambda x: mle.masked_cross_entropy(x, y)), (x,), (v,))
    assert product.tolist() == [[0.5, -0.5]] and (product * v).sum() == 1
    _, product = jvp(grad(lambda x: mle.masked_mse(x, x.detach(), torch.ones(1, 2))), (x,), (v,))
    assert product.tolist() == [[2.0, 0.0]]  # 2 v / n


@pytest.mark.parametrize("how", ["fresh", "in_forward", "in_place", "both"])
def test_batches_of_gradients(how):
    options = {
        "gradient_in_forward": how in ("in_forward", "both"),
        "inplace_backward": how in ("in_place", "both"),
    }
    upstream = torch.tensor([1.0, -2.0, 0.0]).double()
    x = X.clone().requires_grad_()
    loss = mle.masked_cross_entropy(x * 1, Y, MASK, **options)
    (found,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
    close(found, upstream[:, None, None] * truth("cross entropy")[0])
    x = X.clone().requires_grad_()
    loss = mle.masked_cross_entropy(x * 1, Y, MASK, **options)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(loss, x, forward_ad.make_dual(upstream[1], upstream[0]))
        found = forward_ad.unpack_dual(found)
        close(found.tangent, truth("cross entropy")[0])
        close(found.primal, -2 * found.tangent)


@all_losses
def test_batches_of_gradients_of_the_others(name):
    x = X.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0]).double()
    (found,) = torch.autograd.grad(both(name)[0](x), x, upstream, is_grads_batched=True)
    close(found, upstream[:, None, None] * truth(name)[0])


# --- one row per sample: labels and masks have rank 0 under vmap ---------------------------------

PER_ROW = {
    "plain": lambda f, x, y, m: f["cross_entropy"](x, y),
    "mask": lambda f, x, y, m: f["cross_entropy"](x, y, m),
    "none": lambda f, x, y, m: f["cross_entropy"](x, y, reduction="none"),
    "weight": lambda f, x, y, m: f["cross_entropy"](x, y, weight=WEIGHT, label_smoothing=0.1),
    "options": lambda f, x, y, m: f["cross_entropy"](
        x, y, m, temperature=0.5, softcap=3.0, z_loss=0.1, focal_gamma=2.0, token_weight=x[0]
    ),
    "entropy": lambda f, x, y, m: f["statistics"](x, y, m).entropy,
    "log_prob": lambda f, x, y, m: f["statistics"](x, y).log_prob,
    "terms": lambda f, x, y, m: sum(f["terms"](x, y, m, temperature=0.7)[:4]),
    "squared": lambda f, x, y, m: f["squared"](x, x.flip(0), m * (x > 0), WEIGHT),
}
IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, None), (0, 0, None), (0, None, 0), (None, 0, 0)]


def picked(in_dims, i=None):
    values = (X, Y, MASK)
    if i is None:
        return [a if d == 0 else a[0] for a, d in zip(values, in_dims, strict=True)]
    return [a[i if d == 0 else 0] for a, d in zip(values, in_dims, strict=True)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", PER_ROW)
def test_a_row_per_sample(name, in_dims):
    ours, theirs = (partial(PER_ROW[name], f) for f in (OURS, THEIRS))
    tangent = lambda f: lambda x, *rest: jvp(lambda z: f(z, *rest), (x,), (x + 1,))[1]  # noqa: E731
    for transform in (lambda f: f, grad, tangent, lambda f: jacfwd(grad(f))):
        for chunk_size in (None, 2):
            found = vmap(transform(ours), in_dims, chunk_size=chunk_size)(*picked(in_dims))
            loop = [transform(theirs)(*picked(in_dims, i)) for i in range(3)]
            close(found, torch.stack(loop))


def test_vmap_within_vmap():
    x, y = torch.stack([X, -X, X * 2]), torch.stack([Y, Y.flip(0), Y])
    for name, f in PER_ROW.items():
        ours, theirs = partial(f, OURS), partial(f, THEIRS)
        for inner, outer, by_x in (((0, 0, 0), (0, 0, None), False), ((0, None, 0), 0, True)):
            args = (x, y[:, 0] if by_x else y, MASK.expand(3, 3) if by_x else MASK)
            found = vmap(vmap(grad(ours), inner), outer)(*args)
            loop = [
                grad(theirs)(x[i, j], y[i, 0] if by_x else y[i, j], MASK[j])
                for i in range(3)
                for j in range(3)
            ]
            close(found, torch.stack(loop).view(3, 3, 4)), name


def test_focal_loss_per_sample():
    loss = FocalLoss()
    found = vmap(grad(loss))(X[:, None], Y[:, None])
    loop = [grad(lambda x, i=i: loss(x, Y[i, None]))(X[i, None]) for i in range(3)]
    close(found, torch.stack(loop))


def test_vmap_over_what_is_not_a_row():
    for key, batch in (
        ("weight", torch.stack([WEIGHT, WEIGHT.flip(0)])),
        ("token_weight", torch.stack([MASK, MASK + 1]).double()),
        ("temperature", torch.tensor([0.5, 2.0]).double()),
        ("normalizer", torch.tensor([3.0, 7.0]).double()),
    ):
        for x, y in ((X, Y), (X[0], Y[0])):
            value = batch[:, 0] if key == "token_weight" and x.dim() == 1 else batch
            apply = lambda v, x=x, y=y, key=key: mle.masked_cross_entropy(x, y, **{key: v})  # noqa: E731
            close(vmap(apply)(value), torch.stack([apply(v) for v in value]))


def test_one_row_at_a_time_with_class_weights():
    """Labels of rank 0."""

    def row(x, y, w):
        return mle.masked_cross_entropy(
            x, y, weight=WEIGHT, token_weight=w, reduction="weighted_mean"
        )

    each = [grad(row)(x[None], y[None], w[None])[0] for x, y, w in zip(X, Y, MASK + 1, strict=True)]
    close(vmap(grad(row))(X, Y, MASK + 1), torch.stack(each))


# --- what has no derivative ----------------------------------------------------------------------

ONE = torch.tensor(0.8, dtype=torch.float64)
CONSTANTS = {
    "temperature": (ONE, lambda f, t: f["cross_entropy"](X, Y, temperature=t)),
    "normalizer": (ONE, lambda f, t: f["cross_entropy"](X, Y, normalizer=t)),
    "weight": (WEIGHT, lambda f, t: f["cross_entropy"](X, Y, weight=t)),
    "weight in a denominator": (
        WEIGHT,
        lambda f, t: f["cross_entropy"](X[None], Y[None], weight=t, reduction="sequence_mean"),
    ),
    "temperature of statistics": (ONE, lambda f, t: f["statistics"](X, Y, temperature=t).lse.sum()),
    "temperature of terms": (ONE, lambda f, t: f["terms"](X, Y, temperature=t)[0].sum()),
    "edit_mask": (X[:, 0].clone(), lambda f, t: f["squared"](X, X + 1, None, t)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_derivative_or_an_error(name):
    value, function = CONSTANTS[name]
    ours, theirs = partial(function, OURS), partial(function, THEIRS)
    expected = jvp(theirs, (value,), (torch.ones_like(value),))
    assert expected[1].abs() > 1e-3, "the derivative is not 0"
    text = f"{name.partition(' ')[0]} must not require a gradient"
    wanted = value.clone().requires_grad_()
    with pytest.raises(ValueError, match=text):
        ours(wanted)
    with pytest.raises(ValueError, match=text):
        grad(ours)(value)
    with torch.no_grad():
        close(ours(wanted), theirs(value))

    def dual(f):
        with forward_ad.dual_level():
            out = f(forward_ad.make_dual(value, torch.ones_like(value)))
            return forward_ad.unpack_dual(out)

    def tangent(f):
        return jvp(f, (value,), (torch.ones_like(value),))

    close(tuple(dual(ours)), expected)
    close(tangent(ours), expected)
    batch = vmap(lambda a: tangent(lambda t: ours(t) * a))(torch.tensor([1.0, 2.0]).double())
    close(batch, tuple(torch.stack([e, 2 * e]) for e in expected))


@pytest.mark.parametrize("name", CONSTANTS)
def test_within_a_batch_it_has_one(name):
    """Plain PyTorch stands in for the operator there."""
    value, function = CONSTANTS[name]
    values = torch.stack([value, value + 1])
    ours, theirs = (vmap(partial(function, f)) for f in (OURS, THEIRS))
    close(jvp(ours, (values,), (values,)), jvp(theirs, (values,), (values,)))
    close(*(grad(lambda v, f=f: f(v).sum())(values) for f in (ours, theirs)))


@pytest.mark.parametrize("name", CONSTANTS)
def test_compiled_too(name):
    """A traced transform goes through plain PyTorch; a gradient is refused as in eager mode."""
    value, function = CONSTANTS[name]
    ours, theirs = partial(function, OURS), partial(function, THEIRS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: jvp(ours, (t,), (torch.ones_like(t),)), backend="aot_eager")
    close(compiled(value), jvp(theirs, (value,), (torch.ones_like(value),)))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="must not require a gradient"):
        compiled(value.clone().requires_grad_())
    torch._dynamo.reset()


def test_a_mask_is_looked_at_and_has_derivative_0():
    """As ``mask != 0`` of PyTorch."""
    for name in ("cross_entropy", "statistics", "terms", "squared"):
        second = X + 1 if name == "squared" else Y
        outputs = lambda m, name=name, y=second: OURS[name](X, y, m)  # noqa: E731
        first = (lambda out: out) if name in ("cross_entropy", "squared") else (lambda out: out[0])
        _, tangent = jvp(lambda m: first(outputs(m)), (MASK.double(),), (torch.ones(3).double(),))  # noqa: B023
        assert (tangent == 0).all()


@pytest.mark.parametrize("argument", ["label_smoothing", "softcap", "z_loss", "focal_gamma"])
def test_numbers_are_numbers(argument):
    """A tensor would be read, which drops its derivative and waits for a GPU."""
    for value in (ONE, ONE.clone().requires_grad_(), torch.nn.Parameter(ONE)):
        with pytest.raises((TypeError, ValueError), match=f"masked_cross_entropy: {argument} must"):
            mle.masked_cross_entropy(X, Y, **{argument: value})
    with pytest.raises((TypeError, ValueError), match=f"masked_cross_entropy: {argument} must"):
        jvp(lambda t: mle.masked_cross_entropy(X, Y, **{argument: t}), (ONE,), (ONE,))
