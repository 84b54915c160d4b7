# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy of the next token plus that of further heads, weighed by the model's confidence."""

import torch

from .._checks import check_choice, check_device, check_flags, check_number, check_tensor
from ._arguments import (
    check_ignore_index,
    check_list,
    check_logits,
    check_segments,
    check_size,
    check_smoothing,
    check_targets,
    may_be_on,
)
from ._confidence import counted_scores, uncertainty
from ._documents import document_starts
from ._operators import cross_entropy as cross_entropy_of
from ._rows import check_floating, masked_mean, torch_smoothing, valid_rows
from ._state import KeepsState, advances, borrow, give_back

_NAME = "AdaptiveMTPLoss"
_TOTALS = ("primary_loss", "additional_loss", "confidence_reg")
_SUMS = tuple(f"total_{name}" for name in _TOTALS)


class AdaptiveMTPLoss(KeepsState):
    r"""Primary loss + confidence-weighted heads + a regulariser of the confidence.

    .. math::
        L = w\, \mathrm{CE}(z, y)
        + \beta\, \mathrm{clamp}(\bar c, 0, 1)\, \frac1K \sum_{i=0}^{K-1}
        \mathrm{CE}(z^{(i)}_{b,s},\ y_{b,s+i+1})
        + \lambda\, \overline{-\ln \max(|2c - 1|, 10^{-7})}

    CE is the mean over targets that count (mask on, not ignore_index), smoothed over the *other*
    classes (PyTorch's ``label_smoothing`` with :math:`\varepsilon V / (V - 1)`). Targets are
    aligned with the primary logits, so head i predicts i + 2 tokens on. Heads that reach past the
    end take no part; one whose targets are all masked is 0.

    >>> loss_fn = AdaptiveMTPLoss(vocab_size=7)
    >>> heads, confidence = [logits.flip(0)], torch.tensor([[0.9], [0.7]])
    >>> out = loss_fn(logits, labels, heads, confidence, attention_mask, mtp_active=True)
    >>> a = attention_mask.bool()
    >>> primary = F.cross_entropy(logits[a], labels[a])
    >>> head = F.cross_entropy(logits.flip(0)[:, :-1][a[:, 1:]], labels[:, 1:][a[:, 1:]])
    >>> torch.testing.assert_close(out["primary_loss"], primary)
    >>> torch.testing.assert_close(out["additional_loss"], 0.1 * 0.8 * head)

    The confidence weight gets a gradient, which is positive: lowering the confidence lowers the
    loss, and the regulariser is content with 0 as it is with 1. ``detach_confidence=True`` keeps
    the value and stops that gradient (not the regulariser's).

    Args:
        vocab_size: V.
        primary_loss_weight: w.
        additional_loss_base_weight: :math:`\beta`.
        confidence_reg_strength: :math:`\lambda`; 0 for none.
        use_confidence_weighting: without it, or without scores, :math:`\bar c = 1`.
        label_smoothing: :math:`\varepsilon` in [0, 1 - 1 / V].
        ignore_index: targets that do not count.
        detach_confidence: see above.

    Buffers: ``total_primary_loss``, ``total_additional_loss``, ``total_confidence_reg`` and
    ``loss_count``, [] each, of training calls whose loss is finite. They stay where the module is.

    **On several ranks** each counts its own calls until ``sync_state``. The averages are then those
    over the calls of all ranks, ``loss_count`` the mean number of calls (rounded up), so that
    syncing twice counts nothing twice. With as many tokens on each rank in each call that is the
    state of one process with all batches, which would else weigh calls by their tokens.
    """

    def __init__(
        self,
        vocab_size,
        primary_loss_weight=1.0,
        additional_loss_base_weight=0.1,
        confidence_reg_strength=0.01,
        use_confidence_weighting=True,
        label_smoothing=0.0,
        ignore_index=-100,
        *,
        detach_confidence=False,
    ):
        super().__init__()
        check_size(_NAME, "vocab_size", vocab_size)
        most = 1 - 1 / vocab_size if vocab_size > 1 else 1
        check_smoothing(_NAME, label_smoothing, most)
        check_number(_NAME, "primary_loss_weight", primary_loss_weight)
        check_number(_NAME, "additional_loss_base_weight", additional_loss_base_weight)
        check_number(_NAME, "confidence_reg_strength", confidence_reg_strength, least=0)
        check_flags(_NAME, {"use_confidence_weighting": use_confidence_weighting})
        check_flags(_NAME, {"detach_confidence": detach_confidence})
        check_ignore_index(_NAME, ignore_index)
        self.vocab_size = vocab_size
        self.primary_loss_weight = primary_loss_weight
        self.additional_loss_base_weight = additional_loss_base_weight
        self.confidence_reg_strength = confidence_reg_strength
        self.use_confidence_weighting = use_confidence_weighting
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.detach_confidence = detach_confidence
        for name in _SUMS:
            self.add_state(name)
        self.add_state("loss_count", (), 0, dtype=torch.int64)

    def forward(
        self,
        primary_logits,
        targets,
        additional_logits=None,
        confidence_scores=None,
        attention_mask=None,
        mtp_active=False,
        *,
        segment_ids=None,
        update_state=True,
    ):
        """The loss and its parts.

        Args:
            primary_logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers, aligned with primary_logits.
            additional_logits: a list of K tensors ``[B, S, V]``.
            confidence_scores: floating in [0, 1], one per row (``[B]``, ``[B, 1]``) or position
                (``[B, S]``, ``[B, S, 1]``); what the mask excludes is left out of its mean. Any
                other shape is averaged as it is.
            attention_mask: ``[B, S]`` any dtype, a target counts where it is not 0. None: all.
            mtp_active: whether the heads count; a bool, or a 0-d tensor.
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one, and no head predicts a token of another.
            update_state: let a training call add to the statistics.

        Returns:
            dict: "loss", "primary_loss", "additional_loss", "confidence_reg" (weighted),
            "avg_confidence", "effective_mtp_weight", [] each, and "mtp_active" as given.
        """
        check_targets(_NAME, targets, attention_mask)
        check_segments(_NAME, segment_ids, targets)
        given = primary_logits, targets, attention_mask
        primary = self._cross_entropy("primary_logits", *given)
        return self.from_primary(
            primary,
            targets,
            additional_logits,
            confidence_scores,
            attention_mask,
            mtp_active,
            starts=document_starts(segment_ids, targets),
            update_state=update_state,
        )

    def from_primary(
        self,
        cross_entropy,
        targets,
        additional_logits=None,
        confidence_scores=None,
        attention_mask=None,
        mtp_active=False,
        *,
        starts=None,
        update_state=True,
    ):
        """As ``forward``, with the primary cross entropy [] (not yet weighted) at hand and the
        column in which the document of each position begins."""
        if additional_logits is not None:  # active or not: a mask in its place would be lost
            check_list(_NAME, "additional_logits", additional_logits)
        zero = cross_entropy.new_zeros(())
        valid = valid_rows(targets, attention_mask, self.ignore_index)
        confidence = average = regularizer = zero
        if confidence_scores is not None:
            confidence, average, regularizer = self._confidence(confidence_scores, valid)
        additional, weight = zero, zero
        if may_be_on(_NAME, mtp_active) and additional_logits is not None:
            additional = self._heads(additional_logits, targets, attention_mask, starts, zero)
            weight = self._weight(None if confidence_scores is None else confidence, zero)
            if isinstance(mtp_active, torch.Tensor):
                weight = torch.where(mtp_active != 0, weight, 0)
        parts = {
            "primary_loss": self.primary_loss_weight * cross_entropy,
            "additional_loss": weight * additional,
            "confidence_reg": self.confidence_reg_strength * regularizer,
        }
        loss = parts["primary_loss"] + parts["additional_loss"] + parts["confidence_reg"]
        if advances(self, update_state):
            self._record(loss, parts)
        return {
            "loss": loss,
            **parts,
            "avg_confidence": average.detach(),
            "effective_mtp_weight": weight.detach(),
            "mtp_active": mtp_active,
        }

    def compute_cross_entropy(
        self, logits, targets, attention_mask=None, *, shift=0, segment_ids=None
    ):
        """Smoothed mean cross entropy [] of logits ``[B, S, V]``; position s is scored against
        targets[:, s + shift], of the same segment."""
        check_targets(_NAME, targets, attention_mask)
        return self._cross_entropy("logits", logits, targets, attention_mask, shift, segment_ids)

    def _cross_entropy(self, argument, logits, targets, attention_mask, shift=0, segment_ids=None):
        check_logits(_NAME, logits, targets, self.vocab_size, argument)
        return cross_entropy_of(
            _NAME,
            (argument, "targets"),
            logits,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
            label_smoothing=min(torch_smoothing(self.label_smoothing, self.vocab_size), 1.0),
            shift=shift,
            segment_ids=segment_ids,
        )

    def compute_confidence_regularization(
        self, confidence_scores, target_mode="binary", *, valid=None
    ):
        """Mean, not yet weighted, of what uncertain scores cost: :math:`-\\ln \\max(|2c - 1|,
        10^{-7})` ("binary") or :math:`-\\ln \\max(c, 10^{-7})` ("high"); of valid scores alone, a
        bool tensor of their shape."""
        check_choice(_NAME, "target_mode", target_mode, ("binary", "high"), "Unknown target_mode: ")
        check_tensor(_NAME, "confidence_scores", confidence_scores)
        if valid is None:
            valid = torch.ones_like(confidence_scores, dtype=torch.bool)
        return uncertainty(confidence_scores, valid, target_mode)

    def _confidence(self, scores, valid):
        """What weighs the heads, its mean, and the regulariser."""
        check_tensor(_NAME, "confidence_scores", scores)
        check_floating(_NAME, "confidence_scores", scores)
        check_device(_NAME, "confidence_scores", scores, "targets", valid)
        on = counted_scores(scores, valid)
        average = masked_mean(scores, on)
        regularizer = average.new_zeros(())
        if self.confidence_reg_strength > 0:
            regularizer = self.compute_confidence_regularization(scores, valid=on)
        return average.detach() if self.detach_confidence else average, average, regularizer

    def _weight(self, confidence, zero):
        if confidence is None or not self.use_confidence_weighting:
            return zero + self.additional_loss_base_weight
        return self.additional_loss_base_weight * confidence.clamp(0, 1)

    def _heads(self, additional_logits, targets, attention_mask, starts, zero):
        """Mean over the heads that do not reach past the end."""
        if len(additional_logits) == 0:
            return zero
        losses = [
            self._cross_entropy(
                f"additional_logits[{i}]", logits, targets, attention_mask, i + 1, starts
            )
            for i, logits in enumerate(additional_logits)
        ]  # 0, attached to the graph, of those that do
        return sum(losses) / max(min(len(losses), targets.shape[1] - 1), 1)

    @torch.no_grad()
    def _record(self, loss, parts):
        state = borrow(self, (*_SUMS, "loss_count"), loss)
        counts = loss.isfinite()  # one NaN would spoil the sums for good
        for name in _TOTALS:
            total = state[f"total_{name}"]
            total.add_(torch.where(counts, parts[name].detach(), 0).to(total.dtype))
        state["loss_count"].add_(counts)
        give_back(self, state)

    def _shares(self):
        return [*(getattr(self, name) for name in _SUMS), self.loss_count]

    def _take(self, sums, ranks):
        *totals, count = sums
        calls = (count / ranks).ceil()
        for name, total in zip(_SUMS, totals, strict=True):
            getattr(self, name).copy_(total / count.clamp(min=1) * calls)
        self.loss_count.copy_(calls)

    def get_statistics(self):
        """Averages over the recorded calls, as numbers: it waits for the device."""
        count = self.loss_count.item()
        averages = {
            f"avg_{name}": getattr(self, f"total_{name}").item() / max(count, 1) for name in _TOTALS
        }
        return {**averages, "total_computations": count}

    @torch.no_grad()
    def reset_statistics(self):
        for name in (*_SUMS, "loss_count"):
            getattr(self, name).zero_()

    def extra_repr(self):
        return (
            f"vocab_size={self.vocab_size}, primary_loss_weight={self.primary_loss_weight}, "
            f"additional_loss_base_weight={self.additional_loss_base_weight}, "
            f"label_smoothing={self.label_smoothing}"
        )
