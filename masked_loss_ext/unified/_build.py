# SPDX-License-Identifier: BSD-3-Clause
"""The parts of a UnifiedLoss, made from its arguments (attributes of ``loss`` by now)."""

import torch

from .._checks import check_choice, check_flags, check_number, shape_text
from ._arguments import (
    as_part,
    check_ignore_index,
    check_size,
    check_smoothing,
    check_token_id,
    check_weights,
)
from ._penalties import check_penalty_on
from .adaptive_mtp import AdaptiveMTPLoss
from .auxiliary import AuxiliaryLoss
from .diversity import DiversityLoss
from .hidden_state_mtp import MultiTokenPredictionLoss
from .moe import AuxiliaryFreeMoEBalancer
from .repetition import NGramRepetitionPenalty, SequenceRepetitionDetector
from .simple import FocalLoss, LabelSmoothingLoss
from .temperature import TemperatureScaledCrossEntropy

PRIMARY = ("standard", "deepseek", "adaptive_mtp")
MTP = ("deepseek", "adaptive")
FOCAL_MODES = ("replace", "add", "report")
_NAME = "UnifiedLoss"
_WEIGHTS = (
    *("mtp_weight", "ngram_penalty_weight", "immediate_repetition_weight"),
    *("gradient_balance_weight", "diversity_weight", "load_balancing_weight", "router_z_weight"),
)
_NOT_NEGATIVE = ("confidence_reg_strength", "eos_penalty_weight", "focal_gamma")
_FLAGS = (
    *("adaptive_temperature", "use_mtp", "use_confidence_weighting", "use_ngram_penalty"),
    *("use_immediate_repetition_penalty", "use_moe_balancing", "use_focal_loss"),
    *("use_diversity_loss", "use_auxiliary_loss", "shift_labels", "clamp_router_z"),
    *("normalize_topk", "detach_confidence"),
)


def check_options(name, loss):
    """Of all options, whether the part that they belong to is on or not."""
    check_size(name, "vocab_size", loss.vocab_size)
    check_flags(name, {option: getattr(loss, option) for option in _FLAGS})
    check_weights(name, {option: getattr(loss, option) for option in _WEIGHTS})
    for option in _NOT_NEGATIVE:
        check_number(name, option, getattr(loss, option), least=0)
    for option in ("num_future_tokens", "ngram_size"):
        check_size(name, option, getattr(loss, option))
    for option in ("hidden_size", "num_experts"):
        if getattr(loss, option) is not None:
            check_size(name, option, getattr(loss, option))
    kinds = "unknown primary_loss_type: "
    check_choice(name, "primary_loss_type", loss.primary_loss_type, PRIMARY, kinds)
    check_choice(name, "mtp_type", loss.mtp_type, MTP, "unknown mtp_type: ")
    check_choice(name, "focal_mode", loss.focal_mode, FOCAL_MODES)
    check_penalty_on(name, loss.penalty_on)
    check_number(name, "initial_temperature", loss.initial_temperature, above=0)
    most = 1 if loss.primary_loss_type == "deepseek" else 1 - 1 / max(loss.vocab_size, 2)
    check_smoothing(name, loss.label_smoothing, most)
    check_ignore_index(name, loss.ignore_index)
    check_size(name, "min_sequence_length", loss.min_sequence_length, 0)
    for needs, what in (
        (loss.use_mtp, "multi-token prediction"),
        (loss.primary_loss_type == "adaptive_mtp", "adaptive_mtp loss"),
    ):
        if needs and loss.hidden_size is None:
            raise ValueError(f"{name}: hidden_size required for {what}: pass hidden_size")
    if loss.use_moe_balancing and loss.num_experts is None:
        raise ValueError(f"{name}: num_experts required for MoE balancing: pass num_experts")
    check_token_id(name, "eos_token_id", loss.eos_token_id, loss.vocab_size)
    check_token_id(name, "pad_token_id", loss.pad_token_id)
    alpha = loss.focal_alpha
    if not isinstance(alpha, torch.Tensor):
        check_number(name, "focal_alpha", alpha, least=0)
    elif alpha.numel() != loss.vocab_size:
        raise ValueError(
            f"{name}: focal_alpha must be a number or [vocab_size] = [{loss.vocab_size}], got "
            f"{shape_text(alpha)}"
        )


def main_loss(loss):
    if loss.primary_loss_type == "adaptive_mtp":
        return adaptive_mtp(loss, 1.0)
    if loss.primary_loss_type == "standard":
        return LabelSmoothingLoss(
            loss.vocab_size, loss.label_smoothing, ignore_index=loss.ignore_index
        )
    return TemperatureScaledCrossEntropy(
        loss.initial_temperature,
        loss.adaptive_temperature,
        loss.label_smoothing,
        loss.vocab_size,
        eos_token_id=loss.eos_token_id,
        min_sequence_length=loss.min_sequence_length,
        eos_penalty_weight=loss.eos_penalty_weight,
        ignore_index=loss.ignore_index,
        penalty_on=loss.penalty_on,
    )


def adaptive_mtp(loss, primary_loss_weight):
    return as_part(
        _NAME,
        AdaptiveMTPLoss,
        loss.vocab_size,
        primary_loss_weight,
        loss.mtp_weight,
        loss.confidence_reg_strength,
        loss.use_confidence_weighting,
        loss.label_smoothing,
        loss.ignore_index,
        detach_confidence=loss.detach_confidence,
    )


def mtp_loss(loss):
    if not loss.use_mtp or loss.primary_loss_type == "adaptive_mtp":
        return None
    if loss.mtp_type == "adaptive":
        return adaptive_mtp(loss, 0.0)
    return as_part(
        _NAME,
        MultiTokenPredictionLoss,
        loss.vocab_size,
        loss.hidden_size,
        loss.num_future_tokens,
        loss.mtp_weight,
        ignore_index=loss.ignore_index,
    )


def ngram_penalty(loss):
    if not loss.use_ngram_penalty:
        return None
    return NGramRepetitionPenalty(
        loss.ngram_size,
        loss.ngram_penalty_weight,
        loss.vocab_size,
        loss.ignore_index,
        penalty_on=loss.penalty_on,
    )


def repetition_detector(loss):
    if not loss.use_immediate_repetition_penalty:
        return None
    return SequenceRepetitionDetector(
        loss.immediate_repetition_weight,
        ignore_index=loss.ignore_index,
        penalty_on=loss.penalty_on,
    )


def moe_balancer(loss):
    if not loss.use_moe_balancing:
        return None
    return as_part(
        _NAME,
        AuxiliaryFreeMoEBalancer,
        loss.num_experts,
        gradient_balance_weight=loss.gradient_balance_weight,
    )


def focal_loss(loss):
    if not loss.use_focal_loss:
        return None
    options = dict(ignore_index=loss.ignore_index)
    return as_part(_NAME, FocalLoss, loss.focal_alpha, loss.focal_gamma, **options)


def diversity_loss(loss):
    if not loss.use_diversity_loss:
        return None
    return DiversityLoss(diversity_weight=loss.diversity_weight)


def auxiliary_loss(loss):
    if not loss.use_auxiliary_loss:
        return None
    return AuxiliaryLoss(
        loss.load_balancing_weight,
        loss.router_z_weight,
        normalize_topk=loss.normalize_topk,
        clamp_router_z=loss.clamp_router_z,
    )
