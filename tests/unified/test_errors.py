# SPDX-License-Identifier: BSD-3-Clause
"""What the unified loss refuses, and what it says one should pass instead."""

import re
import warnings

import pytest
import torch

from masked_loss_ext import UnifiedLoss, create_unified_loss
from masked_loss_ext.unified import (
    AdaptiveMTPLoss,
    DeepSeekLoss,
    NGramRepetitionPenalty,
    SequenceRepetitionDetector,
    TemperatureScaledCrossEntropy,
)

B, S, V, H, E = 2, 4, 5, 3, 3
X, Y = torch.zeros(B, S, V), torch.ones(B, S, dtype=torch.int64)
GATE, CHOSEN = torch.zeros(B * S, E), torch.zeros(B * S, 1, dtype=torch.int64)
META = torch.ones(B, S, device="meta")


def refused(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


CONSTRUCTION = [
    (UnifiedLoss, {"primary_loss_type": "deepsek"}, "unknown primary_loss_type: "),
    (UnifiedLoss, {"primary_loss_type": "deepsek"}, "standard, deepseek or adaptive_mtp, got"),
    (UnifiedLoss, {"use_mtp": True, "hidden_size": 3, "mtp_type": "x"}, "unknown mtp_type: "),
    (UnifiedLoss, {"mtp_type": "x"}, "deepseek or adaptive, got 'x'"),
    (UnifiedLoss, {"use_mtp": True}, "hidden_size required for multi-token prediction"),
    (
        UnifiedLoss,
        {"primary_loss_type": "adaptive_mtp"},
        "hidden_size required for adaptive_mtp loss",
    ),
    (UnifiedLoss, {"use_moe_balancing": True}, "num_experts required for MoE balancing"),
    (UnifiedLoss, {"focal_mode": "on"}, "focal_mode must be replace, add or report, got 'on'"),
    (UnifiedLoss, {"penalty_on": "logits"}, "penalty_on must be targets or model, got 'logits'"),
    (UnifiedLoss, {"label_smoothing": 1.5}, "number at least 0 and at most 1, got 1.5"),
    (UnifiedLoss, {"ngram_size": 0}, "ngram_size must be at least 1, got 0"),
    (UnifiedLoss, {"initial_temperature": 0.0}, "initial_temperature must be a finite number"),
    (UnifiedLoss, {"min_sequence_length": -1}, "min_sequence_length must be at least 0"),
    (UnifiedLoss, {"focal_gamma": -1.0}, "focal_gamma must be a finite number at least 0"),
    (
        UnifiedLoss,
        {"eos_token_id": 5, "penalty_on": "model"},
        "eos_token_id must be in [0, 5), got 5",
    ),
    (TemperatureScaledCrossEntropy, {"vocab_size": None}, "vocab_size must be provided"),
    (
        TemperatureScaledCrossEntropy,
        {"temperature_bounds": (2.0, 0.5)},
        "temperature_bounds[1] must be a finite number at least 2.0, got 0.5",
    ),
    (AdaptiveMTPLoss, {"label_smoothing": 0.9}, "number at least 0 and at most 0.8, got 0.9"),
    (DeepSeekLoss, {"hidden_size": None}, "hidden_size required for multi-token prediction"),
    (NGramRepetitionPenalty, {"penalty_on": "x"}, "penalty_on must be targets or model"),
]


@pytest.mark.parametrize("cls,options,text", CONSTRUCTION)
def test_construction(cls, options, text):
    given = {} if cls is NGramRepetitionPenalty else {"vocab_size": V}
    refused(lambda: cls(**given | options), ValueError, text)


def test_vocabulary_of_none():
    refused(lambda: UnifiedLoss(0), ValueError, "vocab_size must be at least 1, got 0")
    refused(lambda: UnifiedLoss("x"), TypeError, "vocab_size must be an int, got str")


def test_configurations():
    text = "config has unknown options ['use_contrastive']"
    refused(lambda: create_unified_loss({"vocab_size": 5, "use_contrastive": 1}), ValueError, text)
    refused(lambda: create_unified_loss({}), ValueError, "config must have vocab_size")


MISSING = [
    ({"num_experts": E, "use_moe_balancing": True}, {}, "gate_logits must be passed to forward"),
    (
        {"num_experts": E, "use_moe_balancing": True},
        {"gate_logits": GATE},
        "expert_indices must be passed to forward for use_moe_balancing",
    ),
    ({"use_diversity_loss": True}, {}, "expert_outputs must be passed to forward"),
    ({"use_auxiliary_loss": True}, {}, "gate_logits (with expert_indices) or expert_outputs"),
    (
        {"primary_loss_type": "adaptive_mtp", "hidden_size": H},
        {"mtp_active": True},
        "additional_logits must be passed to forward for mtp_active",
    ),
    (
        {"use_mtp": True, "mtp_type": "adaptive", "hidden_size": H},
        {"mtp_active": torch.tensor(True)},
        "additional_logits must be passed to forward",
    ),
]


@pytest.mark.parametrize("options,inputs,text", MISSING)
def test_missing_inputs_of_enabled_components(options, inputs, text):
    loss_fn = UnifiedLoss(V, **options)
    refused(lambda: loss_fn(X, Y, **inputs), ValueError, text)


ARGUMENTS = [
    ((X[..., :4], Y), ValueError, "logits must have vocab_size = 5 classes in the last dimension"),
    ((X[..., :4], Y), ValueError, "got [2, 4, 4]: pass vocab_size=4"),
    ((X[0], Y), ValueError, "logits must have 3 dimensions [B, S, V], got [4, 5]"),
    ((X.long(), Y), ValueError, "logits must be a floating tensor, got torch.int64"),
    ((X[:1], Y), ValueError, "logits must have the B and S of targets [2, 4], got [1, 4, 5]"),
    ((None, Y), TypeError, "logits must be a torch.Tensor, got NoneType"),
    ((X, None), TypeError, "targets must be a torch.Tensor, got NoneType"),
    ((X, Y.float()), ValueError, "targets must be integers, got torch.float32"),
    ((X, Y[0]), ValueError, "targets must have 2 dimensions [B, S], got [4]"),
    ((X, Y, Y[:, :3]), ValueError, "attention_mask shape must be [2, 4]"),
    ((X, Y, torch.zeros(B, 1, S, S)), ValueError, "attention_mask must have 2 dimensions [B, S]"),
    ((X, Y, -torch.ones(B, S)), ValueError, "an additive mask?"),
    ((X, Y, META), ValueError, "attention_mask must be on the device of targets (cpu), got meta"),
    ((X, Y + V), IndexError, "[0, 5)"),
]
CALLABLE = {
    "UnifiedLoss": UnifiedLoss(V),
    "TemperatureScaledCrossEntropy": TemperatureScaledCrossEntropy(vocab_size=V),
    "NGramRepetitionPenalty": NGramRepetitionPenalty(vocab_size=V),
}


@pytest.mark.parametrize("name", CALLABLE)
@pytest.mark.parametrize("arguments,kind,text", ARGUMENTS)
def test_arguments(name, arguments, kind, text):
    refused(lambda: CALLABLE[name](*arguments), kind, f"{name}: ")
    refused(lambda: CALLABLE[name](*arguments), kind, text)


def test_arguments_of_parts():
    detector = SequenceRepetitionDetector(penalty_on="model")
    text = 'logits must be passed for penalty_on="model", got None'
    refused(lambda: detector(Y), ValueError, text)
    penalty = NGramRepetitionPenalty(vocab_size=7)
    refused(lambda: penalty(X, Y), ValueError, "pass vocab_size=5")
    refused(lambda: penalty.compute_token_diversity_penalty(X), ValueError, "pass vocab_size=5")
    text = "reduction must be mean, sum or none, got 'avg'"
    refused(lambda: CALLABLE["TemperatureScaledCrossEntropy"](X, Y, None, "avg"), ValueError, text)
    adaptive = AdaptiveMTPLoss(V)
    scores = torch.ones(B, 1)
    text = "Unknown target_mode"
    refused(lambda: adaptive.compute_confidence_regularization(scores, "low"), ValueError, text)
    refused(lambda: adaptive(X, Y, confidence_scores=Y), ValueError, "must be a floating")
    refused(lambda: adaptive(X[..., :4], Y), ValueError, "primary_logits must have vocab")
    heads = [X, X[:1]]
    refused(lambda: adaptive(X, Y, heads, mtp_active=True), ValueError, "B and S of targets")
    old = DeepSeekLoss(V, H, num_experts=E)
    refused(lambda: old(X, Y), ValueError, "DeepSeekLoss: gate_logits and expert_indices must be")
    refused(
        lambda: old(X, Y, torch.zeros(B, S, H + 1), None, GATE, CHOSEN), ValueError, "hidden_size 3"
    )


def test_missing_hidden_states_warn():
    """The one input that is missed in words alone."""
    for loss_fn in (UnifiedLoss(V, H, use_mtp=True), DeepSeekLoss(V, H)):
        with pytest.warns(UserWarning, match="hidden_states is None: pass hidden_states") as caught:
            loss_fn(X, Y)
        assert caught[0].filename == __file__, "it names the line of the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UnifiedLoss(V, H, "adaptive_mtp", use_mtp=True)(X, Y)  # has its own heads
        UnifiedLoss(V, H, use_mtp=True, mtp_type="adaptive")(X, Y)
        CALLABLE["UnifiedLoss"](X, Y, hidden_states=torch.zeros(B, S, H))


@pytest.mark.parametrize("mtp_active", [False, True])
def test_a_mask_where_the_heads_belong(mtp_active):
    """The third by position is not the mask, as it is elsewhere."""
    adaptive = AdaptiveMTPLoss(V)
    text = "AdaptiveMTPLoss: additional_logits must be a list of tensors, got Tensor"
    refused(lambda: adaptive(X, Y, torch.ones(B, S), mtp_active=mtp_active), TypeError, text)
    assert adaptive.loss_count == 0
    unified = UnifiedLoss(V, H, "adaptive_mtp")
    refused(lambda: unified(X, Y, additional_logits=X), TypeError, "UnifiedLoss: additional_log")
