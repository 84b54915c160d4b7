# SPDX-License-Identifier: BSD-3-Clause
"""Temporary: until the class is in the package."""

from torch import nn

import masked_loss_ext as mle


class MultiTokenPredictionLoss(nn.Module):
    def __init__(
        self,
        n_pred_tokens=4,
        aux_loss_weights=(1.0, 0.5, 0.3, 0.2),
        ignore_index=-100,
        *,
        inplace_backward=False,
    ):
        super().__init__()
        total = sum(aux_loss_weights)
        self.aux_loss_weights = [w / total for w in aux_loss_weights]
        self.inplace_backward = inplace_backward

    def forward(self, logits_list, labels, attention_mask=None):
        losses = [
            mle.masked_cross_entropy(
                logits, labels, attention_mask, shift=i, inplace_backward=self.inplace_backward
            )
            for i, logits in enumerate(logits_list, 1)
        ]
        total = sum(w * loss for w, loss in zip(self.aux_loss_weights, losses, strict=True))
        return total, {f"loss_t{i}": loss.detach() for i, loss in enumerate(losses, 1)}
