# SPDX-License-Identifier: BSD-3-Clause
"""Penalties on repetition and early ends: of the data, or of the model."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flags, check_mask, check_number, refuse_unknown
from ..ops.masked_cross_entropy import row_statistics
from ..ops.repetition import repetition_counts
from ..reference.cross_entropy_terms import LARGEST_LOG_PROB
from ._options import Flag, LossModule, Number, PenaltyOn, Size, Token, check_class, check_size
from ._rows import (
    Needs,
    Read,
    Rows,
    check_features,
    check_logits,
    check_vocabulary,
    columns,
    cross_entropy,
    document_counts,
    document_links,
    masked_mean,
    of_one_document,
    read,
    reduced,
    rows_of,
)
from ._state import KeepsState, borrow, store

_HALF = -math.log(2)


def unlikelihood(log_prob, asked):
    """-log(1 - p) where asked for, 0 elsewhere; finite for p = 1."""
    bounded = torch.where(asked, log_prob, -1.0).clamp(max=LARGEST_LOG_PROB)
    # Near p = 1 the difference 1 - exp loses what expm1 keeps; below, the derivative of expm1,
    # computed as (p - 1) + 1, loses a small p.
    likely = torch.log(-torch.expm1(bounded))
    unlikely = torch.log1p(-bounded.exp())
    return torch.where(asked, -torch.where(bounded > _HALF, likely, unlikely), 0)


class PenalisesEnds:
    """Of a module with eos_token_id, min_sequence_length, eos_penalty_weight and penalty_on."""

    eos_token_id: Any  # an int or None
    min_sequence_length: int
    eos_penalty_weight: float
    penalty_on: str

    def _penalises_ends(self) -> bool:
        return self.eos_token_id is not None and self.eos_penalty_weight > 0

    def _early(self, rows: Rows) -> Tensor:
        column = columns(rows.valid) if rows.starts is None else columns(rows.valid) - rows.starts
        return rows.valid & (column < self.min_sequence_length)

    def end_classes(self, rows: Rows) -> Tensor | None:
        """EOS at early rows at which the data goes on; None where the data is penalised."""
        if self.penalty_on == "targets" or not self._penalises_ends():
            return None
        goes_on = self._early(rows) & (rows.targets != self.eos_token_id)
        return torch.where(goes_on, self.eos_token_id, -1)

    def end_penalty(self, rows: Rows, read: Read, like, reduction="mean"):
        """Weighted and reduced; ``read`` is that of ``end_classes``."""
        if not self._penalises_ends():
            return 0.0
        if read.classes is None:
            ends = self._early(rows) & (rows.targets == self.eos_token_id)
            penalty = reduced(ends.to(like.dtype), rows.valid, reduction)
        else:
            wanted = read.classes >= 0
            penalty = reduced(unlikelihood(read.class_log_prob, wanted), wanted, reduction)
        return self.eos_penalty_weight * penalty


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


_SCHEDULED = ("repetition_penalty_weight", "eos_penalty_weight")


@dataclass(eq=False, repr=False)
class AntiRepetitionLoss(LossModule):
    r"""Cross entropy plus what the labels say about repetition, early ends and variety.

    .. math:: L = \mathrm{ce} + w_r\, \overline{r} + w_e\, \overline{e} - w_d\, \overline{d}

    with means over the rows of the batch of

    - repetition r: 1 - distinct n-grams / n-grams (0 for a row with none),
    - early end e: with c end tokens among the n valid ones c / n if c > 1, 0.5 / n if the only one
      is not the last, else 0,
    - diversity d: distinct tokens / tokens, of those that are neither end nor padding.

    **The three are statistics of the data**: constants to the model, without any gradient; they
    move the loss that is reported, not the weights. What trains a model not to repeat itself is
    ``UnifiedLoss(penalty_on="model")``.

    >>> loss_fn = AntiRepetitionLoss(vocab_size=7, eos_token_id=5, pad_token_id=6, ngram_size=2)
    >>> loss, parts = loss_fn(logits[:1], torch.tensor([[1, 2, 1, 2, 5]]), return_components=True)
    >>> parts["repetition_penalty"].item(), parts["eos_penalty"].item()  # 1 2 comes twice
    (0.25, 0.0)
    >>> parts["diversity_bonus"].item()
    0.5
    >>> ce = F.cross_entropy(logits[0], torch.tensor([1, 2, 1, 2, 5]))
    >>> torch.testing.assert_close(loss, ce + 0.1 * 0.25 - 0.05 * 0.5)

    labels are aligned with logits: nothing is shifted. A label counts where the mask is on and it
    is not ignore_index; one that does not breaks n-grams. The padding token is left out of all
    three, too, unless it is also the end token: of end tokens all count for e, so give the mask.

    Args:
        vocab_size: V.
        eos_token_id, pad_token_id: the end of a text, in [0, V), and padding.
        repetition_penalty_weight, eos_penalty_weight, diversity_bonus_weight: the three w.
        ngram_size: n, at least 1.
        ignore_index: labels that do not count.
    """

    vocab_size: Size
    eos_token_id: Token
    pad_token_id: Token
    repetition_penalty_weight: Number = 0.1
    eos_penalty_weight: Number = 0.05
    diversity_bonus_weight: Number = 0.05
    ngram_size: Size = 4
    ignore_index: Token = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class(self.function, "eos_token_id", self.eos_token_id, self.vocab_size)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        return_components: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """(loss, components or None).

        Args:
            logits, labels, attention_mask: as in ``UnifiedLoss``, whose targets are the labels.
            return_components: also give a dict of detached tensors ``[]``: ``base_loss``,
                ``repetition_penalty``, ``eos_penalty``, ``diversity_bonus`` (means, without their
                weights) and ``total_loss``.
        """
        name = self.function
        rows = rows_of(self, labels, attention_mask, argument="labels")
        check_logits(name, logits, labels, self.vocab_size, like="labels")
        check_flags(name, {"return_components": return_components})
        names = ("logits", "labels")
        ignored = self.ignore_index
        base = cross_entropy(name, names, logits, rows.targets, rows.valid, ignore_index=ignored)
        repetition, early_end, diversity = (
            statistic.to(base.dtype) for statistic in self._statistics(rows)
        )
        of_repetition, of_end = self._weights(base)
        loss = base + of_repetition * repetition + of_end * early_end
        loss = loss - self.diversity_bonus_weight * diversity
        if not return_components:
            return loss, None
        return loss, {
            "base_loss": base.detach(),
            "repetition_penalty": repetition,
            "eos_penalty": early_end,
            "diversity_bonus": diversity,
            "total_loss": loss.detach().clone(),  # a caller may scale the loss in place
        }

    def _weights(self, like):
        return self.repetition_penalty_weight, self.eos_penalty_weight

    def _statistics(self, rows: Rows):
        labels, valid = rows.targets, rows.valid
        no_padding = valid & (labels != self.pad_token_id)
        grams = repetition_counts(labels, no_padding, self.ngram_size)
        words = repetition_counts(labels, no_padding & (labels != self.eos_token_id), 1)
        # In float64 by name: a ratio of two integers is of the default dtype.
        repetition = 1 - grams.distinct.double() / grams.windows.clamp(min=1)
        repetition = torch.where(grams.windows > 0, repetition, 0)
        diversity = words.distinct.double() / words.windows.clamp(min=1)
        if self.pad_token_id != self.eos_token_id:
            valid = no_padding
        early_end = self._early_end(labels, valid)
        return tuple(
            term.sum() / max(labels.shape[0], 1) for term in (repetition, early_end, diversity)
        )

    def _early_end(self, labels, valid):
        is_end = valid & (labels == self.eos_token_id)
        count, tokens = is_end.sum(-1), valid.sum(-1).clamp(min=1)
        valid_after = valid.flip(-1).cumsum(-1).flip(-1) - valid.long()
        not_last = (is_end & (valid_after > 0)).any(-1)
        return torch.where(count > 1, count.double(), 0.5 * not_last.double()) / tokens


for _name in _SCHEDULED:  # as attributes of the class the defaults would hide buffers
    delattr(AntiRepetitionLoss, _name)


class AdaptiveAntiRepetitionLoss(AntiRepetitionLoss, KeepsState):
    r"""AntiRepetitionLoss whose first two weights fall from an initial to a final value.

    .. math:: w(\text{step}) = w_0 + (w_1 - w_0)\, \min(\text{step} / \text{warmup\_steps}, 1)

    The weights are buffers, ``repetition_penalty_weight`` and ``eos_penalty_weight`` ``[]``, so a
    checkpoint resumes with them, and a compiled step is not compiled again for them. All else is as
    in ``AntiRepetitionLoss``. On several ranks they are equal if all call ``update_weights`` with
    the same step; ``sync_state`` makes them their mean.

    >>> loss_fn = AdaptiveAntiRepetitionLoss(7, 5, 6, warmup_steps=100)
    >>> loss_fn.update_weights(50)
    >>> round(loss_fn.repetition_penalty_weight.item(), 4)  # halfway from 0.2 to 0.05
    0.125

    Args:
        vocab_size, eos_token_id, pad_token_id: as in ``AntiRepetitionLoss``.
        initial_repetition_weight, final_repetition_weight: of repetition.
        initial_eos_weight, final_eos_weight: of early ends.
        warmup_steps: steps until the final values; 0: they hold from the first update on.
        kwargs: diversity_bonus_weight, ngram_size, ignore_index of ``AntiRepetitionLoss``.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_id: int,
        pad_token_id: int,
        initial_repetition_weight: float = 0.2,
        final_repetition_weight: float = 0.05,
        initial_eos_weight: float = 0.1,
        final_eos_weight: float = 0.02,
        warmup_steps: int = 10000,
        **kwargs: Any,
    ) -> None:
        name = self.function
        for argument in _SCHEDULED:
            if argument in kwargs:
                raise ValueError(f"{name}: {argument} must be given as its initial and final value")
        known = ("diversity_bonus_weight", "ngram_size", "ignore_index")
        refuse_unknown(name, [key for key in kwargs if key not in known], known)
        super().__init__(vocab_size, eos_token_id, pad_token_id, **kwargs)
        check_number(name, "initial_repetition_weight", initial_repetition_weight)
        check_number(name, "final_repetition_weight", final_repetition_weight)
        check_number(name, "initial_eos_weight", initial_eos_weight)
        check_number(name, "final_eos_weight", final_eos_weight)
        check_size(name, "warmup_steps", warmup_steps, 0)
        self.repetition_weights = (initial_repetition_weight, final_repetition_weight)
        self.eos_weights = (initial_eos_weight, final_eos_weight)
        self.warmup_steps = warmup_steps
        for buffer, (initial, _) in self._schedules():
            delattr(self, buffer)
            self.add_state(buffer, (), float(initial))

    def _schedules(self):
        return zip(_SCHEDULED, (self.repetition_weights, self.eos_weights), strict=True)

    @torch.no_grad()
    def update_weights(self, step: float) -> None:
        """Set the weights for this step of training, a finite number counted from 0 (below: 0)."""
        check_number(self.function, "step", step)
        share = min(max(step, 0) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        new = {}
        for name, (initial, final) in self._schedules():
            weight = initial + (final - initial) * share
            new[name] = torch.full_like(getattr(self, name), weight)
        store(self, new)

    def _weights(self, like):
        return borrow(self, _SCHEDULED, like).values()

    def _shares(self):
        return [getattr(self, name) for name in _SCHEDULED]

    def _take(self, sums, ranks):
        means = [total / ranks for total in sums]
        store(self, dict(zip(_SCHEDULED, means, strict=True)))
