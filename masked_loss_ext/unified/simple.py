# SPDX-License-Identifier: BSD-3-Clause
"""Token losses that are one call of masked_cross_entropy."""

import torch

from .._checks import check_choice, check_number, check_tensor, shape_text
from ..reference.cross_entropy import focal_factor
from ._arguments import check_ignore_index, check_size, check_smoothing, check_tokens
from ._operators import cross_entropy
from ._rows import check_floating, reduced, torch_smoothing, valid_rows

_INPUTS = ("inputs", "targets")


class FocalLoss(torch.nn.Module):
    r"""Cross entropy that turns away from what is predicted well already.

    .. math:: \ell = \alpha_y (1 - p)^\gamma\, \mathrm{ce}, \qquad p = e^{-\mathrm{ce}}

    >>> loss = FocalLoss(alpha=0.5, gamma=2.0)(logits, labels)
    >>> ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    >>> torch.testing.assert_close(loss, (0.5 * (1 - torch.exp(-ce)) ** 2 * ce).mean())

    The mean is over the rows that count, whatever their alpha. With none it is 0, attached to the
    graph. Its derivative is finite at p = 1 for every gamma.

    Args:
        alpha: a number, or a tensor ``[V]`` of one weight per class (a buffer, without gradient);
            finite and not negative.
        gamma: at least 0; 0 is cross entropy.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target do not count.
    """

    def __init__(self, alpha=1.0, gamma=2.0, reduction="mean", *, ignore_index=-100):
        super().__init__()
        check_choice("FocalLoss", "reduction", reduction, ("mean", "sum", "none"))
        check_number("FocalLoss", "gamma", gamma, least=0)
        check_ignore_index("FocalLoss", ignore_index)
        if isinstance(alpha, torch.Tensor):
            _check_alpha(alpha)
            self.register_buffer("alpha", alpha)
        else:
            check_number("FocalLoss", "alpha", alpha, least=0)
            self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, inputs, targets, attention_mask=None):
        """The loss, float32 (float64 for float64 inputs): ``[]``, or of targets' shape for "none".

        Args:
            inputs: logits ``[N, V]`` or ``[B, S, V]``.
            targets: ``[N]`` or ``[B, S]`` integers.
            attention_mask: of targets' shape, a row counts where it is not 0. None: all.
        """
        weight = normalizer = None
        if isinstance(self.alpha, torch.Tensor):
            weight = self.alpha
            check_tokens("FocalLoss", _INPUTS, inputs, targets, attention_mask)
            if inputs.shape[-1] != weight.numel():
                raise ValueError(
                    f"FocalLoss: alpha must have one entry per class of inputs "
                    f"{shape_text(inputs)}, got {shape_text(weight)}"
                )
            if self.reduction == "mean":  # else the classes' weights would be divided by
                normalizer = valid_rows(targets, attention_mask, self.ignore_index).sum()
        loss = cross_entropy(
            "FocalLoss",
            _INPUTS,
            inputs,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
            weight=weight,
            focal_gamma=self.gamma,
            reduction=self.reduction,
            normalizer=normalizer,
        )
        return loss if weight is not None else self.alpha * loss

    def from_log_prob(self, log_prob, targets, valid):
        """As ``forward`` from log p of the targets [...], of rows that are valid (bool [...])."""
        ce = -log_prob
        rows = ce if self.gamma == 0 else ce * focal_factor(ce, self.gamma)
        if isinstance(self.alpha, torch.Tensor):
            rows = (
                rows
                * self.alpha.to(rows.dtype)[
                    torch.where(valid, targets, 0).clamp(0, self.alpha.numel() - 1)
                ]
            )
            return reduced(rows, valid, self.reduction)
        return self.alpha * reduced(rows, valid, self.reduction)

    def extra_repr(self):
        alpha = self.alpha
        alpha = shape_text(alpha) if isinstance(alpha, torch.Tensor) else alpha
        return f"alpha={alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


def _check_alpha(alpha):
    check_tensor("FocalLoss", "alpha", alpha)
    if alpha.dim() != 1 or not alpha.is_floating_point():
        raise ValueError(
            "FocalLoss: alpha must be a number or floating, of one entry per class [V], got "
            f"{shape_text(alpha)} of {alpha.dtype}"
        )
    if type(alpha) is torch.Tensor and alpha.device.type == "cpu" and not alpha.requires_grad:
        # NaN fits nothing
        if not ((alpha >= 0) & (alpha < float("inf"))).all():
            raise ValueError("FocalLoss: alpha must be finite and not negative, got other entries")


class LabelSmoothingLoss(torch.nn.Module):
    r"""Cross entropy with a target that leaves a little to each other class.

    .. math:: \ell = -\sum_j q_j \log p_j, \qquad q_y = 1 - \varepsilon,\quad
        q_{j \ne y} = \varepsilon / (V - 1)

    ``label_smoothing`` of PyTorch gives the target its share of :math:`\varepsilon'`, too, so
    :math:`\varepsilon' = \varepsilon V / (V - 1)` is the same:

    >>> expected = F.cross_entropy(
    ...     logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1 * 7 / 6)
    >>> torch.testing.assert_close(LabelSmoothingLoss(7)(logits, labels), expected)

    The mean is over the rows that count; with none it is 0, attached to the graph. With one class
    there is no other to share with, and nothing is smoothed.

    Args:
        num_classes: V.
        smoothing: :math:`\varepsilon` in [0, 1 - 1 / V], up to an even distribution.
        ignore_index: rows with this target do not count.
    """

    def __init__(self, num_classes, smoothing=0.1, *, ignore_index=-100):
        super().__init__()
        check_size("LabelSmoothingLoss", "num_classes", num_classes)
        most = 1 - 1 / num_classes if num_classes > 1 else 1
        check_smoothing("LabelSmoothingLoss", smoothing, most, "smoothing")
        check_ignore_index("LabelSmoothingLoss", ignore_index)
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.ignore_index = ignore_index

    def forward(self, inputs, targets, attention_mask=None):
        """The mean ``[]``, float32 (float64 for float64 inputs).

        Args:
            inputs: logits ``[N, V]`` or ``[..., V]``.
            targets: ``[N]`` or ``[...]`` integers.
            attention_mask: of targets' shape, a row counts where it is not 0. None: all.
        """
        check_floating("LabelSmoothingLoss", "inputs", inputs, self.num_classes, "num_classes")
        return cross_entropy(
            "LabelSmoothingLoss",
            _INPUTS,
            inputs,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
            label_smoothing=min(torch_smoothing(self.smoothing, self.num_classes), 1.0),
        )

    def extra_repr(self):
        return f"num_classes={self.num_classes}, smoothing={self.smoothing}"


class PerplexityLoss(torch.nn.Module):
    r"""Cross entropy and its exponential.

    .. math:: L = -\frac{1}{K} \sum_n \log p_{n, y_n}, \qquad \text{perplexity} = e^L

    >>> out = PerplexityLoss()(logits, labels)
    >>> torch.testing.assert_close(
    ...     out["loss"], F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    >>> torch.testing.assert_close(out["perplexity"], out["loss"].exp())

    With no row that counts: 0 (attached to the graph) and 1.

    Args:
        ignore_index: rows with this target do not count.
    """

    def __init__(self, ignore_index=-100):
        super().__init__()
        check_ignore_index("PerplexityLoss", ignore_index)
        self.ignore_index = ignore_index

    def forward(self, logits, targets, attention_mask=None):
        """dict of ``loss`` and ``perplexity``, ``[]``, float32 (float64 for float64 logits).

        Args:
            logits: ``[..., V]`` floating.
            targets: ``[...]`` integers.
            attention_mask: of targets' shape, a row counts where it is not 0. None: all.
        """
        loss = cross_entropy(
            "PerplexityLoss",
            ("logits", "targets"),
            logits,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
        )
        return {"loss": loss, "perplexity": loss.exp()}

    def extra_repr(self):
        return f"ignore_index={self.ignore_index}"
