# SPDX-License-Identifier: BSD-3-Clause
"""Losses whose forward has made their gradients, for an incoming gradient of 1.

The backward hands them over, once, multiplied on the device by what comes in where that is not 1,
and reads nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..reference.squared_error import select
from ._autograd import _below_autograd, is_batch, is_transformed


class Sweep(NamedTuple):
    """One call, of ``inputs``: those of its arguments that may need a gradient.

    run: gives the loss, and a gradient per input, None where none is needed.
    scale: multiplies a gradient in place by an incoming one, but for what is 0 in it.
    once: what is said of another backward. again: the loss of the inputs in plain PyTorch, for
    second derivatives; None where those are refused, with the words of ``refused``.
    """

    inputs: Sequence[torch.Tensor | None]
    run: Callable[[], tuple[torch.Tensor, Sequence[torch.Tensor | None]]]
    scale: Callable[[torch.Tensor, torch.Tensor], Any]
    once: str
    refused: str = ""
    again: Callable[..., torch.Tensor] | None = None


def swept(sweep: Sweep) -> torch.Tensor:
    """The loss, in eager mode."""
    return _Swept.apply(*sweep.inputs, sweep)


class _Swept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):
        *inputs, sweep = given
        with _below_autograd():
            loss, gradients = sweep.run()
        kept = inputs if sweep.again is not None else ()
        ctx.save_for_backward(*gradients, *kept)
        ctx.count = len(gradients)
        # Not the call itself, which holds the inputs: they would outlive the backward.
        ctx.sweep = sweep._replace(inputs=(), run=None)
        ctx.handed_over = False
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        sweep = ctx.sweep
        if torch.is_grad_enabled():  # create_graph=True
            return (*_again(ctx, sweep, grad_loss), None)
        if ctx.handed_over:  # a flag, as saved-tensor hooks hide the version of what is saved
            raise RuntimeError(sweep.once)
        gradients = ctx.saved_tensors[: ctx.count]
        if torch.compiler.is_dynamo_compiling() or is_transformed() or is_batch(grad_loss):
            # compiled autograd, a gradient with a tangent, a batch of them
            return (*[multiplied(gradient, grad_loss) for gradient in gradients], None)
        ctx.handed_over = True
        with _below_autograd():
            return (*[_handed_over(sweep.scale, one, grad_loss) for one in gradients], None)


def _handed_over(scale, gradient, grad_loss):
    if gradient is None:
        return None
    if gradient.numel() > 0:
        scale(gradient, grad_loss)
    # Who gets it may add to it: a second backward must not find it.
    torch.autograd.graph.increment_version(gradient)
    return gradient.data


def multiplied(
    gradient: torch.Tensor | None, grad_loss: torch.Tensor | None
) -> torch.Tensor | None:
    """The same in plain PyTorch, as a new tensor."""
    if gradient is None or grad_loss is None:
        return None
    scaled = (gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype)
    return select(gradient != 0, scaled)


def _again(ctx, sweep, grad_loss):
    """Gradients that can be differentiated again."""
    if sweep.again is None:
        raise RuntimeError(sweep.refused)
    inputs = ctx.saved_tensors[ctx.count :]
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(sweep.again(*inputs), wanted, grad_loss, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[: len(inputs)]]
