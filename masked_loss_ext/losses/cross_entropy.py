# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy as a module."""

import inspect
from typing import Any

import torch

from .._checks import check_flags, check_tensor, refusal, shape_text
from ..ops import masked_cross_entropy_checks as checks
from ..ops.masked_cross_entropy import Number, masked_cross_entropy

# What comes with each batch; the function's other arguments are the module's.
_OF_A_CALL = ("logits", "target", "mask", "token_weight", "segment_ids", "normalizer")
_EVERY = inspect.signature(masked_cross_entropy).parameters
_SIGNATURE = inspect.Signature([p for name, p in _EVERY.items() if name not in _OF_A_CALL])
_DEFAULTS = {name: p.default for name, p in _SIGNATURE.parameters.items()}
_FLAGS = [name for name, p in _SIGNATURE.parameters.items() if p.annotation is bool]


def _with_the_signature(init: Any) -> Any:
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [self, *_SIGNATURE.parameters.values()]
    init.__signature__ = inspect.Signature(keywords, return_annotation=None)
    return init


class MaskedCrossEntropyLoss(torch.nn.Module):
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

    @_with_the_signature
    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        name = type(self).__name__
        given = _DEFAULTS | _SIGNATURE.bind(**keywords).arguments
        checks.check_every_option(name, given)
        checks.softcap_number(name, given["softcap"])
        checks.check_int64(name, "class_dim", given["class_dim"])
        check_flags(name, {flag: given[flag] for flag in _FLAGS})
        weight, temperature = given["weight"], given["temperature"]
        if weight is not None:
            check_tensor(name, "weight", weight)
            if weight.dim() != 1:
                raise refusal(name, "weight", "have one entry per class [V]", shape_text(weight))
        self.register_buffer("weight", weight)
        if isinstance(temperature, torch.Tensor):  # not looked at: it may be on a GPU
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            checks.check_scale(name, "temperature", temperature)
        for keyword, value in given.items():
            if keyword not in self._buffers:
                setattr(self, keyword, value)

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
        keywords = {keyword: getattr(self, keyword) for keyword in _DEFAULTS}
        if temperature is not None:
            keywords["temperature"] = temperature
        return masked_cross_entropy(
            logits,
            target,
            mask,
            token_weight=token_weight,
            segment_ids=segment_ids,
            normalizer=normalizer,
            **keywords,
        )

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        shown = []
        for keyword, default in _DEFAULTS.items():
            value = getattr(self, keyword)
            if isinstance(value, torch.Tensor):
                shown.append(f"{keyword}={shape_text(value)}")
            elif value != default:
                shown.append(f"{keyword}={value!r}")
        return ", ".join(shown)
