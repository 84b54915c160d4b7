# SPDX-License-Identifier: BSD-3-Clause
"""Compiled autograd: the backward of a loss that was called eagerly, or compiled, as one graph."""

import pytest
import torch
from torch._dynamo.utils import counters

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

generator = torch.Generator().manual_seed(6)
X = torch.randn(3, 5, 7, generator=generator)
HEAD = torch.randn(7, 7, generator=generator)
TARGET = torch.randint(0, 7, (3, 5), generator=generator)
MASK = torch.rand(3, 5, generator=generator) < 0.7
UNIFIED = mle.UnifiedLoss(7)
f = mle.masked_cross_entropy
LOSSES = {
    "cross entropy": lambda x: f(x, TARGET, MASK, token_weight=x[..., 0] * 1.0, z_loss=0.1),
    "statistics": lambda x: mle.row_statistics(x, TARGET, MASK).entropy.sum(),
    "in place": lambda x: f(x * 1, TARGET, MASK, inplace_backward=True),
    "in forward": lambda x: f(x * 1, TARGET, MASK, gradient_in_forward=True) * 3,
    "in forward and place": lambda x: (
        f(x * 1, TARGET, MASK, gradient_in_forward=True, inplace_backward=True) * 3
    ),
    "terms": lambda x: cross_entropy_terms(x, TARGET, MASK).log_prob.sum(),
    "linear": lambda x: mle.masked_linear_cross_entropy(x, HEAD, TARGET, MASK) * 3,
    "linear none": lambda x: (
        mle.masked_linear_cross_entropy(x, HEAD, TARGET, MASK, reduction="none").square().sum()
    ),
    "unified": lambda x: UNIFIED(x, TARGET, MASK, update_state=False),
    "squared": lambda x: mle.masked_edit_token_mean_loss(x, X + 1, MASK, None, x * 0.5),
}


@pytest.mark.parametrize("compiled_forward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_eager_mode(name, compiled_forward):
    loss_fn = LOSSES[name]
    expected = X.clone().requires_grad_()
    loss_fn(expected).backward()
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(loss_fn, backend="aot_eager") if compiled_forward else loss_fn
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = X.clone().requires_grad_()
        with torch._dynamo.compiled_autograd._enable(compiler):
            call(x).backward()
        torch.testing.assert_close(x.grad, expected.grad)
    assert counters["compiled_autograd"]["captures"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()
