# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C, wherever it comes: the exception is the caller's, every part's state is that before the
step or that after it, and the next call works.

Python raises KeyboardInterrupt between two of its own steps, so never within an operator. A mode
raises it before each operator in turn; a process of its own gets real signals at any time.
"""

import copy
import subprocess
import sys

import pytest
import torch
from life_cases import GRAPHS, MODULES, named, started, steps
from torch.utils._python_dispatch import TorchDispatchMode

from masked_loss_ext.unified import AdaptiveAntiRepetitionLoss, _state

OWN = [
    life for life in MODULES if any(isinstance(m, _state.KeepsState) for m in life.make().modules())
]
OVERWRITING = ["masked_cross_entropy_2", "masked_cross_entropy_4", "masked_linear_cross_entropy_0"]


class Interrupting(TorchDispatchMode):
    """Ctrl-C before operator number ``at``; counts them, and looks on before each."""

    def __init__(self, at=None, look=lambda: None):
        super().__init__()
        self.at, self.look, self.count = at, look, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.look()
        if self.count == self.at:
            raise KeyboardInterrupt
        self.count += 1
        return function(*args, **(kwargs or {}))


def seen_by_an_interrupt(call, state):
    """The state that each interrupt of the call would leave."""
    found = []
    with Interrupting(look=lambda: found.append(state())):
        call()
    return found


def own_state(module):
    """Of each part, as one thing. What only a recomputation reads is no part of it."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, _state.KeepsState):
            apart = part._non_persistent_buffers_set
            buffers = dict(part.named_buffers(recurse=False)).items()
            found[name] = torch.cat([b.double().flatten() for n, b in buffers if n not in apart])
    return found


def check_whole(found, before, after):
    for name, state in found.items():
        is_one = torch.equal(state, before[name]) or torch.equal(state, after[name])
        assert is_one, f"the state of {name or 'the module'} is half-written"


@pytest.mark.parametrize(**named(OWN))
def test_a_step_is_counted_or_not(life):
    start = started(life)
    before = own_state(start)
    module, inputs = copy.deepcopy(start), life.with_gradients(3)
    seen = seen_by_an_interrupt(lambda: life.loss(module, inputs), lambda: own_state(module))
    after = own_state(module)
    for state in seen:
        check_whole(state, before, after)
    for at in (0, len(seen) // 2, len(seen) - 1):
        module = copy.deepcopy(start)
        with pytest.raises(KeyboardInterrupt), Interrupting(at):
            life.loss(module, inputs)
        check_whole(own_state(module), before, after)
        steps(life, module)


def changes(module):
    """What users call beside the forward to change state."""
    if hasattr(module, "reset_statistics"):
        yield module.reset_statistics
    if isinstance(module, AdaptiveAntiRepetitionLoss):
        yield lambda: module.update_weights(5000)


@pytest.mark.parametrize(**named(OWN))
def test_other_changes_of_state_are_whole(life):
    module = started(life)
    for change in changes(module):
        before = own_state(module)
        seen = seen_by_an_interrupt(change, lambda: own_state(module))
        for state in seen:
            check_whole(state, before, own_state(module))
        steps(life, module)


@pytest.mark.parametrize(**named([life for life in GRAPHS if life.name in OVERWRITING]))
def test_an_interrupted_backward_that_overwrites(life):
    """Again it is refused, or right: never a gradient that was multiplied twice."""
    module = life.make()
    expected = life.gradients(module, life.with_gradients())

    def of_a_fresh_one():
        inputs = life.with_gradients()
        loss = 3 * life.loss(module, inputs)
        wanted = life.leaves(inputs)
        return lambda: torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

    for at, _ in enumerate(seen_by_an_interrupt(of_a_fresh_one(), lambda: None)):
        backward = of_a_fresh_one()
        with pytest.raises(KeyboardInterrupt), Interrupting(at):
            backward()
        try:
            found = backward()
        except RuntimeError as error:
            assert "one backward" in str(error)
            continue
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, 3 * theirs)


# --- real signals --------------------------------------------------------------------------------

PROGRAM = """
import os, random, signal, threading, time
import torch
import masked_loss_ext as mle

torch.set_num_threads(1)
random.seed(0)
loss_fn = mle.UnifiedLoss(1024, 32, use_mtp=True, num_experts=4, use_moe_balancing=True)
g = torch.Generator().manual_seed(0)
logits, hidden = (torch.randn(4, 256, n, generator=g, requires_grad=True) for n in (1024, 32))
gate = torch.randn(1024, 4, generator=g, requires_grad=True)
targets = torch.randint(1024, (4, 256), generator=g)
chosen = gate.detach().topk(2).indices

def step():
    loss = loss_fn(logits, targets, hidden_states=hidden, gate_logits=gate, expert_indices=chosen)
    return torch.autograd.grad(loss, logits)[0]

def check_whole():
    # a remembered loss for each step that is counted, and no step that is counted by halves
    main, balancer = loss_fn.main_loss, loss_fn.moe_balancer
    size, pointer = main.history_size.item(), main.history_ptr.item()
    assert pointer == size % 100 or size == 100, (size, pointer)
    assert (main.loss_history != 0).sum() == size
    assert balancer._accumulation_steps == 0 and not balancer._accumulated_counts.any()
    torch.testing.assert_close(balancer.expert_counts.sum(), 2 * balancer.total_tokens)

step()
check_whole()
interrupted = 0
# Python drops an exception that meets it in a callback of its own: then there are more steps
while interrupted < 20:
    killer = threading.Timer(random.random() * 0.05, os.kill, (os.getpid(), signal.SIGINT))
    try:
        killer.start()
        while killer.is_alive():
            step()
        step()
    except KeyboardInterrupt:
        killer.join()
        interrupted += 1
    check_whole()
    assert step().isfinite().all()
    check_whole()
"""


@pytest.mark.slow
def test_signals_at_any_time():
    """Twenty of them, each while a training step runs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
