# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy whose forward makes the gradient: fakes, derivative, and when it is taken.

The gradient is that for an incoming gradient of 1. The backward hands it over, once, multiplied on
the device by what comes in where that is not 1; it reads nothing else.
"""

import torch

from .. import reference
from ..reference.squared_error import select
from ._autograd import (
    _below_autograd,
    is_batch,
    is_transformed,
    refuse_two_devices,
)
from .masked_cross_entropy_autograd import TENSORS, TOKEN_WEIGHT, call, refuse_derivative

_fused_op = torch.ops.masked_loss_ext._masked_cross_entropy_with_gradient.default
_overwriting_op = torch.ops.masked_loss_ext._masked_cross_entropy_with_gradient_.default
_scale_op = torch.ops.masked_loss_ext._masked_cross_entropy_scale_gradient_.default


def check_scalar_loss(reduction, return_stats):
    if reduction == "none":
        raise ValueError(
            "masked_cross_entropy: reduction must be mean or sum for gradient_in_forward, got none"
        )
    if return_stats:
        raise ValueError(
            "masked_cross_entropy: return_stats must be False for gradient_in_forward: gradients "
            "of the statistics would come too late"
        )


def call_with_gradient(args, inplace_backward):
    """args: of the operator, without statistics. Returns the loss in a tuple."""
    token_weight = args[TOKEN_WEIGHT]
    if (
        not (torch.is_grad_enabled() and args[0].requires_grad)
        or (token_weight is not None and token_weight.requires_grad)
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return call(args, inplace_backward)
    return (_Fused.apply((inplace_backward, args[TENSORS:-1]), *args[:TENSORS]),)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, *tensors):
        inplace, options = how
        with _below_autograd():
            if inplace:
                loss = _overwriting_op(*tensors, *options)
                gradient = tensors[0].detach()  # with the version of the logits: all see the other
                torch.autograd.graph.increment_version(gradient)
            else:
                loss, gradient = _fused_op(*tensors, *options)
        ctx.save_for_backward(gradient)
        ctx.handed_over = False
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "masked_cross_entropy: gradient_in_forward=True has no second derivative; call it "
                "without, or backward without create_graph"
            )
        if ctx.handed_over:  # a flag, as saved-tensor hooks hide the version of what is saved
            raise RuntimeError(
                "masked_cross_entropy: gradient_in_forward=True has one backward: the gradient has "
                "been handed over"
            )
        (gradient,) = ctx.saved_tensors
        if torch.compiler.is_dynamo_compiling() or is_transformed() or is_batch(grad_loss):
            # compiled autograd, a gradient with a tangent, a batch of them
            scaled = (gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype)
            return None, select(gradient != 0, scaled), *[None] * (TENSORS - 1)
        ctx.handed_over = True
        with _below_autograd():
            _scale_op(gradient, grad_loss)
            # Who gets it may add to it: a second backward must not find it.
            torch.autograd.graph.increment_version(gradient)
            return None, gradient.data, *[None] * (TENSORS - 1)


def _loss_like(logits):
    return logits.new_empty((), dtype=reference.accumulate_dtype(logits, logits))


@torch.library.register_fake("masked_loss_ext::_masked_cross_entropy_with_gradient")
def _fused_fake(*args, **options):
    refuse_two_devices("masked_cross_entropy", *args[:TENSORS])
    return _loss_like(args[0]), args[0].new_empty(args[0].shape)


@torch.library.register_fake("masked_loss_ext::_masked_cross_entropy_with_gradient_")
def _overwriting_fake(*args, **options):
    refuse_two_devices("masked_cross_entropy", *args[:TENSORS])
    return _loss_like(args[0])


@torch.library.register_fake("masked_loss_ext::_masked_cross_entropy_scale_gradient_")
def _scale_fake(grad_logits, grad_loss):
    refuse_two_devices("masked_cross_entropy", grad_logits, grad_loss)


for _op in (_fused_op, _overwriting_op, _scale_op):
    refuse_derivative(_op, "masked_cross_entropy(gradient_in_forward=True)")
