# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy: the reductions that the operator does not make, from one loss per row."""

from .._aggregate import as_divisor, check_weighted, reduce_tokens
from .._checks import as_integers, as_mask, shape_text
from ..reference.cross_entropy import at_labels, counted_rows, shifted
from ..reference.squared_error import select
from .masked_cross_entropy_checks import expanded


def check_aggregation(name, reduction, token_weight, gradient_in_forward):
    if gradient_in_forward:
        raise ValueError(
            f"{name}: reduction must be mean or sum for gradient_in_forward, got {reduction}: what "
            "it divides by is counted after the sweep"
        )
    check_weighted(name, reduction, token_weight)


def aggregate_rows(name, loss, tensors, ignore_index, shift, reduction):
    """loss: of reduction "none"; tensors: as the operator has accepted them, but for their views.

    Class weights take the part in the denominators that they have in "mean".
    """
    tensors = expanded(tensors) or tensors
    logits, target, mask, weight, token_weight, segment_ids, _, normalizer = tensors
    if logits.dim() < 2 and reduction != "weighted_mean":
        raise ValueError(
            f"{name}: logits must be [..., S, V] for reduction {reduction}, got "
            f"{shape_text(logits)}"
        )
    mask = as_mask(name, "mask", mask)
    target, segment_ids = as_integers(target), as_integers(segment_ids)
    labels, on = counted_rows(logits, target, mask, ignore_index, shift, segment_ids)
    share = on
    if weight is not None:
        # On a GPU a label may be out of range; its loss is NaN already.
        weight = weight.to(loss.dtype)  # not detached: in forward mode it may have a tangent
        share = select(on, at_labels(weight, labels.clamp(0, logits.shape[-1] - 1)))
    if reduction == "weighted_mean":
        share = share * select(on, shifted(token_weight, shift, 0).to(loss.dtype))
    divisor = as_divisor(name, normalizer, loss)
    return reduce_tokens(loss, on, share, reduction, segment_ids, divisor)
