# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy: the operator and its derivatives, and the two ways that only it has.

- ``inplace_backward``: the eager backward writes the gradient over the logits;
- ``gradient_in_forward``: the sweep. The forward makes the gradient for an incoming gradient of 1;
  the backward hands it over, once, multiplied on the device by what comes in where that is not 1,
  and reads nothing else.

Of both there is one backward: a second would read a gradient in the place of logits.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from .. import reference
from .._checks import as_number, is_symbolic
from ..reference.cross_entropy import counted_rows, row_losses, scaled_logits
from ..reference.squared_error import select
from ._autograd import (
    Differentiable,
    Like,
    Once,
    Signature,
    _below_autograd,
    is_batch,
    is_transformed,
    refuse_derivative,
)

_NAME = "masked_cross_entropy"


def _likes(a) -> Iterator[Like]:
    rows, dtype = a.logits.shape[:-1], reference.accumulate_dtype(a.logits, a.logits)
    labelled = rows if a.target is not None else None
    smooths = a.schedule is not None or a.label_smoothing > 0
    yield (rows if a.reduction == "none" and labelled is not None else ()), dtype
    yield rows, dtype
    yield (rows if a.statistics else None), dtype
    yield labelled, dtype
    yield (labelled if a.statistics else None), torch.bool
    yield (labelled if smooths else None), dtype
    yield (2,), torch.float64
    yield (*rows, 2), dtype


def _token_weight_gradient_like(b) -> Like:
    weighs = b.token_weight is not None and b.target is not None
    rows = b.logits.shape[:-1] if weighs else None
    return rows, reference.accumulate_dtype(b.logits, b.logits)


# --- in plain PyTorch ----------------------------------------------------------------------------


def _plain(a) -> tuple[torch.Tensor, ...]:
    options = a._asdict()
    if a.schedule is not None:
        options |= zip(_FLOATS, a.schedule.tolist(), strict=True)
    smooths = a.schedule is not None or a.label_smoothing > 0
    for name in ("schedule", "statistics"):
        del options[name]
    options["temperature"] = 1.0 if a.temperature is None else a.temperature
    options["softcap"] = options["softcap"] or None
    labels, on = counted_rows(a.logits, a.target, a.mask, a.ignore_index, a.shift, a.segment_ids)
    z = scaled_logits(a.logits, on, options["temperature"], options["softcap"])
    nothing, unlabelled = z.new_zeros(0), z.new_zeros(0, dtype=torch.bool)
    # What the operator keeps for its own backward, which nobody reads here.
    kept = z.new_full((2,), torch.nan, dtype=torch.float64), z.new_full((*on.shape, 2), torch.nan)
    if a.target is None:
        keywords = {name: options[name] for name in ("temperature", "softcap")}
        stats = reference.row_statistics(a.logits, None, on, **keywords)
        entropy = stats.entropy if a.statistics else nothing
        return z.new_zeros(()), stats.lse, entropy, nothing, unlabelled, nothing, *kept
    loss, stats = reference.masked_cross_entropy(**options, return_stats=True)
    return (
        loss,
        stats.lse,
        stats.entropy if a.statistics else nothing,
        stats.log_prob,
        stats.hit if a.statistics else unlabelled,
        # With smoothing 1 and nothing else the row loss is that sum over V.
        row_losses(z, labels, on, a.weight, None, 1.0, 0.0, 0.0)[0] * z.shape[-1]
        if smooths
        else nothing,
        *kept,
    )


operator = Differentiable(_NAME, _likes, _plain, {"token_weight": _token_weight_gradient_like})
_in_order = itemgetter(*operator.forward.names)
_FLOATS = operator.forward.floats
DEFAULTS = operator.forward.arguments._field_defaults


# --- the ways ------------------------------------------------------------------------------------


def call(a: dict[str, Any], shown: int, inplace_backward: bool) -> tuple[torch.Tensor, ...]:
    """a: the operator's arguments by name."""
    if torch.compiler.is_compiling():
        a = _scheduled(a)
        args = tuple([a[name] for name in operator.forward.names])
    else:
        args = _in_order(a)
    return operator.call(args, shown, _overwrite if inplace_backward else None)


def _scheduled(a):
    """Numbers that are inputs of a compiled graph, as a schedule moves them, in a tensor on the CPU
    that is read when the graph runs: a float of an operator is a part of the graph, and each new
    value would compile another one."""
    numbers = [a[name] for name in _FLOATS]
    if not (torch.compiler.is_dynamo_compiling() and any(map(is_symbolic, numbers))):
        return a
    schedule = torch.stack([as_number(value, "cpu") for value in numbers])
    return {**a, **dict.fromkeys(_FLOATS, 0.0), "schedule": schedule}


def _overwrite(args):
    """The gradient as a new tensor on the storage of the logits, whose version goes up so that
    whoever saved them is told."""
    b = dict(zip(operator.backward.names, args, strict=True))
    grad_token_weight = _overwriting.op(*[b[name] for name in _overwriting.names])
    torch.autograd.graph.increment_version(b["logits"])
    return b["logits"].data, grad_token_weight


_overwrite = Once(
    _overwrite,
    f"{_NAME}: inplace_backward=True has one backward: the gradient stands where the logits were",
)


def call_sweep(a: dict[str, Any], inplace_backward: bool) -> tuple[torch.Tensor, ...]:
    """The loss alone, in a tuple; a: without statistics."""
    token_weight = a["token_weight"]
    if (
        not (torch.is_grad_enabled() and a["logits"].requires_grad)
        or (token_weight is not None and token_weight.requires_grad)
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return call(a, 1, inplace_backward)
    return (_Sweep.apply(a["logits"], (_in_order(a), inplace_backward)),)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, how):
        args, inplace = how
        with _below_autograd():
            if inplace:
                loss = _overwriting_sweep.op(*args)
                gradient = logits.detach()  # with the version of the logits: all see the other
                torch.autograd.graph.increment_version(gradient)
            else:
                loss, gradient = _sweep.op(*args)
        ctx.save_for_backward(gradient)
        ctx.handed_over = False
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                f"{_NAME}: gradient_in_forward=True has no second derivative; call it without, or "
                "backward without create_graph"
            )
        if ctx.handed_over:  # a flag, as saved-tensor hooks hide the version of what is saved
            raise RuntimeError(
                f"{_NAME}: gradient_in_forward=True has one backward: the gradient has been handed "
                "over"
            )
        (gradient,) = ctx.saved_tensors
        if torch.compiler.is_dynamo_compiling() or is_transformed() or is_batch(grad_loss):
            # compiled autograd, a gradient with a tangent, a batch of them
            scaled = (gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype)
            return select(gradient != 0, scaled), None
        ctx.handed_over = True
        with _below_autograd():
            _scale.op(gradient, grad_loss)
            # Who gets it may add to it: a second backward must not find it.
            torch.autograd.graph.increment_version(gradient)
            return gradient.data, None


# --- the operators without a derivative ----------------------------------------------------------


def _sweep_likes(a) -> Iterator[Like]:
    yield (), reference.accumulate_dtype(a.logits, a.logits)
    yield a.logits.shape, a.logits.dtype


_overwriting = Signature("_masked_cross_entropy_backward_")
_sweep = Signature("_masked_cross_entropy_sweep")
_overwriting_sweep = Signature("_masked_cross_entropy_sweep_")
_scale = Signature("_masked_cross_entropy_scale_gradient_")
for _signature, _of, _instead in (
    (_overwriting, lambda b: [operator.gradient_like(b, "token_weight")], "inplace_backward"),
    (_sweep, _sweep_likes, "gradient_in_forward"),
    (_overwriting_sweep, lambda a: [*_sweep_likes(a)][:1], "gradient_in_forward"),
    (_scale, lambda a: [], "gradient_in_forward"),
):
    _signature.register_fake(_of, _NAME)
    refuse_derivative(_signature.op, f"{_NAME}({_instead}=True)")
