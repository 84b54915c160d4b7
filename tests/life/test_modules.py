# SPDX-License-Identifier: BSD-3-Clause
"""What else is done to a module: called with other tensors in the place of its own, switched to
evaluation and back, its weights computed from others or tied to them."""

import copy

import pytest
import torch
from life_cases import MODULES, check_same, named, started, steps, tensors
from torch.nn.utils import parametrizations, parametrize, prune
from unified_cases import CLASSES, HIDDEN, batch

from masked_loss_ext import HiddenStateMTPLoss


class Around(torch.nn.Module):
    """A model that has the loss as a part, as functional_call wants it."""

    def __init__(self, life, module):
        super().__init__()
        self.life, self.module = life, module

    def forward(self, inputs):
        return self.life.result(self.module, inputs)


@pytest.mark.parametrize(**named(MODULES))
def test_functional_call(life):
    """With parameters and buffers of another one: it computes as that, moves the buffers that it
    was given, and its own stay."""
    module, other = started(life), started(life)
    for seed in (8, 9):
        life.result(other, life.inputs(seed))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    before = [buffer.clone() for buffer in module.buffers()]
    given = copy.deepcopy({f"module.{k}": v for k, v in other.state_dict(keep_vars=True).items()})
    result = torch.func.functional_call(Around(life, module), given, (life.inputs(),))
    check_same(tensors(result), tensors(life.result(other, life.inputs())))
    check_same(list(module.buffers()), before)
    for name, value in other.state_dict().items():
        assert torch.equal(given[f"module.{name}"], value), name


@pytest.mark.parametrize(**named(MODULES))
def test_evaluation_moves_no_state(life):
    module = started(life)
    before = [buffer.clone() for buffer in module.buffers()]
    expected = steps(life, copy.deepcopy(module))
    training = module.training
    module.eval()
    for seed in (7, 8):
        life.result(module, life.inputs(seed))
    check_same(list(module.buffers()), before)
    assert not any(part.training for part in module.modules())
    check_same(steps(life, module.train(training)), expected)


# --- heads whose weights are computed ------------------------------------------------------------


def heads():
    torch.manual_seed(0)
    return HiddenStateMTPLoss(CLASSES, HIDDEN, 2)


def loss_of(loss_fn):
    entries = batch()
    given = (entries["hidden_states"], entries["targets"], entries["attention_mask"])
    return loss_fn(*given)["mtp_loss"]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_head():
    """torch.nn.utils.parametrize: the head is read, and what is read is computed."""
    plain, loss_fn = heads(), heads()
    with torch.no_grad():
        plain.projections[0].weight.mul_(2)
    parametrize.register_parametrization(loss_fn.projections[0], "weight", Doubled())
    expected, found = loss_of(plain), loss_of(loss_fn)
    assert torch.equal(found, expected)
    (theirs,) = torch.autograd.grad(expected, plain.projections[0].weight)
    (ours,) = torch.autograd.grad(found, loss_fn.projections[0].parametrizations.weight.original)
    torch.testing.assert_close(ours, 2 * theirs)
    assert torch.equal(loss_of(copy.deepcopy(loss_fn)), expected)


def test_a_head_with_weight_norm():
    loss_fn = heads()
    expected = loss_of(loss_fn)
    parametrizations.weight_norm(loss_fn.projections[1])
    found = loss_of(loss_fn)
    torch.testing.assert_close(found, expected)
    found.backward()
    original = loss_fn.projections[1].parametrizations.weight
    assert all((part.grad != 0).any() for part in (original.original0, original.original1))


def test_a_pruned_head_is_refused():
    """Pruning multiplies by its mask in a hook of the forward, which is not called."""
    loss_fn = heads()
    prune.l1_unstructured(loss_fn.projections[0], "weight", 0.5)
    with pytest.raises(ValueError, match="have no forward hooks: it is not called"):
        loss_of(loss_fn)
    prune.remove(loss_fn.projections[0], "weight")
    assert loss_of(loss_fn).isfinite()


def test_weights_that_are_tied_stay_so():
    """One matrix as embedding and head: a copy has one of its own, and both gradients add up."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(CLASSES, HIDDEN), "loss": heads()})
    model["loss"].projections[0].weight = model["embed"].weight
    copied = copy.deepcopy(model)
    assert copied["loss"].projections[0].weight is copied["embed"].weight
    assert copied["embed"].weight is not model["embed"].weight
    names = [name for name, _ in model.named_parameters()]
    assert "loss.projections.0.weight" not in names and "embed.weight" in names
    entries = batch()
    tokens, mask = entries["targets"], entries["attention_mask"]
    copied["loss"](copied["embed"](tokens), tokens, mask)["mtp_loss"].backward()
    apart = [copied["embed"].weight.detach().clone().requires_grad_() for _ in range(2)]
    given = torch.nn.functional.embedding(tokens, apart[0]), tokens, mask
    head = {"projections.0.weight": apart[1]}
    torch.func.functional_call(copied["loss"], head, given)["mtp_loss"].backward()
    torch.testing.assert_close(copied["embed"].weight.grad, apart[0].grad + apart[1].grad)
