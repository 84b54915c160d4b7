# SPDX-License-Identifier: BSD-3-Clause
"""Banned classes (-inf), infinities, huge and tiny numbers, weights and denominators of 0, ties."""

from math import inf, log, nan

import pytest
import torch
import torch.nn.functional as F
from cases_cross_entropy import EVERYTHING

import masked_loss_ext as mle
from masked_loss_ext import reference

LN2, LN3 = log(2), log(3)
Y = torch.tensor


def run(x, target, **options):
    """Losses, statistics and the gradient of the sum of the losses."""
    x = torch.as_tensor(x).detach().requires_grad_()
    each, stats = mle.masked_cross_entropy(
        x, target, reduction="none", return_stats=True, **options
    )
    return each.detach(), stats, torch.autograd.grad(each.sum(), x)[0]


def close(actual, expected, tol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("filler", [0, 20, 3000])
def test_banned_classes(filler):
    """1/3 and 2/3, whatever number of banned classes stands before, between and after."""
    off = [-inf] * filler
    x = [[*off, 0.0, *off, LN2, -inf, *off]]
    first, second = filler, 2 * filler + 1
    each, stats, grad = run(x, Y([second]))
    close(each, [LN3 - LN2])
    close(stats.lse, [LN3])
    close(stats.entropy, [LN3 - 2 / 3 * LN2])
    assert stats.hit.tolist() == [True]
    close(grad[0, [first, second]], [1 / 3, -1 / 3])
    grad[0, [first, second]] = 0
    assert (grad == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"z_loss": 0.1}, {"focal_gamma": 0.5}]
)
def test_gradients_at_banned_classes_are_0(options):
    x = torch.randn(5, 600)
    banned = torch.rand(5, 600) < 0.5
    banned[:, 0] = False
    x = x.masked_fill(banned, -inf).requires_grad_()
    loss, s = mle.masked_cross_entropy(
        x, torch.zeros(5, dtype=torch.long), **options, return_stats=True
    )
    (grad,) = torch.autograd.grad(loss + (s.entropy * s.lse * s.log_prob).sum(), x)
    assert (grad[banned] == 0).all() and (grad[~banned] != 0).all() and grad.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"focal_gamma": 0.5}, {"focal_gamma": 2.0}, {"z_loss": 0.0}]
)
@pytest.mark.parametrize("classes", [1, 5, 1500])
def test_all_but_the_label_banned(options, classes):
    """p = 1: no loss, no gradient, no entropy, and no 0 * inf."""
    x = torch.full((1, classes), -inf)
    x[0, -1] = 3.0
    each, stats, grad = run(x, Y([classes - 1]), **options)
    assert each.item() == 0 and (grad == 0).all() and stats.entropy.item() == 0
    assert stats.lse.item() == 3 and stats.log_prob.item() == 0 and stats.hit.item()
    (of_entropy,) = torch.autograd.grad(run_entropy(x), x)
    assert (of_entropy == 0).all()


def run_entropy(x):
    return mle.row_statistics(x.requires_grad_()).entropy.sum()


def test_the_label_banned():
    """Infinite loss; the gradient is that of the other classes, 0 at the label."""
    each, stats, grad = run([[0.0, LN2, -inf]], Y([2]))
    assert each.item() == inf and stats.log_prob.item() == -inf and not stats.hit.item()
    close(grad, [[1 / 3, 2 / 3, 0.0]])
    assert grad[0, 2] == 0
    assert mle.masked_cross_entropy(Y([[0.0, LN2, -inf]]), Y([2])).item() == inf


@pytest.mark.parametrize("classes", [1, 4, 1200])
def test_all_banned(classes):
    x = torch.zeros(3, classes)
    x[1] = -inf
    each, stats, grad = run(x, Y([0, 0, 0]))
    assert each.isnan().tolist() == [False, True, False]
    assert stats.log_prob.isnan().tolist() == [False, True, False]
    assert (grad[1] == 0).all() and grad.isfinite().all()


def test_smoothing_over_banned_classes():
    """Each class is asked for a share: infinite, as in PyTorch, unless its class weight is 0."""
    x, target = Y([[0.0, LN2, -inf]]), Y([1])
    each, _, grad = run(x, target, label_smoothing=0.3)
    assert each.item() == inf == F.cross_entropy(x, target, label_smoothing=0.3).item()
    close(grad, [[1 / 3 - 0.1, 2 / 3 - 0.8, 0.0]])
    weight = Y([1.0, 1, 0])
    each, _, grad = run(x, target, label_smoothing=0.3, weight=weight)
    close(each, [0.7 * (LN3 - LN2) + 0.1 * (LN3 + LN3 - LN2)])
    # (0.7 + 2 * 0.1) p_c - 0.7 [c = y] - 0.1 w_c
    close(grad, [[0.9 / 3 - 0.1, 0.9 * 2 / 3 - 0.8, 0.0]])
    assert grad[0, 2] == 0


def test_a_cap_makes_infinities_finite():
    """softcap(x) = c tanh(x / c) is -c and c there."""
    x = Y([[0.0, inf, -inf]])
    each, stats, grad = run(x, Y([1]), softcap=2.0)
    expected, theirs = reference.masked_cross_entropy(
        x, Y([1]), softcap=2.0, reduction="none", return_stats=True
    )
    close(each, expected)
    close(stats.lse, theirs.lse)
    assert grad[0, 2] == 0 and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_logits(dtype):
    """m - z overflows in float32; nothing is NaN."""
    x = torch.tensor([[1e38, -1e38, 0, 1e38], [-3e38, 3e38, 0, 1]], dtype=dtype)
    each, stats, grad = run(x, Y([0, 1]))
    close(each, [LN2, 0.0])
    close(stats.entropy, [LN2, 0.0])
    close(stats.log_prob, [-LN2, 0.0])
    close(stats.lse, x.amax(-1).to(stats.lse.dtype))
    close(grad, [[-0.5, 0, 0, 0.5], [0.0] * 4])
    (of_entropy,) = torch.autograd.grad(run_entropy(x), x)
    assert of_entropy.isfinite().all()
    wrong, _, grad = run(x[1:], Y([0]))
    assert wrong.item() == inf if dtype != torch.float64 else wrong.item() > 5e38
    close(grad, [[-1.0, 1, 0, 0]])


def test_float16_at_its_limits():
    x = torch.tensor([[65504.0, -65504, 65504, 6e-8]], dtype=torch.float16)
    each, stats, grad = run(x, Y([1]))
    close(each, [131008 + LN2])
    close(stats.entropy, [LN2])
    close(grad, [[0.5, -1, 0.5, 0]], 2e-3)  # log_prob = -131008.7 has no more digits in float32


@pytest.mark.parametrize("gap", [80.0, 87.0, 88.0, 95.0, 103.0, 104.0, 110.0, 700.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponentials_that_underflow(gap, dtype):
    """p below the smallest normal number may be 0, never NaN nor larger; the loss is the gap."""
    x = torch.zeros(2, 40, dtype=dtype)
    x[:, 7] = gap
    each, stats, grad = run(x, Y([7, 0]))
    p = torch.softmax(x.double(), -1)
    tiny = torch.finfo(dtype).tiny
    close(each[1:], [gap], 1e-6)
    assert 0 <= each[0] <= 1e-30
    expected = p - F.one_hot(Y([7, 0]), 40)
    expected[0, 7] = -39 * p[0, 0]  # p - 1 has no digits there
    assert ((grad - expected).abs() <= 2 * tiny + 2e-6 * expected.abs()).all()
    assert (stats.entropy >= 0).all() and stats.entropy.max() < 1e-30


@pytest.mark.parametrize("offset", [-8192.0, -64.0, 64.0, 1024.0, 8192.0])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}], ids=str)
def test_a_constant_added_to_a_row_changes_nothing(offset, options):
    """Logits in eighths, so that the sum is exact: only lse moves, nothing loses digits."""
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-40, 40, (6, 700), generator=g) / 8
    target = torch.randint(0, 700, (6,), generator=g)
    here, s0, grad0 = run(x, target, **options)
    there, s1, grad1 = run(x + offset, target, **options)
    smoothing = options.get("label_smoothing", 0)  # its sum over all classes does cancel
    atol = smoothing * abs(offset) * 1e-7
    torch.testing.assert_close(there, here, rtol=2e-6, atol=atol)
    torch.testing.assert_close(s1.lse, s0.lse + offset, rtol=2e-7, atol=0)
    for name in ("entropy", "log_prob"):
        torch.testing.assert_close(getattr(s1, name), getattr(s0, name), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad1, grad0, rtol=5e-6, atol=1e-9 + 5e-6 * smoothing / 700)


def test_class_weights_of_0():
    """A row whose label weighs 0 counts for nothing; where all do the mean is 0, not NaN."""
    x, target = torch.randn(4, 3), Y([0, 1, 2, 1])
    weight = Y([1.0, 0, 2])
    each, _, grad = run(x, target, weight=weight)
    assert each[[1, 3]].tolist() == [0, 0] and (grad[[1, 3]] == 0).all()
    plain = F.cross_entropy(x, target, weight=weight)
    close(mle.masked_cross_entropy(x, target, weight=weight), plain)
    x.requires_grad_()
    loss = mle.masked_cross_entropy(x, Y([1, 1, 1, 1]), weight=weight)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_a_weight_is_not_a_mask():
    x = torch.randn(3, 4)
    x[1] = nan
    loss = mle.masked_cross_entropy(x, Y([0, 1, 2]), token_weight=Y([1.0, 0, 1]))
    assert loss.isnan()


def test_ties_hit_the_first():
    x = torch.zeros(5, 2100)
    x[:, 1000] = x[:, 2050] = 1.0
    x[3, 1024] = 1.5
    hits = run(x, Y([1000, 2050, 0, 1024, 1024]))[1].hit
    assert hits.tolist() == [True, False, False, True, False]
    flat = torch.zeros(3, 33)
    assert run(flat, Y([0, 1, 32]))[1].hit.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 33, 2049, 5000, 16385, 40000])
def test_argmax_is_that_of_torch(classes, dtype):
    """Ties, NaN, infinities, rows of nothing but -inf; the label on the largest and beside it."""
    g = torch.Generator().manual_seed(classes)
    x = torch.randint(-3, 4, (12, classes), generator=g).to(dtype)  # of many equal ones
    for row, value in ((1, nan), (2, nan), (3, inf), (4, inf), (5, 9.0)):
        x[row, torch.randint(classes, (2,), generator=g)] = value
    x[2, torch.randint(classes, (2,), generator=g)] = inf
    x[6] = -inf
    x[7] = nan
    x[8, classes // 2 :] = -inf
    x[9] = -inf
    x[9, -1] = -1e37  # finite at each temperature
    largest = x.argmax(-1)
    for target in (largest, (largest + 1) % classes, torch.zeros(12, dtype=torch.long)):
        for options in ({}, {"temperature": 0.3}):
            s = mle.row_statistics(x, target, **options)
            assert torch.equal(s.argmax, largest) and torch.equal(s.hit, target == largest)
            theirs = reference.row_statistics(x, target, **options)
            assert torch.equal(s.argmax, theirs.argmax) and torch.equal(s.hit, theirs.hit)
    assert torch.equal(mle.row_statistics(x).argmax, largest)


def test_argmax_where_a_cap_makes_logits_equal():
    x = torch.tensor([[1.0, 1000.0, 2000.0], [1.0, 2.0, -5.0]])
    assert mle.row_statistics(x, softcap=5.0).argmax.tolist() == [1, 1]


@pytest.mark.parametrize("classes", [5, 16, 33, 1025, 4100])
def test_every_label_is_found(classes):
    """The largest entry at each place in turn, as the label and not."""
    places = torch.arange(classes) if classes < 100 else torch.randint(0, classes, (64,))
    x = torch.zeros(len(places), classes)
    x[torch.arange(len(places)), places] = 2.0
    each, stats, _ = run(x, places)
    close(each, F.cross_entropy(x, places, reduction="none"), 2e-6)
    assert stats.hit.all()
    assert not run(x, (places + 1) % classes)[1].hit.any()


@pytest.mark.parametrize("ignore", [-100, -1, 0, 3, 255, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_any_ignore_index(ignore, dtype):
    """One that the labels' dtype cannot hold ignores nothing."""
    x = torch.randn(6, 256)
    target = Y([0, 3, 255, 7, 9, 254])
    fits = torch.iinfo(dtype).min <= ignore <= torch.iinfo(dtype).max
    target[4] = ignore if fits else 9
    each, stats, _ = run(x, target.to(dtype), ignore_index=ignore)
    assert (stats.lse == 0).tolist() == (target == ignore).tolist()
    theirs = F.cross_entropy(x, target, ignore_index=ignore, reduction="none")
    close(each, theirs, 2e-6)


def test_everything_at_once_in_a_row_of_one_class():
    """V = 1: p = 1, so only the z-loss is left."""
    x = Y([[0.5], [-2.0]])
    each, stats, grad = run(x, Y([0, 0]), **EVERYTHING, weight=Y([3.0]))
    z = 20 * torch.tanh(x / 20) / 0.8
    close(each, 1e-2 * z[:, 0].square())
    close(grad, 2e-2 * z * (1 - torch.tanh(x / 20).square()) / 0.8)
    assert stats.entropy.tolist() == [0, 0] and stats.hit.all()
