# SPDX-License-Identifier: BSD-3-Clause
"""AdaptiveLossScaling and CompositeLoss: sums by hand, every type, what is missing."""

import copy
import math

import pytest
import torch

from masked_loss_ext import unified
from masked_loss_ext.unified import AdaptiveLossScaling, CompositeLoss
from masked_loss_ext.unified.composite import TYPES

V, H = 7, 4


def inputs():
    g = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(2, 5, V, generator=g, requires_grad=True),
        "targets": torch.randint(V, (2, 5), generator=g),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        "outputs_original": torch.randn(2, 5, V, generator=g),
        "outputs_augmented": torch.randn(2, 5, V, generator=g),
        "embeddings": torch.randn(6, 3, generator=g),
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "expert_outputs": [torch.randn(10, 3, generator=g) for _ in range(2)],
        "gate_logits": torch.randn(10, 2, generator=g, requires_grad=True),
        "expert_indices": torch.randint(2, (10, 1), generator=g),
        "num_experts": 2,
        "hidden_states": torch.randn(2, 5, H, generator=g),
    }


# --- AdaptiveLossScaling -------------------------------------------------------------------------


def test_scaling_by_hand():
    loss_fn = AdaptiveLossScaling(2, [3.0, 1.0])
    losses = [torch.tensor(1.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)]
    total, weights = loss_fn(losses)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(total, torch.tensor(2.0))
    total.backward()
    torch.testing.assert_close(torch.stack([x.grad for x in losses]), weights)
    # w_i (L_i - total): towards the smallest loss
    torch.testing.assert_close(loss_fn.log_weights.grad, torch.tensor([-0.75, 0.75]))
    assert [name for name, _ in loss_fn.named_parameters()] == ["log_weights"]
    total, weights = AdaptiveLossScaling(3)(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(total, torch.tensor(3.0))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    one, _ = AdaptiveLossScaling(2, torch.tensor([3.0, 1.0]))(torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(one, torch.tensor(2.0))


SCALING_BAD = [
    (lambda: AdaptiveLossScaling(0), "num_losses must be at least 1, got 0"),
    (lambda: AdaptiveLossScaling(2, [1.0]), "init_weights must be 2 positive numbers, got [1.0]"),
    (lambda: AdaptiveLossScaling(2, [1.0, 0.0]), "[1] must be a finite number above 0, got 0.0"),
    (lambda: AdaptiveLossScaling(2, [1.0, math.nan]), "[1] must be a finite number above 0"),
    (lambda: AdaptiveLossScaling(2)([torch.ones(())]), "losses must have num_losses 2 entries"),
]


@pytest.mark.parametrize("call,text", SCALING_BAD)
def test_scaling_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith("AdaptiveLossScaling: ") and text in str(caught.value)


# --- CompositeLoss -------------------------------------------------------------------------------


def test_composite_is_the_weighted_sum_of_its_losses():
    config = {
        "tokens": {"type": "label_smoothing", "num_classes": V, "smoothing": 0.1},
        "focal": {"weight": 0.5, "gamma": 1.0},
        "experts": {"type": "auxiliary", "weight": 2.0, "router_z_weight": 1.0},
    }
    before = copy.deepcopy(config)
    given = inputs()
    out = CompositeLoss(config)(**given)
    assert config == before, "the caller's configuration is his own"
    assert list(out) == ["tokens", "focal", "experts", "total"]
    rows = given["logits"], given["targets"], given["attention_mask"]
    assert torch.equal(out["tokens"], unified.LabelSmoothingLoss(V)(*rows))
    assert torch.equal(out["focal"], unified.FocalLoss(gamma=1.0)(*rows))
    torch.testing.assert_close(
        out["total"], out["tokens"] + 0.5 * out["focal"] + 2.0 * out["experts"]
    )
    out["total"].backward()
    assert (given["logits"].grad != 0).any() and (given["gate_logits"].grad != 0).any()


OPTIONS = {
    "label_smoothing": {"num_classes": V},
    "moe_balancing": {"num_experts": 2},
    "multi_token_prediction": {"vocab_size": V, "hidden_size": H},
    "anti_repetition": {"vocab_size": V, "eos_token_id": 5, "pad_token_id": 6},
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind):
    """By its name as the type; all in one call, each takes what it knows."""
    given = inputs()
    if kind != "contrastive":
        del given["labels"]  # of embeddings
    loss_fn = CompositeLoss({kind: OPTIONS.get(kind, {})})
    out = loss_fn(**given)
    assert out[kind].shape == () and out[kind].isfinite() and out["total"] == out[kind]
    assert isinstance(loss_fn.losses[kind], TYPES[kind][0])


def test_the_other_names_of_inputs():
    given = inputs()
    loss_fn = CompositeLoss({"focal": {}})
    one = loss_fn(**given)
    other = loss_fn(
        inputs=given["logits"], targets=given["targets"], attention_mask=given["attention_mask"]
    )
    assert torch.equal(one["total"], other["total"])


def test_state_of_the_parts_is_the_composites():
    config = {"b": {"type": "moe_balancing", "num_experts": 2}, "c": {"type": "focal"}}
    loss_fn = CompositeLoss(config)
    loss_fn(**inputs())
    assert loss_fn.state_dict()["losses.b.total_tokens"] > 0
    resumed = CompositeLoss(config)
    resumed.load_state_dict(loss_fn.state_dict())
    assert torch.equal(resumed(**inputs())["total"], loss_fn(**inputs())["total"])


BAD = [
    (lambda: CompositeLoss({}), "loss_config must have at least one loss, got none"),
    (lambda: CompositeLoss({"x": {"type": "typo"}}), "x: type must be one of focal, label_smo"),
    (lambda: CompositeLoss({"total": {"type": "focal"}}), "its name not total"),
    (
        lambda: CompositeLoss({"x": {"type": "focal"}})(logits=torch.zeros(2, 3)),
        "x of type focal needs targets: pass it to forward by keyword",
    ),
    (
        lambda: CompositeLoss({"diversity": {}})(logits=torch.zeros(2, 3)),
        "diversity of type diversity needs expert_outputs",
    ),
    (
        lambda: CompositeLoss({"y": {"type": "auxiliary"}})(logits=torch.zeros(2, 3)),
        "y of type auxiliary needs gate_logits or expert_outputs",
    ),
]


@pytest.mark.parametrize("call,text", BAD)
def test_composite_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith("CompositeLoss: ") and text in str(caught.value)


def test_a_failing_part_is_not_hidden():
    with pytest.raises(ValueError, match="Labels required"):
        CompositeLoss({"contrastive": {}})(embeddings=torch.zeros(2, 3))
