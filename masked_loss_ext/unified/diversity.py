# SPDX-License-Identifier: BSD-3-Clause
"""DiversityLoss: how alike the outputs of several experts are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._checks import check_device, shape_text
from ._options import LossModule, Number, one_of
from ._rows import attached_zero, check_features, cleaned, distances, row_mask

_EPS = 1e-8  # of F.cosine_similarity


@dataclass(eq=False, repr=False)
class DiversityLoss(LossModule):
    r"""Similarity of the outputs of experts, averaged over pairs of experts and over rows.

    .. math:: L = w\, \frac{2}{E(E-1)} \sum_{i<j} s_{ij}, \qquad
        s_{ij} = \frac1N \sum_n \cos(x_{in}, x_{jn}),\quad
        \Big(1 + \frac1N \sum_n \lVert x_{in} - x_{jn} \rVert\Big)^{-1}
        \ \text{or}\ \frac1N \sum_n x_{in} \cdot x_{jn}

    >>> expected = (F.cosine_similarity(x, y).mean() + F.cosine_similarity(x, z).mean()
    ...             + F.cosine_similarity(y, z).mean()) / 3
    >>> torch.testing.assert_close(DiversityLoss()([x, y, z]), expected)

    With fewer than two experts, or no row that counts, it is 0. Its minimum is reached by outputs
    that point away from each other (the cosine of two is then -1), not by orthogonal ones.

    What the mask excludes is selected away: its NaN reaches neither value nor gradient, and its
    gradient is 0. It is read, though: "never read" is what the row operators promise.

    Args:
        similarity_metric: "cosine", "l2" or "dot".
        diversity_weight: w.
    """

    similarity_metric: Annotated[str, one_of("cosine", "l2", "dot")] = "cosine"
    diversity_weight: Number = 1.0

    def forward(
        self, expert_outputs: Sequence[Tensor] | Tensor, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The loss ``[]``, float32 (float64 for float64 outputs).

        Args:
            expert_outputs: a list of E tensors ``[N, H]`` (or ``[..., H]``), floating, or one
                tensor ``[E, N, H]``.
            attention_mask: ``[N]``, or as many entries; rows count where it is not 0. None: all.

        Raises:
            ValueError: no expert at all, or outputs that differ in shape.
        """
        return self.diversity_weight * self.similarity(expert_outputs, attention_mask)

    def similarity(
        self, expert_outputs: Sequence[Tensor] | Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The loss without its weight."""
        _check_experts(self.function, expert_outputs)
        first = expert_outputs[0]
        if len(expert_outputs) < 2:
            return attached_zero(first)
        valid = row_mask(self.function, attention_mask, "expert_outputs[0]", first)
        stacked = expert_outputs
        if not isinstance(stacked, Tensor):
            stacked = torch.stack([x.reshape(-1, first.shape[-1]) for x in expert_outputs])
        stacked = cleaned(stacked.reshape(len(expert_outputs), -1, first.shape[-1]), valid)
        if self.similarity_metric == "l2":
            return _closeness(stacked, valid)
        if self.similarity_metric == "cosine":
            stacked = torch.nn.functional.normalize(stacked, dim=-1, eps=_EPS)
        return _mean_product(stacked, valid)


def _mean_product(stacked, valid):
    """Mean over pairs and rows of the products of ``[E, N, H]``, rows that do not count being 0.

    Each expert meets the sum of those before it: E products instead of E (E - 1) / 2, and none of
    the cancellation of (|sum|^2 - sum of |x|^2) / 2. No matrix product: autocast would round it.
    """
    experts = stacked.shape[0]
    before = stacked.cumsum(0)[:-1]
    pairs = experts * (experts - 1) // 2
    return (stacked[1:] * before).sum() / (pairs * valid.sum().clamp(min=1))


def _closeness(stacked, valid):
    """Mean over pairs of 1 / (1 + mean distance)."""
    experts = stacked.shape[0]
    rows = stacked.transpose(0, 1)
    count = valid.sum()
    distance = distances(rows, rows).sum(0) / count.clamp(min=1)
    upper = torch.ones_like(distance, dtype=torch.bool).triu(1)
    total = torch.where(upper, 1 / (1 + distance), 0).sum() / (experts * (experts - 1) // 2)
    return torch.where(count > 0, total, 0)


def _check_experts(function, expert_outputs):
    if not isinstance(expert_outputs, (list, tuple, Tensor)):
        raise TypeError(
            f"{function}: expert_outputs must be a list of tensors, got "
            f"{type(expert_outputs).__name__}"
        )
    if isinstance(expert_outputs, Tensor):
        check_features(function, "expert_outputs", expert_outputs)
        if expert_outputs.dim() < 3:
            raise ValueError(
                f"{function}: expert_outputs must be [E, N, H], got {shape_text(expert_outputs)}"
            )
    if len(expert_outputs) == 0:
        raise ValueError(f"{function}: expert_outputs must have at least one expert, got none")
    for i, output in enumerate(expert_outputs):
        name = f"expert_outputs[{i}]"
        check_features(function, name, output)
        if output.dim() < 2 or output.shape != expert_outputs[0].shape:
            raise ValueError(
                f"{function}: {name} must be [N, H] like the others, "
                f"{shape_text(expert_outputs[0])}, got {shape_text(output)}"
            )
        check_device(function, name, output, "expert_outputs[0]", expert_outputs[0])
