# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy of hidden states as a module."""

from typing import Any

import torch

from ..ops.linear_cross_entropy import masked_linear_cross_entropy
from ..ops.masked_cross_entropy import Number
from ._keywords import Kept, KeywordsModule

_ROWS = ("hidden", "weight", "bias", "target", "mask", "token_weight", "segment_ids")
_OF_A_CALL = (*_ROWS, "normalizer", "num_valid")


class MaskedLinearCrossEntropyLoss(KeywordsModule):
    r"""``masked_linear_cross_entropy`` as a module that keeps the keywords.

    >>> loss_fn = MaskedLinearCrossEntropyLoss(label_smoothing=0.1)
    >>> a = attention_mask.bool()
    >>> logits = F.linear(hidden, weight)
    >>> expected = F.cross_entropy(logits[a], labels[a], label_smoothing=0.1)
    >>> torch.testing.assert_close(loss_fn(hidden, weight, labels, attention_mask), expected)

    The keywords are those of ``masked_linear_cross_entropy`` with the same defaults, but for what
    comes with each batch. How they meet is told by ``MaskedCrossEntropyLoss``, whose values these
    are for the logits :math:`h W^\top + b`. ``class_weight`` becomes a buffer; a tensor as
    ``temperature`` one that is not saved.

    The classifier stays the model's: its ``weight`` and ``bias`` come with the call, so that tied
    weights stay tied and nobody has to train, save or shard the parameters of a loss.
    """

    _kept = Kept(masked_linear_cross_entropy, _OF_A_CALL)

    @_kept.signs
    def __init__(self, **keywords: Any) -> None:
        super().__init__(keywords)

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        normalizer: Number | None = None,
        temperature: Number | None = None,
        num_valid: int | None = None,
    ) -> Any:
        """The loss, or (loss, ``RowStatistics``); arguments as in ``masked_linear_cross_entropy``.

        temperature: of this batch, one number or one per row; None: that of the module.
        """
        of_a_call = {
            "bias": bias,
            "token_weight": token_weight,
            "segment_ids": segment_ids,
            "normalizer": normalizer,
            "temperature": temperature,
            "num_valid": num_valid,
        }
        keywords = self._with_kept(of_a_call)
        return masked_linear_cross_entropy(hidden, weight, target, mask, **keywords)
