# SPDX-License-Identifier: BSD-3-Clause
"""Element-wise squared errors: MaskEditLoss and MseLoss."""

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    as_weighting,
    check_choice,
    check_constant,
    check_leading_mask,
    check_mask,
    check_number,
    check_prediction,
    check_rank,
    check_weighting,
    refuse_unknown,
)
from ..ops.masked_squared_error import check_element_loss, squared_error_over
from .token_mse import REDUCTIONS, TOKEN_REDUCTIONS, aggregated, shown_loss

_MSE_ARGUMENTS = (
    *("model_pred", "target", "weighting", "attention_mask", "edit_mask", "normalizer"),
)
_MASK_EDIT_ARGUMENTS = (*_MSE_ARGUMENTS, "reduction")


class MaskEditLoss(torch.nn.Module):
    r"""Squared error with a foreground and a background weight, reduced over elements.

    .. math:: \ell_{btc} = \omega_{btc}\, w_{bt}\, (\hat y_{btc} - y_{btc})^2, \qquad
        w_{bt} = \mathrm{fg}\, m_{bt} + \mathrm{bg}\, (1 - m_{bt})

    Without an edit mask everything is foreground:

    >>> loss = MaskEditLoss(foreground_weight=2.0)(model_pred, target)
    >>> torch.testing.assert_close(loss, 2 * torch.nn.functional.mse_loss(model_pred, target))

    Args:
        foreground_weight, background_weight: fg and bg, finite numbers (for weights that are
            tensors, or that a gradient goes to: ``weighting``); ``forground_weight`` is accepted
            too.
        loss, delta: as in ``masked_edit_token_mean_loss``; attributes that may be set anew.
    """

    def __init__(
        self,
        foreground_weight: float = 2.0,
        background_weight: float = 1.0,
        *,
        forground_weight: float | None = None,
        loss: str = "mse",
        delta: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        check_element_loss("MaskEditLoss", loss, delta)
        self.loss, self.delta = loss, delta
        self.foreground_weight = foreground_weight if forground_weight is None else forground_weight
        self.background_weight = background_weight
        self._weights()

    def _weights(self):
        """fg and bg, which may have been set since: by a schedule, say."""
        fg, bg = self.foreground_weight, self.background_weight
        if type(fg) is float and type(bg) is float and fg - fg == 0 == bg - bg:  # both finite
            return fg, bg
        check_number("MaskEditLoss", "foreground_weight", fg)
        check_number("MaskEditLoss", "background_weight", bg)
        return float(fg), float(bg)

    @property
    def forground_weight(self) -> float:
        return self.foreground_weight

    @forground_weight.setter
    def forground_weight(self, value: float) -> None:
        self.foreground_weight = value

    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        weighting: float | Tensor | None = None,
        edit_mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        attention_mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Loss of ``[B, T, C]`` tensors.

        Args:
            model_pred, target: ``[B, T, C]`` floating.
            weighting: broadcastable to ``[B, T, C]``, or a number.
            edit_mask: ``[B, T]`` in [0, 1], bool or integers: 1 where not 0; a size of 1 stands for
                any. None: all foreground.
            reduction: "mean" over kept elements, "sum", or "none" (``[B, T, C]``); of tokens,
                each its mean over C, "sequence_mean", "sequence_sum" or "weighted_mean", as in
                ``masked_edit_token_mean_loss``.
            attention_mask: ``[B, T]``, selects tokens; a size of 1 stands for any. None keeps all.
            normalizer: what "mean" divides by instead of its own number of elements (C a token),
                and the others instead of their tokens, samples or weights: those of all
                micro-batches and ranks. A number or a 0-d tensor.

        Raises:
            TypeError: any other keyword.
        """
        name = "MaskEditLoss"
        if unknown:
            refuse_unknown(name, unknown, _MASK_EDIT_ARGUMENTS)
        check_choice(name, "reduction", reduction, TOKEN_REDUCTIONS, "Invalid reduction mode: ")
        check_prediction(name, "model_pred", model_pred, "target", target)
        check_rank(name, "model_pred", model_pred, 3, "[B, T, C]")
        check_mask(
            name, "attention_mask", attention_mask, "model_pred", model_pred, 2, broadcast=True
        )
        how = {"broadcast": True, "selects": False}
        check_mask(name, "edit_mask", edit_mask, "model_pred", model_pred, 2, **how)
        check_constant(name, "edit_mask", edit_mask)
        weights = as_weighting(name, weighting, model_pred)
        check_weighting(name, weights, "model_pred", model_pred)
        check_element_loss(name, self.loss, self.delta)
        fg, bg = self._weights()
        of_tokens = reduction not in REDUCTIONS
        tensors = (model_pred, target, attention_mask, edit_mask, weights)
        loss = squared_error_over(
            name,
            None if of_tokens else normalizer,
            *tensors,
            fg,
            fg if edit_mask is None else bg,
            reduction="token" if of_tokens else reduction,
            loss=self.loss,
            delta=self.delta,
        )
        if not of_tokens:
            return loss
        return aggregated(name, loss, attention_mask, reduction, normalizer)

    def extra_repr(self) -> str:
        return (
            f"foreground_weight={self.foreground_weight}, "
            f"background_weight={self.background_weight}{shown_loss(self)}"
        )


class MseLoss(torch.nn.Module):
    r"""Squared error, optionally weighted: :math:`\omega\,(\hat y - y)^2` of tensors of any rank.

    Accumulates in float32 and returns float32 for half-precision inputs too (``F.mse_loss`` returns
    their dtype); otherwise

    >>> torch.testing.assert_close(
    ...     MseLoss()(model_pred, target), torch.nn.functional.mse_loss(model_pred, target))

    With an attention mask the mean is over what it keeps:

    >>> a = attention_mask.bool()
    >>> torch.testing.assert_close(
    ...     MseLoss()(model_pred, target, attention_mask=attention_mask),
    ...     torch.nn.functional.mse_loss(model_pred[a], target[a]))

    Args:
        reduction: "mean", "sum" or "none".
        loss, delta: as in ``masked_edit_token_mean_loss``; attributes that may be set anew.
    """

    def __init__(
        self, reduction: str = "mean", *, loss: str = "mse", delta: float | Tensor = 1.0
    ) -> None:
        super().__init__()
        check_element_loss("MseLoss", loss, delta)
        self.loss, self.delta = loss, delta
        check_choice("MseLoss", "reduction", reduction, REDUCTIONS, "Invalid reduction: ")
        self.reduction = reduction

    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        weighting: float | Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        edit_mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Loss of tensors of any rank; it takes what the other losses take, so that a trainer may
        call any of them with the same keywords.

        Args:
            model_pred, target: ``[...]`` floating.
            weighting: broadcastable to them, or a number.
            attention_mask: their leading dimensions, ``[B, T]`` say; selects, so that "mean" is
                over what it keeps; a size of 1 stands for any. None keeps all.
            edit_mask: likewise; foreground and background weigh 1 here, so that it changes nothing.
            normalizer: what "mean" divides by instead of its own number of elements: that of all
                micro-batches and ranks. A number or a 0-d tensor.

        Raises:
            TypeError: any other keyword.
        """
        name = "MseLoss"
        if unknown:
            refuse_unknown(name, unknown, _MSE_ARGUMENTS)
        check_prediction(name, "model_pred", model_pred, "target", target)
        for argument, mask in (("attention_mask", attention_mask), ("edit_mask", edit_mask)):
            if mask is not None:
                selects = argument == "attention_mask"
                check_leading_mask(name, argument, mask, "model_pred", model_pred, selects)
        weights = as_weighting(name, weighting, model_pred)
        check_weighting(name, weights, "model_pred", model_pred)
        check_element_loss(name, self.loss, self.delta)
        tensors = (model_pred, target, attention_mask, None, weights, 1.0, 1.0)
        how = {"reduction": self.reduction, "loss": self.loss, "delta": self.delta}
        return squared_error_over(name, normalizer, *tensors, **how)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}{shown_loss(self)}"
