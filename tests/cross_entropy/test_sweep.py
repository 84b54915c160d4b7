# SPDX-License-Identifier: BSD-3-Clause
"""gradient_in_forward: the gradient is made with the loss, and the backward hands it over once."""

import math

import pytest
import torch
from accuracy import assert_same_bits
from cases_cross_entropy import BY_NAME, EVERYTHING, make, options_of

import masked_loss_ext as mle
from tests.cross_entropy.test_hand_worked import MASK, TARGET, WEIGHT, P, check, logits
from tests.cross_entropy.test_inplace import FLOATING, MODIFIED
from tests.cross_entropy.test_shift import allocated_bytes

NAMES = [
    *("v1", "v17", "v1025", "v16385", "v32769", "many_rows", "many_tiny_rows", "few_of_many"),
    *("rank_1", "segments_sum", "banned_mean", "nothing_counts", "all_ignored", "peaked"),
    *("row_slice_mean", "misaligned_mean", "permuted_mean", "rank_4_shift"),
]
in_both = pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in_place"])


def fused(x, *args, **options):
    return mle.masked_cross_entropy(x, *args, gradient_in_forward=True, **options)


def loss_and_gradient(inputs, options, scale=1.0):
    x = inputs["logits"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = mle.masked_cross_entropy(**{**inputs, "logits": x}, **options)
    return loss.detach(), torch.autograd.grad(loss * scale, x)[0], x


# --- on paper: row n of the gradient is w_y (p - [c = y]) / denominator -------------------------


def on_paper(weights):
    rows = []
    for p, y, w in zip(P, TARGET.tolist(), weights, strict=False):
        rows.append([w * (p[c] - (c == y)) for c in range(3)])
    return [*rows, [0.0, 0.0, 0.0]]  # the fourth row is NaN and masked


@in_both
@pytest.mark.parametrize("incoming", [1.0, 3.0])
def test_on_paper(inplace, incoming):
    mean = on_paper([1 / 3, 1 / 3, 1 / 3])
    assert mean[0] == pytest.approx([1 / 12, 1 / 12, -1 / 6])
    assert mean[1] == pytest.approx([1 / 4, -7 / 24, 1 / 24])
    for weights, options in (
        ([1 / 3] * 3, {}),
        ([1.0] * 3, {"reduction": "sum"}),
        ([1 / 4] * 3, {"normalizer": 4}),
        ([5 / 10, 3 / 10, 2 / 10], {"weight": WEIGHT}),
        ([5.0, 3.0, 2.0], {"weight": WEIGHT, "reduction": "sum"}),
        ([0.5 / 3, 0.0, 2 / 3], {"token_weight": torch.tensor([0.5, 0, 2, 9])}),
        ([0.0] * 3, {"normalizer": 0}),
    ):
        x = logits().detach().requires_grad_()
        loss = fused(x, TARGET, MASK, inplace_backward=inplace, **options)
        (gradient,) = torch.autograd.grad(loss * incoming, x)
        expected = torch.tensor(on_paper(weights), dtype=torch.float64) * incoming
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)
    check(fused(logits(), TARGET, MASK), sum(torch.tensor([2, 8, 6.0]).double().log()).item() / 3)


# --- against the ordinary way, which its own tests set beside the reference ---------------------


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_the_ordinary_way(name, dtype):
    inputs, options = make(BY_NAME[name], dtype), options_of(BY_NAME[name])
    for more in ({}, EVERYTHING):
        options = {**options, **more}
        loss, expected, _ = loss_and_gradient(inputs, options)
        options["gradient_in_forward"] = True
        same, gradient, x = loss_and_gradient(inputs, options)
        assert_same_bits(same, loss, "loss")
        assert_same_bits(gradient, expected, "gradient")
        assert_same_bits(x.detach(), inputs["logits"], "the logits of the fresh way")
        same, gradient, x = loss_and_gradient(inputs, {**options, "inplace_backward": True})
        assert_same_bits(same, loss, "loss in place")
        assert_same_bits(gradient, expected, "gradient in place")
        assert gradient.data_ptr() == x.data_ptr() and x._version > 0


@in_both
@pytest.mark.parametrize("name", ["mean", "everything", "shift", "pieces", "of_many"])
def test_temperatures_of_rows(name, inplace):
    case = BY_NAME[f"temperatures_{name}"]
    inputs, options = make(case, torch.float32), options_of(case)
    loss, expected, _ = loss_and_gradient(inputs, options)
    options |= {"gradient_in_forward": True, "inplace_backward": inplace}
    same, gradient, _ = loss_and_gradient(inputs, options)
    assert expected.isfinite().all()
    assert_same_bits(same, loss)
    assert_same_bits(gradient, expected)


@in_both
@pytest.mark.parametrize("rows, classes", [(64, 16385), (63, 16385), (300, 40), (1, 70000)])
def test_every_cut_of_the_work(rows, classes, inplace):
    g = torch.Generator().manual_seed(rows)
    inputs = {
        "logits": torch.randn(rows, classes, generator=g),
        "target": torch.randint(classes, (rows,), generator=g),
        "mask": torch.rand(rows, generator=g) < 0.6,
        "weight": torch.rand(classes, generator=g),
    }
    inputs["mask"][0] = True
    inputs["logits"][~inputs["mask"]] = float("nan")
    loss, expected, _ = loss_and_gradient(inputs, {})
    options = {"gradient_in_forward": True, "inplace_backward": inplace}
    same, gradient, _ = loss_and_gradient(inputs, options)
    assert loss.isfinite() and expected.isfinite().all()
    assert_same_bits(same, loss)
    assert_same_bits(gradient, expected)
    same, gradient, _ = loss_and_gradient(inputs, options, 0.3)
    torch.testing.assert_close(gradient, expected * 0.3, rtol=1e-6, atol=0)


@in_both
@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["v1025", "row_slice_mean", "permuted_mean", "many_rows"])
def test_any_incoming_gradient(name, dtype, inplace):
    inputs, options = make(BY_NAME[name], dtype), options_of(BY_NAME[name])
    options |= {"gradient_in_forward": True, "inplace_backward": inplace}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, one, _ = loss_and_gradient(inputs, options)
    for scale in (0.0, -1.0, 0.25, 1.7):
        _, gradient, _ = loss_and_gradient(inputs, options, scale)
        factor = torch.tensor(scale, dtype=wide)
        expected = (one.to(wide) * factor).to(dtype)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    _, gradient, _ = loss_and_gradient(inputs, options, float("inf"))
    assert torch.equal(gradient == 0, one == 0), "a row that does not count takes no part in it"


@in_both
def test_nothing_outside_the_rows_is_written(inplace):
    storage = torch.full((4, 60), -7.0)
    x = storage[:, 3:52].copy_(torch.randn(4, 49)).requires_grad_()
    loss = fused(x, torch.arange(4), inplace_backward=inplace)
    torch.autograd.grad(loss * 2, x)
    assert (storage[:, :3] == -7).all() and (storage[:, 52:] == -7).all()


# --- what the caller gave up --------------------------------------------------------------------


@in_both
def test_one_backward(inplace):
    x = torch.randn(4, 50, requires_grad=True) * 1
    loss = fused(x, torch.arange(4), inplace_backward=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient_in_forward=True has one backward"):
        loss.backward()


def test_a_batch_of_gradients_reaches_no_excluded_row():
    x = torch.randn(3, 50, requires_grad=True)
    mask, factors = torch.tensor([True, False, True]), torch.tensor([math.inf, 0.5])
    loss = fused(x, torch.arange(3), mask)
    (found,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    assert torch.equal(found[:, 1], torch.zeros(2, 50))
    (expected,) = torch.autograd.grad(fused(x, torch.arange(3), mask) * 0.5, x)
    torch.testing.assert_close(found[1], expected)


@in_both
def test_no_second_derivative(inplace):
    x = torch.randn(4, 50, requires_grad=True) * 1
    loss = fused(x, torch.arange(4), inplace_backward=inplace)
    with pytest.raises(RuntimeError, match="gradient_in_forward=True has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("first", [False, True])
def test_in_place_any_other_use_is_refused(first):
    leaf = torch.randn(4, 50, requires_grad=True)
    x = leaf * 1
    other = x.sin().sum()  # saves x
    loss = fused(x, torch.arange(4), inplace_backward=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        (other if first else loss + other).backward()


def test_in_place_a_change_between_forward_and_backward_is_refused():
    x = torch.randn(4, 50, requires_grad=True) * 1
    loss = fused(x, torch.arange(4), inplace_backward=True)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


def test_fresh_logits_may_be_used_and_changed():
    leaf = torch.randn(4, 50, requires_grad=True)
    grads = []
    for in_forward in (False, True):
        x = leaf * 1
        loss = mle.masked_cross_entropy(x, torch.arange(4), gradient_in_forward=in_forward)
        (x.sin().sum() + loss).backward()
        grads.append(leaf.grad)
        leaf.grad = None
    assert_same_bits(*grads)
    x = leaf * 1
    loss = fused(x, torch.arange(4))
    with torch.no_grad():
        x.zero_()  # nobody needs them any more
    loss.backward()


def test_no_gradient_asked_for_no_gradient_made():
    x, target = torch.randn(4, 50, requires_grad=True), torch.arange(4)
    before = x.detach().clone()
    with torch.no_grad():
        fused(x, target, inplace_backward=True)
    fused(x.detach(), target, inplace_backward=True)
    assert torch.equal(x.detach(), before) and x._version == 0


def test_a_bad_label_leaves_the_logits_as_they_were():
    for shape in ((70, 40), (70, 20000)):
        x = torch.randn(*shape, requires_grad=True)
        before, target = x.detach().clone(), torch.zeros(70, dtype=torch.long)
        target[69] = shape[1]
        with pytest.raises(IndexError, match=r"row \[69\] must be in"):
            fused(x, target, inplace_backward=True)
        assert torch.equal(x.detach(), before)


def test_the_ordinary_way_where_it_does_not_apply():
    x, target = torch.randn(4, 50, dtype=torch.float64), torch.arange(4)
    weight = torch.rand(4, dtype=torch.float64)

    def leaves():
        return x.clone().requires_grad_(), weight.clone().requires_grad_()

    results = []
    for function in (mle.masked_cross_entropy, fused):
        a, w = leaves()
        loss = function(a, target, token_weight=w)
        results.append(torch.autograd.grad(loss, (a, w)))
    for ours, expected in zip(*results, strict=True):
        assert_same_bits(ours, expected)
    expected = torch.func.grad(lambda x: mle.masked_cross_entropy(x, target))(x)
    torch.testing.assert_close(torch.func.grad(lambda x: fused(x, target))(x), expected)
    tangent = torch.func.jvp(lambda x: fused(x, target), (x,), (x,))[1]
    torch.testing.assert_close(tangent, (expected * x).sum())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fused(x, target), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
    torch._dynamo.reset()


def test_through_a_model_and_the_module():
    layer = torch.nn.Linear(8, 300)
    hidden, target = torch.randn(3, 5, 8, requires_grad=True), torch.randint(0, 300, (3, 5))
    results = []
    for options in ({}, {"gradient_in_forward": True}):
        for inplace in (False, True):
            module = mle.MaskedCrossEntropyLoss(shift=1, inplace_backward=inplace, **options)
            loss = module(layer(hidden), target) / 4
            results.append(torch.autograd.grad(loss, [hidden, layer.weight, layer.bias]))
    assert "gradient_in_forward=True" in repr(module)
    for found in results[1:]:
        for ours, plain in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, plain)


@in_both
def test_memory(inplace):
    x = torch.randn(64, 20000, requires_grad=True)
    target, mask = torch.randint(0, 20000, (64,)), torch.rand(64) < 0.6

    def step(scale=1.0):
        loss = fused(x, target, mask, inplace_backward=inplace, **EVERYTHING)
        torch.autograd.grad(loss * scale, x)

    step()
    size = x.numel() * x.element_size()
    for scale in (1.0, 0.5):
        used = allocated_bytes(lambda scale=scale: step(scale))
        assert used < ((not inplace) + 0.01) * size, f"{used} bytes"
