# SPDX-License-Identifier: BSD-3-Clause
"""Token losses that are one call of masked_cross_entropy."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._checks import check_number, check_tensor, refusal, shape_text
from ..reference.cross_entropy import focal_factor
from ._options import LossModule, NotNegative, Share, Size, Token, check_smoothing, one_of
from ._rows import check_features, check_tokens, cross_entropy, reduced, torch_smoothing, valid_rows

_INPUTS = ("inputs", "targets")


@dataclass(eq=False, repr=False)
class FocalLoss(LossModule):
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

    alpha: float | Tensor = 1.0
    gamma: NotNegative = 2.0
    reduction: Annotated[str, one_of("mean", "sum", "none")] = "mean"
    _: KW_ONLY
    ignore_index: Token = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, Tensor):
            _check_alpha(self.function, self.alpha)
            self.register_buffer("alpha", self.__dict__.pop("alpha"))
        else:
            check_number(self.function, "alpha", self.alpha, least=0)

    def forward(
        self, inputs: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The loss, float32 (float64 for float64 inputs): ``[]``, or of targets' shape for "none".

        Args:
            inputs: logits ``[N, V]`` or ``[B, S, V]``.
            targets: ``[N]`` or ``[B, S]`` integers.
            attention_mask: of targets' shape, a size of 1 standing for any; on where not 0.
        """
        weight = normalizer = None
        if isinstance(self.alpha, Tensor):
            weight = self.alpha
            check_tokens(self.function, _INPUTS, inputs, targets, attention_mask)
            if inputs.shape[-1] != weight.numel():
                rule = f"have one entry per class of inputs {shape_text(inputs)}"
                raise refusal(self.function, "alpha", rule, shape_text(weight))
            if self.reduction == "mean":  # else the classes' weights would be divided by
                normalizer = valid_rows(targets, attention_mask, self.ignore_index).sum()
        loss = cross_entropy(
            self.function,
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

    def from_log_prob(self, log_prob: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """As ``forward`` from log p of the targets [...], of rows that are valid (bool [...])."""
        ce = -log_prob
        rows = ce if self.gamma == 0 else ce * focal_factor(ce, self.gamma)
        if not isinstance(self.alpha, Tensor):
            return self.alpha * reduced(rows, valid, self.reduction)
        classes = torch.where(valid, targets, 0).clamp(0, self.alpha.numel() - 1)
        return reduced(rows * self.alpha.to(rows.dtype)[classes], valid, self.reduction)


del FocalLoss.alpha  # the default: as an attribute of the class it would hide the buffer


def _check_alpha(function, alpha):
    check_tensor(function, "alpha", alpha)
    if alpha.dim() != 1 or not alpha.is_floating_point():
        got = f"{shape_text(alpha)} of {alpha.dtype}"
        raise refusal(function, "alpha", "be a number or floating, of one entry per class [V]", got)
    if type(alpha) is Tensor and alpha.device.type == "cpu" and not alpha.requires_grad:
        # NaN fits nothing
        if not ((alpha >= 0) & (alpha < float("inf"))).all():
            raise refusal(function, "alpha", "be finite and not negative", "other entries")


@dataclass(eq=False, repr=False)
class LabelSmoothingLoss(LossModule):
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

    num_classes: Size
    smoothing: Share = 0.1
    _: KW_ONLY
    ignore_index: Token = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.function, "smoothing", self.smoothing, self.num_classes)

    def forward(
        self, inputs: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The mean ``[]``, float32 (float64 for float64 inputs).

        Args:
            inputs: logits ``[N, V]`` or ``[..., V]``.
            targets: ``[N]`` or ``[...]`` integers.
            attention_mask: of targets' shape, a size of 1 standing for any; on where not 0.
        """
        check_features(self.function, "inputs", inputs, self.num_classes, "num_classes")
        return cross_entropy(
            self.function,
            _INPUTS,
            inputs,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
            label_smoothing=torch_smoothing(self.smoothing, self.num_classes),
        )


@dataclass(eq=False, repr=False)
class PerplexityLoss(LossModule):
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

    ignore_index: Token = -100

    def forward(
        self, logits: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """dict of ``loss`` and ``perplexity``, ``[]``, float32 (float64 for float64 logits).

        Args:
            logits: ``[..., V]`` floating.
            targets: ``[...]`` integers.
            attention_mask: of targets' shape, a size of 1 standing for any; on where not 0.
        """
        loss = cross_entropy(
            self.function,
            ("logits", "targets"),
            logits,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
        )
        return {"loss": loss, "perplexity": loss.exp()}
