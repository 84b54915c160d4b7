# SPDX-License-Identifier: BSD-3-Clause
"""sync_state: the state of several ranks becomes one, and of one process nothing changes.

Each rank has the losses of its own batches; what sync_state makes of them is compared with one
process that has the batches of all.
"""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from unified_cases import CASES, EXPERTS, HIDDEN, batch

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.distributed import sync_state
from masked_loss_ext.unified import (
    AdaptiveAntiRepetitionLoss,
    AdaptiveMTPLoss,
    AuxiliaryFreeMoEBalancer,
    CompositeLoss,
    DeepSeekLoss,
    TemperatureScaledCrossEntropy,
)
from masked_loss_ext.unified._state import KeepsState, SyncsState

WITH_STATE = [c for c in CASES if any(isinstance(m, KeepsState) for m in c.make().modules())]
CLASSES = 11


def gathered(state):
    """The tensors of all ranks, by name."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {k: v.clone() for k, v in state.items()})
    return found


def check_equal(state):
    one, *others = gathered(state)
    for other in others:
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def half():
    """0 or 1. Of four ranks two pairs do the same: that changes nothing of an average rank."""
    return dist.get_rank() % 2


def routing(expert, tokens=10, experts=4):
    gate = torch.zeros(tokens, experts, requires_grad=True)
    return gate, torch.full((tokens, 1), expert)


def balancer():
    """Ranks that send all tokens to one expert each, 10 and 30 of them."""
    rank = half()
    ours, joint = (AuxiliaryFreeMoEBalancer(4) for _ in range(2))
    mine = routing((1, 3)[rank], (10, 30)[rank])
    both = [torch.cat(x) for x in zip(routing(1, 10), routing(3, 30), strict=True)]
    for _ in range(3):
        ours(*mine)
        out = joint(*both)
    ours.sync_state()
    check_equal(ours.state_dict())
    for name in ("expert_counts", "total_tokens"):  # of an average rank
        torch.testing.assert_close(2 * getattr(ours, name), getattr(joint, name))
    torch.testing.assert_close(ours.expert_scores, joint.expert_scores)
    found = ours(*both, update_state=False)
    for name in ("balancing_term", "expert_balance_ratio", "coefficient_of_variation"):
        torch.testing.assert_close(found[name], out[name], rtol=1e-5, atol=1e-7)
    before = copy.deepcopy(ours.state_dict())
    ours.sync_state()  # once more changes nothing
    for name, tensor in before.items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    ours(*mine, is_optimizer_step=False)  # a step that is under way
    ours.sync_state()
    check_equal(ours.state_dict())
    assert ours._accumulated_counts.tolist() == [0, 5, 0, 15] and ours._accumulation_steps == 1
    ours.reset_statistics()
    ours.sync_state()
    assert not ours.expert_scores.any() and ours.total_tokens == 0


def losses(values):
    """Logits [1, 1, 2] of each cross entropy against 0."""
    for value in values:
        gap = torch.tensor(value, dtype=torch.float64).expm1().log()
        yield torch.tensor([[[0.0, gap]]]), torch.zeros(1, 1, dtype=torch.int64)


def scaled(values=()):
    loss_fn = TemperatureScaledCrossEntropy(label_smoothing=0.0)
    for logits, targets in losses(values):
        loss_fn(logits * loss_fn.temperature, targets)  # the loss is the value at whatever T
    return loss_fn


def temperature():
    """As many losses on both: the joint history, whatever is done to the ring before."""
    rank = half()
    mine, theirs = [[1.0, 2.0, 3.0], [3.0, 6.0, 5.0]][rank], [2.0, 4.0, 4.0]
    ours, joint = scaled(mine), scaled(theirs)
    ours.sync_state()
    check_equal(ours.state_dict())
    for name, buffer in joint.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)

    # T is the mean; a rank that has remembered less has a say in what it has remembered
    ours = scaled([[5.0] * 12, [7.0] * 2][rank])
    before = ours.temperature.item()
    assert abs(before - (0.97, 1.0)[rank]) < 1e-6
    ours.sync_state()
    check_equal(ours.state_dict())
    assert abs(ours.temperature.item() - 0.985) < 1e-6
    assert ours.history_size == 12 and ours.history_ptr == 12
    torch.testing.assert_close(ours.loss_history[:12], torch.tensor([5.0] * 10 + [6.0] * 2))
    assert not ours.loss_history[12:].any()

    # a ring that has turned: the oldest stands first, and is the next to go
    ours = TemperatureScaledCrossEntropy(label_smoothing=0.0, adaptive_temperature=True)
    ours.loss_history.copy_(torch.arange(100.0).roll(30 + 7 * rank))
    ours.history_ptr.fill_(30 + 7 * rank)
    ours.history_size.fill_(100)
    ours.sync_state()
    check_equal(ours.state_dict())
    torch.testing.assert_close(ours.loss_history, torch.arange(100.0))
    assert ours.history_ptr == 0 and ours.history_size == 100


def heads():
    """Averages over the calls of both ranks, also where one has fewer."""
    rank = half()
    ours, joint = AdaptiveMTPLoss(2), AdaptiveMTPLoss(2)
    for inputs in losses([[1.0, 2.0], [4.0, 5.0]][rank]):
        ours(*inputs)
    for inputs in losses([2.5, 3.5]):
        joint(*inputs)
    ours.sync_state()
    ours.sync_state()
    check_equal(ours.state_dict())
    for name, buffer in joint.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)
    ours = AdaptiveMTPLoss(2)
    for inputs in losses([[1.0, 2.0], [9.0]][rank]):
        ours(*inputs)
    ours.sync_state()
    check_equal(ours.state_dict())
    found = ours.get_statistics()
    assert abs(found["avg_primary_loss"] - 4.0) < 1e-5 and found["total_computations"] == 2
    ours.reset_statistics()
    ours.sync_state()
    assert ours.get_statistics()["total_computations"] == 0


def schedule():
    rank = half()
    ours = AdaptiveAntiRepetitionLoss(12, 10, 11, warmup_steps=100)
    ours.update_weights((0, 100)[rank])
    ours.sync_state()
    check_equal(ours.state_dict())
    assert abs(ours.repetition_penalty_weight.item() - 0.125) < 1e-6


def containers():
    """All in one exchange of the module that contains them; parameters are left alone."""
    rank = half()
    options = dict(num_experts=EXPERTS, use_moe_balancing=True, use_mtp=True)
    adaptive = dict(primary_loss_type="adaptive_mtp", num_experts=EXPERTS, use_moe_balancing=True)
    torch.manual_seed(rank)
    entries = batch(seed=rank)
    keys = ("logits", "targets", "attention_mask", "hidden_states", "gate_logits", "expert_indices")
    given = {key: entries[key] for key in keys}
    made = [
        UnifiedLoss(CLASSES, HIDDEN, **options),
        UnifiedLoss(CLASSES, HIDDEN, **adaptive),
        DeepSeekLoss(CLASSES, HIDDEN, EXPERTS),
    ]
    composite = CompositeLoss({"moe_balancing": {"num_experts": EXPERTS}})
    composite(gate_logits=given["gate_logits"], expert_indices=given["expert_indices"])
    for module in made:
        module(**given)
    for module in [*made, composite]:
        parameters = {name: p.clone() for name, p in module.named_parameters()}
        state = dict(module.named_buffers())
        one, two, *_ = gathered(state)
        assert any(not torch.equal(one[name], two[name]) for name in state)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as exchange:
            module.sync_state()
        assert exchange.call_count == 1
        check_equal({name: one for name, one in module.state_dict().items() if name in state})
        for name, p in module.named_parameters():
            assert torch.equal(p, parameters[name])


def models():
    """A model that contains several losses: one exchange for all of them."""
    rank = half()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([scaled([1.0 + rank])]))
    model.append(AdaptiveMTPLoss(2))
    for inputs in losses([3.0 + 2 * rank]):
        model[2](*inputs)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as exchange:
        sync_state(model)
        sync_state(torch.nn.Linear(2, 2))  # nothing to send
    assert exchange.call_count == 1
    torch.testing.assert_close(model[1][0].loss_history[0].item(), 1.5)
    torch.testing.assert_close(model[2].total_primary_loss.item(), 4.0)


def groups():
    """Of a group of one nothing happens, and who is not in it is told so."""
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())]
    ours = scaled([1.0 + rank])
    ours.sync_state(alone[rank])
    assert abs(ours.loss_history[0].item() - 1.0 - rank) < 1e-5
    with pytest.raises(ValueError, match="sync_state: group must contain the rank that calls"):
        ours.sync_state(alone[rank - 1])
    pairs = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("out", "in"))
    ours.sync_state(pairs["in"])
    mean = 1.5 + rank // 2 * 2
    assert abs(ours.loss_history[0].item() - mean) < 1e-5


CHECKS = (balancer, temperature, heads, schedule, containers, models, groups)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks(ranks, size, check):
    ranks(size).run(check)


@pytest.mark.parametrize("case", WITH_STATE, ids=[case.name for case in WITH_STATE])
def test_one_process_changes_nothing(case):
    module = case.make()
    case(module, batch())
    before = copy.deepcopy(module.state_dict())
    assert module.sync_state() is None
    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", WITH_STATE, ids=[case.name for case in WITH_STATE])
def test_every_module_with_state_has_it_and_says_so(case):
    module = case.make()
    assert isinstance(module, SyncsState)
    text = type(module).__doc__ + (type(module).forward.__doc__ or "")
    assert "sync_state" in text and type(module).sync_state is SyncsState.sync_state
