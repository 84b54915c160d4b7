# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy of the next token plus that of further heads, weighed by the model's confidence."""

import torch

from .._checks import check_choice, check_device, check_int, check_tensor
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._arguments import check_logits, check_smoothing, check_targets, require
from ._rows import masked_mean, torch_smoothing, valid_rows, widened
from ._state import KeepsState, advances, follow_device

_NAME = "AdaptiveMTPLoss"
_SMALLEST = 1e-7
_TOTALS = ("primary_loss", "additional_loss", "confidence_reg")


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
    ``loss_count``, [] each, of training calls whose loss is finite.
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
        check_smoothing(_NAME, label_smoothing)
        limit = torch_smoothing(label_smoothing, vocab_size) <= 1
        require(_NAME, "label_smoothing", label_smoothing, limit, "at most 1 - 1 / vocab_size")
        check_int(_NAME, "ignore_index", ignore_index)
        self.vocab_size = vocab_size
        self.primary_loss_weight = primary_loss_weight
        self.additional_loss_base_weight = additional_loss_base_weight
        self.confidence_reg_strength = confidence_reg_strength
        self.use_confidence_weighting = use_confidence_weighting
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.detach_confidence = detach_confidence
        for name in _TOTALS:
            self.register_buffer(f"total_{name}", torch.zeros(()))
        self.register_buffer("loss_count", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        primary_logits,
        targets,
        additional_logits=None,
        confidence_scores=None,
        attention_mask=None,
        mtp_active=False,
        *,
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
            update_state: let a training call add to the statistics.

        Returns:
            dict: "loss", "primary_loss", "additional_loss", "confidence_reg" (weighted),
            "avg_confidence", "effective_mtp_weight", [] each, and "mtp_active" as given.
        """
        primary = self.compute_cross_entropy(primary_logits, targets, attention_mask)
        return self.from_primary(
            primary,
            targets,
            additional_logits,
            confidence_scores,
            attention_mask,
            mtp_active,
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
        update_state=True,
    ):
        """As ``forward``, with the primary cross entropy [] (not yet weighted) at hand."""
        follow_device(self, cross_entropy)
        zero = cross_entropy.new_zeros(())
        valid = valid_rows(targets, attention_mask, self.ignore_index)
        confidence = average = regularizer = zero
        if confidence_scores is not None:
            confidence, average, regularizer = self._confidence(confidence_scores, valid)
        additional, weight = zero, zero
        if additional_logits is not None and _may_be(mtp_active):
            additional = self._heads(additional_logits, targets, attention_mask)
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

    def compute_cross_entropy(self, logits, targets, attention_mask=None, *, shift=0):
        """Smoothed mean cross entropy [] of logits ``[B, S, V]``; position s is scored against
        targets[:, s + shift]."""
        check_targets(_NAME, targets, attention_mask)
        check_logits(_NAME, logits, targets, self.vocab_size)
        return masked_cross_entropy(
            logits,
            targets,
            attention_mask,
            ignore_index=self.ignore_index,
            label_smoothing=torch_smoothing(self.label_smoothing, self.vocab_size),
            shift=shift,
        )

    def compute_confidence_regularization(
        self, confidence_scores, target_mode="binary", *, valid=None
    ):
        """Mean, not yet weighted, of what uncertain scores cost: :math:`-\\ln \\max(|2c - 1|,
        10^{-7})` ("binary") or :math:`-\\ln \\max(c, 10^{-7})` ("high"); of valid scores alone, a
        bool tensor of their shape."""
        check_choice(_NAME, "target_mode", target_mode, ("binary", "high"), "Unknown target_mode: ")
        if valid is None:
            valid = torch.ones_like(confidence_scores, dtype=torch.bool)
        scores = torch.where(valid, widened(confidence_scores), 1)
        certainty = (2 * scores - 1).abs() if target_mode == "binary" else scores
        return masked_mean(-certainty.clamp(min=_SMALLEST).log(), valid)

    def _confidence(self, scores, valid):
        """What weighs the heads, its mean, and the regulariser."""
        check_tensor(_NAME, "confidence_scores", scores)
        if not scores.is_floating_point():
            raise ValueError(f"{_NAME}: confidence_scores must be floating, got {scores.dtype}")
        check_device(_NAME, "confidence_scores", scores, "targets", valid)
        on = _counted_scores(scores, valid)
        average = masked_mean(scores, on)
        regularizer = average.new_zeros(())
        if self.confidence_reg_strength > 0:
            regularizer = self.compute_confidence_regularization(scores, valid=on)
        return average.detach() if self.detach_confidence else average, average, regularizer

    def _weight(self, confidence, zero):
        if confidence is None or not self.use_confidence_weighting:
            return zero + self.additional_loss_base_weight
        return self.additional_loss_base_weight * confidence.clamp(0, 1)

    def _heads(self, additional_logits, targets, attention_mask):
        """Mean over the heads that do not reach past the end."""
        if len(additional_logits) == 0:
            return torch.zeros((), device=targets.device)
        losses = [
            self.compute_cross_entropy(logits, targets, attention_mask, shift=i + 1)
            for i, logits in enumerate(additional_logits)
        ]  # 0, attached to the graph, of those that do
        return sum(losses) / max(min(len(losses), targets.shape[1] - 1), 1)

    @torch.no_grad()
    def _record(self, loss, parts):
        counts = loss.isfinite()  # one NaN would spoil the sums for good
        for name in _TOTALS:
            total = getattr(self, f"total_{name}")
            total.add_(torch.where(counts, parts[name].detach(), 0).to(total.dtype))
        self.loss_count.add_(counts)

    def get_statistics(self):
        """Averages over the recorded calls, as numbers: it waits for the device."""
        count = self.loss_count.item()
        averages = {
            f"avg_{name}": getattr(self, f"total_{name}").item() / max(count, 1) for name in _TOTALS
        }
        return {**averages, "total_computations": count}

    @torch.no_grad()
    def reset_statistics(self):
        for name in (*(f"total_{name}" for name in _TOTALS), "loss_count"):
            getattr(self, name).zero_()

    def extra_repr(self):
        return (
            f"vocab_size={self.vocab_size}, primary_loss_weight={self.primary_loss_weight}, "
            f"additional_loss_base_weight={self.additional_loss_base_weight}, "
            f"label_smoothing={self.label_smoothing}"
        )


def _may_be(active):
    """Whether it is on, or only the device knows."""
    return True if isinstance(active, torch.Tensor) else bool(active)


def _counted_scores(scores, valid):
    """Which scores belong to something that counts: positions, rows, or all of them."""
    batch, length = valid.shape
    if scores.shape in ((batch, length), (batch, length, 1)):
        return valid.reshape(scores.shape)
    if scores.shape in ((batch,), (batch, 1)):
        return valid.any(1).reshape(scores.shape)
    return torch.ones_like(scores, dtype=torch.bool)
