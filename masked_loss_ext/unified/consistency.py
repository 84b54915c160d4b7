# SPDX-License-Identifier: BSD-3-Clause
"""ConsistencyLoss: a loss between two outputs for one input."""

import torch

from .._checks import check_choice, check_device, check_flags, check_number, shape_text
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._rows import check_floating, cleaned, masked_mean, row_mask

_NAME = "ConsistencyLoss"


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

    With no row left it is 0, attached to the graph. Rows that are left out are selected away: their
    NaN reaches neither value nor gradient, and their gradient is 0. They are read, though: "never
    read" is what the row operators promise.

    Args:
        consistency_type: "mse", "kl" or "ce".
        temperature: T > 0.
        threshold: see use_threshold, in [0, 1]; else not used.
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
        known = ("mse", "kl", "ce")
        check_choice(
            _NAME, "consistency_type", consistency_type, known, "Unknown consistency type: "
        )
        check_number(_NAME, "temperature", temperature, above=0)
        check_number(_NAME, "threshold", threshold, least=0, most=1)
        check_flags(_NAME, {"use_threshold": use_threshold, "mean_over_all": mean_over_all})
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
        check_floating(_NAME, "outputs_original", outputs_original)
        check_floating(_NAME, "outputs_augmented", outputs_augmented)
        if outputs_original.dim() == 0:
            raise ValueError(f"{_NAME}: outputs_original must be logits [..., V], got []")
        if outputs_augmented.shape != outputs_original.shape:
            raise ValueError(
                f"{_NAME}: outputs_augmented must have the shape of outputs_original "
                f"{shape_text(outputs_original)}, got {shape_text(outputs_augmented)}"
            )
        check_device(
            _NAME, "outputs_augmented", outputs_augmented, "outputs_original", outputs_original
        )
        valid = row_mask(
            _NAME, confidence_mask, "outputs_original", outputs_original, "confidence_mask"
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
        return loss * valid.sum() / max(rows, 1) if self.mean_over_all else loss

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
