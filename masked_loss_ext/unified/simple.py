# SPDX-License-Identifier: BSD-3-Clause
"""Token losses that are one call of masked_cross_entropy, and a loss between two outputs."""

import torch

from .._checks import check_choice, check_device, check_mask, check_tensor, shape_text
from ..ops.masked_cross_entropy import masked_cross_entropy
from ..reference.cross_entropy import focal_factor
from ._rows import (
    check_floating,
    cleaned,
    masked_mean,
    reduced,
    row_mask,
    torch_smoothing,
    valid_rows,
)


class FocalLoss(torch.nn.Module):
    r"""Cross entropy that turns away from what is predicted well already.

    .. math:: \ell = \alpha_y (1 - p)^\gamma\, \mathrm{ce}, \qquad p = e^{-\mathrm{ce}}

    >>> loss = FocalLoss(alpha=0.5, gamma=2.0)(logits, labels)
    >>> ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    >>> torch.testing.assert_close(loss, (0.5 * (1 - torch.exp(-ce)) ** 2 * ce).mean())

    The mean is over the rows that count, whatever their alpha. With none it is 0, attached to the
    graph. Its derivative is finite at p = 1 for every gamma.

    Args:
        alpha: a number, or a tensor ``[V]`` of one weight per class (a buffer, without gradient).
        gamma: at least 0; 0 is cross entropy.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target do not count.
    """

    def __init__(self, alpha=1.0, gamma=2.0, reduction="mean", *, ignore_index=-100):
        super().__init__()
        check_choice("FocalLoss", "reduction", reduction, ("mean", "sum", "none"))
        if not gamma >= 0:
            raise ValueError(f"FocalLoss: gamma must be at least 0, got {gamma}")
        if isinstance(alpha, torch.Tensor):
            if alpha.dim() != 1:
                raise ValueError(
                    "FocalLoss: alpha must be a number or have one entry per class [V], got "
                    f"{shape_text(alpha)}"
                )
            self.register_buffer("alpha", alpha)
        else:
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
            if self.reduction == "mean":  # else the classes' weights would be divided by
                check_tensor("FocalLoss", "targets", targets)
                check_mask(
                    "FocalLoss", "attention_mask", attention_mask, "targets", targets, targets.dim()
                )
                normalizer = valid_rows(targets, attention_mask, self.ignore_index).sum()
        loss = masked_cross_entropy(
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
        most = 1 - 1 / num_classes if num_classes > 1 else 1.0
        if not 0 <= smoothing <= most:
            raise ValueError(
                "LabelSmoothingLoss: smoothing must be in [0, 1 - 1 / num_classes = "
                f"{most:g}], got {smoothing}"
            )
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
        return masked_cross_entropy(
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
        self.ignore_index = ignore_index

    def forward(self, logits, targets, attention_mask=None):
        """dict of ``loss`` and ``perplexity``, ``[]``, float32 (float64 for float64 logits).

        Args:
            logits: ``[..., V]`` floating.
            targets: ``[...]`` integers.
            attention_mask: of targets' shape, a row counts where it is not 0. None: all.
        """
        loss = masked_cross_entropy(logits, targets, attention_mask, ignore_index=self.ignore_index)
        return {"loss": loss, "perplexity": loss.exp()}

    def extra_repr(self):
        return f"ignore_index={self.ignore_index}"


class ConsistencyLoss(torch.nn.Module):
    r"""How far the output for an augmented input is from that for the original.

    With :math:`p` of the original logits over T, :math:`q` of the augmented ones, per row

    .. math:: \text{mse} = \frac1V \sum_c (p_c - q_c)^2, \qquad
        \text{kl} = \sum_c q_c \ln \frac{q_c}{p_c}, \qquad
        \text{ce} = -\ln \mathrm{softmax}(\text{augmented})_{\arg\max p}

    then the mean over the rows that ``confidence_mask`` keeps. ce takes the logits without T.
    Gradients flow into both outputs, but for ce, which takes from the original a label alone.

    >>> p, q = x.softmax(-1), y.softmax(-1)
    >>> torch.testing.assert_close(ConsistencyLoss()(x, y), F.mse_loss(p, q))
    >>> kl = F.kl_div(p.log(), q, reduction="batchmean")
    >>> torch.testing.assert_close(ConsistencyLoss("kl")(x, y), kl)

    With no row left it is 0, attached to the graph.

    Args:
        consistency_type: "mse", "kl" or "ce".
        temperature: T > 0.
        threshold: see use_threshold; else not used.
        use_threshold: keep only the rows of which the original is sure: max p >= threshold.
        mean_over_all: divide by the number of all rows, not of those that are kept.
    """

    def __init__(
        self,
        consistency_type="mse",
        temperature=1.0,
        threshold=0.95,
        *,
        use_threshold=False,
        mean_over_all=False,
    ):
        super().__init__()
        name = "ConsistencyLoss"
        known = ("mse", "kl", "ce")
        check_choice(
            name, "consistency_type", consistency_type, known, "Unknown consistency type: "
        )
        if not temperature > 0:
            raise ValueError(f"{name}: temperature must be positive, got {temperature}")
        self.consistency_type = consistency_type
        self.temperature = temperature
        self.threshold = threshold
        self.use_threshold = use_threshold
        self.mean_over_all = mean_over_all

    def forward(self, outputs_original, outputs_augmented, confidence_mask=None):
        """The loss ``[]``, float32 (float64 for float64 outputs).

        Args:
            outputs_original, outputs_augmented: logits ``[..., V]``, one shape.
            confidence_mask: ``[...]``, rows count where it is not 0. None: all.
        """
        name = "ConsistencyLoss"
        check_floating(name, "outputs_original", outputs_original)
        check_floating(name, "outputs_augmented", outputs_augmented)
        if outputs_augmented.shape != outputs_original.shape:
            raise ValueError(
                f"{name}: outputs_augmented must have the shape of outputs_original "
                f"{shape_text(outputs_original)}, got {shape_text(outputs_augmented)}"
            )
        check_device(
            name, "outputs_augmented", outputs_augmented, "outputs_original", outputs_original
        )
        valid = row_mask(
            name, confidence_mask, "outputs_original", outputs_original, "confidence_mask"
        )
        classes = outputs_original.shape[-1]
        original, augmented = (
            cleaned(x.reshape(-1, classes), valid) for x in (outputs_original, outputs_augmented)
        )
        rows = valid.numel()
        if self.use_threshold:
            sure = (original.detach() / self.temperature).softmax(-1).amax(-1) >= self.threshold
            valid = valid & sure
        loss = masked_mean(self._rows(original, augmented), valid)
        return loss * (valid.sum() / max(rows, 1)) if self.mean_over_all else loss

    def _rows(self, original, augmented):
        if self.consistency_type == "ce":
            label = original.argmax(-1)
            return masked_cross_entropy(augmented, label, reduction="none")
        log_p = (original / self.temperature).log_softmax(-1)
        log_q = (augmented / self.temperature).log_softmax(-1)
        q = log_q.exp()
        if self.consistency_type == "mse":
            return ((log_p.exp() - q) ** 2).mean(-1)
        possible = q > 0  # a banned class: 0 * (-inf - -inf) is NaN, its term is 0
        return (q * (torch.where(possible, log_q, 0) - torch.where(possible, log_p, 0))).sum(-1)

    def extra_repr(self):
        return (
            f"consistency_type={self.consistency_type!r}, temperature={self.temperature}, "
            f"threshold={self.threshold}"
        )
