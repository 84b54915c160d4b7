# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy as a module."""

from typing import Any

import torch

from ..ops.masked_cross_entropy import Number, masked_cross_entropy
from ._keywords import Kept, KeywordsModule

_OF_A_CALL = ("logits", "target", "mask", "token_weight", "segment_ids", "normalizer")


class MaskedCrossEntropyLoss(KeywordsModule):
    r"""``masked_cross_entropy`` as a module that keeps the keywords.

    >>> loss_fn = MaskedCrossEntropyLoss(label_smoothing=0.1)
    >>> a = attention_mask.bool()
    >>> expected = F.cross_entropy(logits[a], labels[a], label_smoothing=0.1)
    >>> torch.testing.assert_close(loss_fn(logits, labels, attention_mask), expected)

    The keywords are those of ``masked_cross_entropy``, where their formulas stand, with the same
    defaults, but for what comes with each batch, as temperatures of rows may. ``weight`` becomes a
    buffer; a tensor as ``temperature`` one that is not saved.

    How they meet:

    - Smoothing spreads evenly over all V classes, the target among them, and weighs each by its own
      class weight, as ``F.cross_entropy`` does. p, and with it the focal factor, is the target's
      own probability, without smoothing or weight.
    - The focal factor covers the smoothed, weighted cross entropy; z-loss stands beside it, and is
      multiplied by neither class weight nor focal factor. token_weight multiplies all of it.
    - The denominator of "mean" is ``normalizer`` where given, else the number of rows that count
      or, with class weights, the sum of their weights, as in PyTorch. token_weight, smoothing,
      focal factor and z-loss never change it. Where it is 0 the loss is 0, attached to the graph.
      "sequence_mean", "sequence_sum" and "weighted_mean" count as ``aggregate_tokens`` tells, a row
      with its class weight where there are any; "weighted_mean" with token_weight, too.
    - temperature and softcap change the logits, so everything: loss, z-loss and statistics.
    - A logit of :math:`-\infty` (a banned class) has probability and gradient 0. With smoothing its
      share of the loss is infinite, as in PyTorch, unless its class weight is 0.

    An untrained model is near :math:`\ln V`: 10.825 for a vocabulary of 50257.
    """

    _kept = Kept(masked_cross_entropy, _OF_A_CALL)

    @_kept.signs
    def __init__(self, **keywords: Any) -> None:
        super().__init__(keywords)

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        token_weight: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        normalizer: Number | None = None,
        temperature: Number | None = None,
    ) -> Any:
        """The loss, or (loss, ``RowStatistics``); arguments as in ``masked_cross_entropy``.

        temperature: of this batch, one number or one per row; None: that of the module.
        """
        of_a_call = {
            "token_weight": token_weight,
            "segment_ids": segment_ids,
            "normalizer": normalizer,
            "temperature": temperature,
        }
        return masked_cross_entropy(logits, target, mask, **self._with_kept(of_a_call))
