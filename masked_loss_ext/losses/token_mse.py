# SPDX-License-Identifier: BSD-3-Clause
"""Token-wise squared errors for padded, edited and multi-resolution batches."""

from typing import Any

import torch
from torch import Tensor

from .._aggregate import AGGREGATIONS, as_divisor, check_normalizer, reduce_tokens
from .._checks import (
    REFUSALS,
    as_weighting,
    check_choice,
    check_constant,
    check_mask,
    check_number,
    check_prediction,
    check_rank,
    check_weighting,
    has_no_data,
    is_dtensor,
    is_traced,
    refuse_unknown,
)
from ..ops.masked_squared_error import check_element_loss, in_the_name_of, masked_squared_error
from ..reference.squared_error import select

REDUCTIONS = ("mean", "sum", "none")
TOKEN_REDUCTIONS = (*REDUCTIONS, *AGGREGATIONS)
EDIT_MASK_DEFAULTS = ("unit", "foreground")
_ARGUMENTS = ("model_pred", "target", "attention_mask", "edit_mask", "weighting", "normalizer")
_TOKEN_REDUCTION = {"mean": "mean", "sum": "token_sum", "none": "token"}
_TOKEN_REDUCTION |= dict.fromkeys(AGGREGATIONS, "token")


def _check(
    function, reduction, mask_label, model_pred, target, attention_mask, edit_mask, weighting
):
    check_choice(function, "reduction", reduction, TOKEN_REDUCTIONS, "Invalid reduction: ")
    check_prediction(function, "model_pred", model_pred, "target", target)
    check_rank(function, "model_pred", model_pred, 3, "[B, T, C]")
    for name, mask, label, selects in (
        ("attention_mask", attention_mask, mask_label, True),
        ("edit_mask", edit_mask, None, False),
    ):
        how = {"broadcast": True, "selects": selects}
        check_mask(function, name, mask, "model_pred", model_pred, 2, label, **how)
    check_constant(function, "edit_mask", edit_mask)
    weighting = as_weighting(function, weighting, model_pred)
    check_weighting(function, weighting, "model_pred", model_pred)


def _check_weights(function, foreground_weight, background_weight):
    check_number(function, "foreground_weight", foreground_weight)
    check_number(function, "background_weight", background_weight)


def _unusual(model_pred, attention_mask, edit_mask):
    """Ranks that the operator would take."""
    return (
        model_pred.dim() != 3
        or (attention_mask is not None and attention_mask.dim() != 2)
        or (edit_mask is not None and edit_mask.dim() != 2)
    )


def _token_loss(
    function,
    tensors,
    foreground_weight,
    background_weight,
    reduction,
    mask_label="attention_mask shape",
    normalizer=None,
    loss="mse",
    delta=1.0,
):
    """The loss, with Python's checks only where something may be wrong.

    The operator checks its arguments itself, in C++. Doing it in Python as well, to name the
    function that was called, takes a tenth of a small loss's time: only when it refuses, then.
    """
    model_pred, target, attention_mask, edit_mask, weighting = tensors
    if type(foreground_weight) is not float or type(background_weight) is not float:
        _check_weights(function, foreground_weight, background_weight)  # a tensor would be read
    try:
        if (
            is_traced()
            or has_no_data(model_pred)
            or _unusual(model_pred, attention_mask, edit_mask)
        ):
            _check(function, reduction, mask_label, *tensors)
            if not torch.compiler.is_compiling():  # there the operator sees them, when it runs
                _check_weights(function, foreground_weight, background_weight)
        how = _TOKEN_REDUCTION[reduction]
        apart = normalizer is not None or reduction in AGGREGATIONS  # the operator cannot
        result = masked_squared_error(
            model_pred,
            target,
            attention_mask,
            edit_mask,
            as_weighting(function, weighting, model_pred),
            foreground_weight,
            background_weight,
            "token" if apart else how,
            loss,
            delta,
        )
        if not apart:
            return result
        return aggregated(function, result, attention_mask, reduction, normalizer)
    except REFUSALS as error:  # a list has no .dim(), and what else there is
        failure = error
    try:
        _check(function, reduction, mask_label, *tensors)
        _check_weights(function, foreground_weight, background_weight)
        check_element_loss(function, loss, delta)
        raise in_the_name_of(function, failure)
    finally:
        del failure  # error, traceback, frame and this name would keep the tensors alive


def aggregated(function, loss, attention_mask, reduction, normalizer=None):
    """One number of losses ``[B, T]`` of tokens; "weighted_mean" weighs by the mask's values."""
    if normalizer is not None:
        check_normalizer(function, normalizer, reduction)
    if is_dtensor(loss):
        from ..distributed import _dtensor

        weighs = reduction == "weighted_mean" and attention_mask is not None
        given = {"mask": attention_mask, "segment_ids": None}
        given["token_weight"] = attention_mask.to(loss.dtype) if weighs else None
        by = "mean" if reduction == "weighted_mean" and not weighs else reduction
        return _dtensor.tokens(function, loss, given, by, normalizer)
    if attention_mask is None:
        on = torch.ones_like(loss, dtype=torch.bool)
    else:
        attention_mask = attention_mask.expand(loss.shape)
        on = attention_mask != 0
    share = on
    if reduction == "weighted_mean" and attention_mask is not None:
        share = select(on, attention_mask.to(loss.dtype))
        loss = loss * share
    divisor = as_divisor(function, normalizer, loss)
    return reduce_tokens(loss, on, share, reduction, None, divisor)


def shown_loss(module):
    """For extra_repr(): the element loss, where it is not the usual one."""
    return "" if module.loss == "mse" else f", loss={module.loss!r}, delta={module.delta}"


def _background(function, edit_mask, edit_mask_default, foreground_weight, background_weight):
    """The operator gives every token the background weight where there is no edit mask."""
    if edit_mask is not None:
        return background_weight
    # The caller's own does not reach the operator, which would see that it is a finite number.
    plain = type(background_weight) is float and background_weight - background_weight == 0
    if not plain and not torch.compiler.is_compiling():
        check_number(function, "background_weight", background_weight)
    return 1.0 if edit_mask_default == "unit" else foreground_weight


def masked_edit_token_mean_loss(
    model_pred: Tensor,
    target: Tensor,
    attention_mask: Tensor | None = None,
    edit_mask: Tensor | None = None,
    weighting: float | Tensor | None = None,
    foreground_weight: float = 2.0,
    background_weight: float = 1.0,
    *,
    eps: float = 1e-12,
    reduction: str = "mean",
    edit_mask_default: str = "unit",
    normalizer: float | Tensor | None = None,
    loss: str = "mse",
    delta: float | Tensor = 1.0,
) -> Tensor:
    r"""Weighted squared error, mean over channels, then over the tokens that the mask keeps.

    .. math::
        \ell_{bt} = \frac1C \sum_c \omega_{btc}\, w_{bt}\, (\hat y_{btc} - y_{btc})^2,\qquad
        w_{bt} = \mathrm{fg}\, m_{bt} + \mathrm{bg}\, (1 - m_{bt}),\qquad
        L = \frac{\sum_{bt} a_{bt}\, \ell_{bt}}{\sum_{bt} a_{bt}}

    Without masks and weights this equals ``F.mse_loss(model_pred, target)``. With a mask:

    >>> a = attention_mask.bool()
    >>> expected = ((model_pred[a] - target[a]) ** 2).mean()
    >>> torch.testing.assert_close(
    ...     masked_edit_token_mean_loss(model_pred, target, attention_mask), expected)

    What the mask excludes is not read: NaN there changes nothing and its gradient is exactly 0.
    With no token kept loss and gradient are 0, attached to the graph (PyTorch gives NaN).

    Args:
        model_pred: ``[B, T, C]`` float16, bfloat16, float32 or float64, any strides.
        target: ``[B, T, C]``, any of these dtypes.
        attention_mask: ``[B, T]`` any dtype, a token counts where it is not 0. A size of 1 stands
            for any, as in edit_mask. None keeps all.
        edit_mask: ``[B, T]`` in [0, 1], may be fractional (see ``map_mask_to_latent``); 1 is
            foreground. bool and integers are 1 where not 0, so that 0/255 masks work; floating
            values are taken as they are: 255.0 weighs 255 fg - 254 bg. None: see
            ``edit_mask_default``.
        weighting: broadcastable to ``[B, T, C]``, or a number.
        foreground_weight, background_weight: fg and bg, finite numbers (for weights that are
            tensors, or that a gradient goes to: ``weighting``).
        eps: accepted for compatibility; a count of at least 1 needs none.
        reduction: "mean" over kept tokens, "sum" over them, or "none"; "sequence_mean" (mean over
            samples of the mean over their kept tokens), "sequence_sum" (mean over samples of the
            sum), both of the samples that keep a token; "weighted_mean", for grey masks: with the
            mask's values a, not only where they are not 0, :math:`\sum a \ell / \sum a`.
            ``aggregate_tokens`` says who wants which.
        edit_mask_default: without an edit mask every token has weight 1 ("unit") or fg
            ("foreground").
        normalizer: what all means and "sequence_sum" divide by instead of their own count of
            tokens, samples or weights (of all micro-batches and ranks): a number or a 0-d tensor.
        loss: what stands in the place of :math:`d^2` above, with :math:`d = \hat y - y` and
            :math:`\delta` = ``delta``, as PyTorch's functions of these names have it:

            - "mse": :math:`d^2`; "l1": :math:`|d|`, with slope 0 at 0;
            - "smooth_l1": :math:`d^2 / 2\delta` where :math:`|d| < \delta` (PyTorch's beta), else
              :math:`|d| - \delta / 2`;
            - "huber": :math:`d^2 / 2` where :math:`|d| < \delta`, else
              :math:`\delta (|d| - \delta / 2)`;
            - "pseudo_huber": :math:`\delta^2 (\sqrt{1 + (d / \delta)^2} - 1)`, which is close to
              "huber". The diffusion trainers' :math:`2c (\sqrt{d^2 + c^2} - c)`, their "huber", is
              twice this with ``delta=c``; what they call "smooth_l1" is 2 / c times it.
        delta: where the loss bends, above 0 (for "smooth_l1" it may be 0, which is "l1"); "mse" and
            "l1" do not read it. A number, or a 0-d floating tensor, which may change from step to
            step without another graph under torch.compile; it gets no gradient. The value of a
            tensor is checked on the CPU alone.

    Returns:
        ``[]``, or ``[B, T]`` for "none" (0 at excluded tokens); float32, float64 where model_pred
        or target is. Differentiable in model_pred, target and weighting.
    """
    check_choice("masked_edit_token_mean_loss", "reduction", reduction, TOKEN_REDUCTIONS)
    check_choice(
        "masked_edit_token_mean_loss", "edit_mask_default", edit_mask_default, EDIT_MASK_DEFAULTS
    )
    if type(eps) is not float or eps != 1e-12:
        check_number("masked_edit_token_mean_loss", "eps", eps, least=0)
    weights = (foreground_weight, background_weight)
    background = _background("masked_edit_token_mean_loss", edit_mask, edit_mask_default, *weights)
    return _token_loss(
        "masked_edit_token_mean_loss",
        (model_pred, target, attention_mask, edit_mask, weighting),
        foreground_weight,
        background,
        reduction,
        normalizer=normalizer,
        loss=loss,
        delta=delta,
    )


def compute_loss_multi_resolution(
    model_pred: Tensor,
    target: Tensor,
    attention_mask: Tensor | None,
    edit_mask: Tensor | None = None,
    weighting: float | Tensor | None = None,
    *,
    normalizer: float | Tensor | None = None,
    loss: str = "mse",
    delta: float | Tensor = 1.0,
) -> Tensor:
    r"""Squared error over the valid tokens of a multi-resolution batch.

    .. math::
        L = \frac{\sum_{btc} a_{bt}\, w_{bt}\, \omega_{btc}\, (\hat y_{btc} - y_{btc})^2}
        {C \sum_{bt} a_{bt}}, \qquad
        w_{bt} = 2 m_{bt} + (1 - m_{bt}), \text{ or } 1 \text{ without an edit mask}

    The same number as ``masked_edit_token_mean_loss`` with its default weights:

    >>> torch.testing.assert_close(
    ...     compute_loss_multi_resolution(model_pred, target, attention_mask, edit_mask),
    ...     masked_edit_token_mean_loss(model_pred, target, attention_mask, edit_mask))

    Args:
        model_pred, target: ``[B, T, C]`` floating.
        attention_mask: ``[B, T]`` any dtype, a token counts where it is not 0. None keeps all.
        edit_mask: ``[B, T]`` in [0, 1].
        weighting: broadcastable to ``[B, T, C]``, or a number.
        normalizer, loss, delta: as in ``masked_edit_token_mean_loss``.

    Returns:
        ``[]`` float32 (float64); 0 where no token is kept.
    """
    background = _background("compute_loss_multi_resolution", edit_mask, "unit", 2.0, 1.0)
    return _token_loss(
        "compute_loss_multi_resolution",
        (model_pred, target, attention_mask, edit_mask, weighting),
        2.0,
        background,
        "mean",
        "Attention mask shape",
        normalizer=normalizer,
        loss=loss,
        delta=delta,
    )


class AttentionMaskMseLoss(torch.nn.Module):
    r"""``masked_edit_token_mean_loss`` as a module; also called ``ChannelInvariantTokenLoss``.

    .. math::
        L = \frac{\sum_{bt} a_{bt} \frac1C \sum_c \omega_{btc}\, w_{bt}\,
        (\hat y_{btc} - y_{btc})^2}{\sum_{bt} a_{bt}}

    It differs from ``F.mse_loss`` in what padding does (nothing), in weighting each token alike in
    rows of unequal length, and in the edit and element weights.

    >>> loss_fn = AttentionMaskMseLoss(foreground_weight=2.0, background_weight=1.0)
    >>> loss = loss_fn(model_pred, target, attention_mask, edit_mask)
    >>> w = 2.0 * edit_mask + 1.0 * (1 - edit_mask)
    >>> per_token = (w[..., None] * (model_pred - target) ** 2).mean(-1)
    >>> torch.testing.assert_close(loss, per_token[attention_mask.bool()].mean())

    Args:
        foreground_weight, background_weight: fg and bg, weights of edit mask 1 and 0.
        eps: accepted for compatibility; a count of at least 1 needs none.
        reduction: "mean" over kept tokens, "sum" over them, "none" (``[B, T]``), "sequence_mean",
            "sequence_sum" or "weighted_mean", as in ``masked_edit_token_mean_loss``.
        edit_mask_default: without an edit mask every token has weight 1 ("unit") or fg
            ("foreground").
        loss, delta: as in ``masked_edit_token_mean_loss``; attributes that may be set anew.
    """

    def __init__(
        self,
        foreground_weight: float = 2.0,
        background_weight: float = 1.0,
        eps: float = 1e-12,
        reduction: str = "mean",
        *,
        edit_mask_default: str = "unit",
        loss: str = "mse",
        delta: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        check_choice(
            "AttentionMaskMseLoss", "reduction", reduction, TOKEN_REDUCTIONS, "Invalid reduction: "
        )
        check_choice(
            "AttentionMaskMseLoss", "edit_mask_default", edit_mask_default, EDIT_MASK_DEFAULTS
        )
        _check_weights("AttentionMaskMseLoss", foreground_weight, background_weight)
        check_number("AttentionMaskMseLoss", "eps", eps, least=0)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        check_element_loss("AttentionMaskMseLoss", loss, delta)
        self.eps = eps
        self.loss = loss
        self.delta = delta
        self.reduction = reduction
        self.edit_mask_default = edit_mask_default

    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        attention_mask: Tensor | None = None,
        edit_mask: Tensor | None = None,
        weighting: float | Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Shapes, dtypes and normalizer as in ``masked_edit_token_mean_loss``; TypeError for other
        keywords."""
        if unknown:
            refuse_unknown("AttentionMaskMseLoss", unknown, _ARGUMENTS)
        name, weights = "AttentionMaskMseLoss", (self.foreground_weight, self.background_weight)
        return _token_loss(
            name,
            (model_pred, target, attention_mask, edit_mask, weighting),
            self.foreground_weight,
            _background(name, edit_mask, self.edit_mask_default, *weights),
            self.reduction,
            normalizer=normalizer,
            loss=self.loss,
            delta=self.delta,
        )

    def extra_repr(self) -> str:
        return (
            f"foreground_weight={self.foreground_weight}, "
            f"background_weight={self.background_weight}, "
            f"eps={self.eps}, reduction={self.reduction!r}{shown_loss(self)}"
        )


ChannelInvariantTokenLoss = AttentionMaskMseLoss
