# SPDX-License-Identifier: BSD-3-Clause
"""What no module may take, where it has a rule of its own: each is refused in one sentence. Others,
argument by argument: tests/invalid/."""

import math
import re

import numpy as np
import pytest
import torch
from unified_cases import batch

from masked_loss_ext import unified as u

NAN, INF = math.nan, math.inf
V = {"vocab_size": 5}
TOKENS = V | {"eos_token_id": 1, "pad_token_id": 2}


def refuses(call, name, argument):
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{name}: "), text
    assert re.search(rf"\b{argument}\b", text), text
    assert len(text) < 400 and "\n" not in text
    return text


MORE = [
    (lambda: u.MultiTokenPredictionLoss(5, 4, 2**31 - 1), "num_future_tokens must be at most 1024"),
    (lambda: u.MultiTokenPredictionLoss(5, 4, 1025), "num_future_tokens must be at most 1024"),
    (
        lambda: u.MultiTokenPredictionLoss(2**31 - 1, 2**31 - 1, 1),
        "vocab_size * hidden_size * num_future_tokens must be at most 1099511627776 weights",
    ),
    (lambda: u.DeepSeekLoss(5, 4, num_future_tokens=2000), "DeepSeekLoss: num_future_tokens must"),
    (
        lambda: u.UnifiedLoss(5, 4, use_mtp=True, num_future_tokens=2**31 - 1),
        "UnifiedLoss: num_future_tokens must be at most 1024",
    ),
    (lambda: u.AuxiliaryFreeMoEBalancer(2**31 - 1), "num_experts must be at most 16777216"),
    (lambda: u.AdaptiveLossScaling(2**31 - 1), "num_losses must be at most 1048576"),
    (lambda: u.AdaptiveLossScaling(2, "ab"), "init_weights must be a list of numbers, got str"),
    (lambda: u.AdaptiveLossScaling(2, 5), "init_weights must be a list of numbers, got int"),
    (lambda: u.AdaptiveLossScaling(2, ["a", 1]), "init_weights[0] must be a number, got str"),
    (lambda: u.AdaptiveLossScaling(2, [-1, 1]), "init_weights[0] must be a finite number above 0"),
    (lambda: u.AdaptiveLossScaling(2)(3), "losses must be a list of tensors, got int"),
    (lambda: u.AdaptiveLossScaling(2)([1.0, 2.0]), "losses[0] must be a torch.Tensor, got float"),
    (lambda: u.AdaptiveLossScaling(2)(torch.ones(())), "losses must have 1 dimensions [n], got []"),
    (
        lambda: u.AdaptiveLossScaling(2)([torch.ones(2), torch.ones(2)]),
        "losses[0] must have 0 dimensions [], got [2]",
    ),
    (lambda: u.FocalLoss(torch.tensor([1.0, NAN])), "alpha must be finite and not negative"),
    (lambda: u.FocalLoss(torch.tensor([1.0, -1.0])), "alpha must be finite and not negative"),
    (lambda: u.FocalLoss(torch.tensor([1.0, INF])), "alpha must be finite and not negative"),
    (lambda: u.FocalLoss(torch.tensor([1, 2])), "alpha must be a number or floating"),
    (lambda: u.UnifiedLoss(5, focal_alpha=torch.ones(4)), "focal_alpha must be a number or"),
    (lambda: u.LabelSmoothingLoss(5, 0.81), "smoothing must be a finite number at least 0 and"),
    (lambda: u.AdaptiveMTPLoss(5, label_smoothing=0.9), "label_smoothing must be a finite number"),
    (
        lambda: u.UnifiedLoss(5, primary_loss_type="standard", label_smoothing=0.9),
        "UnifiedLoss: label_smoothing must be a finite number at least 0 and at most 0.8",
    ),
    (
        lambda: u.TemperatureScaledCrossEntropy(**V, temperature_bounds=0.5),
        "temperature_bounds must be (lowest, highest), got 0.5",
    ),
    (
        lambda: u.TemperatureScaledCrossEntropy(**V, temperature_bounds=(0, 1)),
        "temperature_bounds[0] must be a finite number above 0",
    ),
    (
        lambda: u.TemperatureScaledCrossEntropy(**V, temperature_bounds=(0.5, NAN)),
        "temperature_bounds[1] must be a finite number at least 0.5",
    ),
    (
        lambda: u.AdaptiveAntiRepetitionLoss(**TOKENS).update_weights(NAN),
        "AdaptiveAntiRepetitionLoss: step must be a finite number, got nan",
    ),
    (
        lambda: u.AdaptiveAntiRepetitionLoss(**TOKENS).update_weights("3"),
        "AdaptiveAntiRepetitionLoss: step must be a number, got str",
    ),
    (
        lambda: u.AdaptiveAntiRepetitionLoss(**TOKENS, ngram=3),
        "unexpected keyword argument ngram; did you mean ngram_size?",
    ),
    (lambda: u.create_unified_loss([("vocab_size", 5)]), "config must be a mapping, got list"),
    (lambda: u.CompositeLoss([1]), "CompositeLoss: loss_config must be a dict, got list"),
    (lambda: u.CompositeLoss({"focal": 1.0}), "loss_config['focal'] must be a dict, got float"),
    (lambda: u.CompositeLoss({"focal": {"weight": NAN}}), "focal: weight must be a finite number"),
    (
        lambda: u.CompositeLoss({"focal": {"weight": "1"}}),
        "weight must be a number, got str",
    ),
    (lambda: u.CompositeLoss({"focal": {"gama": 1.0}}), "CompositeLoss: focal: unexpected keyword"),
    (lambda: u.CompositeLoss({"focal": {"gama": 1.0}}), "gama; did you mean gamma"),
    (lambda: u.CompositeLoss({"focal": {"type": ["focal"]}}), "focal: type must be one of focal,"),
    (lambda: u.CompositeLoss({"a.b": {"type": "focal"}}), "loss_config must have names"),
    (lambda: u.CompositeLoss({"pop": {"type": "focal"}}), "loss_config must have names"),
    (lambda: u.CompositeLoss({"": {"type": "focal"}}), "loss_config must have names"),
    (
        lambda: u.CompositeLoss({"perplexity": {}})(
            **{k: batch()[k] for k in ("logits", "targets")}, mask=batch()["attention_mask"]
        ),
        "CompositeLoss: unexpected keyword argument mask; did you mean",
    ),
    (
        lambda: u.ContrastiveLoss()(torch.ones(3, 2), positive_pairs=torch.tensor([[0, 3]])),
        "ContrastiveLoss: positive_pairs at row 0 must be in [0, 3), the embeddings, got [0, 3]",
    ),
    (
        lambda: u.ContrastiveLoss(loss_type="standard")(
            torch.ones(3, 2), negative_pairs=torch.tensor([[0, 1], [-1, 2]])
        ),
        "ContrastiveLoss: negative_pairs at row 1 must be in [0, 3), the embeddings, got [-1, 2]",
    ),
    (lambda: u.DiversityLoss()(torch.ones(())), "expert_outputs must be [E, N, H], got []"),
    (
        lambda: u.NGramRepetitionPenalty(**V).compute_token_diversity_penalty(
            torch.zeros(2, 3, 5), NAN
        ),
        "NGramRepetitionPenalty: temperature must be a finite number above 0, got nan",
    ),
    (
        lambda: u.NGramRepetitionPenalty(**V).compute_token_diversity_penalty(
            torch.zeros(2, 3, 5), attention_mask=torch.ones(3)
        ),
        "NGramRepetitionPenalty: attention_mask shape must be [2, 3]",
    ),
    (
        lambda: u.AdaptiveMTPLoss(5).compute_confidence_regularization([0.5]),
        "AdaptiveMTPLoss: confidence_scores must be a torch.Tensor, got list",
    ),
    (
        lambda: u.AuxiliaryFreeMoEBalancer(2).update_statistics(
            torch.zeros(3, 1).long(), torch.zeros(3, 3)
        ),
        "AuxiliaryFreeMoEBalancer.update_statistics: expert_scores must have num_experts 2",
    ),
    (
        lambda: u.AuxiliaryLoss()(torch.zeros(3, 2), torch.zeros(3, 1).long(), num_experts=2.0),
        "AuxiliaryLoss: num_experts must be an int, got float",
    ),
]


@pytest.mark.parametrize("call,text", MORE)
def test_more(call, text):
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call()
    assert text in str(caught.value)


def test_what_is_a_number_all_the_same():
    """Integers of another type, flags of 0 and 1, any token as padding."""

    assert u.UnifiedLoss(5, use_mtp=0, ignore_index=-1, pad_token_id=-1).use_mtp == 0
    long = np.int64(5)
    assert u.SequenceRepetitionDetector(max_repeat_length=long).max_repeat_length == 5
    assert u.SequenceRepetitionDetector(cap_repeats=np.bool_(True)).cap_repeats
    with pytest.raises(TypeError, match="FocalLoss: gamma must be a number, got bool"):
        u.FocalLoss(gamma=True)
