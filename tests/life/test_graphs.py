# SPDX-License-Identifier: BSD-3-Clause
"""What users do with the graph behind a loss: recompute it, keep it elsewhere, watch it for NaN,
go through it twice or for several gradients at once, evaluate in between. Every loss has the
gradients of the plain step, bit for bit."""

import contextlib
import copy
import io

import pytest
import torch
from life_cases import GRAPHS, MODULES, check_same, named, started, tensors
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from unified_cases import BY_NAME, batch

# One backward only, as they say: a gradient is handed over, or stands where its logits were.
ONCE = {
    "masked_cross_entropy_2": "gradient_in_forward=True",
    "masked_cross_entropy_4": "inplace_backward=True",
    "masked_linear_cross_entropy_0": "of a mean or a sum",
    "linear_cross_entropy": "of a mean or a sum",
    "multi_token_of_hidden": "of a mean or a sum",
}


def step(life, module, surroundings=contextlib.nullcontext):
    """Gradients and buffers after one; forward and backward stand in the surroundings."""
    with surroundings():
        gradients = life.gradients(module, life.with_gradients())
    return [*gradients, *(buffer.clone() for buffer in module.buffers())]


# --- computed again, kept elsewhere, watched -----------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(**named(GRAPHS))
def test_in_a_checkpoint(life, use_reentrant):
    """torch.utils.checkpoint runs the forward again in the backward: state moves once. It ends by
    an exception where the last tensor is saved, in the middle of a loss, which is not to answer it.
    """
    module = started(life)
    expected = step(life, copy.deepcopy(module))
    inputs = life.with_gradients()
    wanted = [*life.leaves(inputs), *module.parameters()]
    first = torch.zeros((), requires_grad=True)  # a reentrant one looks at its arguments alone
    loss = checkpoint(
        lambda one: life.loss(module, inputs) + one, first, use_reentrant=use_reentrant
    )
    loss.backward()
    check_same([x.grad for x in wanted] + list(module.buffers()), expected)


def on_disk():
    """Saved tensors as bytes, as where they go to a file."""

    def pack(tensor):
        torch.save(tensor, file := io.BytesIO())
        return file.getvalue()

    return saved_tensors_hooks(pack, lambda data: torch.load(io.BytesIO(data), weights_only=True))


SURROUNDINGS = {
    "save_on_cpu": save_on_cpu,
    "on_disk": on_disk,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize(**named(GRAPHS))
def test_within(life, surroundings):
    module = started(life)
    expected = step(life, copy.deepcopy(module))
    check_same(step(life, module, SURROUNDINGS[surroundings]), expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", ["focal", "unified_everything", "unified_heads", "mtp"])
def test_anomaly_mode_finds_nothing_where_the_padding_is_nan(name):
    """What the mask excludes makes no NaN on the way either."""
    case = BY_NAME[name]
    entries = batch()
    off = entries["attention_mask"] == 0
    for key in ("logits", "hidden_states"):
        entries[key] = entries[key].masked_fill(off[..., None], torch.nan).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        case(case.make(), entries).backward()


# --- several backwards ---------------------------------------------------------------------------


@pytest.mark.parametrize(**named(GRAPHS))
def test_a_second_backward(life):
    """retain_graph=True: the same once more, or an error that says why not."""
    module = started(life)
    inputs = life.with_gradients()
    loss = life.loss(module, inputs)
    wanted = [*life.leaves(inputs), *module.parameters()]

    def gradients():
        return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

    first = gradients()
    if life.name in ONCE:
        with pytest.raises(
            RuntimeError, match=f"{ONCE[life.name]}.* has one backward|there is one"
        ):
            gradients()
    else:
        check_same(gradients(), first)


@pytest.mark.parametrize(**named(GRAPHS))
def test_several_gradients_at_once(life):
    """is_grads_batched=True, as torch.autograd.functional's vectorised Jacobians ask."""
    module = started(life)
    expected = life.gradients(copy.deepcopy(module), life.with_gradients())
    inputs = life.with_gradients()
    loss = life.loss(module, inputs)
    wanted = [*life.leaves(inputs), *module.parameters()]
    upstream = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    found = torch.autograd.grad(loss, wanted, upstream, is_grads_batched=True, allow_unused=True)
    for several, one in zip(found, expected, strict=True):
        assert (several is None) == (one is None)
        if one is not None:
            torch.testing.assert_close(several, torch.stack([one, -2 * one]), rtol=1e-4, atol=1e-6)


# --- evaluation in between, inference ------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(**named(GRAPHS))
def test_evaluation_between_forward_and_backward(life, mode):
    """Of micro-batches whose gradients add up: neither the graph nor the state sees it."""
    module = started(life)
    plain = copy.deepcopy(module)
    training = module.training

    def accumulated(module, between):
        inputs = [life.with_gradients(seed) for seed in (0, 1)]
        for one in inputs:
            loss = life.loss(module, one)
            between()
            loss.backward()
        leaves = [x for one in inputs for x in life.leaves(one)]
        return [x.grad for x in (*leaves, *module.parameters())] + list(module.buffers())

    def evaluate():
        module.eval()
        with mode():
            results.append(tensors(life.result(module, life.inputs(7))))
        module.train(training)

    results = []
    check_same(accumulated(module, evaluate), accumulated(plain, lambda: None))
    assert results[0] and not any(x.requires_grad for x in results[0])


@pytest.mark.parametrize(**named([m for m in MODULES if not list(m.make().parameters())]))
def test_tensors_of_inference_mode_are_inputs_like_others(life):
    """A model that was evaluated hands them on; where nothing is trained nothing is kept."""
    module = started(life).eval()
    expected = tensors(life.result(module, life.inputs()))
    with torch.inference_mode():
        inputs = life.inputs()
    check_same(tensors(life.result(module, inputs)), expected)


# --- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(**named(GRAPHS))
def test_under_autocast(life):
    """float32 inputs keep float32 losses and gradients; only products of a head are rounded, to
    bfloat16."""
    module = started(life)
    inputs, plain = life.with_gradients(), copy.deepcopy(module)
    expected_loss = life.loss(plain, inputs)
    expected = life.gradients(plain, inputs, expected_loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = life.loss(module, inputs)
    if not life.name.startswith("packed_attention"):  # no loss, and PyTorch's own products
        assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.float(), expected_loss, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(life.gradients(module, inputs, loss), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == torch.float32
            allowed = 0.05 * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=max(allowed, 1e-6))


@pytest.mark.parametrize(**named(MODULES))
def test_with_a_gradient_scaler(life):
    """The scale goes through the backward and is taken off again; powers of two are exact, but for
    denormals."""
    module = started(life)
    expected = step(life, copy.deepcopy(module))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs = life.with_gradients()
    loss = scaler.scale(life.loss(module, inputs))
    gradients = [g if g is None else g / 2.0**10 for g in life.gradients(module, inputs, loss)]
    found = [*gradients, *module.buffers()]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
