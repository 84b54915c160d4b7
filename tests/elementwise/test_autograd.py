# SPDX-License-Identifier: BSD-3-Clause
"""First and second derivatives, empty selections, checkpointing, autocast."""

import pytest
import torch
from cases import BY_NAME, make
from torch.autograd import gradcheck, gradgradcheck

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.masked_squared_error import masked_squared_error

MASK = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)
ELEMENTS = torch.tensor([[[1, 0], [1, 1], [0, 0]], [[0, 1], [1, 1], [0, 0]]], dtype=torch.bool)
EDIT = torch.tensor([[1.0, 0.3, 0.5], [0.0, 0.7, 0.2]])
WEIGHTINGS = [(), (2,), (3, 1), (2, 1, 1), (2, 3, 1), (2, 3, 2), (2, 1, 2)]


def leaves(weighting=None):
    g = torch.Generator().manual_seed(1)
    shapes = [(2, 3, 2), (2, 3, 2), *([] if weighting is None else [weighting])]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def token_module(reduction):
    loss_fn = mle.AttentionMaskMseLoss(3.0, 0.5, reduction=reduction)
    return lambda p, t, w=None: loss_fn(p, t, MASK, EDIT, w)


def mask_edit(reduction):
    loss_fn = mle.MaskEditLoss(3.0, 0.5)
    return lambda p, t, w=None: loss_fn(p, t, w, EDIT, reduction, attention_mask=MASK)


PUBLIC = {
    "edit_mean": lambda p, t, w=None: mle.masked_edit_token_mean_loss(p, t, MASK, EDIT, w),
    "multi_resolution": lambda p, t, w=None: mle.compute_loss_multi_resolution(p, t, MASK, EDIT, w),
    **{f"token_{r}": token_module(r) for r in ("mean", "sum", "none")},
    **{f"mask_edit_{r}": mask_edit(r) for r in ("mean", "sum", "none")},
    **{f"mse_{r}": mle.MseLoss(r) for r in ("mean", "sum", "none")},
}
AUTOENCODER = {
    f"{f.__name__}_{r}": lambda a, b, f=f, r=r: f(a, b, ELEMENTS, reduction=r)
    for f in (mle.masked_sse, mle.masked_mse)
    for r in ("sum", "mean", "batch_mean")
}
both_checks = pytest.mark.parametrize("check", [gradcheck, gradgradcheck])


@both_checks
@pytest.mark.parametrize("name", PUBLIC)
def test_derivatives_of_public_losses(name, check):
    assert check(PUBLIC[name], leaves((2, 3, 1)))
    assert check(PUBLIC[name], leaves())


@both_checks
@pytest.mark.parametrize("name", AUTOENCODER)
def test_derivatives_of_autoencoder_losses(name, check):
    assert check(AUTOENCODER[name], leaves())


@both_checks
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("mask", [None, MASK, ELEMENTS], ids=["all", "tokens", "elements"])
def test_derivatives_for_every_weighting(weighting, mask, check):
    for reduction in ("mean", "token", "none"):
        assert check(
            lambda p, t, w, r=reduction: masked_squared_error(p, t, mask, EDIT, w, reduction=r),
            leaves(weighting),
        )


@both_checks
def test_derivatives_through_the_operator_itself(check):
    def op(p, t, w):
        return torch.ops.masked_loss_ext.masked_squared_error(p, t, ELEMENTS, EDIT, w)[0]

    assert check(op, leaves((2, 3, 1)))


def test_double_backward_agrees_with_the_reference():
    inputs = make(BY_NAME["weight_all"], torch.float64)

    def second(function):
        values = dict(inputs)
        names = ("prediction", "target", "weighting")
        for name in names:
            values[name] = inputs[name].clone().requires_grad_()
        wanted = [values[name] for name in names]
        loss = function(**values, reduction="mean")
        grads = torch.autograd.grad(loss.square(), wanted, create_graph=True)
        return torch.autograd.grad(sum((g * g.cos()).sum() for g in grads), wanted)

    pairs = zip(second(masked_squared_error), second(reference.masked_squared_error), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_third_derivative():
    x = torch.tensor([[2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    loss = mle.masked_mse(x, torch.zeros_like(x), torch.tensor([[True, False]])) ** 2  # x^4
    for expected in (32.0, 48.0, 48.0):  # 4 x^3, 12 x^2, 24 x
        (loss,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        assert loss.tolist() == [[expected, 0.0]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch_mean"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (2, 3, 0)])
def test_empty_selection_stays_attached(reduction, shape):
    x = torch.full(shape, float("nan"), requires_grad=True)
    target = torch.ones(shape, requires_grad=True)
    loss = mle.masked_mse(x, target, torch.zeros(shape[:2]), reduction=reduction)
    assert loss.requires_grad and loss.item() == 0
    loss.backward()
    assert x.grad.shape == shape and (x.grad == 0).all() and (target.grad == 0).all()


def test_empty_selection_of_token_losses():
    for reduction in ("mean", "sum", "none"):
        x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
        weighting = torch.ones(2, 3, 1, requires_grad=True)
        loss_fn = mle.AttentionMaskMseLoss(reduction=reduction)
        loss = loss_fn(x, torch.zeros(2, 3, 4), torch.zeros(2, 3), weighting=weighting)
        loss.sum().backward()
        assert (loss == 0).all() and (x.grad == 0).all() and (weighting.grad == 0).all()


# --- around a training step --------------------------------------------------------------------


def test_retain_graph_and_accumulation():
    x = torch.ones(2, 3, requires_grad=True)
    loss = mle.masked_mse(x, torch.zeros(2, 3), torch.ones(2, 3))
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["prediction", "target", "mask", "edit_mask", "weighting"])
def test_backward_refuses_inputs_that_were_changed(name):
    inputs = make(BY_NAME["weight_sample"], torch.float32)
    x = inputs["prediction"].requires_grad_()
    inputs["prediction"] = x.clone()
    loss = masked_squared_error(**inputs)
    with torch.no_grad():
        inputs[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast():
    layer = torch.nn.Linear(6, 6)
    x, target, mask = (
        torch.randn(2, 5, 6),
        torch.randn(2, 5, 6),
        torch.tensor([[1] * 5, [1] + [0] * 4]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = layer(x)
        prediction.retain_grad()
        loss = mle.masked_edit_token_mean_loss(prediction, target, mask)
    assert prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert prediction.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    expected = (prediction.detach().float() - target)[mask.bool()].square().mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_one_tensor_as_both_arguments():
    x = torch.randn(2, 3, requires_grad=True)
    loss = mle.masked_mse(x, x, torch.ones(2, 3))
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_without_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        assert not mle.masked_mse(x, x + 1, torch.ones(2, 3)).requires_grad
    with torch.inference_mode():
        assert mle.masked_mse(x, x + 1, torch.ones(2, 3)).item() == pytest.approx(1.0)
    assert not mle.masked_mse(x.detach(), x.detach(), torch.ones(2, 3)).requires_grad
