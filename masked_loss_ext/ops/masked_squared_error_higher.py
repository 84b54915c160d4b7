# SPDX-License-Identifier: BSD-3-Clause
"""Plain-PyTorch pieces of masked_squared_error: vmap, forward mode, the second derivative.

They are built from reference/, need memory of prediction's size, and are used where training
does not come: torch.func.vmap, forward-mode AD and double backward.
"""

import torch

from ..reference import (
    align_leading,
    factors,
    masked_squared_error,
    masked_squared_error_gradients,
    select,
    term_scale,
)


def weighting_gradient_shape(prediction, weighting):
    """The kernel sums over the last dimension where weighting has one entry for all of it."""
    if weighting.dim() == 0 or weighting.shape[-1] == 1:
        return (*prediction.shape[:-1], 1)[: prediction.dim()]
    return prediction.shape


def loss_and_count(prediction, target, mask, edit_mask, weighting, *options):
    loss = masked_squared_error(prediction, target, mask, edit_mask, weighting, *options)
    if mask is None:
        count = torch.full((), prediction.numel(), device=prediction.device)
    else:
        on = align_leading(mask, prediction) != 0
        count = on.expand(prediction.shape).sum()
    return loss, count


def second_derivative(saved, options, upstream, needs):
    """Gradients of sum(upstream * gradients) in grad_loss, prediction, target and weighting.

    With d = p - t, k = edit * omega, s = d loss / d term and v = u_p - u_t that sum is
    sum(2 s k d v + s edit d^2 u_w).
    """
    grad_loss, prediction, target, mask, edit_mask, weighting = saved
    reduction = options[2]
    on, d, edit, omega = factors(prediction, target, mask, edit_mask, weighting, *options[:2])
    s = select(on, term_scale(grad_loss, prediction, on, reduction, d.dtype))
    zero = torch.zeros_like(d)
    u_p, u_t, u_w = (zero if u is None else select(on, u.to(d.dtype)) for u in upstream)
    v = u_p - u_t
    result = [None] * 4
    if needs[0]:
        per_element = 2 * edit * omega * d * v + edit * d.square() * u_w
        result[0] = _reduce_like_loss(per_element, prediction, on, reduction)
    if needs[1] or needs[2]:
        grad = 2 * s * edit * (omega * v + d * u_w)
        result[1], result[2] = grad.to(prediction.dtype), -grad.to(target.dtype)
    if weighting is not None and needs[5]:
        grad = select(on, 2 * s * edit * d * v)
        result[3] = grad.sum_to_size(weighting.shape).to(weighting.dtype)
    return result


def _reduce_like_loss(per_element, prediction, on, reduction):
    ones = torch.ones((), dtype=per_element.dtype, device=per_element.device)
    scaled = per_element * term_scale(ones, prediction, on, reduction, ones.dtype)
    if reduction == "none":
        return scaled
    return scaled.sum(-1) if reduction == "token" else scaled.sum()


def gradients(grad_loss, prediction, target, mask, edit_mask, weighting, count, *options_and_needs):
    """The backward operator in plain PyTorch: same shapes, same dtypes."""
    options, needs = options_and_needs[:3], options_and_needs[3:]
    grads = masked_squared_error_gradients(
        grad_loss, prediction, target, mask, edit_mask, weighting, *options
    )
    nothing = torch.zeros(0, device=prediction.device)
    grad_weighting = nothing.to(grads[2].dtype)
    if needs[2] and weighting is not None:
        shape = weighting_gradient_shape(prediction, weighting)
        grad_weighting = grads[2].expand(prediction.shape).sum_to_size(shape)
    return (
        grads[0].to(prediction.dtype) if needs[0] else nothing.to(prediction.dtype),
        grads[1].to(target.dtype) if needs[1] else nothing.to(target.dtype),
        grad_weighting,
    )
