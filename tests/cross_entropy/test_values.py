# SPDX-License-Identifier: BSD-3-Clause
"""Every case in every dtype against the reference, by the accuracy rule; and against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits
from accuracy_cross_entropy import Expected, assert_all_accurate, evaluate, upstream_for
from cases_cross_entropy import BY_NAME, CASES, REDUCTIONS, make, options_of
from gpu_device import PLACES, at

import masked_loss_ext as mle

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])


@pytest.mark.parametrize("place", PLACES)
@every_dtype
@every_case
def test_agrees_with_reference(case, dtype, place):
    """Loss and gradient; then statistics, with gradients through all of them at once."""
    function = at(place, mle.masked_cross_entropy)
    inputs, options = make(case, dtype), options_of(case)
    upstream = upstream_for(inputs, options, statistics=False)
    expected = Expected(inputs, upstream, **options)
    alone = evaluate(function, inputs, upstream, stats=False, **options)
    assert_all_accurate(alone, expected, case.name)
    upstream = upstream_for(inputs, options)
    actual = evaluate(function, inputs, upstream, **options)
    assert_all_accurate(actual, Expected(inputs, upstream, **options), case.name)
    if place == "cpu":  # the kernels for CUDA may add in another order
        assert_same_bits(actual["loss"], alone["loss"], "loss with and without statistics")


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (7, 37), (3, 5, 4), (2, 3, 2, 129), (4, 1025)], ids=str)
def test_statistics_alone(shape, dtype):
    """row_statistics with labels and without says what the loss's own statistics say."""
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(shape, generator=g)).to(dtype).requires_grad_()
    target = torch.randint(0, shape[-1], shape[:-1], generator=g)
    mask = torch.rand(shape[:-1], generator=g) < 0.7
    options = {"temperature": 0.7, "softcap": 15.0}
    _, expected = mle.masked_cross_entropy(logits, target, mask, **options, return_stats=True)
    actual = mle.row_statistics(logits, target, mask, **options)
    assert actual._fields == ("lse", "entropy", "log_prob", "hit", "argmax")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in actual._asdict().items():
        assert_same_bits(value.detach(), getattr(expected, name).detach(), name)
        assert value.dtype == {"hit": torch.bool, "argmax": torch.int64}.get(name, wide)
    assert torch.equal(actual.hit & mask, (actual.argmax == target) & mask)
    alone = mle.row_statistics(logits, None, mask, **options)
    assert alone.log_prob is None and alone.hit is None
    assert torch.equal(alone.argmax, actual.argmax)
    for name in ("lse", "entropy"):
        ours, theirs = getattr(alone, name), getattr(expected, name)
        # A label's column comes last, apart from the others.
        rtol, atol = 8 * torch.finfo(wide).eps, 32 * torch.finfo(wide).eps
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=rtol, atol=atol, msg=name)
        weights = torch.randn(shape[:-1], generator=g).to(wide)
        grads = [torch.autograd.grad(s, logits, weights, retain_graph=True) for s in (ours, theirs)]
        # With a label that column is computed apart; without, lse is rounded.
        rtol, atol = 8 * torch.finfo(dtype).eps, 32 * torch.finfo(wide).eps
        torch.testing.assert_close(*grads, rtol=rtol, atol=atol)


def pytorch_options(reduction, smoothing, weight, ignore):
    return {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": weight,
        "ignore_index": ignore,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore", [-100, 3])
def test_agrees_with_pytorch(dtype, reduction, smoothing, weighted, ignore):
    g = torch.Generator().manual_seed(3)
    for rows, classes in ((1, 5), (40, 33), (9, 1500)):
        logits = (2 * torch.randn(rows, classes, generator=g, dtype=dtype)).requires_grad_()
        target = torch.randint(0, classes, (rows,), generator=g)
        target[1::4] = ignore
        weight = torch.rand(classes, generator=g, dtype=dtype) if weighted else None
        options = pytorch_options(reduction, smoothing, weight, ignore)
        ours = mle.masked_cross_entropy(logits, target, **options)
        theirs = F.cross_entropy(logits, target, **options)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.randn(ours.shape, generator=g, dtype=dtype)
        for (a,), (b,) in [
            [torch.autograd.grad(loss, logits, upstream) for loss in (ours, theirs)],
        ]:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_is_pytorch_on_the_rows_it_keeps(reduction):
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 9, 50, generator=g)
    target = torch.randint(0, 50, (6, 9), generator=g)
    mask = torch.rand(6, 9, generator=g) < 0.5
    ours = mle.masked_cross_entropy(logits, target, mask, reduction=reduction)
    theirs = F.cross_entropy(logits[mask], target[mask], reduction=reduction)
    torch.testing.assert_close(ours[mask] if reduction == "none" else ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_logits_are_as_exact_as_float_ones(dtype, reduction):
    """The same numbers in a wider dtype: the same loss, the gradient rounded once."""
    g = torch.Generator().manual_seed(5)
    half = (4 * torch.randn(64, 3000, generator=g)).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    target = torch.randint(0, 3000, (64,), generator=g)
    losses = [mle.masked_cross_entropy(x, target, reduction=reduction) for x in (half, full)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    exact = F.cross_entropy(full.double(), target, reduction=reduction)
    torch.testing.assert_close(losses[0].double(), exact, rtol=2e-6, atol=2e-6)
    grads = [
        torch.autograd.grad(loss.sum(), x)[0] for loss, x in zip(losses, (half, full), strict=True)
    ]
    assert grads[0].dtype == dtype
    rounded = grads[1].to(dtype)
    apart = (grads[0].float() - rounded.float()).abs()
    info = torch.finfo(dtype)
    spacing = (rounded.float().abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    assert (apart <= 1.01 * spacing).all() and (grads[0] == rounded).float().mean() > 0.99


def test_the_label_column_is_rounded_once():
    """p - 1 with p = 1 - 1e-4 is about -1e-4; of p in bfloat16, which is 1, it would be 0."""
    logits = torch.zeros(1, 3, dtype=torch.bfloat16)
    logits[0, 1] = 9.5
    logits.requires_grad_()
    mle.masked_cross_entropy(logits, torch.tensor([1])).backward()
    rest = 2 * torch.exp(torch.tensor(-9.5, dtype=torch.float64))
    expected = torch.tensor([[0.5, -1, 0.5]], dtype=torch.float64) * rest / (1 + rest)
    assert torch.equal(logits.grad, expected.to(torch.bfloat16))


def test_many_rows_keep_every_digit():
    """300 000 equal rows; summed one by one in float32 they are wrong in the 4th digit."""
    row = torch.tensor([0.0, 1.0, 0.5])
    exact = torch.logsumexp(row.double(), 0).item()
    logits = row.expand(300_000, 3)
    target = torch.zeros(300_000, dtype=torch.long)
    for reduction, times in (("mean", 1), ("sum", 300_000)):
        loss = mle.masked_cross_entropy(logits, target, reduction=reduction)
        assert loss.item() == pytest.approx(times * exact, rel=1e-6)


@pytest.mark.parametrize("name", ["v1025_everything", "banned_mean", "many_rows", "row_gaps_mean"])
def test_only_the_gradients_that_are_asked_for(name):
    inputs, options = make(BY_NAME[name], torch.float32), options_of(BY_NAME[name])
    rows = inputs["logits"].shape[:-1]
    inputs["token_weight"] = torch.linspace(-1, 1, rows.numel()).reshape(rows)
    both = evaluate(mle.masked_cross_entropy, inputs, stats=False, **options)
    for wanted in ("logits", "token_weight"):
        leaf = inputs[wanted].detach().requires_grad_()
        loss = mle.masked_cross_entropy(**{**inputs, wanted: leaf}, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert_same_bits(grad, both[f"grad {wanted}"], wanted)
