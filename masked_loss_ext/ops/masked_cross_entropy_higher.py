# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy in plain PyTorch: vmap, forward mode, the second derivative.

They are derivatives of reference/, need memory of the logits' size, and are used where training
does not come: torch.func.vmap, forward-mode AD and double backward.
"""

import torch

from .. import reference
from ..reference.cross_entropy import at_labels, counted_rows, row_losses, scaled_logits
from ..reference.squared_error import select


def outputs(
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
    schedule=None,
):
    """The forward operator: same shapes, same dtypes."""
    temperature = 1.0 if temperature is None else temperature
    if schedule is not None:
        label_smoothing, softcap, z_loss, focal_gamma = schedule.tolist()
    smooths = schedule is not None or label_smoothing > 0
    labels, on = counted_rows(logits, target, mask, ignore_index, shift, segment_ids)
    z = scaled_logits(logits, on, temperature, softcap or None)
    nothing = z.new_zeros(0)
    if target is None:
        stats = reference.row_statistics(
            logits, None, on, temperature=temperature, softcap=softcap or None
        )
        entropy = stats.entropy if statistics else nothing
        no_hit = torch.zeros(0, dtype=torch.bool, device=z.device)
        totals = _totals(z.new_ones((), dtype=torch.float64), None, label_smoothing, z)
        return z.new_zeros(()), stats.lse, entropy, nothing, no_hit, nothing, totals, _row_sums(z)
    loss, stats = reference.masked_cross_entropy(
        logits,
        target,
        mask,
        ignore_index=ignore_index,
        weight=weight,
        token_weight=token_weight,
        label_smoothing=label_smoothing,
        temperature=temperature,
        softcap=softcap or None,
        z_loss=z_loss,
        focal_gamma=focal_gamma,
        shift=shift,
        segment_ids=segment_ids,
        reduction=reduction,
        normalizer=normalizer,
        return_stats=True,
    )
    denominator = _denominator(on, labels, weight, normalizer, reduction)
    return (
        loss,
        stats.lse,
        stats.entropy if statistics else nothing,
        stats.log_prob,
        stats.hit if statistics else stats.hit.new_zeros(0),
        _smooth_distance(z, labels, on, weight) if smooths else nothing,
        _totals(denominator, weight, label_smoothing, z),
        _row_sums(z),
    )


def _row_sums(z):
    """In the place of what the operator keeps for its own backward, which nobody reads here."""
    return z.new_full((*z.shape[:-1], 2), torch.nan)


def _totals(denominator, weight, label_smoothing, z):
    weights = denominator.new_full((), z.shape[-1])
    if weight is not None and label_smoothing > 0:
        weights = weight.double().sum()
    return torch.stack([denominator, weights])


def _smooth_distance(z, labels, on, weight):
    # With smoothing 1 and nothing else the row loss is that sum over V.
    loss, _ = row_losses(z, labels, on, weight, None, 1.0, 0.0, 0.0)
    return loss * z.shape[-1]


def _denominator(on, labels, weight, normalizer, reduction):
    if reduction != "mean":
        return torch.ones((), dtype=torch.float64, device=on.device)
    if normalizer is not None:
        return normalizer.double()
    if weight is None:
        return on.sum().double()
    return select(on, at_labels(weight, labels)).double().sum()


def _differentiable(tensors, options):
    """(loss, lse, entropy, log_prob) as a function of logits and token_weight (or logits alone)."""

    def function(logits, token_weight=None):
        inputs = list(tensors)
        inputs[0], inputs[4] = logits, token_weight
        return outputs(*inputs, *options[:-2], True, options[-1])[:4]

    return function, [x for x in (tensors[0], tensors[4]) if x is not None]


def _pullback(saved, options):
    """The backward operator's derivative: its gradients, logits and token_weight -> its results.

    saved: its tensors, options: what follows them.
    """
    grads, tensors = saved[:4], (*saved[9:16], saved[8][0])
    has = [grad is not None for grad in grads]

    def function(logits, token_weight, *given):
        inner, _ = _differentiable(tensors, options[:-2])
        args = (logits,) if token_weight is None else (logits, token_weight)
        values, pullback = torch.func.vjp(inner, *args)
        given = iter(given)
        upstream = [
            next(given).to(v.dtype) if h else torch.zeros_like(v)
            for h, v in zip(has, values, strict=True)
        ]
        found = pullback(tuple(upstream))
        return found if token_weight is not None else (found[0], logits.new_zeros(0))

    return function, [grad for grad in grads if grad is not None], has


def gradients(saved, options):
    """The backward operator: same shapes, same dtypes."""
    function, given, _ = _pullback(saved, options)
    needs_logits, needs_token_weight = options[-2:]
    logits, token_weight = saved[9], saved[13]
    dtype = reference.accumulate_dtype(logits, logits)
    grad_logits, grad_token_weight = function(logits, token_weight, *given)
    weighs = needs_token_weight and token_weight is not None and saved[10] is not None
    return (
        grad_logits if needs_logits else logits.new_zeros(0),
        grad_token_weight.to(dtype) if weighs else logits.new_zeros(0, dtype=dtype),
    )


def second_derivative(saved, options, upstream):
    """Gradients of sum(upstream * results of the backward operator), by argument position."""
    function, given, has = _pullback(saved, options)
    logits, token_weight = saved[9], saved[13]
    if token_weight is None:
        results, pullback = torch.func.vjp(lambda x, *g: function(x, None, *g), logits, *given)
        positions = [9]
    else:
        results, pullback = torch.func.vjp(function, logits, token_weight, *given)
        positions = [9, 13]
    positions += [i for i, present in enumerate(has) if present]
    needs = options[-2:]
    upstream = tuple(
        u.to(r.dtype) if need and u is not None and u.shape == r.shape else torch.zeros_like(r)
        for u, r, need in zip(upstream, results, needs, strict=True)
    )
    return dict(zip(positions, pullback(upstream), strict=True))
