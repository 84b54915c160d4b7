# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy beside statistics of how much its labels repeat themselves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flags, check_number, refuse_unknown
from ..ops.repetition import repetition_counts
from ._options import LossModule, Number, Size, Token, check_class, check_size
from ._state import KeepsState, borrow
from ._tokens import Rows, check_logits, cross_entropy, rows_of

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
            logits: ``[B, S, V]`` floating.
            labels: ``[B, S]`` integers.
            attention_mask: ``[B, S]``, a label counts where it is not 0. None: all.
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
        for buffer, (initial, final) in self._schedules():
            getattr(self, buffer).fill_(initial + (final - initial) * share)

    def _weights(self, like):
        return borrow(self, _SCHEDULED, like).values()

    def _shares(self):
        return [getattr(self, name) for name in _SCHEDULED]

    def _take(self, sums, ranks):
        for name, total in zip(_SCHEDULED, sums, strict=True):
            getattr(self, name).copy_(total / ranks)
