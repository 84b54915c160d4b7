# SPDX-License-Identifier: BSD-3-Clause
"""Digits: of what is beside a confident class, and of the gradients of large logits."""

import itertools
from math import exp, inf, log, log1p, nan

import pytest
import torch
import torch.nn.functional as F
from cases_digits import (
    FLOATING,
    LARGE,
    MARGINS,
    OPTIONS,
    TOLERANCE,
    assert_as_good_as_torch,
    assert_relative,
    confident,
    large,
    truth_beside,
)

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
every_margin = pytest.mark.parametrize("margin", MARGINS)
SHAPES = [(3, 37), (3, 997), (3, 20001)]  # less than a block, a block, pieces


def ways():
    """Name: loss and gradient of sum(loss) by each way there is."""

    def ordinary(x, y, **options):
        x = x.detach().requires_grad_()
        loss = mle.masked_cross_entropy(x, y, reduction="sum", **options)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def terms(x, y, temperature=1.0):
        x = x.detach().requires_grad_()
        t = cross_entropy_terms(x, y, temperature=temperature)
        loss = -(t.log_prob if temperature == 1 else t.scaled_log_prob).sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def scaled_terms(x, y):
        x = x.detach().requires_grad_()
        loss = -cross_entropy_terms(x, y, unscaled=False).scaled_log_prob.sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def in_place(x, y, **options):
        return ordinary(x.clone(), y, inplace_backward=True, **options)

    def sweep(x, y, **options):
        return ordinary(x, y, gradient_in_forward=True, **options)

    def sweep_in_place(x, y, **options):
        leaf = x.detach().clone().requires_grad_()
        y = y.clone()
        loss = mle.masked_cross_entropy(
            leaf * 1, y, reduction="sum", gradient_in_forward=True, inplace_backward=True, **options
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def log_prob(x, y, **options):
        x = x.detach().requires_grad_()
        loss = -mle.row_statistics(x, y, **options).log_prob.sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    cross_entropy = (ordinary, in_place, sweep, sweep_in_place, log_prob)
    return cross_entropy, (terms, scaled_terms)


CROSS_ENTROPY, TERMS = ways()
every_way = pytest.mark.parametrize("way", CROSS_ENTROPY + TERMS, ids=lambda f: f.__name__)


@every_way
@every_dtype
@every_margin
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_beside_a_confident_label(way, dtype, margin, shape):
    """ln p = -ln(1 + rest), p - 1 = -rest / (1 + rest), and p of every other class."""
    x, y = confident(margin, dtype, shape)
    log_p, _, gradient = truth_beside(x, y)
    for row in range(len(y)):  # each loss on its own
        loss, grad = way(x[row : row + 1], y[row : row + 1])
        assert_relative(loss, -log_p[row])
        assert_relative(grad, gradient[row : row + 1])


def test_thirty_above_fifty_thousand_others():
    x = torch.zeros(1, 50257)
    x[0, 5] = 30.0
    expected = log1p(50256 * torch.tensor(-30.0, dtype=torch.float64).exp().item())
    assert expected == pytest.approx(4.7027e-9, rel=1e-4)
    for way in CROSS_ENTROPY + TERMS:
        loss, grad = way(x, torch.tensor([5]))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert grad[0, 5].item() == pytest.approx(-expected, rel=1e-5)


@every_dtype
@every_margin
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_a_confident_row(dtype, margin, shape):
    """The entropy keeps its digits whether the label is that class, another, or there is none."""
    x, best = confident(margin, dtype, shape)
    log_p, entropy, _ = truth_beside(x, best)
    for target in (best, (best + 1) % shape[1], None):
        stats = mle.row_statistics(x, target)
        assert_relative(stats.entropy, entropy)
        loss, other = mle.masked_cross_entropy(
            x, best if target is None else target, return_stats=True, reduction="none"
        )
        assert_relative(other.entropy, entropy)
    assert_relative(mle.row_statistics(x, best).log_prob, log_p)
    terms = cross_entropy_terms(x, (best + 1) % shape[1], classes=best[:, None])
    assert_relative(terms.entropy, entropy)
    assert_relative(terms.class_log_prob[:, 0], log_p)
    cold = cross_entropy_terms(x, (best + 1) % shape[1], classes=best[:, None], temperature=2.0)
    assert_relative(cold.entropy, entropy)
    assert_relative(cold.class_log_prob[:, 0], log_p)


@pytest.mark.parametrize("way", CROSS_ENTROPY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_confident_at_a_temperature(way, temperature):
    x, y = confident(60.0 * temperature, torch.float64)
    x = (x * 8).round() / 8
    log_p, _, gradient = truth_beside(x / temperature, y)
    for row in range(len(y)):
        loss, grad = way(x[row : row + 1], y[row : row + 1], temperature=temperature)
        assert_relative(loss, -log_p[row])
        assert_relative(grad, gradient[row : row + 1] / temperature)


@every_dtype
@pytest.mark.parametrize("way", CROSS_ENTROPY[:-1], ids=lambda f: f.__name__)
def test_one_class_has_no_gradient(way, dtype):
    """None at all: what cancels does so also where products and sums are fused."""
    for weight in torch.rand(50, 1):
        options = {"weight": weight, "token_weight": torch.rand(3), "label_smoothing": 0.3}
        _, gradient = way(torch.randn(3, 1).to(dtype), torch.zeros(3, dtype=torch.long), **options)
        assert (gradient == 0).all()


# --- large logits --------------------------------------------------------------------------------


def cases_of_large_logits():
    for way, name, options, dtype in itertools.product(CROSS_ENTROPY, LARGE, OPTIONS, FLOATING):
        of_loss_alone = options in ("smooth", "z_loss", "focal")
        # A cap rounds like the logits, and far beyond it there is no gradient.
        beyond_cap = options == "capped" and (dtype != torch.float64 or name in ("shifted", "huge"))
        if name == "huge" and dtype == torch.float16:  # infinite
            continue
        if not (beyond_cap or (of_loss_alone and way.__name__ == "log_prob")):
            yield pytest.param(
                way, name, options, dtype, id=f"{way.__name__}-{name}-{options}-{str(dtype)[6:]}"
            )


@pytest.mark.parametrize("way,name,options,dtype", list(cases_of_large_logits()))
def test_gradients_of_large_logits(way, name, options, dtype):
    x, y = large(name, dtype)
    _, grad = way(x, y, **OPTIONS[options])
    assert_as_good_as_torch(grad, x, y, OPTIONS[options])


@pytest.mark.parametrize("way", TERMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_terms_of_large_logits(way, name, dtype):
    x, y = large(name, dtype)
    assert_as_good_as_torch(way(x, y)[1], x, y, {})


@pytest.mark.parametrize("shift", [0, 2.0**13, 2.0**20])
def test_a_shift_changes_nothing(shift):
    """Integers keep every digit: so do loss, smoothing and the gradients of all statistics."""
    torch.manual_seed(1)
    x, y = torch.randint(-9, 9, (4, 300)).float(), torch.randint(300, (4,))
    g = torch.randn(4)

    def gradient(x):
        x = x.requires_grad_()
        loss, s = mle.masked_cross_entropy(
            x, y, reduction="none", label_smoothing=0.1, focal_gamma=1.0, return_stats=True
        )
        total = (loss + g * s.entropy + g.flip(0) * s.log_prob + g.square() * s.lse).sum()
        return loss.detach(), s.entropy.detach(), torch.autograd.grad(total, x)[0]

    for actual, expected in zip(gradient(x + shift), gradient(x.clone()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# --- infinity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 40, 20001])
@pytest.mark.parametrize("statistics", [False, True])
@every_dtype
def test_a_logit_of_infinity(classes, statistics, dtype):
    """lse as torch.logsumexp; all else NaN, as F.cross_entropy and its gradient."""
    x = torch.zeros(3, classes, dtype=dtype)
    x[1, -1] = inf
    x[2, 0] = -inf
    for label in (0, classes - 1):
        y = torch.full((3,), label)
        leaf = x.clone().requires_grad_()
        results = mle.masked_cross_entropy(leaf, y, reduction="none", return_stats=statistics)
        loss = results[0] if statistics else results
        theirs = F.cross_entropy(x.float(), y, reduction="none")
        assert loss[1].isnan() and theirs[1].isnan() and not loss[0].isnan()
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert grad.isnan().all(1).tolist() == [False, True, False] and grad[0].isfinite().all()
    stats = mle.row_statistics(x, y)
    assert stats.lse.tolist()[1] == inf and stats.lse.isfinite().tolist() == [True, False, True]
    assert stats.lse.equal(torch.logsumexp(x.to(stats.lse.dtype), 1)) or classes > 40
    assert stats.entropy.isnan().tolist() == [False, True, False]
    assert stats.log_prob.isnan().tolist() == [False, True, False]
    x[1, 0] = nan
    assert mle.row_statistics(x).lse[1].isnan()
    terms = cross_entropy_terms(x, y, classes=y[:, None])
    for name in ("scaled_log_prob", "scaled_mean_log_prob", "log_prob", "entropy"):
        assert getattr(terms, name).isnan().tolist()[:2] == [False, True], name


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_probability(way, dtype):
    """Near the smallest normal number p has all its digits, or is 0, but only below 1.5 of it."""
    smallest = torch.finfo(dtype).tiny
    below = torch.tensor([[log(smallest) + step / 16 for step in range(16, -17, -1)]], dtype=dtype)
    x = torch.cat([torch.zeros(1, 1, dtype=dtype), below], 1)
    _, gradient = way(x, torch.tensor([0]))
    p, truth = gradient[0, 1:].double(), below[0].double().exp()
    lost = p == 0
    assert (truth[lost] < 1.5 * smallest).all() and not lost.all()
    torch.testing.assert_close(p[~lost], truth[~lost], rtol=TOLERANCE, atol=0)


def test_infinities_in_the_reference():
    x, y = torch.tensor([[0.0, inf, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])
    leaf = x.clone().requires_grad_()
    loss, s = mle.reference.masked_cross_entropy(leaf, y, reduction="none", return_stats=True)
    for value in (loss, s.entropy, s.log_prob):
        assert value.isnan().tolist() == [True, False]
    assert s.lse[0] == inf
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert grad[0].isnan().all() and grad[1].isfinite().all()


@pytest.mark.parametrize("function", [mle.masked_cross_entropy, reference.masked_cross_entropy])
def test_the_focal_factor_of_an_unlikely_label(function):
    """p of e^-36, and a class weight of 0, so that nothing hides the factor's slope: with the core
    C = eps / V sum w (lse - z) and F = (1 - p)^2 the slope at the label is
    p (F eps / V sum w - 2 C F)."""
    logits = torch.tensor([0.0, -36.0, -1.0], dtype=torch.float64, requires_grad=True)
    options = {"label_smoothing": 0.3, "focal_gamma": 2.0, "reduction": "sum"}
    weight = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    loss = function(logits, torch.tensor(1), weight=weight, **options)
    total = 1 + exp(-1) + exp(-36)
    p, core = exp(-36) / total, 0.1 * 2 * (log(total) + 1)
    expected = p * (1 - p) ** 2 * (0.1 * 2 - 2 * core)
    slope = torch.autograd.grad(loss, logits)[0][1].item()
    assert slope == pytest.approx(expected, rel=1e-12, abs=0)
