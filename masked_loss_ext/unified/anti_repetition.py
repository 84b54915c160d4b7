# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy beside statistics of how much its labels repeat themselves."""

import torch

from .._checks import (
    as_integers,
    check_flags,
    check_integers,
    check_mask,
    check_number,
    check_rank,
    refuse_unknown,
)
from ..ops.repetition import repetition_counts
from ._arguments import (
    check_ignore_index,
    check_logits,
    check_size,
    check_token_id,
    check_weights,
)
from ._operators import cross_entropy
from ._rows import valid_rows
from ._state import KeepsState, borrow

_ADAPTIVE = "AdaptiveAntiRepetitionLoss"
_SCHEDULED = ("repetition_penalty_weight", "eos_penalty_weight")


class AntiRepetitionLoss(torch.nn.Module):
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

    def __init__(
        self,
        vocab_size,
        eos_token_id,
        pad_token_id,
        repetition_penalty_weight=0.1,
        eos_penalty_weight=0.05,
        diversity_bonus_weight=0.05,
        ngram_size=4,
        ignore_index=-100,
    ):
        super().__init__()
        name = type(self).__name__
        check_size(name, "vocab_size", vocab_size)
        for argument, token_id, size in (
            ("eos_token_id", eos_token_id, vocab_size),
            ("pad_token_id", pad_token_id, None),
        ):
            if token_id is None:
                raise TypeError(f"{name}: {argument} must be an int, got NoneType")
            check_token_id(name, argument, token_id, size)
        weights = {
            "repetition_penalty_weight": repetition_penalty_weight,
            "eos_penalty_weight": eos_penalty_weight,
            "diversity_bonus_weight": diversity_bonus_weight,
        }
        check_weights(name, weights)
        check_size(name, "ngram_size", ngram_size)
        check_ignore_index(name, ignore_index)
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.repetition_penalty_weight = repetition_penalty_weight
        self.eos_penalty_weight = eos_penalty_weight
        self.diversity_bonus_weight = diversity_bonus_weight
        self.ngram_size = ngram_size
        self.ignore_index = ignore_index

    def forward(self, logits, labels, attention_mask=None, return_components=False):
        """(loss, components or None).

        Args:
            logits: ``[B, S, V]`` floating.
            labels: ``[B, S]`` integers.
            attention_mask: ``[B, S]``, a label counts where it is not 0. None: all.
            return_components: also give a dict of detached tensors ``[]``: ``base_loss``,
                ``repetition_penalty``, ``eos_penalty``, ``diversity_bonus`` (means, without their
                weights) and ``total_loss``.
        """
        name = type(self).__name__
        check_integers(name, "labels", labels)
        check_rank(name, "labels", labels, 2, "[B, S]")
        check_mask(name, "attention_mask", attention_mask, "labels", labels, 2)
        check_logits(name, logits, labels, self.vocab_size, like="labels")
        check_flags(name, {"return_components": return_components})
        base = cross_entropy(
            name,
            ("logits", "labels"),
            logits,
            labels,
            attention_mask,
            ignore_index=self.ignore_index,
        )
        repetition, early_end, diversity = (
            statistic.to(base.dtype) for statistic in self._statistics(labels, attention_mask)
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

    def _statistics(self, labels, attention_mask):
        labels = as_integers(labels)
        valid = valid_rows(labels, attention_mask, self.ignore_index)
        no_padding = valid & (labels != self.pad_token_id)
        grams = repetition_counts(labels, no_padding, self.ngram_size)
        words = repetition_counts(labels, no_padding & (labels != self.eos_token_id), 1)
        # In float64 by name: a ratio of two integers is of the default dtype.
        repetition = 1 - grams.distinct.double() / grams.windows.clamp(min=1)
        repetition = torch.where(grams.windows > 0, repetition, 0)
        diversity = words.distinct.double() / words.windows.clamp(min=1)
        if self.pad_token_id != self.eos_token_id:
            valid = no_padding
        rows = max(labels.shape[0], 1)
        early_end = self._early_end(labels, valid)
        return tuple(term.sum() / rows for term in (repetition, early_end, diversity))

    def _early_end(self, labels, valid):
        is_end = valid & (labels == self.eos_token_id)
        count, tokens = is_end.sum(-1), valid.sum(-1).clamp(min=1)
        valid_after = valid.flip(-1).cumsum(-1).flip(-1) - valid.long()
        not_last = (is_end & (valid_after > 0)).any(-1)
        return torch.where(count > 1, count.double(), 0.5 * not_last.double()) / tokens

    def extra_repr(self):
        return (
            f"vocab_size={self.vocab_size}, eos_token_id={self.eos_token_id}, "
            f"pad_token_id={self.pad_token_id}, ngram_size={self.ngram_size}"
        )


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
        vocab_size,
        eos_token_id,
        pad_token_id,
        initial_repetition_weight=0.2,
        final_repetition_weight=0.05,
        initial_eos_weight=0.1,
        final_eos_weight=0.02,
        warmup_steps=10000,
        **kwargs,
    ):
        for argument in _SCHEDULED:
            if argument in kwargs:
                raise ValueError(
                    f"{_ADAPTIVE}: {argument} must be given as its initial and final value"
                )
        known = ("diversity_bonus_weight", "ngram_size", "ignore_index")
        refuse_unknown(_ADAPTIVE, [key for key in kwargs if key not in known], known)
        super().__init__(vocab_size, eos_token_id, pad_token_id, **kwargs)
        weights = {
            "initial_repetition_weight": initial_repetition_weight,
            "final_repetition_weight": final_repetition_weight,
            "initial_eos_weight": initial_eos_weight,
            "final_eos_weight": final_eos_weight,
        }
        check_weights(_ADAPTIVE, weights)
        check_size(_ADAPTIVE, "warmup_steps", warmup_steps, 0)
        self.repetition_weights = (initial_repetition_weight, final_repetition_weight)
        self.eos_weights = (initial_eos_weight, final_eos_weight)
        self.warmup_steps = warmup_steps
        for name, initial in zip(
            _SCHEDULED, (initial_repetition_weight, initial_eos_weight), strict=True
        ):
            delattr(self, name)
            self.add_state(name, (), float(initial))

    @torch.no_grad()
    def update_weights(self, step):
        """Set the weights for this step of training, a finite number counted from 0 (below: 0)."""
        check_number(_ADAPTIVE, "step", step)
        share = min(max(step, 0) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        for weight, (initial, final) in (
            (self.repetition_penalty_weight, self.repetition_weights),
            (self.eos_penalty_weight, self.eos_weights),
        ):
            weight.fill_(initial + (final - initial) * share)

    def _weights(self, like):
        return borrow(self, _SCHEDULED, like).values()

    def _shares(self):
        return [getattr(self, name) for name in _SCHEDULED]

    def _take(self, sums, ranks):
        for name, total in zip(_SCHEDULED, sums, strict=True):
            getattr(self, name).copy_(total / ranks)
