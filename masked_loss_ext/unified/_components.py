# SPDX-License-Identifier: BSD-3-Clause
"""The components of a UnifiedLoss: each writes what it reports into ``out`` and returns what joins
the total."""

import warnings
from typing import Any, NamedTuple

import torch

from .._checks import check_rank, check_tensor
from ._arguments import as_part, check_logits, may_be_on
from ._penalties import eos_penalty
from ._rows import masked_mean, smoothed_loss
from ._state import advances

_NAME = "UnifiedLoss"
_NO_HIDDEN_STATES = (
    "UnifiedLoss: use_mtp is on but hidden_states is None: pass hidden_states [B, S, hidden_size]; "
    "there is no multi-token prediction loss in this call"
)


class Heads(NamedTuple):
    """Of a model that predicts several tokens."""

    logits: Any
    confidence: Any
    active: Any


class Experts(NamedTuple):
    """Of a mixture of experts."""

    gate_logits: Any
    expert_indices: Any
    expert_outputs: Any


def check_inputs(loss, heads, experts):
    """What an enabled component cannot do without."""
    adaptive = loss.primary_loss_type == "adaptive_mtp" or (
        loss.use_mtp and loss.mtp_type == "adaptive"
    )
    if may_be_on(_NAME, heads.active) and adaptive and heads.logits is None:
        raise _missing("additional_logits", "mtp_active")
    for name, value in experts._asdict().items():
        _check_kind(name, value)
    if loss.moe_balancer is not None:
        for name, value in (
            ("gate_logits", experts.gate_logits),
            ("expert_indices", experts.expert_indices),
        ):
            if value is None:
                raise _missing(name, "use_moe_balancing")
    if loss.diversity_loss is not None and experts.expert_outputs is None:
        raise _missing("expert_outputs", "use_diversity_loss")
    if (
        loss.auxiliary_loss is not None
        and experts.gate_logits is None
        and experts.expert_outputs is None
    ):
        raise _missing("gate_logits (with expert_indices) or expert_outputs", "use_auxiliary_loss")


def _check_kind(name, value):
    """gate_logits and expert_indices are tensors, expert_outputs may be a list of them."""
    if value is None:
        return
    if name != "expert_outputs" or not isinstance(value, (list, tuple)):
        check_tensor(_NAME, name, value)
        if name == "expert_outputs":
            check_rank(_NAME, name, value, 3, "[E, N, H]")
        return
    for i, output in enumerate(value):
        check_tensor(_NAME, f"{name}[{i}]", output)


def _missing(name, option):
    return ValueError(f"{_NAME}: {name} must be passed to forward for {option}, got None")


def main(loss, out, batch, primary_logits, heads, update_state):
    """Cross entropy, or focal loss in its place, and EOS penalty."""
    if primary_logits is None:
        rows = smoothed_loss(*batch.terms[:2], loss.label_smoothing, loss.vocab_size)
        cross_entropy = masked_mean(rows, batch.valid)
    else:
        check_logits(_NAME, primary_logits, batch.targets, loss.vocab_size, "primary_logits")
        cross_entropy = as_part(
            _NAME,
            loss.main_loss.compute_cross_entropy,
            primary_logits,
            batch.targets,
            batch.valid,
        )
    eos, like = (batch.eos, batch.eos_log_prob), cross_entropy.dtype
    rest = eos_penalty(loss, batch.targets, batch.valid, batch.starts, eos, like)
    if loss.primary_loss_type == "adaptive_mtp":
        parts = _adaptive(loss.main_loss, cross_entropy, batch, heads, update_state)
        out.update({f"main_{k}": v for k, v in parts.items() if k != "loss"})
        rest = rest + parts["additional_loss"] + parts["confidence_reg"]
    out["main_loss"] = cross_entropy + rest
    if loss.primary_loss_type == "deepseek":
        if advances(loss.main_loss, update_state):
            loss.main_loss.record(out["main_loss"], batch.valid)
        out["main_temperature"] = loss.main_loss.current_temperature(out["main_loss"])
    if loss.focal_loss is None:
        return out["main_loss"]
    focal = loss.focal_loss.from_log_prob(batch.terms.log_prob, batch.targets, batch.valid)
    out["focal_loss"] = focal
    if loss.focal_mode == "replace":
        return focal + rest
    return out["main_loss"] + focal if loss.focal_mode == "add" else out["main_loss"]


def _adaptive(part, cross_entropy, batch, heads, update_state):
    return as_part(
        _NAME,
        part.from_primary,
        cross_entropy,
        batch.targets,
        heads.logits,
        heads.confidence,
        batch.valid,
        heads.active,
        starts=batch.starts,
        update_state=update_state,
    )


def mtp(loss, out, batch, hidden_states, heads, update_state):
    if loss.mtp_loss is None:
        return 0
    if loss.mtp_type == "adaptive":
        no_primary = batch.terms.scaled_log_prob.new_zeros(())
        parts = _adaptive(loss.mtp_loss, no_primary, batch, heads, update_state)
        out["adaptive_mtp_loss"] = parts.pop("loss")
        out.update({f"adaptive_mtp_{k}": v for k, v in parts.items()})
        return out["adaptive_mtp_loss"]
    if hidden_states is None:
        out["mtp_warning"] = _NO_HIDDEN_STATES
        if not torch.compiler.is_compiling():
            warnings.warn(_NO_HIDDEN_STATES, stacklevel=5)
        return 0
    given = hidden_states, batch.targets, batch.valid
    parts = as_part(_NAME, loss.mtp_loss, *given, segment_ids=batch.starts)
    out["mtp_loss"] = parts["mtp_loss"]
    out["mtp_per_token_losses"] = parts["per_token_losses"]
    return parts["mtp_loss"]


def repetition(loss, out, batch):
    total = 0
    if loss.ngram_penalty is not None:
        parts = loss.ngram_penalty.from_terms(batch.terms, batch.counts, batch.valid)
        out["ngram_penalty"] = parts["total_repetition_penalty"]
        out["ngram_penalty_breakdown"] = {
            "ngram": parts["ngram_penalty"],
            "diversity": parts["diversity_penalty"],
        }
        total = total + out["ngram_penalty"]
    detector = loss.immediate_repetition_detector
    if detector is not None:
        if batch.counts is None:
            penalty = detector.from_log_prob(batch.previous_log_prob, batch.previous)
        else:
            penalty = detector.from_counts(batch.counts, out["main_loss"].dtype)
        out["immediate_repetition_penalty"] = penalty
        total = total + penalty
    return total


def experts(loss, out, batch, given, update_state):
    """Balancing, similarity of outputs, auxiliary losses."""
    total = 0
    if loss.moe_balancer is not None:
        total = total + _balancing(loss.moe_balancer, out, batch, given, update_state)
    outputs_mask = None
    if given.expert_outputs is not None and len(given.expert_outputs) > 0:
        outputs_mask = _row_mask(batch.valid, given.expert_outputs[0])
    similarity = None
    if loss.diversity_loss is not None:
        similarity = as_part(
            _NAME, loss.diversity_loss.similarity, given.expert_outputs, outputs_mask
        )
        out["diversity_loss"] = loss.diversity_loss.diversity_weight * similarity
        total = total + out["diversity_loss"]
    if loss.auxiliary_loss is not None:
        for name, value in _auxiliary(loss, batch, given, outputs_mask, similarity).items():
            out[f"aux_{name}"] = value
            total = total + value
    return total


def _balancing(balancer, out, batch, given, update_state):
    parts = as_part(
        _NAME,
        balancer,
        given.gate_logits,
        given.expert_indices,
        attention_mask=_row_mask(batch.valid, given.gate_logits),
        update_state=advances(balancer, update_state),
    )
    out["moe_balancing_term"] = parts["balancing_term"]
    out["moe_balance_loss"] = parts["balance_loss"]
    out["moe_expert_balance_ratio"] = parts["expert_balance_ratio"]
    out["moe_cv"] = parts["coefficient_of_variation"]
    return parts["balancing_term"]


def _auxiliary(loss, batch, given, outputs_mask, similarity):
    """In two parts: gate and outputs may differ in rows, and so in their masks.

    ``similarity`` is that of the outputs where it is known already: it costs as much as all that
    is not the row pass together.
    """
    losses = {}
    if given.gate_logits is not None:
        losses = as_part(
            _NAME,
            loss.auxiliary_loss,
            given.gate_logits,
            given.expert_indices,
            num_experts=loss.num_experts or given.gate_logits.shape[-1],
            attention_mask=_row_mask(batch.valid, given.gate_logits),
        )
    if given.expert_outputs is not None:
        auxiliary = loss.auxiliary_loss
        if similarity is None:
            similarity = as_part(
                _NAME, auxiliary.diversity.similarity, given.expert_outputs, outputs_mask
            )
        losses["expert_diversity"] = auxiliary.expert_diversity_weight * similarity
    return losses


def _row_mask(valid, rows):
    """Which rows of [N, D] count; all of them where they are not one per token."""
    return valid.reshape(-1) if rows.shape[:-1].numel() == valid.numel() else None
