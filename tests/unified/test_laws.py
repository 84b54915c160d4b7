# SPDX-License-Identifier: BSD-3-Clause
"""What holds for every module of masked_loss_ext.unified: see unified_cases.CASES."""

import copy
import math

import pytest
import torch
from unified_cases import CASES, batch, floating

from masked_loss_ext import unified

NAMES = [case.name for case in CASES]
MASKED = [case for case in CASES if case.mask]


def evaluate(case, entries, module=None):
    """loss, gradients of the floating inputs and of the module's parameters, module."""
    module = case.make() if module is None else module
    inputs = floating(entries, case.takes.values())
    for x in inputs:
        x.requires_grad_()
    loss = case(module, entries)
    leaves = [*inputs, *module.parameters()]
    return loss, torch.autograd.grad(loss, leaves, allow_unused=True), module


def poison(case, entries, value):
    """The batch with a value stored wherever the mask excludes, and labels out of every range."""
    entries = {k: v for k, v in entries.items()}
    for name in case.masked:
        given = entries[name]
        off = entries[case.mask] == 0
        tensors = []
        for x in given if isinstance(given, list) else [given]:
            x = x.detach().clone()
            x[off.reshape(x.shape[: x.dim() - 1])] = value
            tensors.append(x)
        entries[name] = tensors if isinstance(given, list) else tensors[0]
    off = entries["attention_mask"] == 0
    entries["targets"] = entries["targets"].masked_fill(off, 2**31 - 1)
    entries["expert_indices"] = entries["expert_indices"].masked_fill(off[..., None], 2**31 - 1)
    return entries


def same(ours, theirs):
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("case", MASKED, ids=[case.name for case in MASKED])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_the_mask_excludes_is_not_read(case, value):
    torch.manual_seed(1)
    loss, grads, module = evaluate(case, batch())
    fresh = case.make()
    initial = copy.deepcopy(fresh.state_dict())
    for name, parameter in module.named_parameters():
        initial[name] = parameter.detach().clone()
    fresh.load_state_dict(initial)
    poisoned, poisoned_grads, _ = evaluate(case, poison(case, batch(), value), fresh)
    assert loss.isfinite() and torch.equal(loss, poisoned)
    for x, y in zip(grads, poisoned_grads, strict=True):
        assert same(x, y)
    assert any(g is not None and (g != 0).any() for g in grads), "the loss has a gradient"
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, dict(fresh.named_buffers())[name]), name


EMPTY = [case for case in MASKED if case.empty_is_zero]


@pytest.mark.parametrize("case", EMPTY, ids=[case.name for case in EMPTY])
@pytest.mark.parametrize("shape", [(3, 7), (0, 7), (2, 1), (2, 0)], ids=str)
def test_nothing_that_counts_is_0_attached_to_the_graph(case, shape):
    entries = batch(*shape, mask=torch.zeros(shape, dtype=torch.bool))
    loss, grads, _ = evaluate(case, entries)
    assert loss.shape == () and loss == 0 and loss.requires_grad
    assert all(g is None or (g == 0).all() for g in grads)


@pytest.mark.parametrize("case", MASKED, ids=[case.name for case in MASKED])
@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (1, 2), (2, 3)], ids=str)
def test_short_rows_are_finite(case, shape):
    loss, grads, _ = evaluate(case, batch(*shape, mask=torch.ones(shape)))
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_out(case, dtype):
    half = batch(dtype=dtype)
    loss, grads, module = evaluate(case, half)
    assert loss.dtype == torch.float32
    for x, g in zip(floating(half, case.takes.values()), grads, strict=False):
        assert g is None or g.dtype == dtype == x.dtype
    wide = {
        k: [x.detach().float() for x in v]
        if isinstance(v, list)
        else (v.detach().float() if v.is_floating_point() else v)
        for k, v in half.items()
    }
    fresh = case.make()
    fresh.load_state_dict(case.make().state_dict() | dict(module.named_parameters()))
    torch.testing.assert_close(evaluate(case, wide, fresh)[0], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_float64_all_through(case):
    module = case.make().double()
    assert evaluate(case, batch(dtype=torch.float64), module)[0].dtype == torch.float64


@pytest.mark.parametrize("case", MASKED, ids=[case.name for case in MASKED])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_of_any_dtype(case, dtype):
    entries = batch()
    module = case.make()
    other = {**entries, case.mask: entries[case.mask].to(dtype) * 3}
    ours, theirs = case(copy.deepcopy(module), entries), case(copy.deepcopy(module), other)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_state_round_trip_and_copies(case, tmp_path):
    """Three steps at once, or one, then a checkpoint or a copy, then two: the same bits."""
    torch.manual_seed(0)
    module = case.make().train()
    start = copy.deepcopy(module)

    def steps(module, seeds):
        return [evaluate(case, batch(seed=seed), module)[0].detach() for seed in seeds]

    expected = steps(module, (1, 2, 3))
    first = steps(start, (1,))
    torch.save(start.state_dict(), tmp_path / "state.pt")
    resumed = case.make().train()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for again in (copy.deepcopy(start), resumed, start):
        found = first + steps(again, (2, 3))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        for name, value in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_repr(case):
    module = case.make()
    assert type(module).__name__ in repr(module) and repr(module) == repr(copy.deepcopy(module))


# Of those whose rows lie as [B, S, ...].
ONE_ROW = [c for c in MASKED if c.mask == "attention_mask" and "expert_outputs" not in c.masked]
ONE_ROW += [c for c in MASKED if c.name.startswith("unified") and c not in ONE_ROW]


@pytest.mark.parametrize("case", ONE_ROW, ids=[case.name for case in ONE_ROW])
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1)], ids=str)
def test_a_size_of_1_of_the_mask_stands_for_any(case, shape):
    """As the operators and the token losses take it."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[..., 5:] = mask[2:] = 0
    found = []
    for given in (mask, mask.expand(3, 7).clone()):
        torch.manual_seed(0)
        found.append(evaluate(case, batch(mask=given)))
    (loss, grads, _), (expected, expected_grads, _) = found
    assert torch.equal(loss, expected) and loss != 0
    assert all(same(x, y) for x, y in zip(grads, expected_grads, strict=True))


# --- parts that select but read ------------------------------------------------------------------

ROWS = torch.tensor([True, True, False, True, True, False, True])
PAIRS = torch.tensor([[0, 1], [3, 4], [2, 6], [5, 2], [6, 0]])
CLASS = torch.tensor([0, 0, 1, 1, 0, 1, 1])
SELECTING = {
    "infonce_pairs": lambda x: unified.ContrastiveLoss()(
        x, positive_pairs=PAIRS, embedding_mask=ROWS
    ),
    "standard_pairs": lambda x: unified.ContrastiveLoss(loss_type="standard", margin=9.0)(
        x, positive_pairs=PAIRS, negative_pairs=PAIRS.flip(1), embedding_mask=ROWS
    ),
    "ignored_labels": lambda x: unified.ContrastiveLoss(loss_type="triplet")(
        x, CLASS.masked_fill(~ROWS, -100)
    ),
    "sure_rows": lambda x: unified.ConsistencyLoss("kl", threshold=0.2, use_threshold=True)(
        x, x.flip(1), ROWS
    ),
    "over_all_rows": lambda x: unified.ConsistencyLoss(mean_over_all=True)(x, x.flip(1), ROWS),
    "one_tensor_of_experts": lambda x: unified.DiversityLoss("l2")(
        torch.stack([x, x.flip(1), x.roll(1, 1)]), attention_mask=ROWS
    ),
    "router_z": lambda x: unified.AuxiliaryLoss(clamp_router_z=True)(
        x, CLASS[:, None], num_experts=4, attention_mask=ROWS
    )["router_z"],
    "load": lambda x: unified.AuxiliaryLoss(1.0)(
        x, CLASS[:, None], num_experts=4, attention_mask=ROWS
    )["load_balancing"],
    "balance_loss": lambda x: unified.AuxiliaryFreeMoEBalancer(4, 1.0)(
        x, CLASS[:, None], compute_loss=True, attention_mask=ROWS
    )["balance_loss"],
    "balancing_term": lambda x: unified.AuxiliaryFreeMoEBalancer(4)(
        x, CLASS[:, None], attention_mask=ROWS
    )["balancing_term"],
    "experts_outputs": lambda x: unified.AuxiliaryLoss()(
        expert_outputs=[x, x.roll(1, 1)], attention_mask=ROWS
    )["expert_diversity"],
    "hidden_states": lambda x: heads(x),
}


def heads(x):
    torch.manual_seed(0)
    loss_fn = unified.MultiTokenPredictionLoss(5, 4, 2, mask_sources=True)
    return loss_fn(x[None], CLASS[None], ROWS[None])["mtp_loss"]


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_excluded_rows_leak_neither_into_value_nor_gradient(name, value):
    """They are read, unlike the rows of the operators; nothing comes of it."""
    clean = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    poisoned = clean.masked_fill(~ROWS[:, None], value)
    found = []
    for x in (clean, poisoned):
        x = x.clone().requires_grad_()
        loss = SELECTING[name](x)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    (loss, grad), (poisoned_loss, poisoned_grad) = found
    assert loss.isfinite() and torch.equal(loss, poisoned_loss)
    assert torch.equal(grad, poisoned_grad) and (grad[~ROWS] == 0).all() and (grad != 0).any()


SAY_SO = "ConsistencyLoss DiversityLoss ContrastiveLoss AuxiliaryFreeMoEBalancer AuxiliaryLoss"


@pytest.mark.parametrize("name", [*SAY_SO.split(), "MultiTokenPredictionLoss"])
def test_they_say_that_they_read(name):
    text = " ".join(getattr(unified, name).__doc__.split())
    assert "read, though" in text and "selected away" in text
