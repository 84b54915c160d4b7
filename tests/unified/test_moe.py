# SPDX-License-Identifier: BSD-3-Clause
"""AuxiliaryFreeMoEBalancer and AuxiliaryLoss: numbers by hand, state, errors."""

import copy
import math

import pytest
import torch
from torch.autograd import gradcheck

from masked_loss_ext.unified import AuxiliaryFreeMoEBalancer, AuxiliaryLoss, DiversityLoss

W = 0.1  # the default gradient_balance_weight
SKEWED = torch.tensor([[0], [0], [0], [1]])
KEYS = [
    "balance_loss",
    "balancing_term",
    "expert_counts",
    "expert_balance_ratio",
    "coefficient_of_variation",
    "gradient_weight",
]


def gate(tokens=4, experts=2, dtype=torch.float32):
    return torch.zeros(tokens, experts, dtype=dtype, requires_grad=True)


def state(balancer):
    return {name: value.clone() for name, value in balancer.state_dict().items()}


# --- the balancer by hand ------------------------------------------------------------------------


def test_one_step_by_hand():
    """3 and 1 of 4 tokens with momentum 0.9: a tenth of them is in the averages."""
    balancer, logits = AuxiliaryFreeMoEBalancer(2), gate()
    out = balancer(logits, SKEWED)
    assert list(out) == KEYS and out["gradient_weight"] == W and out["balance_loss"] == 0
    torch.testing.assert_close(balancer.expert_counts, torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(balancer.expert_scores, torch.tensor([0.05, 0.05]))
    torch.testing.assert_close(balancer.total_tokens, torch.tensor(0.4))
    torch.testing.assert_close(out["expert_counts"], torch.tensor([0.3, 0.1]))
    # fair share 0.2, imbalance (0.1, -0.1) / 0.4
    torch.testing.assert_close(out["balancing_term"], torch.tensor(W * (W * 0.25) ** 2))
    torch.testing.assert_close(out["expert_balance_ratio"], torch.tensor([1.5, 0.5]), rtol=1e-5,
                               atol=0)  # fmt: skip
    cv = math.sqrt(0.02) / 0.2  # unbiased
    torch.testing.assert_close(out["coefficient_of_variation"], torch.tensor(cv), rtol=2e-5, atol=0)
    out["balancing_term"].backward()
    row = torch.tensor([2 * W * W * 0.25 / 8, -2 * W * W * 0.25 / 8])
    torch.testing.assert_close(logits.grad, row.expand(4, 2))


def test_two_steps_by_hand():
    balancer = AuxiliaryFreeMoEBalancer(2, momentum=0.5)
    for indices in (SKEWED, 1 - SKEWED):
        balancer(gate(), indices)
    # half of (1.5, 0.5), half of (1, 3)
    torch.testing.assert_close(balancer.expert_counts, torch.tensor([1.25, 1.75]))
    torch.testing.assert_close(balancer.total_tokens, torch.tensor(3.0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_even_choices_are_balanced_for_every_k(k):
    """The fair share knows that every token chooses k experts."""
    indices = torch.stack([(torch.arange(6) + i) % 3 for i in range(k)], -1)
    logits = gate(6, 3)
    out = AuxiliaryFreeMoEBalancer(3)(logits, indices)
    assert out["balancing_term"].abs() < 1e-12
    torch.testing.assert_close(out["expert_balance_ratio"], torch.ones(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out["coefficient_of_variation"], torch.tensor(0.0), atol=1e-6, rtol=0
    )


def test_one_expert_has_no_spread():
    out = AuxiliaryFreeMoEBalancer(1)(gate(4, 1), torch.zeros(4, 1, dtype=torch.int64))
    assert out["coefficient_of_variation"] == 0 and out["balancing_term"] == 0


def test_balance_loss_by_hand():
    """E sum P U / (N k)^2 = 2 (2 * 3 + 2 * 1) / 16 for even probabilities."""
    out = AuxiliaryFreeMoEBalancer(2, balance_loss_weight=0.5)(gate(), SKEWED, compute_loss=True)
    torch.testing.assert_close(out["balance_loss"], torch.tensor(0.5))


def test_a_banned_expert_has_no_gradient():
    logits = torch.tensor([[0.0, -math.inf], [0.0, 1.0]], requires_grad=True)
    out = AuxiliaryFreeMoEBalancer(2, 1.0)(logits, torch.tensor([[0], [0]]), compute_loss=True)
    (out["balancing_term"] + out["balance_loss"]).backward()
    assert out["balancing_term"].isfinite() and logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0


# --- its state -----------------------------------------------------------------------------------


def test_micro_batches_of_one_step_count_once():
    """Two halves in one step equal their average in one call."""
    halves, whole = AuxiliaryFreeMoEBalancer(2), AuxiliaryFreeMoEBalancer(2)
    halves(gate(), SKEWED, is_optimizer_step=False)
    assert halves.expert_counts.sum() == 0 and halves._accumulation_steps == 1
    halves(gate(), 1 - SKEWED)
    assert halves._accumulated_counts.sum() == 0 and halves._accumulation_steps == 0
    whole(gate(), torch.tensor([[0], [0], [1], [1]]))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value)


def test_what_leaves_the_state_alone():
    balancer = AuxiliaryFreeMoEBalancer(2)
    balancer(gate(), SKEWED)
    before = state(balancer)
    out = balancer(gate(), 1 - SKEWED, update_state=False)
    assert out["balancing_term"] > 0  # of the counts so far
    balancer.eval()
    out = balancer(gate(), 1 - SKEWED)
    assert out["balancing_term"] == 0 and out["balancing_term"].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in state(balancer).items())
    assert not AuxiliaryFreeMoEBalancer(2)(gate().detach(), SKEWED)["balancing_term"].requires_grad


def test_buffers_names_and_statistics():
    balancer = AuxiliaryFreeMoEBalancer(2, momentum=0.0)
    assert set(balancer.state_dict()) == {
        "expert_counts",
        "expert_scores",
        "total_tokens",
        "_accumulated_counts",
        "_accumulated_scores",
        "_accumulated_tokens",
        "_accumulation_steps",
    }
    balancer.update_statistics(SKEWED, torch.tensor([[0.75, 0.25]] * 4))
    assert balancer.get_statistics() == {
        "expert_counts": [3.0, 1.0],
        "expert_scores": [0.75, 0.25],
        "total_tokens": 4.0,
    }
    copied = copy.deepcopy(balancer)
    balancer.update_statistics(SKEWED, torch.ones(4, 2), is_optimizer_step=False)
    balancer.reset_statistics()
    assert all((value == 0).all() for value in balancer.state_dict().values())
    assert copied.total_tokens == 4
    assert not list(balancer.parameters())


def test_masked_tokens_are_not_counted():
    logits = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [0.0, 0.0]], requires_grad=True)
    mask, indices = torch.tensor([1, 0, 1]), torch.tensor([[0], [99], [0]])
    balancer = AuxiliaryFreeMoEBalancer(2, momentum=0.0)
    out = balancer(logits, indices, attention_mask=mask)
    assert out["expert_counts"].tolist() == [2.0, 0.0] and balancer.total_tokens == 2
    out["balancing_term"].backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([2.0, -2.0]) * W * W * 0.5 / 4)
    assert (logits.grad[1] == 0).all()


def test_counts_of_many_tokens_are_exact():
    """Past 2^24 a float32 that is counted up by ones stands still."""
    tokens = 2**24 + 3
    indices = torch.zeros(1, dtype=torch.int64).expand(tokens).unsqueeze(-1)
    balancer = AuxiliaryFreeMoEBalancer(1, momentum=0.0)
    balancer.update_statistics(indices, torch.ones(1, 1).expand(tokens, 1))
    assert balancer.total_tokens == 2**24 + 4  # rounded once


# --- AuxiliaryLoss -------------------------------------------------------------------------------


@pytest.mark.parametrize("k,expected", [(1, 1.0), (2, 0.5), (4, 0.25)])
def test_load_of_even_use_is_one_over_k(k, expected):
    indices = torch.stack([(torch.arange(8) + i) % 4 for i in range(k)], -1)
    for normalize, value in ((False, expected), (True, 1.0)):
        loss_fn = AuxiliaryLoss(1.0, normalize_topk=normalize)
        out = loss_fn(torch.zeros(8, 4), indices, num_experts=4)
        torch.testing.assert_close(out["load_balancing"], torch.tensor(value))


def test_load_by_hand_and_its_gradient():
    """p = (3/4, 1/4) for both tokens, both to expert 0: 2 (1.5 * 2 + 0.5 * 0) / 4."""
    logits = torch.tensor([[math.log(3), 0.0]] * 2, requires_grad=True)
    out = AuxiliaryLoss(1.0)(logits, torch.tensor([[0], [0]]), num_experts=2)
    torch.testing.assert_close(out["load_balancing"], torch.tensor(1.5))
    out["load_balancing"].backward()
    slope = 0.75 * 0.25  # of p_0 in its logit; the loss is the sum of p_0 over both tokens
    torch.testing.assert_close(logits.grad, torch.tensor([[slope, -slope]] * 2))


def test_load_is_capped_at_10():
    logits = torch.zeros(1, 12)
    logits[0, 0] = 50.0
    out = AuxiliaryLoss(1.0)(logits, torch.tensor([[0]]), num_experts=12)
    assert out["load_balancing"] == 10


def test_router_z_by_hand():
    """Eight logits of 9: (9 + ln 8)^2, beyond the clamp's 100, where its gradient is 0."""
    for clamp in (False, True):
        logits = torch.full((3, 8), 9.0, requires_grad=True)
        out = AuxiliaryLoss(router_z_weight=1.0, clamp_router_z=clamp)(logits)
        assert list(out) == ["router_z"]
        z = 9 + math.log(8)
        torch.testing.assert_close(out["router_z"], torch.tensor(100.0 if clamp else z**2))
        out["router_z"].backward()
        torch.testing.assert_close(
            logits.grad, torch.zeros(3, 8) if clamp else torch.full((3, 8), 2 * z / 24)
        )
    logits = torch.tensor([[20.0, -20.0]])
    out = AuxiliaryLoss(router_z_weight=1.0, clamp_router_z=True)(logits)
    torch.testing.assert_close(out["router_z"], torch.tensor(100.0))
    small = torch.randn(3, 4)
    one, other = (AuxiliaryLoss(clamp_router_z=c)(small)["router_z"] for c in (False, True))
    assert torch.equal(one, other)


def test_keys_follow_the_inputs_and_weights_are_in():
    logits, indices = torch.randn(4, 2), SKEWED
    outputs = [torch.randn(4, 3) for _ in range(2)]
    loss_fn = AuxiliaryLoss()
    assert loss_fn() == {}
    assert list(loss_fn(logits, indices)) == ["router_z"]
    out = loss_fn(logits, indices, outputs, 2)
    assert list(out) == ["load_balancing", "router_z", "expert_diversity"]
    ones = AuxiliaryLoss(1.0, 1.0, 1.0)(logits, indices, outputs, 2)
    for name, weight in zip(out, (1e-4, 1e-3, 1e-4), strict=True):
        torch.testing.assert_close(out[name], weight * ones[name])
    torch.testing.assert_close(ones["expert_diversity"], DiversityLoss()(outputs))


def test_gradients():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(3, (5, 2), generator=g)
    mask = torch.tensor([1, 0, 1, 1, 1])

    def call(x):
        out = AuxiliaryLoss(1.0, 1.0)(x, indices, num_experts=3, attention_mask=mask)
        return out["load_balancing"], out["router_z"]

    assert gradcheck(call, [logits])


def test_a_batch_of_sequences_equals_its_rows():
    logits, indices = torch.randn(2, 3, 4), torch.randint(4, (2, 3, 2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss_fn = AuxiliaryLoss()
    flat = loss_fn(logits.flatten(0, 1), indices.flatten(0, 1), None, 4, attention_mask=mask)
    for name, value in loss_fn(logits, indices, None, 4, attention_mask=mask).items():
        assert torch.equal(value, flat[name])
    one = loss_fn(logits, indices[..., 0], None, 4)  # [B, S]: one choice each
    assert torch.equal(
        one["load_balancing"], loss_fn(logits, indices[..., :1], None, 4)["load_balancing"]
    )


BAD = [
    (lambda: AuxiliaryFreeMoEBalancer(0), ValueError, "num_experts must be at least 1, got 0"),
    (lambda: AuxiliaryFreeMoEBalancer(2.0), TypeError, "num_experts must be an int, got float"),
    (
        lambda: AuxiliaryFreeMoEBalancer(3)(gate(), SKEWED),
        ValueError,
        "gate_logits must have num_experts 3 as its last dimension, got [4, 2]",
    ),
    (
        lambda: AuxiliaryFreeMoEBalancer(2)(gate(), SKEWED[:3]),
        ValueError,
        "expert_indices must be [N, k] for gate_logits [4, 2], got [3, 1]",
    ),
    (
        lambda: AuxiliaryFreeMoEBalancer(2)(gate(), SKEWED.float()),
        ValueError,
        "expert_indices must be integers, got torch.float32",
    ),
    (
        lambda: AuxiliaryFreeMoEBalancer(2)(gate(), SKEWED, attention_mask=torch.ones(5)),
        ValueError,
        "attention_mask must have one entry per row of gate_logits [4, 2], got [5]",
    ),
    (
        lambda: AuxiliaryLoss()(gate(), SKEWED, num_experts=3),
        ValueError,
        "gate_logits must have num_experts 3 as its last dimension, got [4, 2]",
    ),
    (lambda: AuxiliaryLoss()(SKEWED), ValueError, "gate_logits must be a floating tensor"),
]


@pytest.mark.parametrize("call,kind,text", BAD)
def test_errors(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)
