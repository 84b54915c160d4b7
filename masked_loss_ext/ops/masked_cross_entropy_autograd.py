# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy: fake, derivative, and the ways to the native operator.

As in masked_squared_error.py: torch.compile and torch.export see ``torch.ops``; torch.func takes
_Differentiable; forward-mode AD plain PyTorch; eager training _Eager; without gradients the
operator is called directly. ``call`` takes the operator's arguments and returns (loss, lse,
entropy, log_prob, hit), of which the last four mean nothing without statistics.
"""

import torch
from torch.autograd import forward_ad

from .. import reference
from . import masked_cross_entropy_higher as higher
from ._autograd import (
    _below_autograd,
    _functorch_is_active,
    is_batch,
    needs_plain,
    refuse_two_devices,
)

_forward_op = torch.ops.masked_loss_ext.masked_cross_entropy.default
_backward_op = torch.ops.masked_loss_ext._masked_cross_entropy_backward.default
_overwriting_op = torch.ops.masked_loss_ext._masked_cross_entropy_backward_.default

# Positions among the operator's arguments.
TENSORS = 8  # logits, target, mask, weight, token_weight, segment_ids, temperature, normalizer
TOKEN_WEIGHT, NORMALIZER = 4, 7
ARGUMENTS = 16
SHOWN = 5  # of the results: loss, lse, entropy, log_prob, hit
SMOOTH_DISTANCE = 5


def call(args, inplace_backward):
    if forward_ad._current_level >= 0 or _functorch_is_active() or torch.compiler.is_compiling():
        return _call_traced(args)[:SHOWN]
    token_weight = args[TOKEN_WEIGHT]
    if torch.is_grad_enabled() and (
        args[0].requires_grad or (token_weight is not None and token_weight.requires_grad)
    ):
        # The options in one piece: autograd looks at every argument.
        return _Eager.apply((inplace_backward, args[TENSORS:]), *args[:TENSORS])
    with _below_autograd():
        return _forward_op(*args)[:SHOWN]


def _call_traced(args):
    if needs_plain():
        return higher.outputs(*args)
    if not torch.compiler.is_compiling():
        return _Differentiable.apply(*args)
    from . import masked_cross_entropy_schedule as schedule  # which is made of this module

    return (schedule.call_scheduled if schedule.is_scheduled(args) else _forward_op)(*args)


@torch.library.register_fake("masked_loss_ext::masked_cross_entropy")
def _forward_fake(
    logits,
    target,
    mask=None,
    weight=None,
    token_weight=None,
    segment_ids=None,
    temperature=None,
    normalizer=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=0.0,
    z_loss=0.0,
    focal_gamma=0.0,
    shift=0,
    reduction="mean",
    statistics=False,
):
    name = "masked_cross_entropy"
    refuse_two_devices(
        name, logits, target, mask, weight, token_weight, segment_ids, temperature, normalizer
    )
    rows, nothing = logits.shape[:-1], (0,)
    has_target = target is not None

    def empty(shape, dtype=None):
        return logits.new_empty(shape, dtype=dtype or reference.accumulate_dtype(logits, logits))

    return (
        empty(rows if reduction == "none" and has_target else ()),
        empty(rows),
        empty(rows if statistics else nothing),
        empty(rows if has_target else nothing),
        empty(rows if statistics and has_target else nothing, torch.bool),
        empty(rows if label_smoothing > 0 and has_target else nothing),
        empty((), torch.float64),
        empty((*rows, 2)),
    )


@torch.library.register_fake("masked_loss_ext::_masked_cross_entropy_backward")
def _backward_fake(*args):
    refuse_two_devices("masked_cross_entropy", args[4], *args[:16])
    logits, token_weight, (needs_logits, needs_token_weight) = args[4], args[8], args[23:]
    weighs = needs_token_weight and token_weight is not None and args[5] is not None
    return (
        logits.new_empty(logits.shape if needs_logits else (0,)),
        logits.new_empty(
            logits.shape[:-1] if weighs else (0,),
            dtype=reference.accumulate_dtype(logits, logits),
        ),
    )


@torch.library.register_fake("masked_loss_ext::_masked_cross_entropy_backward_")
def _overwriting_fake(*args):
    return _backward_fake(*args[:23], False, args[23])[1]


def refuse_derivative(op, instead):
    """For an operator without one: else the derivative would be lost in silence."""

    def refuse(*args):
        if torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
        ):
            name = op._schema.name.partition("::")[2]
            raise RuntimeError(f"{name} has no derivative; call {instead}, or this under no_grad()")
        with _below_autograd():
            return op(*args)

    torch.library.impl(op._schema.name, "Autograd", refuse)


refuse_derivative(_overwriting_op, "masked_cross_entropy(inplace_backward=True)")


def _backward_arguments(grads, saved, options):
    """saved: the operator's seven tensors but the normalizer, then row_sums, entropy,
    log_prob, smooth_distance, denominator; options: what follows the tensors."""
    grad_loss, grad_lse, grad_entropy, grad_log_prob = grads
    if not options[-1]:  # without statistics nobody can have used them
        grad_lse = grad_entropy = grad_log_prob = None
    if saved[1] is None:  # no target
        grad_loss = grad_log_prob = None
    return grad_loss, grad_lse, grad_entropy, grad_log_prob, *saved, *options[:-1]


def _input_gradients(grad_logits, grad_token_weight, token_weight, needs):
    """For the operator's arguments, in their own dtypes."""
    result = [None] * ARGUMENTS
    if needs[0]:
        result[0] = grad_logits
    if needs[1]:
        result[TOKEN_WEIGHT] = grad_token_weight.to(token_weight.dtype)
    return result


def _needs(ctx, first=0):
    """Of logits and token_weight; the dispatcher leaves out trailing defaults."""
    needs = ctx.needs_input_grad[first:]
    return needs[0], len(needs) > TOKEN_WEIGHT and needs[TOKEN_WEIGHT]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, *tensors):
        ctx.inplace_backward, ctx.options = how
        ctx.overwritten = False
        with _below_autograd():
            results = _forward_op(*tensors, *ctx.options)
        loss, lse, entropy, log_prob, hit, smooth_distance, denominator, row_sums = results
        ctx.save_for_backward(
            *tensors[:NORMALIZER], row_sums, entropy, log_prob, smooth_distance, denominator
        )
        ctx.set_materialize_grads(False)
        if not ctx.options[-1]:  # statistics
            return (loss,)
        ctx.mark_non_differentiable(hit)
        return loss, lse, entropy, log_prob, hit

    @staticmethod
    def backward(ctx, grad_loss, grad_lse=None, grad_entropy=None, grad_log_prob=None, _=None):
        if ctx.overwritten:  # a flag, as saved-tensor hooks hide the version of what is saved
            raise RuntimeError(
                "masked_cross_entropy: inplace_backward=True has one backward: the gradient stands "
                "where the logits were"
            )
        grads = (grad_loss, grad_lse, grad_entropy, grad_log_prob)
        needs = _needs(ctx, 1)
        saved = ctx.saved_tensors
        args = _backward_arguments(grads, saved, ctx.options)
        if forward_ad._current_level >= 0 or _functorch_is_active():  # of gradients with a tangent
            results = _gradients(args, needs)
        elif torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            # create_graph=True, or compiled autograd
            results = _backward_op(*args, *needs)
        elif ctx.inplace_backward and needs[0] and not any(map(is_batch, grads)):
            ctx.overwritten = True
            with _below_autograd():
                results = _overwrite(saved[0], args, needs[1])
        else:
            with _below_autograd():
                results = _backward_op(*args, *needs)
        return None, *_input_gradients(*results, saved[TOKEN_WEIGHT], needs)[:TENSORS]


def _overwrite(logits, args, needs_token_weight):
    """The gradient as a new tensor on the storage of the logits, whose version goes up so that
    whoever saved them is told."""
    grad_token_weight = _overwriting_op(*args, needs_token_weight)
    torch.autograd.graph.increment_version(logits)
    return logits.data, grad_token_weight


def _setup_forward(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*inputs[:NORMALIZER], output[7], output[2], output[3], *output[5:7])
    ctx.options = tuple(inputs[TENSORS:])


def _backward_registered(ctx, *grads):
    if all(grad is None for grad in grads[:4]):
        return (None,) * ARGUMENTS
    needs = _needs(ctx)
    saved = ctx.saved_tensors
    results = _backward_op(*_backward_arguments(grads[:4], saved, ctx.options), *needs)
    return tuple(_input_gradients(*results, saved[TOKEN_WEIGHT], needs))


torch.library.register_autograd(
    "masked_loss_ext::masked_cross_entropy", _backward_registered, setup_context=_setup_forward
)


class _Differentiable(torch.autograd.Function):
    """The operator for torch.func; slower per call."""

    @staticmethod
    def forward(*args):
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_forward(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads[:4]):
            return (None,) * ARGUMENTS
        needs = _needs(ctx)
        saved = ctx.saved_tensors
        args = _backward_arguments(grads[:4], saved, ctx.options)
        results = _gradients(args, needs)
        return tuple(_input_gradients(*results, saved[TOKEN_WEIGHT], needs))

    @staticmethod
    def vmap(info, in_dims, *args):
        def one(*inputs):
            return higher.outputs(*inputs, *args[TENSORS:])

        results = torch.vmap(one, in_dims=in_dims[:TENSORS])(*args[:TENSORS])
        return results, (0,) * len(results)


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:16])
    ctx.options = tuple(inputs[16:])


def _second_derivative(ctx, upstream_logits, upstream_token_weight):
    """Derivative of the backward operator, in its incoming gradients, logits and token_weight."""
    found = higher.second_derivative(
        ctx.saved_tensors, ctx.options, (upstream_logits, upstream_token_weight)
    )
    grads = [None] * 25
    for position, grad in found.items():
        if ctx.needs_input_grad[position]:
            grads[position] = grad
    return tuple(grads)


torch.library.register_autograd(
    "masked_loss_ext::_masked_cross_entropy_backward",
    _second_derivative,
    setup_context=_setup_backward,
)


def _gradients(args, needs):
    """The backward operator under a transform."""
    if needs_plain():
        return higher.gradients(args[:16], (*args[16:], *needs))
    return _DifferentiableBackward.apply(*args, *needs)


class _DifferentiableBackward(torch.autograd.Function):
    """The backward operator for torch.func, differentiable again."""

    @staticmethod
    def forward(*args):
        return _backward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_backward(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    backward = staticmethod(_second_derivative)

    @staticmethod
    def vmap(info, in_dims, *args):
        def one(*tensors):
            return higher.gradients(tensors, args[16:])

        return torch.vmap(one, in_dims=in_dims[:16])(*args[:16]), (0, 0)
