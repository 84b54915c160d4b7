# SPDX-License-Identifier: BSD-3-Clause
"""What gradient_in_forward and its operators refuse, in their own words."""

import pytest
import torch

import masked_loss_ext as mle

sweep_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep
inplace_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep_
scale_op = torch.ops.masked_loss_ext._masked_cross_entropy_scale_gradient_
OPERATORS = pytest.mark.parametrize("op", [sweep_op, inplace_op], ids=["fresh", "in_place"])
X, Y = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, -100]])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"reduction": "none"}, "reduction must be mean or sum for gradient_in_forward, got none"),
        ({"return_stats": True}, "return_stats must be False for gradient_in_forward"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be a finite number .*at most 1, got 2"),
        ({"mask": torch.ones(2)}, "mask must have the shape of logits"),
        ({"reduction": "sum", "normalizer": 3}, "normalizer must be None for reduction 'sum'"),
    ],
)
def test_the_function(options, text):
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=f"^masked_cross_entropy: {text}"):
        mle.masked_cross_entropy(x, Y, gradient_in_forward=True, **options)
    if "mask" not in options and "normalizer" not in options:
        with pytest.raises(ValueError, match=text.partition(" must")[0]):
            mle.MaskedCrossEntropyLoss(gradient_in_forward=True, **options)(x, Y)


@OPERATORS
@pytest.mark.parametrize(
    "bad, text",
    [
        ({"reduction": "none"}, "reduction must be mean or sum, got none"),
        ({"reduction": "max"}, "reduction must be mean, sum or none, got max"),
        ({"temperature": torch.tensor(0.0)}, "temperature must be positive and finite, got 0"),
        ({"temperature": torch.zeros(2, 3)}, r"temperature at row \[0, 0\] must be positive"),
        ({"normalizer": torch.ones(1)}, r"normalizer must be a number \[\], got \[1\]"),
        ({"token_weight": torch.ones(3)}, "token_weight must have the shape of logits"),
        ({"shift": -1}, "shift must not be negative"),
        ({"target": None}, "target must be given for a gradient"),
    ],
)
def test_the_operators(op, bad, text):
    x = X.clone()
    with pytest.raises(ValueError, match=f"^masked_cross_entropy: {text}"):
        op(**{"logits": x, "target": Y, **bad})
    assert torch.equal(x, X)


@OPERATORS
def test_a_lost_derivative_is_refused(op):
    with pytest.raises(RuntimeError, match="has no derivative; call masked_cross_entropy"):
        op(X.clone().requires_grad_(), Y)
    with torch.no_grad():
        op(X.clone().requires_grad_(), Y)


def test_scaling():
    name = "_masked_cross_entropy_scale_gradient_"
    for grad, factor, text in (
        (X, torch.ones(2), r"grad_loss must be a number \[\], got \[2\]"),
        (X, torch.ones((), dtype=torch.float64), "grad_loss must have the dtype of the loss"),
        (X.long(), torch.ones(()), "logits must be float16"),
        (X[..., ::2], torch.ones(()), "grad_logits must be contiguous in the last dimension"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {text}"):
            scale_op(grad, factor)
    with pytest.raises(RuntimeError, match="has no derivative"):
        scale_op(X.clone(), torch.ones((), requires_grad=True))


def test_two_devices():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        mle.masked_cross_entropy(x, Y.to("meta"), gradient_in_forward=True)
