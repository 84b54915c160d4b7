# SPDX-License-Identifier: BSD-3-Clause
"""Losses of reinforcement learning on linear_row_statistics: as from full logits, in float64, and
tokens into which no gradient flows are left alone by the backward."""

import math

import pytest
import torch
import torch.nn.functional as F

import masked_loss_ext as mle

B, S, D, V = 4, 6, 5, 13
CLIP, KL, ENTROPY = 0.2, 0.04, 0.01


def rollout(**changes):
    """Two prompts of two completions each, padded, and what a trainer keeps of their sampling."""
    g = torch.Generator().manual_seed(0)

    def randn(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    hidden, weight = randn(B, S, D), randn(V, D)
    tokens = torch.randint(V, (B, S), generator=g)
    mask = mle.lengths_to_mask([6, 4, 2, 5], S)
    with torch.no_grad():
        log_prob = log_probabilities(F.linear(hidden, weight), tokens)[0]
    given = {
        "tokens": tokens,
        "mask": mask,
        "old": log_prob + 0.3 * randn(B, S),
        "reference": log_prob + 0.2 * randn(B, S),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)[:, None],
        "temperature": 0.7,
    }
    return hidden.requires_grad_(), weight.requires_grad_(), given | changes


def log_probabilities(logits, tokens):
    """Of the tokens, and the entropy, by full logits."""
    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return log_prob, -(log_p.exp() * log_p).sum(-1)


def surrogate(log_prob, entropy, old, reference, advantages, kl=KL, entropy_weight=ENTROPY):
    """What PPO and GRPO minimise, per token; the divergence by its estimator k3."""
    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    gap = reference - log_prob
    return -gain + kl * (gap.exp() - gap - 1) - entropy_weight * entropy


def policy_loss(
    hidden, weight, tokens, mask, old, reference, advantages, temperature, **weights
):  # fmt: skip
    stats = mle.linear_row_statistics(hidden, weight, tokens, mask, temperature=temperature)
    gains = surrogate(stats.log_prob, stats.entropy, old, reference, advantages, **weights)
    return mle.aggregate_tokens(gains, mask, "sequence_mean")


def by_logits(hidden, weight, tokens, mask, old, reference, advantages, temperature, **weights):
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1)
    logits = F.linear(hidden, weight) / temperature
    gains = surrogate(*log_probabilities(logits, tokens), old, reference, advantages, **weights)
    on = mask.double()
    return ((gains * on).sum(-1) / on.sum(-1)).mean()


# --- numbers worked out by hand ------------------------------------------------------------------


def test_by_hand():
    """One feature, logits (h ln 3, 0): p of class 0 is 3/4 for h = 1. Twice as likely as it was, a
    token of advantage 1 is clipped at 1.2, of advantage -1 it is not; half as likely the other way
    round."""
    hidden = torch.ones(1, 4, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
    now = math.log(3 / 4)
    given = {
        "tokens": torch.zeros(1, 4, dtype=torch.int64),
        "mask": torch.ones(1, 4),
        "old": torch.tensor([[now - math.log(2)] * 2 + [now + math.log(2)] * 2]).double(),
        "reference": torch.full((1, 4), now + math.log(2), dtype=torch.float64),
        "advantages": torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64),
        "temperature": 1.0,
    }
    loss = policy_loss(hidden, weight, **given, kl=0.0, entropy_weight=0.0)
    torch.testing.assert_close(loss, torch.tensor(-(1.2 - 2 + 0.5 - 0.8) / 4).double())
    loss.backward()
    # Of the second and the third alone: ratio * advantage * d log p / d h = (1 - p) ln 3.
    slope = 0.25 * math.log(3) / 4
    expected = torch.tensor([0.0, 2 * slope, -0.5 * slope, 0.0]).double().reshape(1, 4, 1)
    torch.testing.assert_close(hidden.grad, expected)
    # The reference is twice as likely: k3 is 2 - ln 2 - 1 for each.
    divergence = policy_loss(hidden, weight, **given, kl=1.0, entropy_weight=0.0) - loss
    torch.testing.assert_close(divergence, torch.tensor(1 - math.log(2)).double())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    bonus = policy_loss(hidden, weight, **given, kl=0.0, entropy_weight=1.0) - loss
    torch.testing.assert_close(bonus, torch.tensor(-entropy).double())


# --- as from full logits -------------------------------------------------------------------------


def agree(hidden, weight, given, **weights):
    leaves = [hidden, weight]
    ours, theirs = (f(hidden, weight, **given, **weights) for f in (policy_loss, by_logits))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    found, expected = (torch.autograd.grad(x, leaves) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(1.3)])
@pytest.mark.parametrize("kl,entropy_weight", [(KL, ENTROPY), (0.0, 0.0), (KL, 0.0)])
def test_equals_full_logits(temperature, kl, entropy_weight):
    hidden, weight, given = rollout(temperature=temperature)
    grad_hidden, _ = agree(hidden, weight, given, kl=kl, entropy_weight=entropy_weight)
    assert (grad_hidden[given["mask"] == 0] == 0).all()


@pytest.mark.parametrize("sizes", [(B, S), (B, 1)], ids=["token", "sequence"])
def test_a_temperature_per_row_equals_full_logits(sizes):
    temperature = torch.linspace(0.5, 1.5, math.prod(sizes)).double().reshape(sizes)
    hidden, weight, given = rollout(temperature=temperature)
    agree(hidden, weight, given)


def test_garbage_beside_the_mask_does_not_come_in():
    hidden, weight, given = rollout()
    expected = agree(hidden, weight, given)
    off = given["mask"] == 0
    poisoned = hidden.detach().clone()
    poisoned[off] = math.nan
    poisoned.requires_grad_()
    for name in ("old", "reference"):
        given[name] = given[name].masked_fill(off, math.nan)
    given["tokens"] = given["tokens"].masked_fill(off, -1)
    loss = policy_loss(poisoned, weight, **given)
    found = torch.autograd.grad(loss, [poisoned, weight])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# --- tokens into which no gradient flows ---------------------------------------------------------


def clipped_rows(hidden, weight, given):
    """Where the mask is on and the surrogate is flat."""
    with torch.no_grad():
        logits = F.linear(hidden, weight) / given["temperature"]
        ratio = torch.exp(log_probabilities(logits, given["tokens"])[0] - given["old"])
    rises = given["advantages"].expand(B, S) > 0
    flat = torch.where(rises, ratio > 1 + CLIP, ratio < 1 - CLIP)
    return flat & (given["mask"] != 0)


def products(call):
    """Rows and classes of the left factor of each product, in the C++ as well."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        call()
    return [event.input_shapes[0] for event in profile.function_events if event.name == "aten::mm"]


def test_clipped_tokens_take_part_in_no_product_of_the_backward():
    hidden, weight, given = rollout()
    clipped = int(clipped_rows(hidden, weight, given).sum())
    kept = int(given["mask"].sum())
    assert 3 <= clipped <= kept - 3
    losses = []

    def forward():
        losses.append(policy_loss(hidden, weight, **given, kl=0.0, entropy_weight=0.0))

    assert products(forward) == [[kept, D]]
    n = kept - clipped
    # the logits again, the gradients of hidden and weight
    assert products(losses[0].backward) == [[n, D], [n, V], [V, n]]
    # With a divergence or an entropy bonus each token has a gradient.
    loss = policy_loss(hidden, weight, **given)
    assert products(loss.backward) == [[kept, D], [kept, V], [V, kept]]


def test_clipped_tokens_are_not_read_by_the_backward():
    """After the forward NaN is put into their hidden states: nothing may come of it."""
    hidden, weight, given = rollout()
    clipped = clipped_rows(hidden, weight, given)
    flat = {"kl": 0.0, "entropy_weight": 0.0}
    expected = agree(hidden, weight, given, **flat)
    loss = policy_loss(hidden, weight, **given, **flat)
    hidden.data[clipped] = math.nan  # unseen by autograd, which would refuse
    found = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert (found[0][clipped] == 0).all()


def test_a_group_of_equal_rewards_costs_the_backward_nothing():
    """All advantages 0: no row receives anything, so no product is made."""
    hidden, weight, given = rollout()
    given["advantages"] = torch.zeros(B, 1, dtype=torch.float64)
    loss = policy_loss(hidden, weight, **given, kl=0.0, entropy_weight=0.0)
    assert products(loss.backward) == []
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_a_frozen_head_trains_the_trunk_alone():
    hidden, weight, given = rollout()
    expected = agree(hidden, weight, given)[0]
    weight.requires_grad_(False)
    loss = policy_loss(hidden, weight, **given)
    kept = int(given["mask"].sum())
    assert products(loss.backward) == [[kept, D], [kept, V]]
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected)
