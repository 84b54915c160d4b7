# SPDX-License-Identifier: BSD-3-Clause
"""Inference mode: tensors made under it, and losses, do what they do in PyTorch's own losses."""

import pytest
import torch
import torch.nn.functional as F

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

X, TARGET = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4)
LOSSES = {
    "cross entropy": mle.masked_cross_entropy,
    "in place": lambda x, y: mle.masked_cross_entropy(x * 1, y, inplace_backward=True),
    "statistics": lambda x, y: mle.row_statistics(x, y).log_prob.sum(),
    "terms": lambda x, y: cross_entropy_terms(x, y).log_prob.sum(),
    "squared": lambda x, y: mle.MseLoss()(x, F.one_hot(y, 6).to(x.dtype)),
}
PYTORCH = {
    "squared": lambda x, y: F.mse_loss(x, F.one_hot(y, 6).to(x.dtype)),
}


def error_of(function):
    with pytest.raises(RuntimeError) as caught:
        function()
    return str(caught.value)


@pytest.mark.parametrize("name", LOSSES)
def test_as_pytorch(name):
    ours, theirs = LOSSES[name], PYTORCH.get(name, F.cross_entropy)
    leaf = X.clone().requires_grad_()
    with torch.inference_mode():
        losses = ours(leaf, TARGET), theirs(leaf, TARGET)
        inputs, target = X.clone(), TARGET.clone()
        assert not losses[0].requires_grad and losses[0].is_inference()
    assert torch.equal(ours(inputs, target), ours(X, TARGET)), "no gradient, no difference"
    # "does not require grad", "Inference tensors cannot be saved"
    mine, pytorch = (error_of(loss.backward) for loss in losses)
    assert mine == pytorch
    mine, pytorch = (error_of(lambda loss=loss: loss * leaf.sum()) for loss in losses)
    assert mine == pytorch
    if name != "squared":
        assert error_of(lambda: ours(leaf, target)) == error_of(lambda: theirs(leaf, target))
    ours(leaf * 1, target.clone()).backward()  # what PyTorch says to do
    assert (leaf.grad != 0).any()


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_in_forward_saves_no_input(inplace):
    options = {"gradient_in_forward": True, "inplace_backward": inplace}
    with torch.inference_mode():
        target = TARGET.clone()
        leaf = X.clone().requires_grad_()
        mle.masked_cross_entropy(leaf, TARGET, **options)
        assert torch.equal(leaf, X), "nothing is written where no gradient is wanted"
    leaf = X.clone().requires_grad_()
    mle.masked_cross_entropy(leaf * 1, target, **options).backward()
    expected = X.clone().requires_grad_()
    F.cross_entropy(expected, TARGET).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
