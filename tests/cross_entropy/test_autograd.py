# SPDX-License-Identifier: BSD-3-Clause
"""First and second derivatives of the loss and of each statistic, together and apart."""

import pytest
import torch
from accuracy import assert_same_bits
from torch.autograd import gradcheck, gradgradcheck

import masked_loss_ext as mle
from masked_loss_ext import reference

TARGET = torch.tensor([[1, 4, -100, 0, 3], [2, 2, 0, 77, 4]])
MASK = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 0, 1]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]])
WEIGHT = torch.tensor([1.0, 0.5, 2, 0, 1.5], dtype=torch.float64)
NAN = float("nan")
TEMPERATURES = torch.tensor([[0.7, 1.3, NAN, -1, 2], [1, 0, 0.5, NAN, 0.8]], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing_all": {"label_smoothing": 1.0},
    "weight": {"weight": WEIGHT},
    "weight_smoothing": {"weight": WEIGHT, "label_smoothing": 0.3, "reduction": "none"},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": TEMPERATURES, "label_smoothing": 0.1, "z_loss": 0.1},
    "softcap": {"softcap": 2.0, "temperature": 1.3},
    "z_loss": {"z_loss": 0.1},
    "focal": {"focal_gamma": 2.0},
    "focal_root": {"focal_gamma": 0.5, "label_smoothing": 0.1},
    "shift": {"shift": 2, "reduction": "none"},
    "segments": {"shift": 1, "segment_ids": SEGMENTS},
    "normalizer": {"normalizer": 3.5},
    "everything": {
        "label_smoothing": 0.1,
        "weight": WEIGHT,
        "temperature": 0.7,
        "softcap": 3.0,
        "z_loss": 0.05,
        "focal_gamma": 1.5,
        "shift": 1,
        "segment_ids": SEGMENTS,
    },
}
STATISTICS = ("lse", "entropy", "log_prob")


def second_gradcheck(*args):
    """Along random directions: entry by entry it takes seconds."""
    return gradgradcheck(*args, fast_mode=True)


both_checks = pytest.mark.parametrize("check", [gradcheck, second_gradcheck])


def leaves(token_weight=True):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 5, generator=g, dtype=torch.float64).requires_grad_()
    t = torch.randn(2, 5, generator=g, dtype=torch.float64).requires_grad_()
    return (x, t) if token_weight else (x,)


@both_checks
@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_of_the_loss(name, check):
    def loss(x, t=None):
        return mle.masked_cross_entropy(x, TARGET, MASK, token_weight=t, **OPTIONS[name])

    assert check(loss, leaves())
    assert check(loss, leaves(False))


@both_checks
@pytest.mark.parametrize("name", ["plain", "none", "everything"])
def test_derivatives_of_loss_and_statistics_together(name, check):
    def outputs(x, t):
        loss, stats = mle.masked_cross_entropy(
            x, TARGET, MASK, token_weight=t, **OPTIONS[name], return_stats=True
        )
        return loss, *stats[:3]

    def sum_of_products(x, t):
        loss, lse, entropy, log_prob = outputs(x, t)
        return (loss * lse * entropy + log_prob.square() * entropy).sum()

    assert check(outputs, leaves())
    assert check(sum_of_products, leaves())


@both_checks
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 2.5}], ids=["plain", "cap"]
)
def test_derivatives_of_each_statistic(statistic, options, check):
    def alone(x):
        return getattr(mle.row_statistics(x, TARGET, MASK, **options), statistic)

    def of_the_loss(x, t):
        _, stats = mle.masked_cross_entropy(
            x, TARGET, MASK, token_weight=t, **options, return_stats=True
        )
        return getattr(stats, statistic)

    assert check(alone, leaves(False))
    assert check(lambda x: of_the_loss(x, leaves()[1].detach()), leaves(False))
    if statistic != "log_prob":
        assert check(
            lambda x: getattr(mle.row_statistics(x, None, MASK, **options), statistic),
            leaves(False),
        )


@both_checks
@pytest.mark.parametrize("which", ["loss", *STATISTICS])
def test_derivatives_with_banned_classes(which, check):
    banned = torch.zeros(2, 5, 5, dtype=torch.bool)
    banned[:, :, 3] = True
    target = TARGET.masked_fill(TARGET == 3, 1)

    def output(x):
        x = x.masked_fill(banned, -torch.inf)
        loss, stats = mle.masked_cross_entropy(
            x, target, MASK, z_loss=0.1, focal_gamma=2.0, return_stats=True
        )
        return loss if which == "loss" else getattr(stats, which)

    assert check(output, leaves(False))


def test_outputs_that_are_not_differentiable():
    x, t = leaves()
    _, stats = mle.masked_cross_entropy(x, TARGET, MASK, token_weight=t, return_stats=True)
    assert not stats.hit.requires_grad and not stats.argmax.requires_grad
    assert all(getattr(stats, name).requires_grad for name in STATISTICS)
    (grad,) = torch.autograd.grad(stats.lse.sum(), t, allow_unused=True)
    assert grad is None or (grad == 0).all()


@pytest.mark.parametrize("name", ["plain", "everything", "segments"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_second_derivatives_agree_with_the_reference(name, dtype):
    options = {**OPTIONS[name]}
    if "weight" in options:
        options["weight"] = WEIGHT.to(dtype)

    def second(module):
        x, t = (v.detach().to(dtype).requires_grad_() for v in leaves())
        loss, stats = module.masked_cross_entropy(
            x, TARGET, MASK, token_weight=t, **options, return_stats=True
        )
        total = loss.square() + (stats.entropy * stats.lse).sum() + stats.log_prob.exp().sum()
        grads = torch.autograd.grad(total, (x, t), create_graph=True)
        return torch.autograd.grad(sum((g * g.cos()).sum() for g in grads), (x, t))

    tol = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip(second(mle), second(reference), strict=True):
        torch.testing.assert_close(ours, theirs, **tol)


def test_second_derivative_with_poison():
    off = ~((MASK != 0) & (TARGET != -100))

    def second(fill):
        x, t = (v.detach() for v in leaves())
        x = x.masked_fill(off.unsqueeze(-1), fill).requires_grad_()
        t = t.masked_fill(off, fill).requires_grad_()
        loss, stats = mle.masked_cross_entropy(
            x, TARGET, MASK, token_weight=t, **OPTIONS["weight_smoothing"], return_stats=True
        )
        grads = torch.autograd.grad(
            loss.square().sum() + stats.entropy.sum(), (x, t), create_graph=True
        )
        return torch.autograd.grad(sum(g[~off].square().sum() for g in grads), (x, t))

    for clean, bad in zip(second(0.0), second(float("nan")), strict=True):
        assert_same_bits(bad, clean)
        assert (bad[off] == 0).all()


@pytest.mark.parametrize("kind", ["strided", "expanded", "scalar_expanded"])
def test_upstream_gradients_of_any_strides(kind):
    x = leaves(False)[0].detach().float().requires_grad_()
    each, stats = mle.masked_cross_entropy(
        x, TARGET, MASK, reduction="none", z_loss=0.1, return_stats=True
    )
    upstream = {
        "strided": torch.randn(5, 2, 3).transpose(0, 1)[..., 1],
        "expanded": torch.randn(2, 1).expand(2, 5),
        "scalar_expanded": torch.tensor(0.5).expand(2, 5),
    }[kind]
    outputs = [each, stats.lse, stats.entropy, stats.log_prob]
    ours = torch.autograd.grad(outputs, x, [upstream] * 4, retain_graph=True)[0]
    theirs = torch.autograd.grad(outputs, x, [upstream.contiguous()] * 4)[0]
    assert_same_bits(ours, theirs)
    assert (ours != 0).any()


# --- around a training step --------------------------------------------------------------------


def test_one_tensor_used_twice():
    x = leaves(False)[0]
    loss = mle.masked_cross_entropy(x, TARGET, MASK)
    stats = mle.row_statistics(x, TARGET, MASK)
    (both,) = torch.autograd.grad(loss + stats.entropy.sum() + x.sum(), x, retain_graph=True)
    parts = [torch.autograd.grad(part, x)[0] for part in (loss, stats.entropy.sum(), x.sum())]
    torch.testing.assert_close(both, sum(parts))


def test_logits_that_are_token_weights_too():
    x = leaves(False)[0].detach().float().requires_grad_()
    weights = torch.softmax(x, -1)[..., 0]
    results = [
        torch.autograd.grad(
            module.masked_cross_entropy(x, TARGET, MASK, token_weight=weights),
            x,
            retain_graph=True,
        )[0]
        for module in (mle, reference)
    ]
    torch.testing.assert_close(*results)


def test_retain_graph_and_accumulation():
    x = leaves(False)[0].detach().float().requires_grad_()
    loss = mle.masked_cross_entropy(x, TARGET, MASK)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert_same_bits(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "name", ["logits", "target", "mask", "weight", "token_weight", "segment_ids"]
)
def test_backward_refuses_inputs_that_were_changed(name):
    inputs = {
        "logits": torch.randn(2, 5, 5, requires_grad=True).clone(),
        "target": TARGET.clone(),
        "mask": MASK.clone(),
        "weight": WEIGHT.float(),
        "token_weight": torch.rand(2, 5),
        "segment_ids": SEGMENTS.clone(),
    }
    loss = mle.masked_cross_entropy(**inputs, shift=1)
    with torch.no_grad():
        inputs[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_leaves_the_logits_alone():
    layer, x = torch.nn.Linear(6, 5), torch.randn(2, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        logits.retain_grad()
        loss = mle.masked_cross_entropy(logits, TARGET, MASK)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        loss, reference.masked_cross_entropy(logits.float(), TARGET, MASK), rtol=1e-6, atol=1e-6
    )


def test_without_gradients():
    x = torch.randn(2, 5, 5, requires_grad=True)
    with torch.no_grad():
        loss, stats = mle.masked_cross_entropy(x, TARGET, MASK, return_stats=True)
        assert not loss.requires_grad and not stats.lse.requires_grad
    with torch.inference_mode():
        again = mle.masked_cross_entropy(x, TARGET, MASK)
    assert torch.equal(again, loss)
    assert not mle.masked_cross_entropy(x.detach(), TARGET, MASK).requires_grad
