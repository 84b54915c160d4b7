# SPDX-License-Identifier: BSD-3-Clause
"""Element-wise squared errors: MaskEditLoss and MseLoss."""

import torch

from .._checks import (
    as_weighting,
    check_choice,
    check_mask,
    check_prediction,
    check_rank,
    check_weighting,
)
from ..ops.masked_squared_error import masked_squared_error
from .token_mse import REDUCTIONS, TOKEN_REDUCTIONS, aggregated


class MaskEditLoss(torch.nn.Module):
    r"""Squared error with a foreground and a background weight, reduced over elements.

    .. math:: \ell_{btc} = \omega_{btc}\, w_{bt}\, (\hat y_{btc} - y_{btc})^2, \qquad
        w_{bt} = \mathrm{fg}\, m_{bt} + \mathrm{bg}\, (1 - m_{bt})

    Without an edit mask everything is foreground:

    >>> loss = MaskEditLoss(foreground_weight=2.0)(model_pred, target)
    >>> torch.testing.assert_close(loss, 2 * torch.nn.functional.mse_loss(model_pred, target))

    Args:
        foreground_weight, background_weight: fg and bg; ``forground_weight`` is accepted too.
    """

    def __init__(self, foreground_weight=2.0, background_weight=1.0, *, forground_weight=None):
        super().__init__()
        self.foreground_weight = foreground_weight if forground_weight is None else forground_weight
        self.background_weight = background_weight

    @property
    def forground_weight(self):
        return self.foreground_weight

    @forground_weight.setter
    def forground_weight(self, value):
        self.foreground_weight = value

    def forward(
        self,
        model_pred,
        target,
        weighting=None,
        edit_mask=None,
        reduction="mean",
        *,
        attention_mask=None,
        **kwargs,
    ):
        """Loss of ``[B, T, C]`` tensors.

        Args:
            model_pred, target: ``[B, T, C]`` floating.
            weighting: broadcastable to ``[B, T, C]``, or a number.
            edit_mask: ``[B, T]`` in [0, 1]; None: all foreground.
            reduction: "mean" over kept elements, "sum", or "none" (``[B, T, C]``); of tokens,
                each its mean over C, "sequence_mean", "sequence_sum" or "weighted_mean", as in
                ``masked_edit_token_mean_loss``.
            attention_mask: ``[B, T]``, selects tokens. None keeps all.
        """
        name = "MaskEditLoss"
        check_choice(name, "reduction", reduction, TOKEN_REDUCTIONS, "Invalid reduction mode: ")
        check_prediction(name, "model_pred", model_pred, "target", target)
        check_rank(name, "model_pred", model_pred, 3, "[B, T, C]")
        check_mask(name, "attention_mask", attention_mask, "model_pred", model_pred, 2)
        check_mask(name, "edit_mask", edit_mask, "model_pred", model_pred, 2)
        weighting = as_weighting(weighting, model_pred)
        check_weighting(name, weighting, "model_pred", model_pred)
        fg, bg = float(self.foreground_weight), float(self.background_weight)
        of_tokens = reduction not in REDUCTIONS
        loss = masked_squared_error(
            model_pred,
            target,
            attention_mask,
            edit_mask,
            weighting,
            fg,
            fg if edit_mask is None else bg,
            "token" if of_tokens else reduction,
        )
        return aggregated(name, loss, attention_mask, reduction) if of_tokens else loss

    def extra_repr(self):
        return (
            f"foreground_weight={self.foreground_weight}, "
            f"background_weight={self.background_weight}"
        )


class MseLoss(torch.nn.Module):
    r"""Squared error, optionally weighted: :math:`\omega\,(\hat y - y)^2` of tensors of any rank.

    Accumulates in float32 and returns float32 for half-precision inputs too (``F.mse_loss`` returns
    their dtype); otherwise

    >>> torch.testing.assert_close(
    ...     MseLoss()(model_pred, target), torch.nn.functional.mse_loss(model_pred, target))

    Args:
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, reduction="mean"):
        super().__init__()
        check_choice("MseLoss", "reduction", reduction, REDUCTIONS, "Invalid reduction: ")
        self.reduction = reduction

    def forward(self, model_pred, target, weighting=None, **kwargs):
        """model_pred, target ``[...]`` floating; weighting broadcastable to them, or a number."""
        check_prediction("MseLoss", "model_pred", model_pred, "target", target)
        weighting = as_weighting(weighting, model_pred)
        check_weighting("MseLoss", weighting, "model_pred", model_pred)
        return masked_squared_error(
            model_pred, target, None, None, weighting, 1.0, 1.0, self.reduction
        )

    def extra_repr(self):
        return f"reduction={self.reduction!r}"
