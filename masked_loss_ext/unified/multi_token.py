# SPDX-License-Identifier: BSD-3-Clause
"""Multi-token prediction by heads that the model has itself, weighted by its confidence."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_device, check_tensor
from ._options import Flag, NotNegative, Number, Share, Size, Token, check_smoothing
from ._rows import (
    Rows,
    check_features,
    check_list,
    check_logits,
    cross_entropy,
    masked_mean,
    may_be_on,
    rows_of,
    torch_smoothing,
    widened,
)
from ._state import KeepsState, advances, borrow, clear, give_back, store

_SMALLEST = 1e-7
_TOTALS = ("primary_loss", "additional_loss", "confidence_reg")
_SUMS = tuple(f"total_{name}" for name in _TOTALS)


@dataclass(eq=False, repr=False)
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
    over the calls of all ranks, ``loss_count`` the mean number of calls (rounded up). With as many
    tokens on each rank in each call that is the state of one process with all batches.
    """

    vocab_size: Size
    primary_loss_weight: Number = 1.0
    additional_loss_base_weight: Number = 0.1
    confidence_reg_strength: NotNegative = 0.01
    use_confidence_weighting: Flag = True
    label_smoothing: Share = 0.0
    ignore_index: Token = -100
    _: KW_ONLY
    detach_confidence: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.function, "label_smoothing", self.label_smoothing, self.vocab_size)
        for name in _SUMS:
            self.add_state(name)
        self.add_state("loss_count", (), 0, dtype=torch.int64)

    def forward(
        self,
        primary_logits: Tensor,
        targets: Tensor,
        additional_logits: Sequence[Tensor] | None = None,
        confidence_scores: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mtp_active: bool | Tensor = False,
        *,
        segment_ids: Tensor | None = None,
        update_state: bool = True,
    ) -> dict[str, Any]:
        """The loss and its parts.

        Args:
            primary_logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers, aligned with primary_logits.
            additional_logits: a list of K tensors ``[B, S, V]``.
            confidence_scores: floating in [0, 1], one per row (``[B]``, ``[B, 1]``) or position
                (``[B, S]``, ``[B, S, 1]``); what the mask excludes is left out of its mean. Any
                other shape is averaged as it is.
            mtp_active: whether the heads count; a bool, or a 0-d tensor.
            attention_mask, segment_ids, update_state: as in ``UnifiedLoss``.

        Returns:
            dict: "loss", "primary_loss", "additional_loss", "confidence_reg" (weighted),
            "avg_confidence", "effective_mtp_weight", [] each, and "mtp_active" as given.
        """
        rows = rows_of(self, targets, attention_mask, segment_ids)
        primary = self._cross_entropy("primary_logits", primary_logits, rows)
        heads = additional_logits, confidence_scores, mtp_active
        return self.from_primary(primary, rows, *heads, update_state=update_state)

    def from_primary(
        self,
        primary: Tensor,
        rows: Rows,
        additional_logits: Sequence[Tensor] | None,
        confidence_scores: Tensor | None,
        mtp_active: bool | Tensor,
        update_state: bool,
    ) -> dict[str, Any]:
        """As ``forward``, of the primary cross entropy [], not yet weighted."""
        if additional_logits is not None:  # active or not: a mask in its place would be lost
            check_list(self.function, "additional_logits", additional_logits)
        zero = primary.new_zeros(())
        average = regularizer = additional = weight = zero
        confidence = None
        if confidence_scores is not None:
            average, regularizer = self._confidence(confidence_scores, rows.valid)
            confidence = average.detach() if self.detach_confidence else average
        if may_be_on(self.function, mtp_active) and additional_logits is not None:
            additional = self._heads(additional_logits, rows, zero)
            weight = zero + self.additional_loss_base_weight
            if confidence is not None and self.use_confidence_weighting:
                weight = weight * confidence.clamp(0, 1)
            if isinstance(mtp_active, Tensor):
                weight = torch.where(mtp_active != 0, weight, 0)
        parts = {
            "primary_loss": self.primary_loss_weight * primary,
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
        self,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift: int = 0,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Smoothed mean cross entropy [] of logits ``[B, S, V]``; position s is scored against
        targets[:, s + shift], of the same segment."""
        rows = rows_of(self, targets, attention_mask, segment_ids)
        return self._cross_entropy("logits", logits, rows, shift)

    def _cross_entropy(self, argument, logits, rows, shift=0):
        check_logits(self.function, logits, rows.targets, self.vocab_size, argument)
        return cross_entropy(
            self.function,
            (argument, "targets"),
            logits,
            rows.targets,
            rows.valid,
            ignore_index=self.ignore_index,
            label_smoothing=torch_smoothing(self.label_smoothing, self.vocab_size),
            shift=shift,
            segment_ids=rows.starts,
        )

    def compute_confidence_regularization(
        self, confidence_scores: Tensor, target_mode: str = "binary", *, valid: Tensor | None = None
    ) -> Tensor:
        """Mean, not yet weighted, of what uncertain scores cost: :math:`-\\ln \\max(|2c - 1|,
        10^{-7})` ("binary") or :math:`-\\ln \\max(c, 10^{-7})` ("high"); of valid scores alone, a
        bool tensor of their shape."""
        modes = ("binary", "high")
        check_choice(self.function, "target_mode", target_mode, modes, "Unknown target_mode: ")
        check_tensor(self.function, "confidence_scores", confidence_scores)
        if valid is None:
            valid = torch.ones_like(confidence_scores, dtype=torch.bool)
        scores = torch.where(valid, widened(confidence_scores), 1)
        certainty = (2 * scores - 1).abs() if target_mode == "binary" else scores
        return masked_mean(-certainty.clamp(min=_SMALLEST).log(), valid)

    def _confidence(self, scores, valid):
        """The mean of the scores that belong to something that counts, and the regulariser."""
        check_features(self.function, "confidence_scores", scores)
        check_device(self.function, "confidence_scores", scores, "targets", valid)
        batch, length = valid.shape
        on = torch.ones_like(scores, dtype=torch.bool)
        if scores.shape in ((batch, length), (batch, length, 1)):
            on = valid.reshape(scores.shape)
        elif scores.shape in ((batch,), (batch, 1)):
            on = valid.any(1).reshape(scores.shape)
        average = masked_mean(scores, on)
        if self.confidence_reg_strength > 0:
            return average, self.compute_confidence_regularization(scores, valid=on)
        return average, average.new_zeros(())

    def _heads(self, additional_logits, rows, zero):
        """Mean over the heads that do not reach past the end."""
        if len(additional_logits) == 0:
            return zero
        losses = [
            self._cross_entropy(f"additional_logits[{i}]", logits, rows, i + 1)
            for i, logits in enumerate(additional_logits)
        ]  # 0, attached to the graph, of those that do
        return sum(losses) / max(min(len(losses), rows.targets.shape[1] - 1), 1)

    @torch.no_grad()
    def _record(self, loss, parts):
        state = borrow(self, (*_SUMS, "loss_count"), loss)
        counts = loss.isfinite()  # one NaN would spoil the sums for good
        for name in _TOTALS:
            total = state[f"total_{name}"]
            added = torch.where(counts, parts[name].detach(), 0).to(total.dtype)
            state[f"total_{name}"] = total + added
        state["loss_count"] = state["loss_count"] + counts
        give_back(self, state)

    def _shares(self):
        return [*(getattr(self, name) for name in _SUMS), self.loss_count]

    def _take(self, sums, ranks):
        *totals, count = sums
        calls = (count / ranks).ceil()
        means = [total / count.clamp(min=1) * calls for total in totals]
        store(self, dict(zip((*_SUMS, "loss_count"), (*means, calls), strict=True)))

    def get_statistics(self) -> dict[str, Any]:
        """Averages over the recorded calls, as numbers: it waits for the device."""
        count = self.loss_count.item()
        averages = {
            f"avg_{name}": getattr(self, f"total_{name}").item() / max(count, 1) for name in _TOTALS
        }
        return {**averages, "total_computations": count}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the recorded calls."""
        clear(self, (*_SUMS, "loss_count"))
