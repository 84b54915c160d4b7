# SPDX-License-Identifier: BSD-3-Clause
"""Every operation again in plain PyTorch: the specification that the kernels are tested against.

Never tuned. Each function computes in float32, or in float64 where prediction or target (or the
logits) is float64, so float64 copies of the inputs give the truth. What a mask excludes is replaced
by 0 *before* any arithmetic: ``torch.where`` on the result would leave ``0 * NaN`` in the gradient.
"""

from . import attention, repetition
from .aggregate import aggregate_tokens
from .cross_entropy import (
    RowStatistics,
    mask_labels,
    masked_cross_entropy,
    multi_token_prediction_loss,
    row_statistics,
)
from .cross_entropy_terms import CrossEntropyTerms, cross_entropy_terms
from .linear import linear_row_statistics, masked_linear_cross_entropy
from .padding import (
    lengths_to_mask,
    map_mask_to_latent,
    pad_latents_for_multi_res,
    shift_labels,
    unpad,
)
from .squared_error import (
    accumulate_dtype,
    align_leading,
    compute_loss_multi_resolution,
    factors,
    mask_edit_loss,
    masked_edit_token_mean_loss,
    masked_mse,
    masked_squared_error,
    masked_sse,
    mse_loss,
    select,
)

__all__ = [
    "CrossEntropyTerms",
    "RowStatistics",
    "accumulate_dtype",
    "aggregate_tokens",
    "align_leading",
    "attention",
    "compute_loss_multi_resolution",
    "cross_entropy_terms",
    "factors",
    "lengths_to_mask",
    "linear_row_statistics",
    "map_mask_to_latent",
    "mask_edit_loss",
    "mask_labels",
    "masked_cross_entropy",
    "masked_edit_token_mean_loss",
    "masked_linear_cross_entropy",
    "masked_mse",
    "masked_squared_error",
    "masked_sse",
    "mse_loss",
    "multi_token_prediction_loss",
    "pad_latents_for_multi_res",
    "repetition",
    "row_statistics",
    "select",
    "shift_labels",
    "unpad",
]
