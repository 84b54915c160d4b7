# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms: fake, derivative, and the ways to the native operator.

torch.compile and torch.export see ``torch.ops``; eager training takes _Eager; without gradients the
operator is called directly. torch.func, forward-mode AD and the second derivative are those of the
reference, which needs memory of the logits' size: training does not come there.
"""

import torch

from .. import reference
from .masked_squared_error import _below_autograd, is_transformed, refuse_two_devices

_forward_op = torch.ops.masked_loss_ext.cross_entropy_terms.default
_backward_op = torch.ops.masked_loss_ext._cross_entropy_terms_backward.default

# Positions among the operators' arguments.
TENSORS = 7  # logits, target, mask, temperature, classes, context_before, ngram_after
GRADIENTS = 6  # of all results but candidates and sums
SHOWN = 7  # of the results: all but sums


def call(args):
    """The operator's results but sums; those that were not asked for mean nothing."""
    if is_transformed():
        return outputs(*args)
    if torch.compiler.is_compiling():
        return _forward_op(*args)[:SHOWN]
    if torch.is_grad_enabled() and args[0].requires_grad:
        return _Eager.apply(*args)
    with _below_autograd():
        return _forward_op(*args)[:SHOWN]


def outputs(
    logits,
    target,
    mask=None,
    temperature=None,
    classes=None,
    context_before=None,
    ngram_after=None,
    ignore_index=-100,
    unscaled=True,
):
    """The operator in plain PyTorch."""
    terms = reference.cross_entropy_terms(
        logits,
        target,
        mask,
        temperature=temperature,
        classes=classes,
        links=None if context_before is None else (context_before, ngram_after),
        ignore_index=ignore_index,
        unscaled=unscaled,
    )
    return tuple(logits.new_zeros(0) if term is None else term for term in terms)


@torch.library.register_fake("masked_loss_ext::cross_entropy_terms")
def _forward_fake(
    logits,
    target,
    mask=None,
    temperature=None,
    classes=None,
    context_before=None,
    ngram_after=None,
    ignore_index=-100,
    unscaled=True,
):
    others = (target, mask, temperature, classes, context_before, ngram_after)
    refuse_two_devices("cross_entropy_terms", logits, *others)
    rows, nothing = logits.shape[:-1], (0,)
    linked = rows if context_before is not None else nothing

    def empty(shape):
        return logits.new_empty(shape, dtype=reference.accumulate_dtype(logits, logits))

    return (
        empty(rows),
        empty(rows),
        empty(rows if unscaled else nothing),
        empty(rows if unscaled else nothing),
        empty((*rows, classes.shape[-1]) if classes is not None else nothing),
        empty(linked),
        empty(linked),
        logits.new_empty((*rows, 4), dtype=torch.float64),
    )


@torch.library.register_fake("masked_loss_ext::_cross_entropy_terms_backward")
def _backward_fake(*args):
    refuse_two_devices("cross_entropy_terms", args[GRADIENTS], *args[:-1])
    return args[GRADIENTS].new_empty(args[GRADIENTS].shape)


def _used(grads, classes, links, unscaled):
    """The gradients of results that there are: others would be of no elements."""
    grads = list(grads[:GRADIENTS])
    if not unscaled:
        grads[2:] = [None] * 4
    if classes is None:
        grads[4] = None
    if links is None:
        grads[5] = None
    return grads


def _setup_forward(ctx, inputs, output):
    # The dispatcher leaves out trailing defaults.
    inputs = (*inputs, *(None,) * (TENSORS - len(inputs)))
    ctx.arguments = len(inputs)
    ctx.ignore_index, ctx.unscaled = (*inputs[TENSORS:], *(-100, True)[len(inputs) - TENSORS :])
    ctx.save_for_backward(*inputs[:TENSORS], output[-1])
    ctx.mark_non_differentiable(*output[GRADIENTS:])


def _backward(ctx, *grads):
    saved = ctx.saved_tensors
    grads = _used(grads, saved[4], saved[5], ctx.unscaled)
    if all(grad is None for grad in grads):
        return None
    return _backward_op(*grads, *saved, ctx.ignore_index)


def _pullback(grads, tensors, ignore_index):
    """The backward operator in plain PyTorch, as a function of the logits and of those incoming
    gradients that there are, and these."""
    present = [i for i, grad in enumerate(grads) if grad is not None]

    def function(logits, *given):
        # Without its options a result is not computed; the two at temperature T always are.
        terms, pull = torch.func.vjp(
            lambda x: outputs(x, *tensors[1:], ignore_index)[:GRADIENTS], logits
        )
        full = [torch.zeros_like(term) for term in terms]
        for i, grad in zip(present, given, strict=True):
            full[i] = grad.to(terms[i].dtype)
        return pull(tuple(full))[0]

    return function, [grads[i] for i in present]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with _below_autograd():
            results = _forward_op(*args)
        ctx.save_for_backward(*args[:TENSORS], results[-1])
        ctx.ignore_index, ctx.unscaled = args[TENSORS:]
        ctx.mark_non_differentiable(results[SHOWN - 1])
        ctx.set_materialize_grads(False)
        return results[:SHOWN]

    @staticmethod
    def backward(ctx, *grads):
        if is_transformed():  # gradients with a tangent, say
            saved = ctx.saved_tensors[:TENSORS]
            used = _used(grads, saved[4], saved[5], ctx.unscaled)
            function, given = _pullback(used, saved, ctx.ignore_index)
            grad_logits = function(saved[0], *given)
        elif torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            # create_graph=True, or compiled autograd
            grad_logits = _backward(ctx, *grads)
        else:
            with _below_autograd():
                grad_logits = _backward(ctx, *grads)
        return grad_logits, *(None,) * (TENSORS + 1)


def _backward_registered(ctx, *grads):
    return _backward(ctx, *grads), *(None,) * (ctx.arguments - 1)


torch.library.register_autograd(
    "masked_loss_ext::cross_entropy_terms", _backward_registered, setup_context=_setup_forward
)


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1])
    ctx.ignore_index = inputs[-1]


def _second_derivative(ctx, upstream):
    """Derivative of the backward operator, in its incoming gradients and the logits."""
    grads, tensors = ctx.saved_tensors[:GRADIENTS], ctx.saved_tensors[GRADIENTS:-1]
    function, given = _pullback(grads, tensors, ctx.ignore_index)
    _, pull = torch.func.vjp(function, tensors[0], *given)
    found = pull(upstream)
    present = [i for i, grad in enumerate(grads) if grad is not None]
    result = [None] * (GRADIENTS + TENSORS + 2)
    for position, grad in zip((GRADIENTS, *present), found, strict=True):
        if ctx.needs_input_grad[position]:
            result[position] = grad
    return tuple(result)


torch.library.register_autograd(
    "masked_loss_ext::_cross_entropy_terms_backward",
    _second_derivative,
    setup_context=_setup_backward,
)
