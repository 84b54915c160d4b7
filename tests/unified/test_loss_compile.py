# SPDX-License-Identifier: BSD-3-Clause
"""The whole unified loss in one graph: nothing breaks it, nothing asks the device for a number."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from unified_cases import BY_NAME, CLASSES, EOS, EVERYTHING, HIDDEN, PAD, batch, floating

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.unified import AdaptiveAntiRepetitionLoss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def leaves(case, entries):
    return [x.requires_grad_() for x in floating(entries, case.takes.values())]


def flat(result):
    """Every tensor of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [t for v in values if isinstance(v, (torch.Tensor, dict, list)) for t in flat(v)]


def check_same_steps(case, compiled, module, sizes, **keywords):
    """Values, gradients and buffers of compiled and eager modules, step by step."""
    eager = copy.deepcopy(module)
    for seed, (rows, length) in enumerate(sizes):
        found = []
        for call in (compiled, eager):
            entries = batch(rows, length, seed=seed)
            owner = module if call is compiled else eager
            inputs = [*leaves(case, entries), *owner.parameters()]
            result = call(**case.inputs(entries), **keywords)
            total = result["total_loss"] if isinstance(result, dict) else result
            grads = torch.autograd.grad(total, inputs, allow_unused=True)
            found.append((flat(result), grads))
        for ours, theirs in zip(*found, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y)
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(dict(module.named_buffers())[name], buffer)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name,detailed", [("unified_everything", True), ("unified_model", False)])
def test_everything_is_one_graph(name, detailed):
    module = BY_NAME[name].make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sizes = [(3, 7), (3, 7)]  # the second step finds buffers that the first has moved
    check_same_steps(BY_NAME[name], compiled, module, sizes, return_detailed=detailed)


@pytest.mark.slow
def test_defaults_through_inductor():
    """Not everything: its C++ takes a minute to compile."""
    case = BY_NAME["unified_defaults"]
    module = case.make()
    check_same_steps(case, torch.compile(module, fullgraph=True), module, [(3, 7), (3, 7)])


def test_gradients_are_those_of_the_state_before_it_moved():
    """Inductor saves a buffer and copies it again in the backward pass, unless it is hindered: then
    the gradient is that of the next temperature, and of counts that were updated twice."""

    def make():
        torch.manual_seed(0)
        moe = dict(num_experts=4, use_moe_balancing=True, use_ngram_penalty=False)
        loss_fn = UnifiedLoss(CLASSES, initial_temperature=1.3, **moe)
        loss_fn.main_loss.loss_history.copy_(torch.linspace(8, 14, 100))
        loss_fn.main_loss.history_size.fill_(50)
        loss_fn.moe_balancer.expert_counts.copy_(torch.tensor([5.0, 1, 2, 8]))
        loss_fn.moe_balancer.total_tokens.fill_(8)
        return loss_fn

    def gradients(call):
        entries = batch()
        gate = torch.randn(21, 4, generator=torch.Generator().manual_seed(1))
        inputs = [entries["logits"].requires_grad_(), gate.requires_grad_()]
        routing = dict(gate_logits=gate, expert_indices=gate.topk(2).indices)
        return torch.autograd.grad(call(inputs[0], entries["targets"], **routing), inputs)

    eager, module = make(), make()
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        for ours, theirs in zip(gradients(compiled), gradients(eager), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert module.main_loss.temperature == eager.main_loss.temperature != 1.3


def test_snapshot_is_an_operator_like_others():
    x = torch.randn(3, 2).t()
    torch.library.opcheck(torch.ops.masked_loss_ext._snapshot.default, (x,))
    assert torch.equal(torch.ops.masked_loss_ext._snapshot(x), x)


def test_one_graph_over_changing_sizes():
    case = BY_NAME["unified_standard"]
    module = case.make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    check_same_steps(case, compiled, module, [(3, 7), (4, 9), (5, 12)])


def test_one_graph_while_the_temperature_moves():
    """Numbers that change from step to step are tensors: nothing is compiled again."""
    module = UnifiedLoss(CLASSES)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = set()
    entries = batch()
    for _ in range(14):  # the same loss each time: from the tenth on T falls
        compiled(entries["logits"], entries["targets"], entries["attention_mask"])
        found.add(module.main_loss.temperature.item())
    assert len(found) == 6 and counters["stats"]["unique_graphs"] == 1


SCHEDULED = [
    ("label_smoothing", False),
    ("ngram_penalty.penalty_weight", False),
    ("ngram_penalty.penalty_weight", True),
    ("mtp_loss.temperature", False),
    ("focal_loss.gamma", False),
    ("moe_balancer.gradient_balance_weight", False),
    ("moe_balancer.gradient_balance_weight", True),
]


@pytest.mark.parametrize("name,as_tensor", SCHEDULED)
def test_a_number_that_a_schedule_moves(name, as_tensor):
    """Its second value makes a second graph, in which it is a variable; a tensor makes none."""
    case = BY_NAME["unified_everything"]
    module = UnifiedLoss(CLASSES, HIDDEN, **EVERYTHING | {"focal_mode": "add"})
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    *path, attribute = name.split(".")
    owner = module.get_submodule(".".join(path))
    module.moe_balancer.expert_counts[0] = 9  # so that there is something to balance
    module.moe_balancer.total_tokens.fill_(9)
    entries, found, tensor = batch(), set(), torch.zeros(())
    leaves(case, entries)
    given = case.inputs(entries)
    for value in (0.1, 0.2, 0.3, 0.4):
        setattr(owner, attribute, tensor.fill_(value) if as_tensor else value)
        loss = compiled(**given, update_state=False)
        torch.testing.assert_close(loss, module(**given, update_state=False))
        found.add(loss.item())
    assert len(found) == 4
    assert counters["stats"]["unique_graphs"] == (1 if as_tensor else 2)


def test_weights_that_a_warm_up_moves_are_one_graph():
    case = BY_NAME["adaptive_anti_repetition"]
    module = AdaptiveAntiRepetitionLoss(CLASSES, EOS, PAD, ngram_size=1, warmup_steps=5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    found = set()
    for step in range(6):
        module.update_weights(step)
        found.add(case.loss(compiled(**case.inputs(batch()))).item())
    assert len(found) == 6 and counters["stats"]["unique_graphs"] == 1


class RefuseToWait(TorchDispatchMode):
    """Fails on operators that need data on the host: on a GPU each would wait for it."""

    waiting = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waiting, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


UNIFIED = [name for name in BY_NAME if name.startswith(("unified", "deepseek", "temperature"))]


@pytest.mark.parametrize("name", UNIFIED)
def test_nothing_waits_for_the_device(name):
    case = BY_NAME[name]
    module, entries = case.make(), batch()
    leaves(case, entries)
    with pytest.raises(AssertionError, match="waits for the device"), RefuseToWait():
        torch.ones(()).item()
    with RefuseToWait():
        case(module, entries).backward()


@pytest.mark.parametrize("name", UNIFIED)
def test_runs_without_data(name):
    case, mode = BY_NAME[name], FakeTensorMode()
    entries = batch()

    def fake(value):
        if isinstance(value, list):
            return [fake(x) for x in value]
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode:
        module = case.make()
        entries = {k: fake(v) for k, v in entries.items()}
        leaves(case, entries)
        loss = case(module, entries)
        loss.backward()
    assert loss.shape == () and entries["logits"].grad.shape == (3, 7, CLASSES)


def test_the_warning_stays_out_of_the_graph():
    entries = batch()
    loss_fn = UnifiedLoss(CLASSES, HIDDEN, use_mtp=True)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
    out = compiled(entries["logits"], entries["targets"], return_detailed=True)
    assert "hidden_states" in out["mtp_warning"]
