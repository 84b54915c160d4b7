# SPDX-License-Identifier: BSD-3-Clause
"""ConsistencyLoss: a loss between two outputs for one input."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._checks import check_prediction
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._options import Flag, LossModule, Positive, Share, one_of
from ._rows import cleaned, masked_mean, row_mask


@dataclass(eq=False, repr=False)
class ConsistencyLoss(LossModule):
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

    With no row left it is 0, attached to the graph. Rows that are left out are selected away, with
    a gradient of 0; they are read, though.

    Args:
        consistency_type: "mse", "kl" or "ce".
        temperature: T > 0.
        threshold: see use_threshold, in [0, 1]; else not used.
        use_threshold: keep only the rows of which the original is sure: max p >= threshold.
        mean_over_all: divide by the number of all rows, not of those that are kept.
    """

    consistency_type: Annotated[
        str, one_of("mse", "kl", "ce", label="Unknown consistency type: ")
    ] = "mse"
    temperature: Positive = 1.0
    threshold: Share = 0.95
    _: KW_ONLY
    use_threshold: Flag = False
    mean_over_all: Flag = False

    def forward(
        self,
        outputs_original: Tensor,
        outputs_augmented: Tensor,
        confidence_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss ``[]``, float32 (float64 for float64 outputs).

        Args:
            outputs_original, outputs_augmented: logits ``[..., V]``, one shape.
            confidence_mask: ``[...]``, rows count where it is not 0. None: all.
        """
        name, first, second = self.function, "outputs_original", "outputs_augmented"
        check_prediction(name, first, outputs_original, second, outputs_augmented)
        if outputs_original.dim() == 0:
            raise ValueError(f"{name}: {first} must be logits [..., V], got []")
        valid = row_mask(name, confidence_mask, first, outputs_original, "confidence_mask")
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
