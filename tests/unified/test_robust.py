# SPDX-License-Identifier: BSD-3-Clause
"""Uses that once went wrong in silence, each with what it must give."""

import math

import pytest
import torch

from masked_loss_ext.unified import (
    AdaptiveMTPLoss,
    AuxiliaryFreeMoEBalancer,
    TemperatureScaledCrossEntropy,
    UnifiedLoss,
)

V = 5
ALONE = dict(use_ngram_penalty=False, use_immediate_repetition_penalty=False)


@pytest.fixture
def logits():
    return torch.randn(2, 4, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets():
    return torch.tensor([[0, 1, 2, 3], [4, 4, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_are_exact_in_a_half_precision_module(dtype, logits, targets):
    loss_fn = UnifiedLoss(V, num_experts=2, use_moe_balancing=True, **ALONE).to(dtype)
    gate = torch.zeros(140001, 2, requires_grad=True)
    chosen = torch.zeros(140001, 1, dtype=torch.int64)
    assert loss_fn(logits, targets, gate_logits=gate, expert_indices=chosen).isfinite()
    counts = loss_fn.get_loss_statistics()["moe_balancing"]["expert_counts"]
    assert counts == pytest.approx([14000.1, 0])


def test_sums_and_temperature_move_in_a_half_precision_module():
    adaptive = AdaptiveMTPLoss(V).bfloat16()
    moving = TemperatureScaledCrossEntropy(label_smoothing=0.0, adaptation_rate=0.001).bfloat16()
    logits, targets = torch.zeros(1, 2, V), torch.zeros(1, 2, dtype=torch.int64)
    for _ in range(300):
        adaptive(logits, targets)
    for _ in range(19):
        moving(logits, targets)
    assert adaptive.get_statistics()["avg_primary_loss"] == pytest.approx(math.log(V), rel=1e-5)
    assert moving.temperature.item() == pytest.approx(0.99)  # ten of the calls moved it


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [[1, 2], "1", 1.0])
def test_token_ids_are_ints(name, value):
    with pytest.raises(TypeError, match=f"UnifiedLoss: {name} must be an int"):
        UnifiedLoss(V, **{name: value})


def test_the_models_eos_is_a_class():
    with pytest.raises(ValueError, match=r"eos_token_id must be in \[0, 5\), got 9"):
        TemperatureScaledCrossEntropy(vocab_size=V, eos_token_id=9, penalty_on="model")


def test_focal_alpha_is_of_the_vocabulary():
    with pytest.raises(ValueError, match=r"focal_alpha must be a number or .* \[5\], got \[9\]"):
        UnifiedLoss(V, use_focal_loss=True, focal_alpha=torch.ones(9))


def test_a_nan_of_the_gate_does_not_stay():
    balancer = AuxiliaryFreeMoEBalancer(3)
    gate, chosen = torch.zeros(8, 3), torch.zeros(8, 1, dtype=torch.int64)
    gate[0] = torch.nan
    balancer(gate, chosen)
    assert balancer.expert_scores.isfinite().all()


def test_torch_func_changes_no_buffer(logits, targets):
    loss_fn = UnifiedLoss(V)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(loss_fn(leaf, targets, update_state=False), leaf)[0]
    found = torch.func.grad(lambda x: loss_fn(x, targets))(logits)
    torch.testing.assert_close(found, expected)
    assert loss_fn.main_loss.history_size == 0


def test_a_recomputed_balancer_counts_once():
    balancer = AuxiliaryFreeMoEBalancer(2)
    gate = torch.zeros(4, 2, requires_grad=True)
    chosen = torch.zeros(4, 1, dtype=torch.int64)

    def term(gate):
        return balancer(gate, chosen)["balancing_term"]

    torch.utils.checkpoint.checkpoint(term, gate, use_reentrant=False).backward()
    assert balancer.total_tokens.item() == pytest.approx(0.4)  # a tenth of 4


@pytest.mark.parametrize("index", [3, -1])
def test_a_bad_expert_is_named(index):
    chosen = torch.full((8, 1), index)
    match = r"expert_indices at row 0 must be in \[0, 3\), got \[" + str(index)
    with pytest.raises(IndexError, match=match):
        AuxiliaryFreeMoEBalancer(3)(torch.zeros(8, 3), chosen)


def test_gates_of_each_layer_are_refused_by_name(logits, targets):
    loss_fn = UnifiedLoss(V, num_experts=3, use_moe_balancing=True)
    with pytest.raises(TypeError, match="UnifiedLoss: gate_logits must be a torch.Tensor, got tup"):
        chosen = torch.zeros(8, 1, dtype=torch.int64)
        loss_fn(logits, targets, gate_logits=(torch.zeros(8, 3),), expert_indices=chosen)


def test_heads_may_be_active_by_a_number_on_the_device(logits, targets):
    heads = AdaptiveMTPLoss(V)
    on = heads(logits, targets, [logits], mtp_active=torch.tensor(1))
    assert on["loss"] == heads(logits, targets, [logits], mtp_active=True)["loss"]


def test_padding_counts_in_the_diversity_of_predictions(logits, targets):
    """It is a target like any other there: only what repeats leaves it out."""
    options = dict(return_detailed=True, update_state=False)
    plain = UnifiedLoss(V)(logits, targets, **options)
    padded = UnifiedLoss(V, pad_token_id=4)(logits, targets, **options)
    key = "ngram_penalty_breakdown"
    assert padded[key]["diversity"] == plain[key]["diversity"]
    repeated = "immediate_repetition_penalty"
    assert plain[repeated] == 0.25 and padded[repeated] == 0  # the run of two 4s
