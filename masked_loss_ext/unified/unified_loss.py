# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: every component of a language-model loss, from one read of the logits."""

import warnings

import torch

from .._checks import check_tensor
from . import _build
from ._arguments import check_logits, check_targets
from ._penalties import eos_penalty
from ._read import read
from ._rows import masked_mean, smoothed_loss
from ._state import advances, follow_device
from .adaptive_mtp import AdaptiveMTPLoss

_NAME = "UnifiedLoss"
_NO_HIDDEN_STATES = (
    "UnifiedLoss: use_mtp is on but hidden_states is None: pass hidden_states [B, S, hidden_size]; "
    "there is no multi-token prediction loss in this call"
)


class UnifiedLoss(torch.nn.Module):
DOC
    def __init__(
        self,
        vocab_size,
        hidden_size=None,
        primary_loss_type="deepseek",
        ignore_index=-100,
        initial_temperature=1.0,
        adaptive_temperature=True,
        label_smoothing=0.1,
        use_mtp=False,
        num_future_tokens=3,
        mtp_weight=0.1,
        mtp_type="deepseek",
        use_confidence_weighting=True,
        confidence_reg_strength=0.01,
        use_ngram_penalty=True,
        ngram_size=4,
        ngram_penalty_weight=0.1,
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=0.5,
        eos_token_id=None,
        pad_token_id=None,
        min_sequence_length=20,
        eos_penalty_weight=0.05,
        num_experts=None,
        use_moe_balancing=False,
        gradient_balance_weight=0.1,
        use_focal_loss=False,
        focal_alpha=1.0,
        focal_gamma=2.0,
        use_diversity_loss=False,
        diversity_weight=0.01,
        use_auxiliary_loss=False,
        load_balancing_weight=0.0001,
        router_z_weight=0.001,
        *,
        focal_mode="replace",
        penalty_on="targets",
        shift_labels=False,
        clamp_router_z=False,
        normalize_topk=False,
        detach_confidence=False,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        _build.check_options(_NAME, self)
        self.main_loss = _build.main_loss(self)
        self.mtp_loss = _build.mtp_loss(self)
        self.ngram_penalty = _build.ngram_penalty(self)
        self.immediate_repetition_detector = _build.repetition_detector(self)
        self.moe_balancer = _build.moe_balancer(self)
        self.focal_loss = _build.focal_loss(self)
        self.diversity_loss = _build.diversity_loss(self)
        self.auxiliary_loss = _build.auxiliary_loss(self)

    def forward(
        self,
        logits,
        targets,
        attention_mask=None,
        hidden_states=None,
        primary_logits=None,
        additional_logits=None,
        confidence_scores=None,
        mtp_active=False,
        gate_logits=None,
        expert_indices=None,
        expert_outputs=None,
        return_detailed=False,
        *,
        update_state=True,
    ):
FDOC
        self._check(logits, targets, attention_mask, primary_logits)
        self._check_inputs(
            additional_logits, mtp_active, gate_logits, expert_indices, expert_outputs
        )
        heads = additional_logits, confidence_scores, mtp_active
        elsewhere = self._has_other_logits(logits, primary_logits)
        batch = read(self, logits, targets, attention_mask, elsewhere)
        out = {"total_loss": None, "main_loss": None}
        total = self._main(out, batch, primary_logits if elsewhere else None, heads, update_state)
        total = total + self._mtp(out, batch, hidden_states, heads, update_state)
        total = total + self._repetition(out, batch)
        total = total + self._experts(
            out, batch, gate_logits, expert_indices, expert_outputs, update_state
        )
        out["total_loss"] = total
        return out if return_detailed else total

    def _main(self, out, batch, primary_logits, heads, update_state):
        """The main loss into ``out``; returned: what of it, or in its place, joins the total."""
        if primary_logits is not None:
            cross_entropy = self.main_loss.compute_cross_entropy(
                primary_logits, batch.targets, batch.valid
            )
        else:
            rows = smoothed_loss(*batch.terms[:2], self.label_smoothing, self.vocab_size)
            cross_entropy = masked_mean(rows, batch.valid)
        rest = eos_penalty(self, batch.targets, batch.valid, batch.eos, batch.eos_log_prob)
        if self.primary_loss_type == "adaptive_mtp":
            parts = self.main_loss.from_primary(
                cross_entropy, batch.targets, *heads[:2], batch.valid, heads[2],
                update_state=advances(self, update_state),
            )
            out.update({f"main_{k}": v for k, v in parts.items() if k != "loss"})
            rest = rest + parts["additional_loss"] + parts["confidence_reg"]
        out["main_loss"] = cross_entropy + rest
        if self.primary_loss_type == "deepseek":
            if advances(self.main_loss, update_state):
                self.main_loss.record(out["main_loss"], batch.valid)
            out["main_temperature"] = self.main_loss.temperature.clone()
        if self.focal_loss is None:
            return out["main_loss"]
        terms = batch.terms
        out["focal_loss"] = self.focal_loss.from_log_prob(terms.log_prob, batch.targets, batch.valid)
        if self.focal_mode == "replace":
            return out["focal_loss"] + rest
        return out["main_loss"] + (out["focal_loss"] if self.focal_mode == "add" else 0)

    def _mtp(self, out, batch, hidden_states, heads, update_state):
        if self.mtp_loss is None:
            return 0
        if self.mtp_type == "adaptive":
            zero = batch.valid.new_zeros((), dtype=torch.float32)
            parts = self.mtp_loss.from_primary(
                zero, batch.targets, *heads[:2], batch.valid, heads[2],
                update_state=advances(self, update_state),
            )
            out["adaptive_mtp_loss"] = parts["loss"]
            out.update({f"adaptive_mtp_{k}": v for k, v in parts.items() if k != "loss"})
            return parts["loss"]
        if hidden_states is None:
            out["mtp_warning"] = _NO_HIDDEN_STATES
            if not torch.compiler.is_compiling():
                warnings.warn(_NO_HIDDEN_STATES, stacklevel=4)
            return 0
        parts = self.mtp_loss(hidden_states, batch.targets, batch.valid)
        out["mtp_loss"], out["mtp_per_token_losses"] = parts["mtp_loss"], parts["per_token_losses"]
        return parts["mtp_loss"]

    def _repetition(self, out, batch):
        total = 0
        if self.ngram_penalty is not None:
            parts = self.ngram_penalty.from_terms(batch.terms, batch.counts, batch.said)
            out["ngram_penalty"] = parts["total_repetition_penalty"]
            out["ngram_penalty_breakdown"] = {
                "ngram": parts["ngram_penalty"],
                "diversity": parts["diversity_penalty"],
            }
            total = total + out["ngram_penalty"]
        detector = self.immediate_repetition_detector
        if detector is not None:
            if batch.counts is None:
                penalty = detector.from_log_prob(batch.previous_log_prob, batch.previous)
            else:
                penalty = detector.from_counts(batch.counts)
            out["immediate_repetition_penalty"] = penalty
            total = total + penalty
        return total
