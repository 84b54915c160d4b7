# SPDX-License-Identifier: BSD-3-Clause
"""No rows, whatever the strides: of a tensor without elements contiguous() changes none."""

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

LOGITS = {
    "moved": lambda: torch.randn(0, 10, 4).movedim(1, -1),
    "moved, no positions": lambda: torch.randn(3, 10, 0).movedim(1, -1),
    "transposed": lambda: torch.randn(10, 0).t(),
    "sliced": lambda: torch.randn(0, 4, 20)[..., ::2],
    "plain": lambda: torch.randn(0, 4, 10),
    "one class": lambda: torch.randn(0, 1, 4).movedim(1, -1),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_nothing_is_0(name, requires_grad):
    leaf = LOGITS[name]().requires_grad_(requires_grad)
    target = torch.empty(leaf.shape[:-1], dtype=torch.int64)
    options = ({}, {"inplace_backward": True}, {"gradient_in_forward": True})
    for reduction in ("mean", "sum", "none"):
        for more in options[:2] if reduction == "none" else options:
            loss = mle.masked_cross_entropy(leaf, target, reduction=reduction, **more)
            expected = leaf.shape[:-1] if reduction == "none" else ()
            assert loss.shape == expected and (loss == 0).all()
            assert loss.requires_grad == requires_grad
            if requires_grad:
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                assert gradient.shape == leaf.shape
    loss, stats = mle.masked_cross_entropy(leaf, target, return_stats=True)
    alone = mle.row_statistics(leaf)
    found = (*mle.row_statistics(leaf, target), alone.lse, alone.entropy, alone.argmax)
    for rows in (*stats, *found):
        assert rows.shape == leaf.shape[:-1]
    for rows in cross_entropy_terms(leaf, target)[:4]:
        assert rows.shape == leaf.shape[:-1] and rows.requires_grad == requires_grad
        if requires_grad:
            assert torch.autograd.grad(rows.sum(), leaf, retain_graph=True)[0].shape == leaf.shape


@pytest.mark.parametrize("name", LOGITS)
def test_under_transforms_and_compile(name):
    x = LOGITS[name]()
    target = torch.empty(x.shape[:-1], dtype=torch.int64)
    assert torch.func.grad(mle.masked_cross_entropy)(x, target).shape == x.shape
    assert torch.func.jvp(lambda x: mle.masked_cross_entropy(x, target), (x,), (x,))[1] == 0
    torch._dynamo.reset()
    compiled = torch.compile(mle.masked_cross_entropy, backend="aot_eager", fullgraph=True)
    assert compiled(x, target) == 0
    torch._dynamo.reset()
