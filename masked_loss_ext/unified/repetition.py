# SPDX-License-Identifier: BSD-3-Clause
"""Penalties on repeated n-grams and on runs of one token: of the data, or of the model."""

import math

import torch

from .._checks import check_flags, check_mask, check_number, shape_text
from ..ops.masked_cross_entropy import row_statistics
from ._arguments import (
    check_ignore_index,
    check_logits,
    check_segments,
    check_size,
    check_targets,
)
from ._documents import document_counts, document_links, document_starts
from ._operators import terms as terms_of
from ._penalties import check_penalty_on, mean_unlikelihood, previous_classes
from ._rows import check_floating, masked_mean, valid_rows


class NGramRepetitionPenalty(torch.nn.Module):
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

    def __init__(
        self,
        ngram_size=3,
        penalty_weight=0.1,
        vocab_size=50257,
        ignore_index=-100,
        *,
        penalty_on="targets",
    ):
        super().__init__()
        name = type(self).__name__
        check_size(name, "ngram_size", ngram_size)
        check_size(name, "vocab_size", vocab_size)
        check_number(name, "penalty_weight", penalty_weight)
        check_ignore_index(name, ignore_index)
        check_penalty_on(name, penalty_on)
        self.ngram_size = ngram_size
        self.penalty_weight = penalty_weight
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index
        self.penalty_on = penalty_on

    def forward(self, logits, targets, attention_mask=None, *, segment_ids=None):
        """Both terms, weighted.

        Args:
            logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers.
            attention_mask: ``[B, S]`` any dtype, on where not 0. None: all.
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one, and each repeats only itself, as if it were a row.

        Returns:
            dict: "ngram_penalty", "diversity_penalty" and their sum "total_repetition_penalty", []
            float32 (float64 for float64 logits), and the number "penalty_weight".
        """
        name = type(self).__name__
        check_targets(name, targets, attention_mask)
        check_logits(name, logits, targets, self.vocab_size)
        check_segments(name, segment_ids, targets)
        starts = document_starts(segment_ids, targets)
        targets = targets.long()
        valid = valid_rows(targets, attention_mask, self.ignore_index)
        terms = terms_of(
            name,
            "targets",
            logits,
            targets,
            valid,
            links=self.links(targets, valid, starts),
            ignore_index=self.ignore_index,
        )
        counts = None
        if self.penalty_on == "targets":
            counts = document_counts(targets, valid, self.ngram_size, starts)
        return self.from_terms(terms, counts, valid)

    def links(self, targets, valid, starts=None):
        """What cross_entropy_terms needs for the model's n-grams; None for the data's."""
        if self.penalty_on == "targets":
            return None
        return document_links(targets, valid, self.ngram_size, starts)

    def from_terms(self, terms, counts, valid):
        """As ``forward``, from CrossEntropyTerms and, for the data's n-grams, RepetitionCounts."""
        diversity = self._diversity(terms.entropy, valid)
        if counts is None:
            taken = terms.candidates.sum().clamp(min=1)
            ngram = self.penalty_weight * (terms.unlikelihood.sum() / taken)
        else:
            ngram = self._of_counts(counts, diversity.dtype)
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

    def compute_ngram_repetition_penalty(self, token_ids, attention_mask=None, *, segment_ids=None):
        """The statistic of the data, weighted, [] float32; token_ids ``[B, S]`` integers (of
        [0, 2^32) where there are segment_ids)."""
        starts, valid = _documents(self, token_ids, attention_mask, segment_ids)
        return self._of_counts(document_counts(token_ids.long(), valid, self.ngram_size, starts))

    def compute_token_diversity_penalty(self, logits, temperature=1.0, *, attention_mask=None):
        """The diversity term of softmax(logits / temperature), weighted; logits ``[..., V]``."""
        name = type(self).__name__
        check_floating(name, "logits", logits)
        if not isinstance(temperature, torch.Tensor):
            check_number(name, "temperature", temperature, above=0)
        if logits.dim() == 0 or logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"{name}: logits must have vocab_size = {self.vocab_size} classes, got "
                f"{shape_text(logits)}: pass vocab_size={logits.shape[-1] if logits.dim() else 1}"
            )
        check_mask(name, "attention_mask", attention_mask, "logits", logits, logits.dim() - 1)
        entropy = row_statistics(logits, None, attention_mask, temperature=temperature).entropy
        valid = torch.ones_like(entropy, dtype=torch.bool)
        return self._diversity(entropy, valid if attention_mask is None else attention_mask != 0)

    def extra_repr(self):
        return (
            f"ngram_size={self.ngram_size}, penalty_weight={self.penalty_weight}, "
            f"vocab_size={self.vocab_size}, penalty_on={self.penalty_on!r}"
        )


class SequenceRepetitionDetector(torch.nn.Module):
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

    def __init__(
        self,
        penalty_weight=1.0,
        max_repeat_length=10,
        *,
        ignore_index=-100,
        cap_repeats=False,
        penalty_on="targets",
    ):
        super().__init__()
        name = type(self).__name__
        check_number(name, "penalty_weight", penalty_weight)
        check_size(name, "max_repeat_length", max_repeat_length)
        check_flags(name, {"cap_repeats": cap_repeats})
        check_ignore_index(name, ignore_index)
        check_penalty_on(name, penalty_on)
        self.penalty_weight = penalty_weight
        self.max_repeat_length = max_repeat_length
        self.ignore_index = ignore_index
        self.cap_repeats = cap_repeats
        self.penalty_on = penalty_on

    def forward(self, token_ids, attention_mask=None, *, logits=None, segment_ids=None):
        """The penalty.

        Args:
            token_ids: ``[B, S]`` integers.
            attention_mask: ``[B, S]`` any dtype, on where not 0. None: all.
            logits: ``[B, S, V]`` floating, for penalty_on="model".
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one, which counts as a row does.

        Returns:
            dict: "immediate_repetition_penalty" [] and the number "repetition_detector_weight".
        """
        if self.penalty_on == "targets":
            penalty = self.detect_immediate_repetition(
                token_ids, attention_mask, segment_ids=segment_ids
            )
        else:
            penalty = self._of_model(token_ids, attention_mask, logits, segment_ids)
        return {
            "immediate_repetition_penalty": penalty,
            "repetition_detector_weight": self.penalty_weight,
        }

    def detect_immediate_repetition(self, token_ids, attention_mask=None, *, segment_ids=None):
        """The statistic of the data, weighted, [] float32; token_ids ``[B, S]`` integers (of
        [0, 2^32) where there are segment_ids)."""
        starts, valid = _documents(self, token_ids, attention_mask, segment_ids)
        return self.from_counts(document_counts(token_ids.long(), valid, 1, starts))

    def from_counts(self, counts, dtype=torch.float32):
        """The statistic of the data from RepetitionCounts."""
        run = counts.longest_run
        if self.cap_repeats:
            run = run.clamp(max=self.max_repeat_length)
        squares = (run - 1).clamp(min=0).square().sum().double()
        mean = squares / (run > 0).sum().clamp(min=1)
        return self.penalty_weight * mean.to(dtype)

    def classes(self, targets, valid, starts=None):
        """The class whose probability the model's penalty needs, ``[B, S]``, -1 for none; None for
        the data's."""
        if self.penalty_on == "targets":
            return None
        return previous_classes(targets, valid, starts)

    def from_log_prob(self, class_log_prob, classes):
        """The model's penalty from the log-probabilities of ``classes()``."""
        return self.penalty_weight * mean_unlikelihood(class_log_prob, classes >= 0)

    def _of_model(self, token_ids, attention_mask, logits, segment_ids):
        name = type(self).__name__
        starts, valid = _documents(self, token_ids, attention_mask, segment_ids)
        if logits is None:
            raise ValueError(f'{name}: logits must be passed for penalty_on="model", got None')
        check_logits(name, logits, token_ids)
        targets = token_ids.long()
        classes = self.classes(targets, valid, starts)
        terms = terms_of(
            name,
            "token_ids",
            logits,
            targets,
            valid,
            classes=classes.unsqueeze(-1),
            ignore_index=self.ignore_index,
        )
        return self.from_log_prob(terms.class_log_prob[..., 0], classes)

    def extra_repr(self):
        return f"penalty_weight={self.penalty_weight}, penalty_on={self.penalty_on!r}"


def _documents(module, token_ids, attention_mask, segment_ids):
    """Where documents begin, and what counts, of arguments that are checked."""
    name = type(module).__name__
    check_targets(name, token_ids, attention_mask, "token_ids")
    check_segments(name, segment_ids, token_ids, "token_ids")
    valid = valid_rows(token_ids, attention_mask, module.ignore_index)
    return document_starts(segment_ids, token_ids), valid
