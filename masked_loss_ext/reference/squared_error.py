# SPDX-License-Identifier: BSD-3-Clause
"""Masked squared errors and their kin: one loss per element, weighted, selected, reduced."""

from typing import Any

import torch
from torch import Tensor


def _bent(d, delta, inner, outer):
    """inner(d) below delta, outer(|d|) above."""
    size = d.abs()
    below = size < delta
    return torch.where(below, inner(select(below, d)), outer(size))


def _smooth_l1(d, delta):
    bend = torch.where(delta > 0, delta, 1)  # at 0 nothing is below it
    return _bent(d, delta, lambda x: x.square() / (2 * bend), lambda x: x - delta / 2)


def _huber(d, delta):
    return _bent(d, delta, lambda x: x.square() / 2, lambda x: delta * (x - delta / 2))


# Losses of d = p - t. delta is a 0-d tensor.
ELEMENT_LOSSES = {
    "mse": lambda d, delta: d.square(),
    "l1": lambda d, delta: d.abs(),
    "smooth_l1": _smooth_l1,
    "huber": _huber,
    # delta^2 (sqrt(1 + (d / delta)^2) - 1), without the difference of two equal numbers
    "pseudo_huber": lambda d, delta: d.square() / (1 + (1 + (d / delta).square()).sqrt()),
}


def accumulate_dtype(prediction: Tensor, target: Tensor) -> torch.dtype:
    """float64 where either is float64, else float32."""
    wide = torch.float64 in (prediction.dtype, target.dtype)
    return torch.float64 if wide else torch.float32


def align_leading(tensor: Tensor, like: Tensor) -> Tensor:
    """View a tensor of ``like``'s leading dimensions, or with 1 in their place, so that it
    broadcasts to ``like``."""
    return tensor.reshape(tensor.shape + (1,) * (like.dim() - tensor.dim()))


def select(on: Tensor | None, tensor: Tensor) -> Tensor:
    """The tensor where ``on``, exactly 0 elsewhere."""
    return tensor if on is None else torch.where(on, tensor, tensor.new_zeros(()))


def factors(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    edit_mask: Tensor | None,
    weighting: Tensor | None,
    foreground_weight: float,
    background_weight: float,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """on (bool of prediction's shape, or None), p - t, edit weight and weighting, selected."""
    dtype = accumulate_dtype(prediction, target)
    on = None
    if mask is not None:
        on = (align_leading(mask, prediction) != 0).expand(prediction.shape)
    difference = select(on, prediction.to(dtype)) - select(on, target.to(dtype))
    edit = torch.full((), background_weight, dtype=dtype, device=prediction.device)
    if edit_mask is not None:
        if not edit_mask.is_floating_point():
            edit_mask = edit_mask != 0
        m = select(on, align_leading(edit_mask, prediction).to(dtype))
        edit = foreground_weight * m + background_weight * (1 - m)
    omega = torch.ones((), dtype=dtype, device=prediction.device)
    if weighting is not None:
        omega = select(on, weighting.to(dtype))
    return on, difference, edit, omega


def _denominator(reduction, prediction, on):
    """What the sum is divided by, as a Python number or a 0-d float64 tensor, at least 1."""
    if reduction == "mean":
        return prediction.numel() if on is None else on.sum().double()
    if reduction == "batch_mean":
        return prediction.shape[0] if prediction.dim() else 1
    if reduction in ("token_sum", "token"):
        return prediction.shape[-1] if prediction.dim() else 1
    return 1


def _at_least_one(number):
    return number.clamp(min=1) if isinstance(number, torch.Tensor) else max(number, 1)


def masked_squared_error(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    edit_mask: Tensor | None = None,
    weighting: Tensor | None = None,
    foreground_weight: float = 2.0,
    background_weight: float = 1.0,
    reduction: str = "mean",
    loss: str = "mse",
    delta: float | Tensor | None = None,
) -> Tensor:
    """What the operator ``masked_squared_error`` computes (csrc/elementwise/formula.h)."""
    on, difference, edit, omega = factors(
        prediction, target, mask, edit_mask, weighting, foreground_weight, background_weight
    )
    if not isinstance(delta, Tensor):  # on that device, whatever the default one is
        number = 1.0 if delta is None else delta
        delta = torch.tensor(number, dtype=difference.dtype, device=difference.device)
    delta = delta.to(difference)
    term = select(on, edit * omega * ELEMENT_LOSSES[loss](difference, delta))
    denominator = _at_least_one(_denominator(reduction, prediction, on))
    if reduction == "none":
        return term
    if reduction == "token":
        return term.sum(-1) / denominator
    return (term.sum() / denominator).to(term.dtype)


def masked_edit_token_mean_loss(
    model_pred: Tensor,
    target: Tensor,
    attention_mask: Tensor | None = None,
    edit_mask: Tensor | None = None,
    weighting: Tensor | None = None,
    foreground_weight: float = 2.0,
    background_weight: float = 1.0,
    *,
    reduction: str = "mean",
    edit_mask_default: str = "unit",
    loss: str = "mse",
    delta: float | Tensor | None = None,
) -> Tensor:
    """AttentionMaskMseLoss: weighted error, mean over channels, then over valid tokens."""
    if edit_mask is None:
        background_weight = 1.0 if edit_mask_default == "unit" else foreground_weight
    return masked_squared_error(
        model_pred,
        target,
        attention_mask,
        edit_mask,
        weighting,
        foreground_weight,
        background_weight,
        {"mean": "mean", "sum": "token_sum", "none": "token"}[reduction],
        loss,
        delta,
    )


def compute_loss_multi_resolution(
    model_pred: Tensor,
    target: Tensor,
    attention_mask: Tensor | None,
    edit_mask: Tensor | None = None,
    weighting: Tensor | None = None,
    **element_loss: Any,
) -> Tensor:
    """The same with weights 2 (foreground) and 1 (background)."""
    return masked_edit_token_mean_loss(
        model_pred, target, attention_mask, edit_mask, weighting, **element_loss
    )


def mask_edit_loss(
    model_pred: Tensor,
    target: Tensor,
    weighting: Tensor | None = None,
    edit_mask: Tensor | None = None,
    reduction: str = "mean",
    *,
    foreground_weight: float = 2.0,
    background_weight: float = 1.0,
    attention_mask: Tensor | None = None,
    loss: str = "mse",
    delta: float | Tensor | None = None,
) -> Tensor:
    """MaskEditLoss: per element; without an edit mask everything is foreground."""
    if edit_mask is None:
        background_weight = foreground_weight
    return masked_squared_error(
        model_pred,
        target,
        attention_mask,
        edit_mask,
        weighting,
        foreground_weight,
        background_weight,
        reduction,
        loss,
        delta,
    )


def mse_loss(
    model_pred: Tensor,
    target: Tensor,
    weighting: Tensor | None = None,
    reduction: str = "mean",
    **element_loss: Any,
) -> Tensor:
    """MseLoss: squared error, optionally weighted, no mask."""
    return masked_squared_error(
        model_pred, target, weighting=weighting, reduction=reduction, **element_loss
    )


def masked_sse(
    x_recon: Tensor, x: Tensor, mask: Tensor, *, reduction: str = "batch_mean", **element_loss: Any
) -> Tensor:
    """Sum of squared errors where mask is on, divided as ``reduction`` says."""
    return masked_squared_error(x_recon, x, mask, reduction=reduction, **element_loss)


def masked_mse(
    x_recon: Tensor, x: Tensor, mask: Tensor, *, reduction: str = "mean", **element_loss: Any
) -> Tensor:
    """The same with another default."""
    return masked_sse(x_recon, x, mask, reduction=reduction, **element_loss)
