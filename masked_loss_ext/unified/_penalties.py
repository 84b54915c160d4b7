# SPDX-License-Identifier: BSD-3-Clause
"""Penalties on what a model should not say next: -log(1 - p) of classes that are asked for."""

import math

import torch
from torch import Tensor

from ..reference.cross_entropy_terms import LARGEST_LOG_PROB
from ._rows import reduced
from ._tokens import Read, Rows, columns

_HALF = -math.log(2)


def unlikelihood(log_prob, asked):
    """-log(1 - p) where asked for, 0 elsewhere; finite for p = 1."""
    bounded = torch.where(asked, log_prob, -1.0).clamp(max=LARGEST_LOG_PROB)
    # Near p = 1 the difference 1 - exp loses what expm1 keeps; below, the derivative of expm1,
    # computed as (p - 1) + 1, loses a small p.
    likely = torch.log(-torch.expm1(bounded))
    unlikely = torch.log1p(-bounded.exp())
    return torch.where(asked, -torch.where(bounded > _HALF, likely, unlikely), 0)


class PenalisesEnds:
    """Of a module with eos_token_id, min_sequence_length, eos_penalty_weight and penalty_on."""

    eos_token_id: int | None
    min_sequence_length: int
    eos_penalty_weight: float
    penalty_on: str

    def _penalises_ends(self) -> bool:
        return self.eos_token_id is not None and self.eos_penalty_weight > 0

    def _early(self, rows: Rows) -> Tensor:
        column = columns(rows.valid) if rows.starts is None else columns(rows.valid) - rows.starts
        return rows.valid & (column < self.min_sequence_length)

    def end_classes(self, rows: Rows) -> Tensor | None:
        """EOS at early rows at which the data goes on; None where the data is penalised."""
        if self.penalty_on == "targets" or not self._penalises_ends():
            return None
        goes_on = self._early(rows) & (rows.targets != self.eos_token_id)
        return torch.where(goes_on, self.eos_token_id, -1)

    def end_penalty(self, rows: Rows, read: Read, like, reduction="mean"):
        """Weighted and reduced; ``read`` is that of ``end_classes``."""
        if not self._penalises_ends():
            return 0.0
        if read.classes is None:
            ends = self._early(rows) & (rows.targets == self.eos_token_id)
            penalty = reduced(ends.to(like.dtype), rows.valid, reduction)
        else:
            wanted = read.classes >= 0
            penalty = reduced(unlikelihood(read.class_log_prob, wanted), wanted, reduction)
        return self.eos_penalty_weight * penalty
