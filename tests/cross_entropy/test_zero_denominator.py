# SPDX-License-Identifier: BSD-3-Clause
"""Where tokens are kept and what they are divided by is 0, loss and gradients are 0, not NaN."""

import pytest
import torch

import masked_loss_ext as mle

KEEPS_ALL = torch.ones(2, 3)
NOTHING = torch.zeros(2, 3)
# weights that cancel, weights of 0, and a count of another batch that is 0
WAYS = {
    "cancelling weights": ("weighted_mean", torch.tensor([[1.0, -1, 2], [-2, 3, -3]]), None),
    "no weight": ("weighted_mean", NOTHING, None),
    "no tokens": ("mean", KEEPS_ALL, 0),
    "no tokens in a tensor": ("mean", KEEPS_ALL, torch.tensor(0)),
    "no sequences": ("sequence_mean", KEEPS_ALL, 0.0),
    "no sequences to add up": ("sequence_sum", KEEPS_ALL, 0),
    "no weights of others": ("weighted_mean", KEEPS_ALL, 0),
}
ways = pytest.mark.parametrize("reduction, weight, normalizer", WAYS.values(), ids=WAYS)


def expect_nothing(loss, *inputs):
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@ways
def test_aggregate_tokens(reduction, weight, normalizer):
    loss, weight = torch.rand(2, 3, requires_grad=True), weight.clone().requires_grad_()
    found = mle.aggregate_tokens(
        loss, KEEPS_ALL, reduction, token_weight=weight, normalizer=normalizer
    )
    expect_nothing(found, loss, weight)


@ways
def test_masked_cross_entropy(reduction, weight, normalizer):
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[0, 1, 2], [3, 4, 0]])
    weight = weight.clone().requires_grad_()
    found = mle.masked_cross_entropy(
        logits, labels, token_weight=weight, reduction=reduction, normalizer=normalizer
    )
    expect_nothing(found, logits, weight)


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sequence_sum", "weighted_mean"])
def test_losses_of_tokens(reduction):
    x, y = torch.randn(2, 2, 3, 4).requires_grad_()
    found = mle.masked_edit_token_mean_loss(x, y, KEEPS_ALL, reduction=reduction, normalizer=0)
    expect_nothing(found, x, y)
