# SPDX-License-Identifier: BSD-3-Clause
"""Confidence scores: which count, and what uncertain ones cost."""

import torch

from ._rows import masked_mean, widened

_SMALLEST = 1e-7


def uncertainty(scores, valid, target_mode):
    """Mean over valid scores of how far they are from 0 and 1 ("binary") or from 1 ("high")."""
    scores = torch.where(valid, widened(scores), 1)
    certainty = (2 * scores - 1).abs() if target_mode == "binary" else scores
    return masked_mean(-certainty.clamp(min=_SMALLEST).log(), valid)


def counted_scores(scores, valid):
    """Which scores belong to something that counts: positions, rows, or all of them."""
    batch, length = valid.shape
    if scores.shape in ((batch, length), (batch, length, 1)):
        return valid.reshape(scores.shape)
    if scores.shape in ((batch,), (batch, 1)):
        return valid.any(1).reshape(scores.shape)
    return torch.ones_like(scores, dtype=torch.bool)
