# SPDX-License-Identifier: BSD-3-Clause
"""What the mask excludes changes no bit and gets exactly 0; what it keeps does count."""

import pytest
import torch
from accuracy import Expected, assert_all_accurate, assert_same_bits, evaluate
from cases import BY_NAME, CASES, FLOATING, REDUCTIONS, make
from hypothesis import given, settings
from hypothesis import strategies as st

import masked_loss_ext as mle
from masked_loss_ext.ops.masked_squared_error import masked_squared_error

NAN, INF = float("nan"), float("inf")
POISONS = (NAN, -INF, 6e4)
SMALL = [c for c in CASES if c.mask and torch.Size(c.shape).numel() < 1 << 13]
# A stride of 0 makes one number of excluded and kept elements: it cannot be poisoned in one place.
POISONABLE = [c for c in SMALL if "expanded" not in (c.layout, c.mask_layout)]
# One integer and one floating mask stand for all dtypes here.
POISONABLE = [c for c in POISONABLE if c.mask_dtype in (torch.bool, torch.int64, torch.float16)]


def kept(inputs):
    """bool, of prediction's shape."""
    mask, shape = inputs["mask"] != 0, inputs["prediction"].shape
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)


def poison(tensor, excluded, value):
    """A copy (with the same strides) that holds ``value`` where ``excluded``."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    return copy.masked_fill_(excluded, value)


def poisoned(inputs, value):
    """Whatever stands at excluded positions only is replaced, broadcast weights included."""
    off = ~kept(inputs)
    result = dict(inputs)
    for name in ("prediction", "target"):
        result[name] = poison(inputs[name], off, value)
    if inputs["edit_mask"] is not None:
        edit = inputs["edit_mask"]
        all_off = off if edit.dim() == off.dim() else off.flatten(edit.dim()).all(-1)
        all_off = (~all_off).float().sum_to_size(edit.shape) == 0
        result["edit_mask"] = poison(edit, all_off, value if edit.is_floating_point() else 77)
    if inputs["weighting"] is not None:
        weighting = inputs["weighting"]
        all_off = (~off).float().sum_to_size(weighting.shape) == 0
        result["weighting"] = poison(weighting, all_off, value)
    return result


def grad_loss_with(inputs, reduction, value):
    """A grad_loss that holds ``value`` where no element of it is kept."""
    on = kept(inputs)
    if reduction not in ("token", "none"):
        return torch.tensor(1.7)
    on = on.any(-1) if reduction == "token" else on
    return torch.where(on, torch.linspace(-1, 1, on.numel()).reshape(on.shape), value)


@pytest.mark.parametrize("case", POISONABLE, ids=lambda c: c.name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_poison_changes_no_bit(case, reduction):
    inputs = make(case, torch.float32)
    if not case.shape:
        pytest.skip("a number has no tokens")
    clean = evaluate(
        masked_squared_error, inputs, grad_loss_with(inputs, reduction, 0.0), reduction=reduction
    )
    for value in POISONS:
        grad_loss = grad_loss_with(inputs, reduction, value)
        bad = evaluate(
            masked_squared_error, poisoned(inputs, value), grad_loss, reduction=reduction
        )
        for key, result in clean.items():
            assert_same_bits(bad[key], result, f"{value} in {case.name}: {key}")
        off = ~kept(inputs)
        for name in ("prediction", "target"):
            assert (bad[f"grad {name}"][off] == 0).all(), f"{value}: gradient of {name}"


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["elements", "empty_rows", "random_tokens", "weight_all"])
def test_poison_in_every_dtype(name, dtype):
    inputs = make(BY_NAME[name], dtype)
    clean = evaluate(masked_squared_error, inputs)
    for value in (NAN, INF):
        bad = evaluate(masked_squared_error, poisoned(inputs, value))
        for key, result in clean.items():
            assert_same_bits(bad[key], result, f"{value}: {key}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_poisoned_padding_block(reduction):
    """The usual batch: right padding, NaN in all of it, through the public functions."""
    latents = [torch.randn(n, 64) for n in (5, 130, 1, 77)]
    padded, mask = mle.pad_latents_for_multi_res(latents)
    target, edit = torch.randn_like(padded), torch.rand(padded.shape[:2])
    loss_fn = mle.AttentionMaskMseLoss(reduction=reduction)

    def run(prediction, target, edit):
        leaves = [prediction.requires_grad_(), target.requires_grad_()]
        loss = loss_fn(*leaves, mask, edit, torch.full((4, 1, 1), 0.5))
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    clean = run(padded.clone(), target.clone(), edit)
    bad = run(
        padded.masked_fill(~mask[..., None], NAN),
        target.masked_fill(~mask[..., None], INF),
        edit.masked_fill(~mask, NAN),
    )
    for a, b in zip(clean, bad, strict=True):
        assert_same_bits(a, b)
    assert (bad[1][~mask] == 0).all() and (bad[1][mask] != 0).any()


def test_poison_in_double_backward():
    inputs = make(BY_NAME["weight_element"], torch.float64)

    def second(inputs):
        leaves = [inputs[n].detach().requires_grad_() for n in ("prediction", "weighting")]
        values = {**inputs, "prediction": leaves[0], "weighting": leaves[1]}
        loss = masked_squared_error(**values)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        on = kept(inputs)
        return torch.autograd.grad(sum(g[on].square().sum() for g in grads), leaves)

    for a, b in zip(second(inputs), second(poisoned(inputs, NAN)), strict=True):
        assert_same_bits(a, b)


def test_poison_in_forward_mode():
    inputs = make(BY_NAME["random_tokens"], torch.float32)
    on = kept(inputs)

    def tangent_of(inputs, fill):
        rest = {k: v for k, v in inputs.items() if k != "prediction"}
        direction = torch.where(on, 1.0, fill)
        return torch.func.jvp(
            lambda p: masked_squared_error(p, **rest), (inputs["prediction"],), (direction,)
        )

    for a, b in zip(tangent_of(inputs, 0.0), tangent_of(poisoned(inputs, NAN), NAN), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("where", ["prediction", "target", "edit_mask", "weighting"])
@pytest.mark.parametrize("name", ["weight_sample", "weight_all", "one_vector"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_at_a_kept_position_propagate(where, name, value):
    inputs = make(BY_NAME[name], torch.float32)
    if inputs["edit_mask"] is None:
        inputs["edit_mask"] = torch.rand(BY_NAME[name].shape[:2])
    at = tuple(int(i) for i in kept(inputs).nonzero()[-1])
    tensor = inputs[where] = inputs[where].clone()
    place = at[: tensor.dim()]
    tensor[tuple(0 if n == 1 else i for i, n in zip(place, tensor.shape, strict=True))] = value
    for reduction in REDUCTIONS:
        loss = masked_squared_error(**inputs, reduction=reduction)
        assert not loss.isfinite().all(), reduction
        if reduction == "none":
            assert not loss[at].isfinite()
            assert (loss[~kept(inputs)] == 0).all()


def test_zero_weight_is_not_a_mask():
    # 0 * NaN is NaN: only a mask selects
    prediction = torch.tensor([[[NAN, 1.0]]])
    loss = mle.AttentionMaskMseLoss()(prediction, torch.zeros(1, 1, 2), weighting=0.0)
    assert loss.isnan()


@pytest.mark.parametrize("name", ["random_tokens", "three_channels", "weight_element"])
def test_dropping_a_row_is_deleting_it(name):
    inputs = make(BY_NAME[name], torch.float32)
    on = kept(inputs)
    tokens = on.all(-1)
    mask = inputs["mask"] if inputs["mask"].dim() == 2 else tokens
    inputs["mask"] = mask

    def flat(tensor):
        if tensor is None:
            return None
        rest = tensor.shape[2:]
        return tensor.expand(*mask.shape, *rest)[mask].reshape(1, -1, *rest)

    fewer = {key: flat(value) for key, value in inputs.items()}
    fewer["mask"] = None
    for reduction in ("mean", "sum", "token_sum"):
        expected = Expected(fewer, reduction=reduction)
        actual = evaluate(masked_squared_error, inputs, reduction=reduction)
        actual = {k: v if k == "loss" else flat(v) for k, v in actual.items()}
        assert_all_accurate(actual, expected, reduction)


sizes = st.tuples(*(st.integers(0, 9),) * 3)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=sizes,
    seed=st.integers(0, 2**31),
    keep=st.floats(0, 1),
    mask_dims=st.sampled_from([None, 1, 2, 3]),
    edit=st.booleans(),
    broadcast=st.none() | st.lists(st.booleans(), max_size=3),
    dtype=st.sampled_from(FLOATING),
    reduction=st.sampled_from(REDUCTIONS),
    order=st.permutations(range(3)),
)
def test_any_arguments(shape, seed, keep, mask_dims, edit, broadcast, dtype, reduction, order):
    g = torch.Generator().manual_seed(seed)

    def values():
        back = [order.index(i) for i in range(3)]
        return torch.randn([shape[i] for i in order], generator=g).to(dtype).permute(back)

    weighting = None
    if broadcast is not None:
        ends = shape[len(shape) - len(broadcast) :]
        size = [1 if one else n for one, n in zip(broadcast, ends, strict=True)]
        weighting = torch.rand(size, generator=g).to(dtype)
    inputs = {
        "prediction": values(),
        "target": values(),
        "mask": None if mask_dims is None else torch.rand(shape[:mask_dims], generator=g) < keep,
        "edit_mask": torch.rand(shape[:2], generator=g) if edit else None,
        "weighting": weighting,
    }
    actual = evaluate(masked_squared_error, inputs, reduction=reduction)
    assert_all_accurate(actual, Expected(inputs, reduction=reduction))
    if mask_dims is not None:
        bad = evaluate(masked_squared_error, poisoned(inputs, NAN), reduction=reduction)
        for key, value in actual.items():
            assert_same_bits(bad[key], value, key)
