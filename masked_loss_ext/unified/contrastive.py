# SPDX-License-Identifier: BSD-3-Clause
"""ContrastiveLoss: InfoNCE, pairs with a margin, or triplets, of embeddings."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._checks import check_device, check_integers, check_rank, refusal, shape_text
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._options import Flag, LossModule, Number, Positive, Token, one_of
from ._rows import (
    check_features,
    cleaned,
    distances,
    masked_mean,
    row_mask,
    valid_rows,
    without_autocast,
)
from .experts import refuse_indices


@dataclass(eq=False, repr=False)
class ContrastiveLoss(LossModule):
    r"""Draws embeddings of a kind together and others apart.

    With embeddings :math:`x` (of length 1 where ``normalize_embeddings``),
    :math:`s_{ij} = x_i \cdot x_j / \tau`, :math:`d_{ij} = \lVert x_i - x_j \rVert` and margin
    :math:`\mu`:

    .. math::
        \text{infonce} = -\operatorname{mean}_{(i, j)} \log
            \frac{e^{s_{ij}}}{\sum_{a \ne i} e^{s_{ia}}}, \qquad
        \text{standard} = \tfrac12 \big( \operatorname{mean}_{+} d^2
            + \operatorname{mean}_{-} \max(0, \mu - d)^2 \big)

    .. math::
        \text{triplet} = \operatorname{mean}_i
            \max\big(0, \max_{+} d_{ij} - \min_{-} d_{ij} + \mu\big)

    An embedding is not its own rival in infonce. With labels the positives of i are all others of
    its label (supervised contrastive: the mean over them, then over all i that have one), the
    negatives those of another label; triplet takes the farthest positive and the nearest negative.

    >>> embeddings = torch.eye(2).repeat(2, 1)  # 0 and 2 are equal, 1 and 3 are
    >>> loss = ContrastiveLoss(temperature=1.0)(embeddings, torch.tensor([0, 1, 0, 1]))
    >>> torch.testing.assert_close(loss, torch.log(1 + 2 * torch.exp(torch.tensor(-1.0))))

    Where there is nothing to compare (no pair, no label twice) the loss is 0, attached to the
    graph. Embeddings that do not count are selected away, with a gradient of 0; they are read,
    though.

    Args:
        temperature: :math:`\tau > 0`, for infonce.
        margin: :math:`\mu`, for standard and triplet.
        loss_type: "infonce", "standard" or "triplet".
        normalize_embeddings: divide each embedding by its length first.
        ignore_index: embeddings with this label do not count.
    """

    temperature: Positive = 0.07
    margin: Number = 0.5
    loss_type: Annotated[
        str, one_of("infonce", "standard", "triplet", label="Unknown loss type: ")
    ] = "infonce"
    normalize_embeddings: Flag = True
    _: KW_ONLY
    ignore_index: Token = -100

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        positive_pairs: Tensor | None = None,
        negative_pairs: Tensor | None = None,
        *,
        embedding_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss ``[]``, float32 (float64 for float64 embeddings).

        Args:
            embeddings: ``[N, D]`` floating.
            labels: ``[N]`` integers; used where no pairs are given, and always by triplet.
            positive_pairs: ``[P, 2]`` integers, (anchor, positive) indices of embeddings.
            negative_pairs: ``[P, 2]`` integers, used by standard alone.
            embedding_mask: ``[N]``, embeddings count where it is not 0. None: all.

        Raises:
            ValueError: neither labels nor pairs (triplet: no labels), or a shape that does not fit.
            IndexError: a pair of which one is not in [0, N) (CPU).
        """
        self._check(embeddings, labels, positive_pairs, negative_pairs)
        valid = row_mask(self.function, embedding_mask, "embeddings", embeddings, "embedding_mask")
        if labels is not None:
            valid = valid_rows(labels, valid, self.ignore_index)
        # Under autocast too: bfloat16 similarities divided by 0.07 would be noise.
        with without_autocast(embeddings.device):
            x = cleaned(embeddings, valid)
            if self.normalize_embeddings:
                x = torch.nn.functional.normalize(x, dim=-1)
            if self.loss_type == "triplet":
                return self._triplet(x, labels, valid)
            by_pairs = positive_pairs is not None or negative_pairs is not None
            if self.loss_type == "standard":
                if by_pairs:
                    return self._standard_pairs(x, positive_pairs, negative_pairs, valid)
                return self._standard_labels(x, labels, valid)
            if positive_pairs is not None:
                return self._infonce_pairs(x, positive_pairs, valid)
            return self._infonce_labels(x, labels, valid)

    def _infonce_pairs(self, x, pairs, valid):
        anchor, positive = pairs.long().unbind(-1)
        similarity = x[anchor] @ x.T / self.temperature
        itself = anchor[:, None] == torch.arange(len(x), device=x.device)
        similarity = similarity.masked_fill(itself | ~valid, float("-inf"))
        counts = valid[anchor] & valid[positive] & (anchor != positive)
        return masked_cross_entropy(similarity, positive, counts)

    def _infonce_labels(self, x, labels, valid):
        same, _ = _relations(labels, valid)
        positives = same.sum(-1)
        has_positive = positives > 0
        similarity = x @ x.T / self.temperature
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        rivals = (valid & ~itself) | ~has_positive[:, None]  # a row of -inf alone has no gradient
        lse = similarity.masked_fill(~rivals, float("-inf")).logsumexp(-1)
        mean = torch.where(same, similarity, 0).sum(-1) / positives.clamp(min=1)
        return masked_mean(lse - mean, has_positive)

    def _standard_pairs(self, x, positive_pairs, negative_pairs, valid):
        total = x[:0].sum()
        for pairs, cost in ((positive_pairs, self._apart), (negative_pairs, self._near)):
            if pairs is not None:
                one, other = pairs.long().unbind(-1)
                distance = torch.linalg.vector_norm(x[one] - x[other], dim=-1)
                total = total + masked_mean(cost(distance), valid[one] & valid[other])
        return 0.5 * total

    def _standard_labels(self, x, labels, valid):
        same, different = _relations(labels, valid)
        distance = distances(x, x)
        return 0.5 * (
            masked_mean(self._apart(distance), same) + masked_mean(self._near(distance), different)
        )

    def _triplet(self, x, labels, valid):
        same, different = _relations(labels, valid)
        distance = distances(x, x)
        far = torch.finfo(distance.dtype).max
        pad = torch.nn.functional.pad  # so that there is a largest of no embeddings, too
        farthest = pad(torch.where(same, distance, 0), (0, 1)).amax(-1)
        nearest = pad(torch.where(different, distance, far), (0, 1), value=far).amin(-1)
        loss = (farthest - nearest + self.margin).relu()
        return masked_mean(loss, same.any(-1) & different.any(-1))

    def _apart(self, distance):
        return distance**2

    def _near(self, distance):
        return (self.margin - distance).relu() ** 2

    def _check(self, embeddings, labels, positive_pairs, negative_pairs):
        name = self.function
        check_features(name, "embeddings", embeddings)
        check_rank(name, "embeddings", embeddings, 2, "[N, D]")
        if labels is not None:
            check_integers(name, "labels", labels)
            check_device(name, "labels", labels, "embeddings", embeddings)
            if labels.shape != embeddings.shape[:1]:
                rule = f"have one entry per embedding of {shape_text(embeddings)}"
                raise refusal(name, "labels", rule, shape_text(labels))
        pairs = {"positive_pairs": positive_pairs, "negative_pairs": negative_pairs}
        for argument, tensor in pairs.items():
            if tensor is not None:
                check_integers(name, argument, tensor)
                check_device(name, argument, tensor, "embeddings", embeddings)
                if tensor.dim() != 2 or tensor.shape[1] != 2:
                    raise ValueError(f"{name}: {argument} must be [P, 2], got {shape_text(tensor)}")
                refuse_indices(name, argument, tensor, embeddings.shape[0], ", the embeddings")
        if labels is not None:
            return
        if self.loss_type == "triplet":
            raise ValueError(f"{name}: Labels required for triplet, got None")
        if positive_pairs is None and (negative_pairs is None or self.loss_type == "infonce"):
            raise ValueError(
                f"{name}: Labels required where positive_pairs are not given. Either pairs or "
                f"labels must be there for {self.loss_type}, got neither"
            )


def _relations(labels, valid):
    """[N, N]: of one label but not the same embedding; of different labels. Both must count."""
    both = valid[:, None] & valid
    equal = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return both & equal & ~itself, both & ~equal
