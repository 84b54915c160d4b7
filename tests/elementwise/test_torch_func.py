# SPDX-License-Identifier: BSD-3-Clause
"""torch.func (grad, vmap, jacobians, hessians) and forward-mode differentiation."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from masked_loss_ext.ops.masked_squared_error import masked_squared_error
from tests.elementwise.test_autograd import EDIT, ELEMENTS, MASK, PUBLIC, leaves, token_module


def sample_loss(module=mle):
    def loss(x, target, mask):
        return module.masked_mse(x, target, mask)

    return loss


@pytest.fixture
def samples():
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(4, 2, 5, generator=g) < 0.6
    mask[1] = False  # an empty selection among others
    x, target = (torch.randn(4, 2, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return x, target, mask


def test_func_grad(samples):
    x, target, mask = (s[0] for s in samples)
    got = torch.func.grad(sample_loss())(x, target, mask)
    torch.testing.assert_close(got, 2 * (x - target) * mask / mask.sum())


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, 0), (0, 0, None), (1, 1, 1)])
def test_vmap_and_gradients_per_sample(samples, in_dims):
    args = [s if d is not None else s[0] for s, d in zip(samples, in_dims, strict=True)]
    for transform in (lambda f: f, torch.func.grad):
        ours = torch.vmap(transform(sample_loss()), in_dims)(*args)
        theirs = [
            transform(sample_loss(reference))(
                *(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(args[0].shape[in_dims[0]])
        ]
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_vmap_of_weighted_token_losses():
    prediction, target, weighting = (x.detach() for x in leaves((2, 3, 1)))
    for reduction in ("mean", "none"):
        f = token_module(reduction)
        stacked = torch.stack([prediction, prediction * 2])
        ours = torch.vmap(f, (0, None, None))(stacked, target, weighting)
        theirs = torch.stack([f(p, target, weighting) for p in stacked])
        torch.testing.assert_close(ours, theirs)


def test_vmap_of_gradients_of_weighting():
    prediction, target, weighting = (x.detach() for x in leaves((3, 1)))
    f = torch.func.grad(PUBLIC["edit_mean"], argnums=(0, 1, 2))
    ours = torch.vmap(f, (None, None, 0))(prediction, target, torch.stack([weighting, -weighting]))
    for i, w in enumerate((weighting, -weighting)):
        for got, expected in zip(ours, f(prediction, target, w), strict=True):
            torch.testing.assert_close(got[i], expected)


def test_jacobians_and_hessians(samples):
    x, target, mask = (s[0] for s in samples)
    per_element = mle.MseLoss("none")
    expected = torch.diag_embed(2 * (x - target).flatten()).reshape(2, 5, 2, 5)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(per_element)(x, target), expected)
    hessian = torch.diag(2.0 * mask.flatten() / mask.sum()).double().reshape(2, 5, 2, 5)
    loss = sample_loss()
    torch.testing.assert_close(torch.func.hessian(loss)(x, target, mask), hessian)
    twice = torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(twice(x, target, mask), hessian)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch_mean", "token_sum", "token", "none"])
def test_forward_mode(reduction):
    primals = tuple(x.detach() for x in leaves((2, 3, 1)))
    tangents = tuple(torch.randn_like(x) for x in primals)

    def loss(function):
        return lambda p, t, w: function(p, t, ELEMENTS, EDIT, w, 3.0, 0.5, reduction)

    ours = torch.func.jvp(loss(masked_squared_error), primals, tangents)
    theirs = torch.func.jvp(loss(reference.masked_squared_error), primals, tangents)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        dual = forward_ad.unpack_dual(loss(masked_squared_error)(*duals))
        torch.testing.assert_close(dual.tangent, theirs[1])


@pytest.mark.parametrize("only", [0, 1, 2])
def test_forward_mode_in_one_argument(only):
    primals = [x.detach() for x in leaves((2, 3, 1))]

    def loss(function):
        def of_one(value):
            args = [value if i == only else p for i, p in enumerate(primals)]
            return function(args[0], args[1], MASK, EDIT, args[2])

        return of_one

    arguments = (primals[only],), (torch.ones_like(primals[only]),)
    ours = torch.func.jvp(loss(masked_squared_error), *arguments)
    torch.testing.assert_close(
        ours, torch.func.jvp(loss(reference.masked_squared_error), *arguments)
    )


def test_arguments_are_checked_under_vmap():
    x, target, mask = torch.randn(4, 2, 5), torch.randn(2, 5), torch.ones(2, 5)
    token_loss = mle.AttentionMaskMseLoss()
    for bad, text in (
        (lambda a: mle.masked_mse(a, target[:1], mask), "x must have the shape of x_recon"),
        (lambda a: mle.masked_mse(a.long(), target, mask), "x_recon must be a floating tensor"),
        (lambda a: mle.masked_mse(a, target, mask[:1, :2]), "mask shape must be"),
        (lambda a: mle.MseLoss()(a, target, x), "weighting must be broadcastable"),
        (lambda a: token_loss(a[None], target[None, :1]), "Shape mismatch"),
        (lambda a: token_loss(a[None].long(), target[None]), "must be a floating tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            torch.vmap(bad)(x)


LABELS, ROWS = torch.tensor([1, 0]), torch.tensor([1.0, 0.0])
WITH_FLOAT_MASK = {
    "squared": lambda x: mle.masked_mse(x, x.detach() + 1, ROWS),
    "tokens": lambda x: mle.masked_edit_token_mean_loss(x[None], x[None] * 0, ROWS[None]),
    "elements": lambda x: mle.MaskEditLoss()(x[None], x[None] * 0, attention_mask=ROWS[None]),
    "cross entropy": lambda x: mle.masked_cross_entropy(x, LABELS, ROWS),
    "statistics": lambda x: mle.row_statistics(x, LABELS, ROWS).lse.sum(),
    "terms": lambda x: cross_entropy_terms(x, LABELS, ROWS).log_prob.sum(),
}


@pytest.mark.parametrize("name", WITH_FLOAT_MASK)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_no_data_of_a_mask_is_read_while_tracing(name):
    """Eagerly a floating mask on the CPU is looked at, to refuse an additive one."""
    loss, x = WITH_FLOAT_MASK[name], torch.randn(2, 5, dtype=torch.float64)
    gradient = torch.func.grad(loss)(x)
    value, linear = torch.func.linearize(loss, x)
    torch.testing.assert_close(value, loss(x))
    torch.testing.assert_close(linear(x + 1), (gradient * (x + 1)).sum())
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(loss, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(graph(x + 1), loss(x + 1))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert loss(fake.from_tensor(x)).shape == ()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        torch.testing.assert_close(loss(x), value)
