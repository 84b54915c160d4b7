# SPDX-License-Identifier: BSD-3-Clause
"""Which rows count, and sums over them: shared by every part of the unified loss."""

import contextlib

import torch

from .._checks import check_floating, check_mask, check_tensor, shape_text


def valid_rows(target, attention_mask=None, ignore_index=-100):
    """Where a row counts: mask on and target not ignored; bool of target's shape."""
    on = target.long() != ignore_index  # -100 and uint8 156 would be equal
    return on if attention_mask is None else on & (attention_mask != 0)


def widened(values):
    """Half precision as float32, in which everything is summed; float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def attached_zero(like):
    """0 with a gradient of zeros for ``like``, whatever is stored there."""
    return widened(like.reshape(-1)[:0]).sum()


def masked_sum(values, valid):
    """Sum of the values at valid positions, whatever is stored at the others.

    Selects the values, not what they were computed from: their gradient is 0 where valid is off,
    but 0 * NaN is NaN further back. Clean the operands of a computation that may meet NaN.
    """
    return torch.where(valid, widened(values), 0).sum()


def masked_mean(values, valid):
    """Mean of the values at valid positions; 0, attached to the graph, if there are none."""
    return masked_sum(values, valid) / valid.expand_as(values).sum().clamp(min=1)


def reduced(rows, valid, reduction):
    """Mean or sum over valid rows, or each of them and 0 at the others ("none")."""
    if reduction == "mean":
        return masked_mean(rows, valid)
    if reduction == "sum":
        return masked_sum(rows, valid)
    return torch.where(valid, widened(rows), 0)


def smoothed_loss(log_prob, mean_log_prob, smoothing, classes):
    r"""Cross entropy of a target that has 1 - smoothing, each other class smoothing / (V - 1).

    :math:`-(1 - \varepsilon - e) \log p_y - e V \cdot \tfrac1V \sum_j \log p_j` with
    :math:`e = \varepsilon / (V - 1)`. One class leaves nobody to share with: smoothing 0.
    """
    if classes == 1 or smoothing == 0:  # not 0 * mean: that is -inf with a banned class
        return -log_prob
    share = smoothing / (classes - 1)
    return -(1 - smoothing - share) * log_prob - share * classes * mean_log_prob


def torch_smoothing(smoothing, classes):
    """The label_smoothing of masked_cross_entropy and of PyTorch, whose share of every class the
    target gets too, for a smoothing that goes to the others alone."""
    return min(smoothing * classes / (classes - 1), 1.0) if classes > 1 else 0.0


def cleaned(values, valid):
    """The rows ``[..., D]`` that count, 0 in place of the others, as float32 or float64."""
    return torch.where(valid.unsqueeze(-1), widened(values), 0)


def distances(x, y):
    # Not by way of a matrix product: its rounding makes the distance of equal rows large.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def is_autocast(device):
    """Autocast knows no meta tensors, and raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device):
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def row_mask(function, mask, like_name, like, name="attention_mask"):
    """The mask of the rows of ``like`` [..., D] as one dimension [N] of bool; None: all count."""
    rows = like.shape[:-1]
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=like.device).flatten()
    check_tensor(function, name, mask)
    if mask.numel() != rows.numel():
        raise ValueError(
            f"{function}: {name} must have one entry per row of {like_name} "
            f"{shape_text(like)}, got {shape_text(mask)}"
        )
    mask = mask.reshape(rows)
    check_mask(function, name, mask, like_name, like, len(rows))
    return (mask != 0).flatten()


def check_features(function, name, tensor, last=None, last_name=""):
    """A floating tensor, and what its last dimension must be."""
    check_tensor(function, name, tensor)
    check_floating(function, name, tensor)
    if last is not None and (tensor.dim() == 0 or tensor.shape[-1] != last):
        raise ValueError(
            f"{function}: {name} must have {last_name} {last} as its last dimension, got "
            f"{shape_text(tensor)}"
        )
