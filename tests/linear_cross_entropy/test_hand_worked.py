# SPDX-License-Identifier: BSD-3-Clause
"""Losses from hidden states on paper, for the functions and for the reference.

One number per hidden state, and a head whose weights are logarithms of small numbers:

    h    head             odds        p                   label   ce          h (p - [c = y])
    1    0, ln 3          1, 3        1/4, 3/4            1       ln 4/3      1/4, -1/4
    2    0, ln 3          1, 9        1/10, 9/10          0       ln 10       -9/5, 9/5

A third row of NaN is masked out everywhere, with a label that is no class.
"""

from math import log, nan

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import reference

LN3 = log(3)
CE = (log(4 / 3), log(10))
HIDDEN = torch.tensor([[1.0], [2.0], [nan]], dtype=torch.float64)
HEAD = torch.tensor([[0.0], [LN3]], dtype=torch.float64)
TARGET, MASK = torch.tensor([1, 0, 77]), torch.tensor([True, True, False])
BOTH = pytest.mark.parametrize("module", [mle, reference], ids=["native", "reference"])


def leaves():
    return HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()


def check(actual, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-13, atol=1e-13)


@BOTH
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("reduction,share", [("mean", 0.5), ("sum", 1.0), ("none", 1.0)])
def test_loss_and_gradients(module, reduction, share, factor):
    h, w = leaves()
    loss = module.masked_linear_cross_entropy(h, w, TARGET, MASK, reduction=reduction)
    check(loss, [*CE, 0.0] if reduction == "none" else share * sum(CE))
    grad_h, grad_w = torch.autograd.grad(factor * loss.sum(), (h, w))
    share = share * factor
    check(grad_h, [[-share * LN3 / 4], [share * 0.9 * LN3], [0.0]])
    check(grad_w, [[share * (1 / 4 - 9 / 5)], [share * (9 / 5 - 1 / 4)]])


@BOTH
def test_statistics(module):
    h, w = leaves()
    stats = module.linear_row_statistics(h, w, TARGET, MASK)
    check(stats.lse, [log(4), log(10), 0.0])
    check(stats.log_prob, [-CE[0], -CE[1], 0.0])
    check(stats.entropy, [log(4) - 3 / 4 * LN3, log(10) - 9 / 10 * log(9), 0.0])
    assert stats.hit.tolist() == [True, False, False]
    # d lse = sum p w; d entropy = -sum p (ln p + H) w
    (grad_h,) = torch.autograd.grad(stats.lse.sum(), h, retain_graph=True)
    check(grad_h, [[3 / 4 * LN3], [9 / 10 * LN3], [0.0]])
    (grad_h,) = torch.autograd.grad(stats.entropy.sum(), h)
    entropy = log(4) - 3 / 4 * LN3
    first = -3 / 4 * (log(3 / 4) + entropy) * LN3
    entropy = log(10) - 9 / 10 * log(9)
    check(grad_h, [[first], [-9 / 10 * (log(9 / 10) + entropy) * LN3], [0.0]])
    alone = module.linear_row_statistics(h, w, None, MASK)
    check(alone.lse, [log(4), log(10), 0.0])
    assert alone.log_prob is None and alone.hit is None


@BOTH
def test_a_bias_and_a_banned_class(module):
    """Odds 1, 2, 3 times 3, 1, 0: p is 3/5, 2/5, 0."""
    h = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.0], [log(2)], [LN3]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([LN3, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = module.masked_linear_cross_entropy(
            h, w, torch.tensor([1]), bias=b, reduction=reduction
        )
        check(loss.sum(), log(5 / 2))
        grads = torch.autograd.grad(loss.sum(), (h, w, b))
        check(grads[0], [[-3 / 5 * log(2)]])
        check(grads[1], [[3 / 5], [-3 / 5], [0.0]])
        check(grads[2], [3 / 5, -3 / 5, 0.0])


@BOTH
def test_one_class(module):
    h, w = leaves()
    loss = module.masked_linear_cross_entropy(h, w[:1], TARGET * 0, MASK)
    check(loss, 0.0)
    assert not any(g.any() for g in torch.autograd.grad(loss, (h, w)))


@BOTH
def test_keywords(module):
    def loss(**keywords):
        h, w = leaves()
        return module.masked_linear_cross_entropy(h, w, TARGET, MASK, **keywords)

    weight = torch.tensor([3.0, 5.0], dtype=torch.float64)  # of label 1: 5, of label 0: 3
    check(loss(class_weight=weight), (5 * CE[0] + 3 * CE[1]) / 8)
    token_weight = torch.tensor([2.0, -1.0, nan], dtype=torch.float64)
    check(loss(token_weight=token_weight), (2 * CE[0] - CE[1]) / 2)
    check(loss(normalizer=7), sum(CE) / 7)
    check(loss(ignore_index=0), CE[0])
    check(loss(z_loss=0.1, reduction="sum"), sum(CE) + 0.1 * (log(4) ** 2 + log(10) ** 2))
    # At a temperature of 1/2: odds 1, 9 and 1, 81.
    check(loss(temperature=0.5), (log(10 / 9) + log(82)) / 2)
    # Smoothed: half of the mean over classes of -ln p.
    spread = (log(4) + log(4 / 3)) / 2, (log(10) + log(10 / 9)) / 2
    check(loss(label_smoothing=0.5), sum(CE) / 4 + sum(spread) / 4)
    # Position 0 against the label at 1, whose mask counts.
    check(loss(shift=1), log(4))
    check(loss(shift=1, reduction="none"), [log(4), 0.0, 0.0])
    check(loss(shift=1, segment_ids=torch.tensor([0, 1, 1])), 0.0)


@BOTH
def test_the_gradient_of_a_token_weight_is_the_row_loss(module):
    t = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = module.masked_linear_cross_entropy(HIDDEN, HEAD, TARGET, MASK, token_weight=t)
    check(torch.autograd.grad(loss, t)[0], [CE[0] / 2, CE[1] / 2, 0.0])


@BOTH
def test_one_hidden_state(module):
    """[D] and a label []."""
    h = HIDDEN[1].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = module.masked_linear_cross_entropy(h, HEAD, TARGET[1], reduction=reduction)
        check(loss, CE[1])
        check(torch.autograd.grad(loss, h)[0], [0.9 * LN3])
    check(module.linear_row_statistics(h, HEAD, TARGET[1]).log_prob, -CE[1])


@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
def test_chunks(chunk_rows):
    h, w = leaves()
    loss = mle.masked_linear_cross_entropy(h, w, TARGET, MASK, chunk_rows=chunk_rows)
    check(loss, sum(CE) / 2)
    check(torch.autograd.grad(loss, w)[0], [[(1 / 4 - 9 / 5) / 2], [(9 / 5 - 1 / 4) / 2]])
