# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of losses: saved and loaded, of an older version, in another precision, into modules
that were made without data. State comes back as it was, or it is said what is missing."""

import copy
import io

import pytest
import torch
from life_cases import MODULES, check_same, named, started, steps
from torch.utils.checkpoint import checkpoint
from unified_cases import batch

from masked_loss_ext import MaskedCrossEntropyLoss, UnifiedLoss
from masked_loss_ext.unified import AuxiliaryFreeMoEBalancer, TemperatureScaledCrossEntropy, _state

SAVED = [life for life in MODULES if life.make().state_dict()]
OWN = [
    life for life in MODULES if any(isinstance(m, _state.KeepsState) for m in life.make().modules())
]
LOWER = [torch.float16, torch.bfloat16, torch.float64]


def through_a_file(state):
    """As a user saves it; loading runs no code of the file."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def new(life, module, device="cpu"):
    with torch.device(device):
        made = life.make()
    return made.train(module.training)


def set_again(life, module):
    """What is in no checkpoint because the user gives it: the temperature of a call of his."""
    if life.name == "cross_entropy":
        module.temperature = torch.tensor(1.5)
    return module


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize(**named(SAVED))
def test_training_goes_on_from_a_file(life, assign):
    module = started(life)
    resumed = new(life, module)
    resumed.load_state_dict(through_a_file(module.state_dict()), assign=assign)
    check_same(steps(life, resumed), steps(life, module))


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assigned"])
@pytest.mark.parametrize(**named(SAVED))
def test_made_on_meta_and_then_loaded(life, assign):
    """As large models are: no memory before the checkpoint is there."""
    module = started(life)
    resumed = new(life, module, "meta")
    if not assign:
        resumed.to_empty(device="cpu")
    resumed.load_state_dict(through_a_file(module.state_dict()), assign=assign)
    set_again(life, resumed)
    assert not any(x.is_meta for x in resumed.buffers())
    found, expected = steps(life, resumed), steps(life, module)
    check_same(found, expected)


@pytest.mark.parametrize(**named(SAVED))
def test_sent_to_meta_and_back(life):
    """As who frees the memory of a module for a while."""
    module = started(life)
    kept = through_a_file(module.state_dict())
    expected = steps(life, copy.deepcopy(module))
    module.to("meta").to_empty(device="cpu").load_state_dict(kept)
    check_same(steps(life, set_again(life, module)), expected)


def test_a_checkpointed_step_of_a_module_that_was_made_on_meta():
    """The temperature of the last forward is in no file, and the recomputation reads it."""
    trained = TemperatureScaledCrossEntropy(0.8, label_smoothing=0.0)
    with torch.device("meta"):
        loss_fn = TemperatureScaledCrossEntropy(0.8, label_smoothing=0.0)
    loss_fn.load_state_dict(trained.state_dict(), assign=True)
    x, targets = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    loss = checkpoint(lambda x: loss_fn(x, targets)["loss"], x, use_reentrant=False)
    (found,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(copy.deepcopy(trained)(x, targets)["loss"], x)
    assert torch.equal(found, expected)


# --- other precisions ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize(**named(OWN))
def test_a_checkpoint_in_another_precision(life, assign, dtype):
    """Loaders convert whole checkpoints: the numbers are rounded then, but state counts on in its
    own dtype, where 4097 tokens are not 4096."""
    module = started(life)
    dtypes = {name: x.dtype for name, x in module.named_buffers()}
    converted = {
        name: x.to(dtype) if x.is_floating_point() else x for name, x in module.state_dict().items()
    }
    module.load_state_dict(converted, assign=assign)
    assert {name: x.dtype for name, x in module.named_buffers()} == dtypes
    for name, x in module.named_buffers():
        if name in converted:
            assert torch.equal(x, converted[name].to(x.dtype)), name


def test_tokens_go_on_being_counted_after_a_checkpoint_in_bfloat16():
    balancer = AuxiliaryFreeMoEBalancer(2, momentum=0.0)
    low = {
        k: x.bfloat16() if x.is_floating_point() else x for k, x in balancer.state_dict().items()
    }
    balancer.load_state_dict(low, assign=True)
    balancer(torch.zeros(4097, 2), torch.zeros(4097, 1, dtype=torch.int64))
    assert balancer.total_tokens == 4097 and balancer.expert_counts.tolist() == [4097, 0]


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize(**named(OWN))
def test_state_is_not_rounded_by_a_conversion(life, dtype):
    """.half() or .bfloat16() for a while, .double() for a test: state keeps dtype and digits."""
    module = started(life)
    before = {name: x.clone() for name, x in module.named_buffers()}
    module.to(dtype)
    assert {x.dtype for x in module.parameters()} <= {dtype}
    for name, x in module.named_buffers():
        assert x.dtype == before[name].dtype and torch.equal(x, before[name]), name
    entries = life.inputs(3)
    converted = {k: moved(x, dtype) for k, x in entries.items()}
    life.result(module, converted)


def moved(x, dtype):
    if isinstance(x, list):
        return [moved(one, dtype) for one in x]
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


# --- older files, and files of something else ----------------------------------------------------


@pytest.mark.parametrize(**named(OWN))
def test_a_file_that_knows_less(life):
    """Of a version without some state: strict loading names what is missing and has not begun to
    train; strict=False takes the rest, and what is missing is as new."""
    module = started(life)
    state = through_a_file(module.state_dict())
    missing = next(name for name in state if name in dict(module.named_buffers()))
    older = {name: x for name, x in state.items() if name != missing}
    resumed = new(life, module)
    fresh = {name: x.clone() for name, x in resumed.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{missing}\""):
        resumed.load_state_dict(older)
    report = resumed.load_state_dict(older, strict=False)
    assert report.missing_keys == [missing] and not report.unexpected_keys
    for name, x in resumed.state_dict().items():
        assert torch.equal(x, fresh[name] if name == missing else state[name]), name
    steps(life, resumed)


@pytest.mark.parametrize(**named(SAVED))
def test_a_file_that_knows_more(life):
    module = started(life)
    state = module.state_dict() | {"of_another_version": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*of_another_version"):
        new(life, module).load_state_dict(state)
    resumed = new(life, module)
    assert resumed.load_state_dict(state, strict=False).unexpected_keys == ["of_another_version"]
    check_same(steps(life, resumed), steps(life, module))


def test_a_file_of_other_sizes():
    """Of three experts for four."""
    state = AuxiliaryFreeMoEBalancer(3).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for expert_counts"):
        AuxiliaryFreeMoEBalancer(4).load_state_dict(state)


def test_what_the_user_gives_is_in_no_file():
    """A temperature that is a tensor: said where it was made on meta and not given again."""
    with torch.device("meta"):
        loss_fn = MaskedCrossEntropyLoss(weight=torch.ones(5), temperature=torch.tensor(2.0))
    loss_fn.load_state_dict({"weight": torch.ones(5)}, assign=True)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        loss_fn(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


def test_the_optimizer_is_saved_beside_it():
    """A loss with parameters: one file with model, loss and optimiser, as training resumes."""
    torch.manual_seed(0)
    inputs = batch()
    given = {k: inputs[k] for k in ("hidden_states", "attention_mask")}

    def train(loss_fn, optimizer, count):
        found = []
        for _ in range(count):
            loss = loss_fn(inputs["logits"], inputs["targets"], **given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return found

    def make():
        loss_fn = UnifiedLoss(11, 6, use_mtp=True)
        return loss_fn, torch.optim.AdamW(loss_fn.parameters(), 0.01)

    loss_fn, optimizer = make()
    train(loss_fn, optimizer, 3)
    state = {"loss": loss_fn.state_dict(), "optimizer": optimizer.state_dict()}
    saved = through_a_file(copy.deepcopy(state))
    expected = train(loss_fn, optimizer, 3)
    resumed, other = make()
    resumed.load_state_dict(saved["loss"])
    other.load_state_dict(saved["optimizer"])
    check_same(train(resumed, other, 3), expected)
