# SPDX-License-Identifier: BSD-3-Clause
"""Which rows are gathered: those that count, in the backward those into which anything flows; and
from where, and how."""

import pytest
import torch
from accuracy import assert_same_bits
from cases import MASK_DTYPES, stored_as

import masked_loss_ext as mle
from masked_loss_ext import reference

ROWS, WIDTH, CLASSES = (4, 9), 7, 23
UPSTREAM = ("loss", "lse", "entropy", "log_prob")
LAYOUTS = ("contiguous", "transposed", "permuted", "expanded", "misaligned", "gaps", "sliced")
NAN = float("nan")


def data(dtype=torch.float32, seed=0):
    """hidden, head, bias, target, mask"""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(*ROWS, WIDTH, generator=g)
    w, b = torch.randn(CLASSES, WIDTH, generator=g), torch.randn(CLASSES, generator=g)
    target = torch.randint(0, CLASSES, ROWS, generator=g)
    target[torch.rand(ROWS, generator=g) < 0.2] = -100
    return *(x.to(dtype) for x in (h, w, b)), target, torch.rand(ROWS, generator=g) < 0.7


def outputs(module, h, w, b, target, mask, **options):
    loss, stats = module.masked_linear_cross_entropy(
        h, w, target, mask, bias=b, reduction="none", return_stats=True, **options
    )
    return loss, *stats[:3]


def gradients(module, tensors, rest, upstream, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = outputs(module, *leaves, *rest, **options)
    chosen = [(out, g) for out, g in zip(found, upstream, strict=True) if g is not None]
    results, incoming = zip(*chosen, strict=True)
    return torch.autograd.grad(results, leaves, incoming)


# --- rows into which nothing flows ---------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("which", [*UPSTREAM, "all"])
def test_zero_rows_of_what_comes_in(which, share):
    *tensors, target, mask = data(torch.float64)
    g = torch.Generator().manual_seed(5)
    upstream = []
    for name in UPSTREAM:
        one = torch.randn(ROWS, generator=g, dtype=torch.float64)
        one[torch.rand(ROWS, generator=g) < share] = 0
        upstream.append(one if which in (name, "all") else None)
    rest = (target, mask)
    ours = gradients(mle, tensors, rest, upstream, chunk_rows=5)
    torch.testing.assert_close(ours, gradients(reference, tensors, rest, upstream))
    if share == 1.0:
        assert not any(g.any() for g in ours)
    flows = sum(u != 0 for u in upstream if u is not None) > 0
    assert (ours[0][~flows] == 0).all()


@pytest.mark.parametrize("which", ["none", "lse", "entropy", "log_prob"])
def test_rows_of_nan_into_which_nothing_flows(which):
    """They count, and their results are NaN; what is filtered out is out of the gradients too."""
    h, w, b, target, _ = data()
    dropped = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.5
    found = []
    for fill in (0.0, NAN):
        leaves = [h.masked_fill(dropped.unsqueeze(-1), fill), w.clone(), b.clone()]
        leaves = [x.requires_grad_() for x in leaves]
        if which == "none":
            result = mle.masked_linear_cross_entropy(
                *leaves[:2], target, bias=leaves[2], reduction="none", chunk_rows=3
            )
        else:
            result = getattr(mle.linear_row_statistics(*leaves[:2], target, bias=leaves[2]), which)
        counts = dropped & (target != -100)
        assert result[counts].isnan().all() == (fill != fill)
        kept = torch.where(dropped, 0, result)
        found.append(torch.autograd.grad(kept.sum(), leaves))
    for a, b_ in zip(*found, strict=True):
        assert_same_bits(b_, a)
        assert a.any() and a.isfinite().all()


def test_a_gradient_of_nan_is_no_zero():
    h, w, b, target, mask = data()
    w.requires_grad_()
    loss = mle.masked_linear_cross_entropy(h, w, target, mask, reduction="none")
    g = torch.zeros(ROWS)
    on = (mask & (target != -100)).nonzero()[0].tolist()
    g[tuple(on)] = NAN
    assert torch.autograd.grad(loss, w, g)[0].isnan().any()


def test_a_frozen_layer_and_a_token_weight_of_zero():
    """Where the loss does not weigh, its token weight still has a gradient: the row's loss."""
    h, w, b, target, mask = data()
    on = mask & (target != -100)
    t = torch.zeros(ROWS, requires_grad=True)
    plain = mle.masked_linear_cross_entropy(h, w, target, mask, reduction="none")
    for reduction in ("sum", "none"):
        loss = mle.masked_linear_cross_entropy(
            h, w, target, mask, token_weight=t, reduction=reduction
        )
        assert not loss.any()
        (grad,) = torch.autograd.grad(loss.sum(), t)
        torch.testing.assert_close(grad, plain)
        assert (grad[~on] == 0).all()


# --- from where ----------------------------------------------------------------------------------


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_of_any_strides(layout, dtype, all_rows):
    h, w, b, target, mask = data(dtype)
    if all_rows:
        mask, target = None, target.clamp(min=0)
    if layout == "expanded":
        h = h[:1].expand(h.shape)
    stored = stored_as(h, layout)
    for reduction in ("mean", "none"):
        found = []
        for x in (h.contiguous(), stored):
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            loss = mle.masked_linear_cross_entropy(
                *leaves, target, mask, bias=b, reduction=reduction, shift=1, chunk_rows=6
            )
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
        for a, b_ in zip(*found, strict=True):
            assert_same_bits(b_.contiguous(), a.contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_of_any_strides(layout):
    h, w, b, target, mask = data()
    if layout == "expanded":
        w = w[:1].expand(w.shape)
    for reduction in ("mean", "none"):
        found = []
        for x in (w.contiguous(), stored_as(w, layout)):
            leaf = x.detach().requires_grad_()
            loss = mle.masked_linear_cross_entropy(h, leaf, target, mask, reduction=reduction)
            found.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        for a, b_ in zip(*found, strict=True):
            torch.testing.assert_close(b_, a, rtol=1e-5, atol=1e-6)


def test_a_bias_of_any_strides():
    h, w, b, target, mask = data()
    wide = torch.stack([b, torch.full_like(b, NAN)], -1)[:, 0]
    plain = mle.masked_linear_cross_entropy(h, w, target, mask, bias=b)
    assert torch.equal(mle.masked_linear_cross_entropy(h, w, target, mask, bias=wide), plain)
    one = b[:1].expand(CLASSES)
    found = mle.masked_linear_cross_entropy(h, w, target, mask, bias=one)
    torch.testing.assert_close(found, mle.masked_linear_cross_entropy(h, w, target, mask))


def test_more_dimensions():
    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(2, 3, 2, 5, WIDTH, generator=g), torch.randn(CLASSES, WIDTH, generator=g)
    target = torch.randint(0, CLASSES, (2, 3, 2, 5), generator=g)
    mask = torch.rand(2, 3, 2, 5, generator=g) < 0.6
    moved = h.movedim(1, 3).contiguous().movedim(3, 1)
    for x in (h, moved):
        ours = mle.masked_linear_cross_entropy(x, w, target, mask, shift=2, reduction="none")
        theirs = reference.masked_linear_cross_entropy(
            h, w, target, mask, shift=2, reduction="none"
        )
        torch.testing.assert_close(ours, theirs)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_masks_of_any_dtype(dtype):
    h, w, b, target, mask = data()
    h.requires_grad_()
    expected = mle.masked_linear_cross_entropy(h, w, target, mask)
    given = mask.to(dtype) if dtype == torch.bool else torch.where(mask, 3, 0).to(dtype)
    found = mle.masked_linear_cross_entropy(h, w, target, given)
    assert_same_bits(found.detach(), expected.detach())
    assert_same_bits(*[torch.autograd.grad(loss, h)[0] for loss in (found, expected)])


@pytest.mark.parametrize("shape", [(1, 9), (4, 1), (1, 1)])
def test_rows_of_size_one_stand_for_all(shape):
    h, w, b, target, _ = data()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
    t = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    for reduction in ("mean", "none"):
        found, expected = (
            mle.masked_linear_cross_entropy(h, w, target, m, token_weight=x, reduction=reduction)
            for m, x in ((mask, t), (mask.expand(ROWS), t.expand(ROWS).contiguous()))
        )
        assert_same_bits(found, expected)
    if shape == (1, 9):
        one = target[:1].clamp(min=0)
        found = mle.masked_linear_cross_entropy(h, w, one)
        assert_same_bits(found, mle.masked_linear_cross_entropy(h, w, one.expand(ROWS)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, 3, 8, 9, 100])
def test_shift_and_documents(shift, reduction):
    *tensors, target, mask = data(torch.float64)
    segments = torch.rand(ROWS, generator=torch.Generator().manual_seed(4)).lt(0.3).cumsum(-1)
    found = []
    for module in (mle, reference):
        leaves = [x.detach().requires_grad_() for x in tensors]
        loss = module.masked_linear_cross_entropy(
            *leaves[:2], target, mask, bias=leaves[2], shift=shift, segment_ids=segments,
            reduction=reduction,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("extra", [0, 1, 7, 10**6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_num_valid_changes_nothing(extra, reduction):
    h, w, b, target, mask = data()
    count = int((mask & (target != -100)).sum())
    found = []
    for n in (None, count + extra):
        leaves = [x.detach().requires_grad_() for x in (h, w, b)]
        loss = mle.masked_linear_cross_entropy(
            *leaves[:2], target, mask, bias=leaves[2], reduction=reduction, num_valid=n
        )
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for a, b_ in zip(*found, strict=True):
        assert_same_bits(a, b_)


def test_the_surrogate_of_reinforcement_learning():
    """Clipped ratios with advantages and a KL term, ten lines: as with full logits in float64."""
    h, w, b, target, mask = data(torch.float64)
    g = torch.Generator().manual_seed(8)
    old, ref = (torch.randn(ROWS, generator=g, dtype=torch.float64) * 0.2 - 3 for _ in range(2))
    advantage = torch.randn(ROWS, generator=g, dtype=torch.float64)
    temperature = torch.linspace(0.6, 1.5, 36).reshape(ROWS)  # of each token's rollout
    on = mask & (target != -100)
    found = []
    for module in (mle, reference):
        leaves = [x.detach().requires_grad_() for x in (h, w, b)]
        stats = module.linear_row_statistics(
            *leaves[:2], target, mask, bias=leaves[2], temperature=temperature
        )
        log_p = torch.where(on, stats.log_prob, 0)
        ratio = torch.exp(log_p - torch.where(on, old, 0))
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        away = torch.where(on, ref, 0) - log_p
        kl = away.exp() - away - 1
        loss = (torch.where(on, 0.04 * kl - gain, 0).sum() - 0.01 * stats.entropy.sum()) / on.sum()
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*found)
