# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy and row statistics of logits = hidden weight^T + bias, which are made here."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .cross_entropy import (
    RowStatistics,
    counted_rows,
    masked_cross_entropy,
    row_statistics,
)
from .squared_error import accumulate_dtype, select


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, on: Tensor | None = None
) -> Tensor:
    """In float32 (float64), of rows of zeros where a row is not on: 0 * NaN must not reach the
    gradient of the weight."""
    dtype = accumulate_dtype(hidden, weight)
    hidden = hidden.to(dtype)
    if on is not None:
        hidden = select(on.unsqueeze(-1), hidden)
    return F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    segment_ids: Tensor | None = None,
    **keywords: Any,
) -> Any:
    """masked_cross_entropy of the logits, with its keywords."""
    _, on = counted_rows(hidden, target, mask, ignore_index, shift, segment_ids)
    logits = logits_of(hidden, weight, bias, on)
    keywords |= {"ignore_index": ignore_index, "shift": shift, "segment_ids": segment_ids}
    return masked_cross_entropy(logits, target, mask, weight=class_weight, **keywords)


def linear_row_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    **keywords: Any,
) -> RowStatistics:
    """row_statistics of the logits, with its keywords."""
    _, on = counted_rows(hidden, target, mask, ignore_index)
    logits = logits_of(hidden, weight, bias, on)
    return row_statistics(logits, target, mask, ignore_index=ignore_index, **keywords)
