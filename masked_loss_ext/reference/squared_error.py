# SPDX-License-Identifier: BSD-3-Clause
"""Masked squared errors."""

import torch


def accumulate_dtype(prediction, target):
    """float64 where either is float64, else float32."""
    wide = torch.float64 in (prediction.dtype, target.dtype)
    return torch.float64 if wide else torch.float32


def align_leading(tensor, like):
    """View a tensor of ``like``'s leading dimensions, or with 1 in their place, so that it
    broadcasts to ``like``."""
    return tensor.reshape(tensor.shape + (1,) * (like.dim() - tensor.dim()))


def select(on, tensor):
    """The tensor where ``on``, exactly 0 elsewhere."""
    return tensor if on is None else torch.where(on, tensor, tensor.new_zeros(()))


def factors(prediction, target, mask, edit_mask, weighting, foreground_weight, background_weight):
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
    prediction,
    target,
    mask=None,
    edit_mask=None,
    weighting=None,
    foreground_weight=2.0,
    background_weight=1.0,
    reduction="mean",
):
    """What the operator ``masked_squared_error`` computes (csrc/elementwise/formula.h)."""
    on, difference, edit, omega = factors(
        prediction, target, mask, edit_mask, weighting, foreground_weight, background_weight
    )
    term = select(on, edit * omega * difference.square())
    denominator = _at_least_one(_denominator(reduction, prediction, on))
    if reduction == "none":
        return term
    if reduction == "token":
        return term.sum(-1) / denominator
    return (term.sum() / denominator).to(term.dtype)


def masked_squared_error_gradients(
    grad_loss,
    prediction,
    target,
    mask=None,
    edit_mask=None,
    weighting=None,
    foreground_weight=2.0,
    background_weight=1.0,
    reduction="mean",
):
    """Its derivative, written out: of prediction, of target and, per element, of weighting.

    In plain PyTorch as well, and so differentiable again. All in the dtype of the loss.
    """
    on, difference, edit, omega = factors(
        prediction, target, mask, edit_mask, weighting, foreground_weight, background_weight
    )
    scale = term_scale(grad_loss, prediction, on, reduction, difference.dtype)
    scale = select(on, scale)
    grad = 2 * scale * edit * omega * difference
    grad_weighting = scale * edit * difference.square()
    return grad, -grad, grad_weighting


def term_scale(grad_loss, prediction, on, reduction, dtype):
    """d loss / d term times ``grad_loss``, in a shape that broadcasts to prediction."""
    denominator = _at_least_one(_denominator(reduction, prediction, on))
    scale = (grad_loss / denominator).to(dtype)
    return scale.unsqueeze(-1) if reduction == "token" else scale


def masked_edit_token_mean_loss(
    model_pred,
    target,
    attention_mask=None,
    edit_mask=None,
    weighting=None,
    foreground_weight=2.0,
    background_weight=1.0,
    *,
    reduction="mean",
    edit_mask_default="unit",
):
    """AttentionMaskMseLoss: weighted squared error, mean over channels, then over valid tokens."""
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
    )


def compute_loss_multi_resolution(
    model_pred, target, attention_mask, edit_mask=None, weighting=None
):
    """The same with weights 2 (foreground) and 1 (background)."""
    return masked_edit_token_mean_loss(model_pred, target, attention_mask, edit_mask, weighting)


def mask_edit_loss(
    model_pred,
    target,
    weighting=None,
    edit_mask=None,
    reduction="mean",
    *,
    foreground_weight=2.0,
    background_weight=1.0,
    attention_mask=None,
):
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
    )


def mse_loss(model_pred, target, weighting=None, reduction="mean"):
    """MseLoss: squared error, optionally weighted, no mask."""
    return masked_squared_error(model_pred, target, weighting=weighting, reduction=reduction)


def masked_sse(x_recon, x, mask, *, reduction="batch_mean"):
    """Sum of squared errors where mask is on, divided as ``reduction`` says."""
    return masked_squared_error(x_recon, x, mask, reduction=reduction)


def masked_mse(x_recon, x, mask, *, reduction="mean"):
    """The same with another default."""
    return masked_squared_error(x_recon, x, mask, reduction=reduction)
