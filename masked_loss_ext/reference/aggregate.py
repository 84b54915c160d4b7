# SPDX-License-Identifier: BSD-3-Clause
"""Token losses to one number, sequence by sequence as one would count by hand."""

import torch
from torch import Tensor

from .squared_error import accumulate_dtype, select


def aggregate_tokens(
    loss: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    *,
    token_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """What ``masked_loss_ext.aggregate_tokens`` says; tensors of the loss's shape."""
    on = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    loss = select(on, loss.to(accumulate_dtype(loss, loss)))
    weight = torch.ones_like(loss) if token_weight is None else token_weight.to(loss.dtype)
    weight = select(on, weight)
    share = weight if reduction == "weighted_mean" else on.to(loss.dtype)
    return aggregated(loss * weight, on, share, reduction, segment_ids, normalizer)


def aggregated(loss, on, share, reduction, segment_ids=None, normalizer=None):
    """loss and share (of the denominators): 0 where ``on`` is off."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction in ("mean", "weighted_mean"):
        return _over(loss.sum(), share.double().sum() if normalizer is None else normalizer)
    sums = [loss.sum() * 0]
    flat = [t.reshape(-1, t.shape[-1]) for t in (loss, share, on)] if loss.numel() else [()] * 3
    for i, (row, parts, counts) in enumerate(zip(*flat, strict=True)):
        ids = None
        if segment_ids is not None:
            ids = segment_ids.reshape(-1, loss.shape[-1])[i].tolist()
        for piece in _pieces(ids, loss.shape[-1]):
            if not counts[piece].any():
                continue
            total = row[piece].sum()
            if reduction == "sequence_mean":
                total = _over(total, parts[piece].sum())
            sums.append(total)
    return _over(torch.stack(sums).sum(), len(sums) - 1 if normalizer is None else normalizer)


def _pieces(ids, length):
    """Slices of a row: all of it, or its runs of one id."""
    if ids is None:
        return [slice(0, length)]
    cuts = [0, *(t for t in range(1, length) if ids[t] != ids[t - 1]), length]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _over(total, denominator):
    denominator = torch.as_tensor(denominator, device=total.device).double()
    nothing = denominator == 0
    return torch.where(nothing, 0, total / torch.where(nothing, 1, denominator)).to(total.dtype)
