# SPDX-License-Identifier: BSD-3-Clause
"""Mixed dtypes, autocast, float32 logits of halves, sums over chunks, and confident rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits
from cases_digits import FLOATING, MARGINS, assert_relative, confident, truth_beside

import masked_loss_ext as mle

HALVES = (torch.bfloat16, torch.float16)
f = mle.masked_linear_cross_entropy
every_half = pytest.mark.parametrize("half", HALVES, ids=str)


def layer(dtype=torch.float32, rows=40, width=16, classes=70):
    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(rows, width, generator=g), torch.randn(classes, width, generator=g)
    b, y = torch.randn(classes, generator=g), torch.randint(0, classes, (rows,), generator=g)
    y[::5] = -100
    return *(x.to(dtype).requires_grad_() for x in (h, w, b)), y


def step(h, w, b, y, **options):
    loss = f(h, w, y, bias=b, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (h, w, b))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtypes", itertools.product(FLOATING, repeat=3), ids=str)
def test_mixed_dtypes(dtypes, reduction):
    """All are computed in the wider one; each gets its gradient in its own."""
    h, w, b, y = layer()
    given = [x.detach().to(d).requires_grad_() for x, d in zip((h, w, b), dtypes, strict=True)]
    wide = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    same = [x.detach().to(wide).requires_grad_() for x in given]
    found, expected = step(*given, y, reduction=reduction), step(*same, y, reduction=reduction)
    assert found[0].dtype == (torch.float64 if wide == torch.float64 else torch.float32)
    assert_same_bits(found[0], expected[0])
    for x, gradient, wider in zip(given, found[1:], expected[1:], strict=True):
        assert_same_bits(gradient, wider.to(x.dtype))


@every_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(half, reduction):
    """As F.linear: the parameters stay float32, the products are of halves."""
    h, w, b, y = layer()
    with torch.autocast("cpu", dtype=half):
        loss = f(h, w, y, bias=b, reduction=reduction)
        stats = mle.linear_row_statistics(h, w, y, bias=b)
    assert loss.dtype == torch.float32 and stats.lse.dtype == torch.float32
    grads = torch.autograd.grad(loss.sum(), (h, w, b))
    assert all(g.dtype == torch.float32 for g in grads)
    by_hand = [x.detach().to(half).requires_grad_() for x in (h, w, b)]
    expected = step(*by_hand, y, reduction=reduction)
    assert_same_bits(loss.detach(), expected[0])
    for gradient, one in zip(grads, expected[1:], strict=True):
        assert_same_bits(gradient, one.float())
    with torch.autocast("cpu", dtype=half):
        theirs = F.cross_entropy(F.linear(h, w, b).float(), y, reduction=reduction)
    torch.testing.assert_close(loss, theirs, rtol=0.02, atol=0.05)


@every_half
def test_autocast_leaves_float64_alone(half):
    h, w, b, y = layer(torch.float64)
    with torch.autocast("cpu", dtype=half):
        assert torch.equal(f(h, w, y, bias=b), f(h, w, y, bias=b))
        assert f(h, w, y, bias=b).dtype == torch.float64
    with torch.autocast("cpu", enabled=False):
        assert f(h.float(), w.float(), y).dtype == torch.float32


@every_half
def test_autocast_with_float32_logits(half):
    h, w, b, y = layer()
    with torch.autocast("cpu", dtype=half):
        loss = f(h, w, y, bias=b, logits_dtype=torch.float32)
    wide = [x.detach().to(half).float() for x in (h, w, b)]
    torch.testing.assert_close(loss, f(*wide[:2], y, bias=wide[2]), rtol=1e-6, atol=1e-6)


@every_half
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float32_logits_lose_no_more_than_the_inputs(half, reduction):
    """Loss and statistics of the same numbers in float32; gradients of these, rounded once."""
    h, w, b, y = layer(half)
    wide = [x.detach().float().requires_grad_() for x in (h, w, b)]
    found = step(h, w, b, y, reduction=reduction, logits_dtype=torch.float32)
    expected = step(*wide, y, reduction=reduction)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)
    for gradient, one in zip(found[1:], expected[1:], strict=True):
        eps = torch.finfo(half).eps
        torch.testing.assert_close(gradient.float(), one, rtol=eps, atol=1e-6)
    narrow = f(h, w, y, bias=b, reduction="none") - f(*wide[:2], y, bias=wide[2], reduction="none")
    assert narrow.abs().max() < 16 * torch.finfo(half).eps * 8  # logits up to 16, rounded


@every_half
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["halves", "float32 logits"])
def test_sums_over_chunks_are_kept_in_float32(half, logits_dtype):
    """1 row at a time: no further from the truth than one chunk of all rows is, but for the one
    rounding of each chunk's product. Added up in halves they would be."""
    h, w, b, y = layer(half, rows=600, width=8, classes=5)
    wide = [x.detach().double().requires_grad_() for x in (h, w, b)]
    truth = step(*wide, y, reduction="sum")[1:]
    for chunk_rows in (1, 3, 599, 600):
        found = step(h, w, b, y, reduction="sum", chunk_rows=chunk_rows, logits_dtype=logits_dtype)
        for gradient, exact in zip(found[2:], truth[1:], strict=True):
            error = (gradient.double() - exact).abs().max() / exact.abs().max()
            assert error < 1.5 * torch.finfo(half).eps, (chunk_rows, error)


def test_a_sum_in_halves_would_stand_still():
    """4000 rows that add 1/4 each to one entry: a sum in bfloat16 ends at 64."""
    rows = 4000
    h, y = torch.full((rows, 1), 0.5).bfloat16(), torch.zeros(rows, dtype=torch.long)
    w = torch.zeros(2, 1).bfloat16().requires_grad_()
    b = torch.zeros(2).bfloat16().requires_grad_()
    for options in ({}, {"logits_dtype": torch.float32}):
        for reduction in ("sum", "none"):
            loss = f(h, w, y, bias=b, reduction=reduction, chunk_rows=1, **options).sum()
            grad_w, grad_b = torch.autograd.grad(loss, (w, b))
            assert grad_w.flatten().tolist() == [-1000, 1000]
            assert grad_b.tolist() == [-2000, 2000]


# --- confident rows ------------------------------------------------------------------------------


def as_linear(x):
    """Logits [N, V] as one-hot hidden states and a head of their columns: exact."""
    return torch.eye(len(x), dtype=x.dtype), x.T.contiguous()


def ways():
    def sweep(h, w, y, **how):
        return f(h, w, y, reduction="sum", **how)

    def row_losses(h, w, y, **how):
        return f(h, w, y, reduction="none", **how).sum()

    def log_prob(h, w, y, **how):
        return -mle.linear_row_statistics(h, w, y, **how).log_prob.sum()

    return sweep, row_losses, log_prob


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("margin", MARGINS)
def test_what_is_beside_a_confident_label(way, dtype, margin):
    """ln p = -ln(1 + rest) and p - 1 = -rest / (1 + rest), to 1e-5 where the dtype carries it."""
    x, y = confident(margin, dtype)
    log_p, entropy, gradient = truth_beside(x, y)
    h, w = as_linear(x)
    h.requires_grad_()
    w.requires_grad_()
    each = f(h, w, y, reduction="none")
    assert_relative(each, -log_p)
    assert_relative(mle.linear_row_statistics(h, w, y).entropy, entropy)
    loss = way(h, w, y, chunk_rows=2)
    (grad,) = torch.autograd.grad(loss, w)  # of a one-hot: the gradient of the logits
    assert_relative(grad.T, gradient)


def test_thirty_above_fifty_thousand_others():
    x = torch.zeros(1, 50257)
    x[0, 5] = 30.0
    h, w = torch.ones(1, 1), x.T.contiguous().requires_grad_()
    for way in ways():
        loss = way(h, w, torch.tensor([5]))
        assert loss.item() == pytest.approx(4.7027e-9, rel=1e-4)
        assert torch.autograd.grad(loss, w)[0][5].item() == pytest.approx(-4.7027e-9, rel=1e-4)


@every_half
def test_no_second_rounding_of_the_logits(half):
    """Halves keep the digits that F.linear leaves them."""
    h, w, b, y = layer(half)
    logits = F.linear(h, w, b)
    ours = f(h, w, y, bias=b, reduction="none")
    theirs = mle.masked_cross_entropy(logits, y, reduction="none")
    exact = f(h, w, y, bias=b, reduction="none", logits_dtype=torch.float32)
    bound = (theirs - exact).abs().max() + 1e-5
    assert (ours - exact).abs().max() <= 1.5 * bound
