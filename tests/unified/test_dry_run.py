# SPDX-License-Identifier: BSD-3-Clause
"""What a forward stores comes from no input's device or level: after any call a module can be
copied, saved and used as before."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from unified_cases import CASES, batch, floating

from masked_loss_ext.unified import (
    AdaptiveMTPLoss,
    AuxiliaryFreeMoEBalancer,
    TemperatureScaledCrossEntropy,
    UnifiedLoss,
    _state,
)

WITH_STATE = [c for c in CASES if any(isinstance(m, _state.KeepsState) for m in c.make().modules())]
STATE_IDS = [case.name for case in WITH_STATE]
# Parameters are in one place and of one kind, as PyTorch says: only state can go with the inputs.
MOVABLE = [case for case in WITH_STATE if not any(True for _ in case.make().parameters())]
MOVABLE_IDS = [case.name for case in MOVABLE]


def converted(entries, convert):
    return {
        key: [convert(x) for x in value]
        if isinstance(value, list)
        else (convert(value) if isinstance(value, torch.Tensor) else value)
        for key, value in entries.items()
    }


def check_untouched(module, before):
    """Buffers lie where they lay, hold what they held, and nothing else is left on the module."""
    for name, buffer in module.named_buffers():
        assert type(buffer) is torch.Tensor and buffer.device.type == "cpu", name
        assert torch.equal(buffer, dict(before.named_buffers())[name]), name
    for part in module.modules():
        assert set(vars(part)) == set(vars(dict(before.named_modules())[name_of(module, part)]))
    copied = copy.deepcopy(module)
    again = pickle.loads(pickle.dumps(copied))
    torch.save(module.state_dict(), io.BytesIO())
    assert set(again.state_dict()) == set(module.state_dict())


def name_of(module, part):
    return next(name for name, other in module.named_modules() if other is part)


def same_as_without(case, module, before):
    """The next real step is that of a module that has never seen the dry run."""
    assert torch.equal(case(module, batch(seed=3)), case(before, batch(seed=3)))


@pytest.mark.parametrize("case", MOVABLE, ids=MOVABLE_IDS)
def test_meta_inputs(case):
    """A dry run, a FLOP counter."""
    module = case.make()
    case(module, batch())
    before = copy.deepcopy(module)
    entries = converted(case.inputs(batch()), lambda x: x.to("meta"))
    assert case.loss(module(**entries)).device.type == "meta"
    check_untouched(module, before)
    same_as_without(case, module, before)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_module_that_is_on_meta_itself(case):
    module = case.make().to("meta")
    entries = converted(case.inputs(batch()), lambda x: x.to("meta"))
    assert case.loss(module(**entries)).device.type == "meta"
    assert {b.device.type for b in module.buffers()} <= {"meta"}


@pytest.mark.parametrize(
    "case,takes_real",
    [(case, True) for case in WITH_STATE] + [(case, False) for case in MOVABLE],
    ids=[f"{name}-real" for name in STATE_IDS] + MOVABLE_IDS,
)
def test_fake_inputs(case, takes_real):
    """Of a real module: in a mode that takes real tensors, too, and in one that does not."""
    module = case.make()
    case(module, batch())
    before = copy.deepcopy(module)
    mode = FakeTensorMode(allow_non_fake_inputs=takes_real)
    entries = converted(case.inputs(batch()), mode.from_tensor)
    with mode:
        loss = case.loss(module(**entries))
    assert loss.shape == () and hasattr(loss, "fake_mode")
    check_untouched(module, before)
    same_as_without(case, module, before)


@pytest.mark.parametrize("case", WITH_STATE, ids=STATE_IDS)
def test_under_a_fake_mode_with_real_inputs(case):
    module = case.make()
    before = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        case(module, batch())
    check_untouched(module, before)


@pytest.mark.parametrize("case", WITH_STATE, ids=STATE_IDS)
def test_vmap_over_stacked_buffers(case):
    """An ensemble: one forward of stacked state, of which the module itself keeps nothing."""
    module = case.make()
    entries = batch()
    loss = case(copy.deepcopy(module), entries)
    before = copy.deepcopy(module)
    stacked = torch.func.stack_module_state([module, module])
    kept = [{k: v.clone() for k, v in part.items()} for part in stacked]

    def call(parameters, buffers):
        state = {**parameters, **buffers}
        return case.loss(torch.func.functional_call(module, state, (), case.inputs(entries)))

    try:
        both = torch.vmap(call)(*stacked)
    except RuntimeError as error:
        pytest.skip(f"vmap does not take it: {str(error)[:60]}")
    torch.testing.assert_close(both, loss.expand(2), rtol=1e-4, atol=1e-5)
    for part, copies in zip(stacked, kept, strict=True):
        for name, tensor in part.items():
            assert torch.equal(tensor, copies[name]), name
    check_untouched(module, before)
    same_as_without(case, module, before)


def test_gradients_and_checkpoints_after_a_dry_run():
    """The temperature of the last forward is no stray tensor: recomputation finds the right one."""
    loss_fn = TemperatureScaledCrossEntropy(0.8, label_smoothing=0.0)
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    loss_fn(logits.to("meta"), targets.to("meta"))
    x = logits.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        lambda x: loss_fn(x, targets)["loss"], x, use_reentrant=False
    ).backward()
    y = logits.clone().requires_grad_()
    TemperatureScaledCrossEntropy(0.8, label_smoothing=0.0)(y, targets)["loss"].backward()
    assert torch.equal(x.grad, y.grad)


def test_the_temperature_of_the_last_forward_moves_with_the_module():
    loss_fn = TemperatureScaledCrossEntropy(0.8, label_smoothing=0.0)
    loss_fn(torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64))
    assert {b.device.type for b in loss_fn.to("meta").buffers()} == {"meta"}
    assert all(not isinstance(value, torch.Tensor) for value in vars(loss_fn).values())
    assert set(loss_fn.state_dict()) == {
        "temperature",
        "loss_history",
        "history_ptr",
        "history_size",
    }


class OnAnother(torch.Tensor):
    """A CPU tensor that says that it is on another device: there is no second one here."""

    device = torch.device("cuda", 0)


def test_a_state_elsewhere_is_brought_and_taken_back(monkeypatch):
    """Where inputs are on another device the buffers stay, with a warning, and move on there."""
    stay, moved = (AuxiliaryFreeMoEBalancer(2, momentum=0.0) for _ in range(2))
    borrowed = []

    def beside(module, name, buffer, like):
        borrowed.append(buffer.clone())
        return borrowed[-1]

    gate, chosen = torch.zeros(4, 2), torch.tensor([[0], [0], [0], [1]])
    monkeypatch.setattr(_state, "_beside", beside)
    out = stay(gate, chosen)
    monkeypatch.undo()
    expected = moved(gate, chosen)
    assert out["expert_counts"].tolist() == expected["expert_counts"].tolist() == [3, 1]
    for name, buffer in moved.named_buffers():
        mine = dict(stay.named_buffers())[name]
        assert torch.equal(mine, buffer) and all(mine is not x for x in borrowed), name


def test_another_device_warns(monkeypatch):
    loss_fn = AdaptiveMTPLoss(5)
    like = OnAnother(torch.zeros(()))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: (tensor, device))
    text = "AdaptiveMTPLoss: its state is on cpu and its inputs on cuda:0.*move the loss with .to"
    with pytest.warns(UserWarning, match=text):
        found = _state.borrow(loss_fn, ("loss_count",), like)
    assert found["loss_count"] == (loss_fn.loss_count, torch.device("cuda", 0))


def test_a_module_without_data_says_so():
    loss_fn = UnifiedLoss(5).to("meta")
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature must be on the device of the inputs .*meta"):
        loss_fn(logits, targets)


def test_made_under_inference_mode():
    """As by a loader: its state moves on in training all the same."""
    with torch.inference_mode():
        loss_fn = UnifiedLoss(5, num_experts=2, use_moe_balancing=True)
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    gate, chosen = torch.zeros(6, 2, requires_grad=True), torch.zeros(6, 1, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets = torch.zeros(2, 3, dtype=torch.int64)
        loss = loss_fn(logits, targets, gate_logits=gate, expert_indices=chosen)
    loss.backward()
    assert loss_fn.main_loss.history_size == 1 and floating({"x": logits.grad}, ["x"])
