# SPDX-License-Identifier: BSD-3-Clause
"""The buffers of the unified loss: what moves them, what does not, and that training resumes."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from unified_cases import BY_NAME, CLASSES, HIDDEN, batch

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.unified import AdaptiveMTPLoss, DeepSeekLoss, TemperatureScaledCrossEntropy

CASE = BY_NAME["unified_everything"]


def constant_loss(value):
    """Logits [1, 1, 2] whose cross entropy against 0 is ``value``."""
    gap = math.log(math.expm1(value))
    return torch.tensor([[[0.0, gap]]]), torch.zeros(1, 1, dtype=torch.int64)


def scaled(**options):
    return TemperatureScaledCrossEntropy(label_smoothing=0.0, **options)


def temperatures(loss_fn, values, **keywords):
    found = []
    for value in values:
        logits, targets = constant_loss(value)
        logits = logits * loss_fn.temperature  # the loss is `value` at whatever T
        found.append(loss_fn(logits, targets, **keywords)["temperature"].item())
    return found


def test_trajectory_on_a_constant_loss():
    found = temperatures(scaled(), [2.0] * 14)
    assert found[:9] == [1.0] * 9
    assert found[9:] == pytest.approx([0.99, 0.98, 0.97, 0.96, 0.95])


def test_trajectory_follows_the_spread():
    """Standard deviation over mean of ten: 0.0527 stays, 0.21 rises, beyond that by the rate."""
    steady = [1.9, 2.1] * 5
    assert temperatures(scaled(), steady)[-1] == 1.0
    wide = [1.6, 2.4] * 5
    assert temperatures(scaled(), wide)[-1] == pytest.approx(1.01)
    assert temperatures(scaled(adaptation_rate=0.3), wide)[-1] == pytest.approx(1.3)
    assert temperatures(scaled(adaptive_temperature=False), wide)[-1] == 1.0


def test_temperature_stays_in_its_bounds():
    loss_fn = scaled(temperature_bounds=(0.97, 1.02))
    assert temperatures(loss_fn, [2.0] * 20)[-1] == pytest.approx(0.97)
    loss_fn = scaled(temperature_bounds=(0.97, 1.02))
    assert temperatures(loss_fn, [1.0, 3.0] * 10)[-1] == pytest.approx(1.02)


def test_ring_of_a_hundred():
    """A hundred ones push everything else out: the spread is 0 again."""
    loss_fn = scaled(adaptation_rate=0.001)
    temperatures(loss_fn, [1.0 + k % 7 for k in range(120)])
    assert loss_fn.history_size == 100 and loss_fn.history_ptr == 20
    before = loss_fn.temperature.item()
    temperatures(loss_fn, [1.0] * 100)
    torch.testing.assert_close(loss_fn.loss_history, torch.ones(100), rtol=1e-5, atol=0)
    after = temperatures(loss_fn, [1.0])[0]
    assert after < loss_fn.temperature_bounds[1] and loss_fn.history_ptr == 21
    assert temperatures(loss_fn, [1.0])[0] == pytest.approx(after - 0.001) and before > 0.5


@pytest.mark.parametrize("keywords", [{"reduction": "sum"}, {"update_state": False}], ids=str)
def test_what_records_nothing(keywords):
    loss_fn = scaled()
    temperatures(loss_fn, [2.0] * 12, **keywords)
    assert loss_fn.history_size == 0 and loss_fn.temperature == 1
    temperatures(loss_fn.eval(), [2.0] * 12)
    assert loss_fn.history_size == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing"])
def test_what_is_not_finite_or_empty_is_not_recorded(bad):
    """Between the same good losses it changes nothing."""
    plain, disturbed = scaled(), scaled()
    for k in range(15):
        temperatures(plain, [2.0 + k % 2])
        logits, targets = constant_loss(1.0)
        if bad == "nothing":
            disturbed(logits, targets, torch.zeros(1, 1))
        else:
            disturbed(logits * bad, targets)
        temperatures(disturbed, [2.0 + k % 2])
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(disturbed.named_buffers())[name]), name


def test_statistics_of_adaptive_heads():
    loss_fn = AdaptiveMTPLoss(2, primary_loss_weight=2.0)
    for value in (1.0, 2.0, math.nan):
        logits, targets = constant_loss(1.0 if math.isnan(value) else value)
        loss_fn(logits * (value if math.isnan(value) else 1), targets)
    loss_fn(*constant_loss(9.0), update_state=False)
    loss_fn.eval()(*constant_loss(9.0))
    stats = loss_fn.get_statistics()
    assert stats["total_computations"] == 2 and stats["avg_primary_loss"] == pytest.approx(3.0)
    assert stats["avg_additional_loss"] == stats["avg_confidence_reg"] == 0
    assert all(isinstance(value, (int, float)) for value in stats.values())
    loss_fn.reset_statistics()
    assert loss_fn.get_statistics()["avg_primary_loss"] == 0 == loss_fn.loss_count


# --- everything at once --------------------------------------------------------------------------


def step(loss_fn, seed, **keywords):
    return loss_fn(**CASE.inputs(batch(seed=seed)), **keywords)


def moving(loss_fn):
    """After twelve steps everything moves with the next."""
    loss_fn.main_loss.history_size.fill_(9)
    loss_fn.main_loss.loss_history[:9] = torch.linspace(1, 9, 9)
    return loss_fn


def same_state(a, b):
    return all(torch.equal(x, dict(b.named_buffers())[n]) for n, x in a.named_buffers())


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "torch.save"])
def test_training_resumes_bit_for_bit(how, tmp_path):
    loss_fn = moving(CASE.make())
    step(loss_fn, 1)
    assert loss_fn.main_loss.temperature > 1
    if how == "state_dict":
        resumed = CASE.make()
        torch.save(loss_fn.state_dict(), tmp_path / "loss.pt")
        resumed.load_state_dict(torch.load(tmp_path / "loss.pt"))
    elif how == "deepcopy":
        resumed = copy.deepcopy(loss_fn)
    else:
        torch.save(loss_fn, tmp_path / "loss.pt")
        resumed = torch.load(tmp_path / "loss.pt", weights_only=False)
    for seed in (2, 3, 4):
        assert torch.equal(step(loss_fn, seed), step(resumed, seed))
    assert same_state(loss_fn, resumed)


def test_names_in_a_checkpoint():
    names = set(dict(CASE.make().named_buffers()))
    main = {
        f"main_loss.{n}" for n in ("temperature", "loss_history", "history_ptr", "history_size")
    }
    assert main <= names and {"moe_balancer.expert_counts", "moe_balancer.total_tokens"} <= names
    adaptive = UnifiedLoss(CLASSES, HIDDEN, "adaptive_mtp")
    assert "main_loss.total_primary_loss" in dict(adaptive.named_buffers())


def test_without_update_no_buffer_changes():
    loss_fn = moving(CASE.make())
    before = copy.deepcopy(loss_fn)
    first = step(loss_fn, 1, update_state=False)
    assert same_state(loss_fn, before)
    loss_fn.eval()
    step(loss_fn, 1)
    assert same_state(loss_fn, before)
    loss_fn.train()
    assert torch.equal(first, step(loss_fn, 1, update_state=False))
    step(loss_fn, 1)
    assert loss_fn.main_loss.history_size == 10 and loss_fn.moe_balancer.total_tokens > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_advances_once_and_sees_the_same_temperature(use_reentrant):
    """The forward is run again in backward, when T has moved on."""
    case = BY_NAME["unified_model"]  # whose gradient has the main loss in it

    def gradient(run):
        loss_fn = moving(copy.deepcopy(start))
        entries = batch(seed=1)
        given = {k: v for k, v in case.inputs(entries).items() if k != "logits"}
        logits = entries["logits"].requires_grad_()
        run(lambda x: loss_fn(x, **given), logits).backward()
        return logits.grad, loss_fn

    start = case.make()
    plain, ours = gradient(lambda f, x: f(x))
    again, recomputed = gradient(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    assert torch.equal(plain, again) and same_state(ours, recomputed)
    assert ours.main_loss.temperature != 1


def test_old_deepseek_loss_advances_once_under_checkpointing():
    loss_fn = DeepSeekLoss(CLASSES, HIDDEN, 4)
    entries = batch()
    logits = entries["logits"].requires_grad_()
    names = ("targets", "hidden_states", "attention_mask", "gate_logits", "expert_indices")
    out = checkpoint(
        lambda x: loss_fn(x, *(entries[n] for n in names))["total_loss"],
        logits,
        use_reentrant=False,
    )
    out.backward()
    tokens = entries["attention_mask"].sum()
    assert loss_fn.main_loss.history_size == 1
    torch.testing.assert_close(loss_fn.moe_balancer.total_tokens, 0.1 * tokens)


def test_backward_after_the_next_forward():
    """In-place updates of T must not reach what backward saved."""
    loss_fn = moving(UnifiedLoss(CLASSES))
    entries = [batch(seed=seed) for seed in (1, 2)]
    leaves = [e["logits"].requires_grad_() for e in entries]
    losses = [loss_fn(e["logits"], e["targets"], e["attention_mask"]) for e in entries]
    grads = torch.autograd.grad(losses[0], leaves[0]) + torch.autograd.grad(losses[1], leaves[1])
    fresh = moving(UnifiedLoss(CLASSES))
    for e, leaf, grad in zip(entries, leaves, grads, strict=True):
        loss = fresh(e["logits"], e["targets"], e["attention_mask"])
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], grad)


def test_reset_statistics():
    def moved():
        loss_fn = moving(CASE.make())
        step(loss_fn, 1)
        return loss_fn

    loss_fn = moved()
    temperature = loss_fn.main_loss.temperature.clone()
    loss_fn.reset_statistics()
    state = {n: x for n, x in loss_fn.state_dict().items() if not n.startswith("mtp_loss.")}
    assert {n for n, x in state.items() if not x.any()} == set(state) - {"main_loss.temperature"}
    assert loss_fn.main_loss.temperature == temperature != 1
    loss_fn = moved()
    loss_fn.reset_statistics(experts=False, history=False)
    assert loss_fn.main_loss.history_size == 10 and loss_fn.moe_balancer.total_tokens > 0
    adaptive = UnifiedLoss(CLASSES, HIDDEN, "adaptive_mtp")
    adaptive(**{k: batch()[k] for k in ("logits", "targets")})
    assert adaptive.get_loss_statistics()["adaptive_mtp"]["total_computations"] == 1
    adaptive.reset_statistics()
    assert adaptive.get_loss_statistics()["adaptive_mtp"]["total_computations"] == 0
    assert UnifiedLoss(CLASSES).get_loss_statistics() == {}
