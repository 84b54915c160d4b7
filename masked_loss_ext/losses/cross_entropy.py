# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy as a module."""

import torch

from .._aggregate import REDUCTIONS
from .._checks import check_choice, check_flags, check_tensor, shape_text
from ..ops import masked_cross_entropy_checks as checks
from ..ops.masked_cross_entropy import masked_cross_entropy


class MaskedCrossEntropyLoss(torch.nn.Module):
    r"""``masked_cross_entropy`` as a module that keeps the keywords.

    .. math::
        z = \mathrm{softcap}(x) / T,\quad \mathrm{softcap}(x) = c \tanh(x / c),\qquad
        \mathrm{lse} = \log\sum_c e^{z_c},\quad \mathrm{ce} = \mathrm{lse} - z_y,\quad
        p = e^{-\mathrm{ce}}

    .. math::
        \ell = \omega \Big( \big((1 - \varepsilon)\, w_y\, \mathrm{ce}
        + \tfrac{\varepsilon}{V} \sum_c w_c\, (\mathrm{lse} - z_c)\big)\, (1 - p)^\gamma
        + \lambda\, \mathrm{lse}^2 \Big),\qquad
        L = \frac{\sum_{n\ \mathrm{counts}} \ell_n}{\mathrm{denominator}}

    with :math:`x` the logits of one row, :math:`T` the temperature, :math:`y` the target,
    :math:`\varepsilon` label_smoothing, :math:`w` the class weights, :math:`\gamma` focal_gamma,
    :math:`\lambda` z_loss and :math:`\omega` the row's token_weight. A row counts where the mask is
    on and its target is not ignore_index; any other is not read, is 0 in "none" and has gradient 0.

    >>> loss_fn = MaskedCrossEntropyLoss(label_smoothing=0.1)
    >>> a = attention_mask.bool()
    >>> expected = F.cross_entropy(logits[a], labels[a], label_smoothing=0.1)
    >>> torch.testing.assert_close(loss_fn(logits, labels, attention_mask), expected)

    How the keywords meet:

    - Smoothing spreads :math:`\varepsilon` evenly over all V classes, the target among them, and
      weighs each by its own class weight, as ``F.cross_entropy`` does. :math:`p`, and with it the
      focal factor, is the target's own probability, without smoothing or weight.
    - The focal factor covers the smoothed, weighted cross entropy; z-loss stands beside it, and is
      multiplied by neither class weight nor focal factor. token_weight multiplies all of it.
    - The denominator of "mean" is ``normalizer`` where given, else the number of rows that count
      or, with class weights, the sum of their :math:`w_y`, as in PyTorch. token_weight, smoothing,
      focal factor and z-loss never change it. Where it is 0 the loss is 0, attached to the graph.
      "sequence_mean", "sequence_sum" and "weighted_mean" count as ``aggregate_tokens`` tells, a row
      with its :math:`w_y` where there are class weights; "weighted_mean" with token_weight, too.
    - temperature and softcap change :math:`z`, so everything: loss, z-loss and statistics.
    - A logit of :math:`-\infty` (a banned class) has probability and gradient 0. With smoothing its
      share of the loss is infinite, as in PyTorch, unless its class weight is 0.

    An untrained model is near :math:`\ln V`: 10.825 for a vocabulary of 50257.

    Args:
        ignore_index: rows with this target do not count.
        weight: ``[V]`` class weights, a buffer; it gets no gradient.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        temperature: T > 0, a number or a 0-d tensor (a buffer that is not saved).
        softcap: c > 0; None or infinity for none.
        z_loss: :math:`\lambda \ge 0`.
        focal_gamma: :math:`\gamma \ge 0`.
        shift: k scores position t against target t + k, without a copy: 1 for the labels of a
            causal language model. mask, ignore_index and token_weight are those of the target.
        reduction: "mean", "sum", "none" (``[...]``), "sequence_mean", "sequence_sum" or
            "weighted_mean".
        class_dim: the dimension of the classes in logits, 1 for ``[N, C, d1, ...]``.
        inplace_backward: write the gradient over the logits.
        gradient_in_forward: make the gradient together with the loss, reading the logits once less;
            what that takes is told at ``masked_cross_entropy``.
        return_stats: return (loss, ``RowStatistics``).
    """

    def __init__(
        self,
        *,
        ignore_index=-100,
        weight=None,
        label_smoothing=0.0,
        temperature=1.0,
        softcap=None,
        z_loss=0.0,
        focal_gamma=0.0,
        shift=0,
        reduction="mean",
        class_dim=-1,
        inplace_backward=False,
        gradient_in_forward=False,
        return_stats=False,
    ):
        super().__init__()
        name = type(self).__name__
        check_choice(name, "reduction", reduction, REDUCTIONS)
        checks.check_options(name, ignore_index, label_smoothing, z_loss, focal_gamma, shift)
        checks.check_shift(name, shift)
        checks.check_int64(name, "ignore_index", ignore_index)
        checks.softcap_number(name, softcap)
        checks.check_int64(name, "class_dim", class_dim)
        flags = {"inplace_backward": inplace_backward, "gradient_in_forward": gradient_in_forward}
        check_flags(name, flags | {"return_stats": return_stats})
        if weight is not None:
            check_tensor(name, "weight", weight)
            if weight.dim() != 1:
                raise ValueError(
                    f"{name}: weight must have one entry per class [V], got {shape_text(weight)}"
                )
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing
        if isinstance(temperature, torch.Tensor):  # not looked at: it may be on a GPU
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            checks.check_scale(name, "temperature", temperature)
            self.temperature = temperature
        self.softcap = softcap
        self.z_loss = z_loss
        self.focal_gamma = focal_gamma
        self.shift = shift
        self.reduction = reduction
        self.class_dim = class_dim
        self.inplace_backward = inplace_backward
        self.gradient_in_forward = gradient_in_forward
        self.return_stats = return_stats

    def forward(
        self, logits, target, mask=None, *, token_weight=None, segment_ids=None, normalizer=None
    ):
        """The loss, or (loss, ``RowStatistics``).

        Args:
            logits: ``[..., V]`` floating.
            target: ``[...]`` integers, a class or ignore_index.
            mask: ``[...]`` any dtype, a row counts where it is not 0. None: all.
            token_weight: ``[...]`` floating, may be fractional and may need a gradient. It must be
                given for "weighted_mean".
            segment_ids: ``[...]`` integers, for packed documents: with a shift, position and target
                must share one.
            normalizer: what means and "sequence_sum" divide by instead of their own count: the
                number of tokens (of sequences, of weights) of all micro-batches of one step.
        """
        return masked_cross_entropy(
            logits,
            target,
            mask,
            ignore_index=self.ignore_index,
            weight=self.weight,
            token_weight=token_weight,
            label_smoothing=self.label_smoothing,
            temperature=self.temperature,
            softcap=self.softcap,
            z_loss=self.z_loss,
            focal_gamma=self.focal_gamma,
            shift=self.shift,
            segment_ids=segment_ids,
            reduction=self.reduction,
            normalizer=normalizer,
            class_dim=self.class_dim,
            inplace_backward=self.inplace_backward,
            gradient_in_forward=self.gradient_in_forward,
            return_stats=self.return_stats,
        )

    def extra_repr(self):
        """What differs from the defaults."""
        shown = []
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                shown.append(f"{name}={shape_text(value)}")
            elif value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


_DEFAULTS = {
    "ignore_index": -100,
    "weight": None,
    "label_smoothing": 0.0,
    "temperature": 1.0,
    "softcap": None,
    "z_loss": 0.0,
    "focal_gamma": 0.0,
    "shift": 0,
    "reduction": "mean",
    "class_dim": -1,
    "inplace_backward": False,
    "gradient_in_forward": False,
    "return_stats": False,
}
