# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy, row by row: the exact meaning of every keyword and of their combinations.

With z = softcap(logits) / temperature, softcap(x) = c * tanh(x / c), and per row

    lse = log(sum_c exp(z_c))      ce = lse - z_y      p = exp(-ce)      eps = label_smoothing

the loss of a row that counts is

    token_weight * (
        ((1 - eps) * w_y * ce + eps / V * sum_c w_c * (lse - z_c)) * (1 - p)^focal_gamma
        + z_loss * lse^2
    )

and exactly 0 of one that does not. Where a logit is +inf lse is inf, and all else of the row NaN,
its gradient too. A row counts where the mask is on and its label is not
ignore_index; with a shift k both are those of position t + k, which must lie inside the row and,
where segment_ids are given, in the segment of t. A temperature per row is that of position t.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aggregate import aggregated
from .squared_error import accumulate_dtype, select


class RowStatistics(NamedTuple):
    """Per row, of z = softcap(logits) / temperature; 0 (False) at rows that do not count.

    Args:
        lse: log-sum-exp of z.
        entropy: of softmax(z), in nats.
        log_prob: of the target; None without one.
        hit: whether the target is argmax; None without a target.
        argmax: the first of the largest entries, int64, as torch.argmax: NaN is the largest.
    """

    lse: Tensor
    entropy: Tensor
    log_prob: Tensor | None
    hit: Tensor | None
    argmax: Tensor


def shifted(tensor, shift, fill):
    """tensor[..., t + shift] at position t; ``fill`` where that lies outside."""
    if shift == 0:
        return tensor
    moved = torch.full_like(tensor, fill)
    moved[..., : max(tensor.shape[-1] - shift, 0)] = tensor[..., shift:]
    return moved


def counted_rows(logits, target, mask, ignore_index, shift=0, segment_ids=None):
    """The label of each row, 0 where it does not count, and which rows count."""
    on = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if target is not None:
        on = target.long() != ignore_index  # in uint8, 156 would be -100
    if mask is not None:
        on = on & (mask != 0)
    on = shifted(on, shift, False)
    if segment_ids is not None:
        on = on & (shifted(segment_ids, shift, 0) == segment_ids)
    if target is None:
        return None, on
    labels = torch.where(on, shifted(target, shift, 0), 0).long()
    return labels, on


def scaled_logits(logits, on, temperature=1.0, softcap=None):
    """z of the rows that count; all 0 in the others. temperature: one number, or one per row."""
    z = select(on.unsqueeze(-1), logits.to(accumulate_dtype(logits, logits)))
    banned = z == -torch.inf
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        # A number does not change the dtype of what is divided by it, more of them would.
        temperature = torch.where(on, temperature, 1).to(z.dtype).unsqueeze(-1)
    return (z / temperature).masked_fill(banned, -torch.inf)  # a constant: its gradient is 0


def _gather(z, labels):
    return z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def at_labels(weight, labels):
    """Class weights of labels. Not weight[labels], which under vmap reads a label of rank 0."""
    return weight.gather(0, labels.reshape(-1)).reshape(labels.shape)


def _one_or_nan(lse):
    """A factor for what follows from lse: NaN where a logit is +inf."""
    return torch.where(lse == torch.inf, torch.nan, 1.0).to(lse.dtype)


def statistics_of(z, labels, on):
    """RowStatistics of z; banned classes (-inf) have probability, gradient and entropy term 0."""
    if z.numel() == 0:
        nothing, labelled = z.sum(-1), labels is not None
        of_label = (nothing, on) if labelled else (None, None)
        return RowStatistics(nothing, nothing, *of_label, on.long())
    lse = torch.logsumexp(z, -1)
    banned = z == -torch.inf
    finite = z.masked_fill(banned, 0)  # 0 * -inf must not come about, in the derivative neither
    p = torch.exp(z - lse.unsqueeze(-1))
    entropy = lse - (p * finite).sum(-1)
    argmax = torch.where(on, z.argmax(-1), 0)
    if labels is None:
        return RowStatistics(select(on, lse), select(on, entropy), None, None, argmax)
    z_y = _gather(z, labels)
    hit = (argmax == labels) & on
    log_prob = (z_y - lse) * _one_or_nan(lse)
    return RowStatistics(select(on, lse), select(on, entropy), select(on, log_prob), hit, argmax)


def row_losses(z, labels, on, weight, token_weight, label_smoothing, z_loss, focal_gamma):
    """The formula above, and w_y per row (the denominator's share)."""
    classes = z.shape[-1]
    lse = torch.logsumexp(z, -1)
    ce = (lse - _gather(z, labels)) * _one_or_nan(lse)
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    w_y = at_labels(w, labels)
    loss = (1 - label_smoothing) * w_y * ce
    if label_smoothing > 0:
        # A class of weight 0 takes no part, banned (-inf) or not.
        distance = (lse.unsqueeze(-1) - z).masked_fill((w == 0).expand(z.shape), 0)
        loss = loss + label_smoothing / classes * (w * distance).sum(-1)
    if focal_gamma > 0:
        loss = loss * focal_factor(ce, focal_gamma)
    if z_loss != 0:
        loss = loss + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * select(on, token_weight.to(z.dtype))
    return select(on, loss), select(on, w_y)


def focal_factor(ce, gamma):
    """(1 - p)^gamma, with derivative 0 where p is 1: gamma < 1 would make it infinite there."""
    # Its slope is p. That of expm1 would be 1 + expm1(-ce), which is p to a rounding of 1 alone.
    p = torch.exp(-ce)
    rest = -torch.expm1(-ce).detach() + (p.detach() - p)
    certain = rest <= 0
    return rest.masked_fill(certain, 1).pow(gamma).masked_fill(certain, 0)


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    z_loss: float | Tensor = 0.0,
    focal_gamma: float | Tensor = 0.0,
    shift: int = 0,
    segment_ids: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    class_dim: int = -1,
    return_stats: bool = False,
) -> Any:
    """The row losses, reduced as aggregate.py says.

    To a denominator a row that counts adds 1 or, with class weights, its w_y.
    """
    logits = logits.movedim(class_dim, -1)
    labels, on = counted_rows(logits, target, mask, ignore_index, shift, segment_ids)
    z = scaled_logits(logits, on, temperature, softcap)
    token_weights = None if token_weight is None else shifted(token_weight, shift, 0)
    stats = statistics_of(z, labels, on) if return_stats else None
    if z.numel() == 0:
        loss, w_y = z.sum(-1), z.sum(-1)
    else:
        loss, w_y = row_losses(
            z, labels, on, weight, token_weights, label_smoothing, z_loss, focal_gamma
        )
    share = on.to(loss.dtype) if weight is None else w_y
    if reduction == "weighted_mean" and token_weights is not None:
        share = share * select(on, token_weights.to(loss.dtype))
    loss = aggregated(loss, on, share, reduction, segment_ids, normalizer)
    return (loss, stats) if return_stats else loss


def row_statistics(
    logits: Tensor,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    class_dim: int = -1,
) -> RowStatistics:
    """The statistics of the rows that count, without a loss."""
    logits = logits.movedim(class_dim, -1)
    labels, on = counted_rows(logits, target, mask, ignore_index)
    return statistics_of(scaled_logits(logits, on, temperature, softcap), labels, on)


def multi_token_prediction_loss(
    logits_list: list[Tensor],
    labels: Tensor,
    attention_mask: Tensor | None = None,
    weights: Sequence[float] = (0.5, 0.25, 0.15, 0.1),
    *,
    ignore_index: int = -100,
    segment_ids: Tensor | None = None,
    mask_sources: bool = False,
    renormalize_empty_heads: bool = False,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Head i predicts the label i + 1 positions on: sum_i weights[i] * mean cross entropy."""
    losses, counts = [], []
    for i, logits in enumerate(logits_list):
        _, on = counted_rows(logits, labels, attention_mask, ignore_index, i + 1, segment_ids)
        if mask_sources and attention_mask is not None:
            on = on & (attention_mask != 0)
        target = torch.where(on, shifted(labels, i + 1, 0), ignore_index)
        losses.append(
            masked_cross_entropy(logits, target, ignore_index=ignore_index, normalizer=normalizer)
        )
        counts.append(on.sum())
    w = torch.tensor(weights, dtype=torch.float64)
    if renormalize_empty_heads:
        w = w * torch.stack([(count > 0).double() for count in counts])
        w = w / w.sum() if w.sum() > 0 else w
    total = sum(wi.item() * loss for wi, loss in zip(w, losses, strict=True))
    return total, losses


def mask_labels(labels: Tensor, mask: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels with ignore_index wherever the mask is off."""
    return torch.where(mask != 0, labels, ignore_index)
