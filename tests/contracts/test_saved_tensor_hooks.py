# SPDX-License-Identifier: BSD-3-Clause
"""A gradient that stands where the logits were, or was made with the loss, goes out once.

Saved-tensor hooks take the versions away by which PyTorch would notice."""

import contextlib

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import masked_loss_ext as mle

X, TARGET = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4)
HOOKS = {
    "none": contextlib.nullcontext,
    "identity": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "wrapped": lambda: saved_tensors_hooks(lambda t: (t,), lambda t: t[0]),
    "copied": lambda: saved_tensors_hooks(torch.clone, lambda t: t),
    "save_on_cpu": save_on_cpu,
}
WAYS = {
    "in forward": {"gradient_in_forward": True},
    "in place": {"inplace_backward": True},
    "both": {"gradient_in_forward": True, "inplace_backward": True},
}
every_way = pytest.mark.parametrize("way", WAYS)
any_hooks = pytest.mark.parametrize("hooks", HOOKS)


def loss_and_leaf(hooks, way):
    leaf = X.clone().requires_grad_()
    with HOOKS[hooks]():
        return mle.masked_cross_entropy(leaf * 1, TARGET, **WAYS[way]), leaf


def plain(scale=1.0):
    leaf = X.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, TARGET) * scale
    return torch.autograd.grad(loss, leaf)[0]


@every_way
@any_hooks
def test_the_second_backward_is_refused(hooks, way):
    loss, leaf = loss_and_leaf(hooks, way)
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, plain(2))
    for second in (
        lambda: (2 * loss).backward(retain_graph=True),
        lambda: torch.autograd.grad(loss, leaf),
        lambda: loss.backward(),
    ):
        with pytest.raises(RuntimeError, match="masked_cross_entropy: .*has one backward"):
            second()
    torch.testing.assert_close(leaf.grad, plain(2))


@every_way
def test_refused_with_create_graph_too(way):
    loss, leaf = loss_and_leaf("identity", way)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="masked_cross_entropy: "):
        torch.autograd.grad(loss, leaf, create_graph=True)


@every_way
def test_what_does_not_overwrite_may_come_again(way):
    """Gradients in a batch leave the saved tensors alone."""
    loss, leaf = loss_and_leaf("identity", way)
    for _ in range(2):
        (batch,) = torch.autograd.grad(
            loss, leaf, torch.tensor([1.0, -3.0]), is_grads_batched=True, retain_graph=True
        )
        torch.testing.assert_close(batch, torch.stack([plain(), plain(-3)]))
    loss.backward()
    torch.testing.assert_close(leaf.grad, plain())


@every_way
def test_under_a_checkpoint(way):
    """Which recomputes the loss when its saved tensors are asked for."""
    leaf = X.clone().requires_grad_()
    step = lambda x: mle.masked_cross_entropy(x * 1, TARGET, **WAYS[way])  # noqa: E731
    loss = checkpoint(step, leaf, use_reentrant=False)
    (0.5 * loss).backward()
    torch.testing.assert_close(leaf.grad, plain(0.5))


@pytest.mark.parametrize("options", [{}, {"gradient_in_forward": False}], ids=str)
def test_the_ordinary_way_has_any_number(options):
    leaf = X.clone().requires_grad_()
    with HOOKS["identity"]():
        loss = mle.masked_cross_entropy(leaf, TARGET, **options)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, plain(3))
