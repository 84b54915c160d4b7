# SPDX-License-Identifier: BSD-3-Clause
"""Penalties on repeated n-grams and on runs of one token: of the data, or of the model."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_mask, check_number
from ..ops.masked_cross_entropy import row_statistics
from ._options import Flag, LossModule, Number, PenaltyOn, Size, Token
from ._penalties import unlikelihood
from ._rows import check_features, masked_mean
from ._tokens import (
    Needs,
    Read,
    Rows,
    check_logits,
    check_vocabulary,
    document_counts,
    document_links,
    of_one_document,
    read,
    rows_of,
)


@dataclass(eq=False, repr=False)
class NGramRepetitionPenalty(LossModule):
    r"""Repeated n-grams, and how far predictions are from uniform.

    .. math::
        \text{ngram} = w\, \frac{\#\{\text{unordered pairs of equal windows of one row}\}}
        {\#\{\text{windows}\}}, \qquad
        \text{diversity} = w\, \frac{\sum_{bs} a_{bs} (1 - H(p_{bs}) / \ln V)}{\sum_{bs} a_{bs}}

    A window is n consecutive positions that all count (mask on, target not ignore_index): a masked
    one breaks it. H is the entropy of softmax(logits).

    >>> penalty = NGramRepetitionPenalty(ngram_size=2, penalty_weight=0.1, vocab_size=7)
    >>> penalty.compute_ngram_repetition_penalty(torch.tensor([[1, 1, 1, 1, 2]]))
    tensor(0.0750)
    >>> out = penalty(logits, labels, attention_mask)
    >>> log_p = logits.log_softmax(-1)[attention_mask.bool()]
    >>> H, largest = -(log_p.exp() * log_p).sum(-1), torch.tensor(7.0).log()
    >>> torch.testing.assert_close(out["diversity_penalty"], 0.1 * (1 - H / largest).mean())

    With ``penalty_on="targets"`` the n-gram term is a statistic of the *data*: no weight of a model
    changes it and it has no gradient. What trains is the diversity term alone, and it pulls
    predictions toward uniform. ``penalty_on="model"`` replaces the n-gram term by one that can
    train: w times the average of :math:`-\log(1 - p_t(c))` over the pairs (t, c) in which class c,
    said at t, would complete an n-gram that stands earlier in the same row, and is not the target.

    Args:
        ngram_size: n.
        penalty_weight: w of both terms.
        vocab_size: V, the last dimension of the logits.
        ignore_index: tokens that do not count.
        penalty_on: "targets" or "model".
    """

    ngram_size: Size = 3
    penalty_weight: Number = 0.1
    vocab_size: Size = 50257
    ignore_index: Token = -100
    _: KW_ONLY
    penalty_on: PenaltyOn = "targets"

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """Both terms, weighted.

        Args:
            logits, targets, attention_mask, segment_ids: as in ``UnifiedLoss``. Each document
                repeats only itself, as if it were a row.

        Returns:
            dict: "ngram_penalty", "diversity_penalty" and their sum "total_repetition_penalty", []
            float32 (float64 for float64 logits), and the number "penalty_weight".
        """
        name = self.function
        rows = rows_of(self, targets, attention_mask, segment_ids)
        check_logits(name, logits, targets, self.vocab_size)
        [found] = read(self, rows._replace(logits=logits), [self.needs(rows)])
        return self.from_read(found, rows.valid)

    def needs(self, rows: Rows) -> Needs:
        if self.penalty_on == "targets":
            return Needs(unscaled=True, counts=self.ngram_size)
        return Needs(unscaled=True, links=document_links(rows, self.ngram_size))

    def from_read(self, found: Read, valid: Tensor) -> dict[str, Any]:
        diversity = self._diversity(found.terms.entropy, valid)
        if self.penalty_on == "targets":
            ngram = self._of_counts(found.counts, diversity.dtype)
        else:
            taken = found.terms.candidates.sum().clamp(min=1)
            ngram = self.penalty_weight * (found.terms.unlikelihood.sum() / taken)
        return {
            "ngram_penalty": ngram,
            "diversity_penalty": diversity,
            "total_repetition_penalty": ngram + diversity,
            "penalty_weight": self.penalty_weight,
        }

    def _of_counts(self, counts, dtype=torch.float32):
        share = counts.pairs.sum().double() / counts.windows.sum().clamp(min=1)
        return self.penalty_weight * share.to(dtype)

    def _diversity(self, entropy, valid):
        if self.vocab_size == 1:  # nothing to be diverse in
            return masked_mean(entropy, valid)
        largest = math.log(self.vocab_size)
        return self.penalty_weight * masked_mean(1 - entropy / largest, valid)

    def compute_ngram_repetition_penalty(
        self,
        token_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """The statistic of the data, weighted, [] float32; token_ids ``[B, S]`` integers (of
        [0, 2^32) where there are segment_ids)."""
        rows = rows_of(self, token_ids, attention_mask, segment_ids, "token_ids")
        return self._of_counts(document_counts(rows, self.ngram_size))

    def compute_token_diversity_penalty(
        self,
        logits: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The diversity term of softmax(logits / temperature), weighted; logits ``[..., V]``."""
        name = self.function
        check_features(name, "logits", logits)
        if not isinstance(temperature, Tensor):
            check_number(name, "temperature", temperature, above=0)
        check_vocabulary(name, logits, self.vocab_size)
        dims = logits.dim() - 1
        check_mask(name, "attention_mask", attention_mask, "logits", logits, dims, broadcast=True)
        entropy = row_statistics(logits, None, attention_mask, temperature=temperature).entropy
        valid = torch.ones_like(entropy, dtype=torch.bool)
        return self._diversity(
            entropy, valid if attention_mask is None else valid & (attention_mask != 0)
        )


@dataclass(eq=False, repr=False)
class SequenceRepetitionDetector(LossModule):
    r"""Runs of one token: squared length of the longest, or what the model would repeat.

    .. math:: L = w\, \frac{1}{B'} \sum_b (r_b - 1)^2

    with :math:`r_b` the longest run of equal adjacent tokens that count in row b, a masked position
    breaking it, and B' the rows in which any token counts.

    >>> detector = SequenceRepetitionDetector(penalty_weight=1.0)
    >>> detector(torch.tensor([[1, 1, 1, 2], [3, 4, 5, 6]]))["immediate_repetition_penalty"]
    tensor(2.)

    Of targets it is a constant of the data, without gradient. ``penalty_on="model"``, which needs
    logits, is w times the average of :math:`-\log(1 - p_t(c))` over positions t at which c, the
    target before, is not the target.

    Args:
        penalty_weight: w.
        max_repeat_length: longest run that makes a difference, if ``cap_repeats``.
        cap_repeats: count longer runs as max_repeat_length.
        ignore_index: tokens that do not count.
        penalty_on: "targets" or "model".
    """

    penalty_weight: Number = 1.0
    max_repeat_length: Size = 10
    _: KW_ONLY
    ignore_index: Token = -100
    cap_repeats: Flag = False
    penalty_on: PenaltyOn = "targets"

    def forward(
        self,
        token_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """The penalty.

        Args:
            token_ids: ``[B, S]`` integers.
            logits: ``[B, S, V]`` floating, for penalty_on="model".
            attention_mask, segment_ids: as in ``UnifiedLoss``. A document counts as a row does.

        Returns:
            dict: "immediate_repetition_penalty" [] and the number "repetition_detector_weight".
        """
        name = self.function
        rows = rows_of(self, token_ids, attention_mask, segment_ids, "token_ids")
        if self.penalty_on == "model":
            if logits is None:
                raise ValueError(f'{name}: logits must be passed for penalty_on="model", got None')
            check_logits(name, logits, token_ids)
        rows = rows._replace(logits=logits)
        [found] = read(self, rows, [self.needs(rows)], "token_ids")
        return {
            "immediate_repetition_penalty": self.from_read(found),
            "repetition_detector_weight": self.penalty_weight,
        }

    def detect_immediate_repetition(
        self,
        token_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """The statistic of the data, weighted, [] float32; token_ids ``[B, S]`` integers (of
        [0, 2^32) where there are segment_ids)."""
        rows = rows_of(self, token_ids, attention_mask, segment_ids, "token_ids")
        return self._of_counts(document_counts(rows, 1))

    def needs(self, rows: Rows) -> Needs:
        """The target before, where both count and differ, or the runs of the data."""
        if self.penalty_on == "targets":
            return Needs(counts=1)
        targets, said, starts = rows.targets, rows.said, rows.starts
        before = torch.cat([torch.full_like(targets[:, :1], -1), targets[:, :-1]], 1)
        counts = said[:, :-1] if starts is None else said[:, :-1] & of_one_document(starts, 1)
        both = said & torch.cat([torch.zeros_like(said[:, :1]), counts], 1)
        return Needs(classes=torch.where(both & (before != targets), before, -1))

    def from_read(self, found: Read, dtype: torch.dtype = torch.float32) -> Tensor:
        """The penalty; ``dtype`` is that of a statistic of the data."""
        if found.classes is None:
            return self._of_counts(found.counts, dtype)
        wanted = found.classes >= 0
        penalty = masked_mean(unlikelihood(found.class_log_prob, wanted), wanted)
        return self.penalty_weight * penalty

    def _of_counts(self, counts, dtype=torch.float32):
        run = counts.longest_run
        if self.cap_repeats:
            run = run.clamp(max=self.max_repeat_length)
        squares = (run - 1).clamp(min=0).square().sum().double()
        mean = squares / (run > 0).sum().clamp(min=1)
        return self.penalty_weight * mean.to(dtype)
