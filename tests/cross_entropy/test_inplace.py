# SPDX-License-Identifier: BSD-3-Clause
"""inplace_backward: the gradient takes the place of the logits; nobody reads them by mistake."""

import pytest
import torch
from accuracy import assert_same_bits
from cases_cross_entropy import BY_NAME, EVERYTHING, REDUCTIONS, make, options_of

import masked_loss_ext as mle
from tests.cross_entropy.test_shift import allocated_bytes

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODIFIED = "modified by an inplace operation"
NAMES = [
    *("v1", "v17_everything", "v1025_everything", "v32769", "many_rows", "few_of_many", "rank_1"),
    *("both_weights_none", "segments_sum", "banned_mean", "nothing_counts", "all_ignored"),
    *("row_slice_mean", "row_gaps_none", "misaligned_none", "permuted_mean", "rank_4_shift"),
]


def gradient(inputs, options, inplace, with_stats=False):
    x = inputs["logits"].detach().requires_grad_()
    out = mle.masked_cross_entropy(
        **{**inputs, "logits": x}, **options, inplace_backward=inplace, return_stats=with_stats
    )
    loss = out
    if with_stats:
        loss = out[0].sum() + (out[1].lse + out[1].entropy * 0.5 + out[1].log_prob).sum()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return x, grad, loss.detach()


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_same_gradient_in_the_logits_memory(name, dtype):
    for with_stats in (False, True):
        inputs, options = make(BY_NAME[name], dtype), options_of(BY_NAME[name])
        before = inputs["logits"].clone()
        _, plain, loss = gradient(inputs, options, False, with_stats)
        assert_same_bits(inputs["logits"], before, "logits of the plain backward")
        version = inputs["logits"]._version
        x, grad, same_loss = gradient(inputs, options, True, with_stats)
        assert_same_bits(grad, plain, "gradient")
        assert_same_bits(same_loss, loss, "loss")
        assert grad.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert grad.shape == x.shape and grad.data_ptr() == x.data_ptr()
        assert_same_bits(x.detach(), plain, "what stands in the logits now")
        assert x._version > version and not grad.requires_grad


@pytest.mark.parametrize("name", ["row_slice_mean", "row_gaps_none", "misaligned_none"])
def test_what_lies_between_the_rows_is_not_written(name):
    """stored_as() leaves NaN there."""
    inputs, options = make(BY_NAME[name], torch.float32), options_of(BY_NAME[name])
    x = inputs["logits"]
    whole = torch.empty(0).set_(x.untyped_storage())
    outside = whole.isnan()
    assert outside.sum() == whole.numel() - x.numel() > 0
    gradient(inputs, options, True)
    assert torch.equal(whole.isnan(), outside)


def test_forward_writes_nothing():
    x = torch.randn(4, 50, requires_grad=True)
    before, target = x.detach().clone(), torch.tensor([0, -100, 2, 3])
    loss = mle.masked_cross_entropy(x, target, inplace_backward=True)
    assert torch.equal(x.detach(), before) and x._version == 0
    with torch.no_grad():
        mle.masked_cross_entropy(x, target, inplace_backward=True)
    mle.masked_cross_entropy(x.detach(), target, inplace_backward=True)
    assert torch.equal(x.detach(), before) and x._version == 0
    loss.backward()
    assert not torch.equal(x.detach(), before)


def test_a_leaf_trains():
    """.grad of a leaf after backward() is the plain one, whether or not it shares memory."""
    x = torch.randn(4, 50, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    target = torch.tensor([0, -100, 2, 3])
    mle.masked_cross_entropy(x, target, inplace_backward=True).backward()
    mle.masked_cross_entropy(y, target).backward()
    assert_same_bits(x.grad, y.grad)


def test_through_a_model():
    layer = torch.nn.Linear(8, 300)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    target = torch.randint(0, 300, (3, 5))
    leaves = [hidden, layer.weight, layer.bias]
    results = []
    for inplace in (False, True):
        loss = mle.masked_cross_entropy(layer(hidden), target, shift=1, inplace_backward=inplace)
        results.append(torch.autograd.grad(loss, leaves))
    for plain, ours in zip(*results, strict=True):
        assert_same_bits(ours, plain)


def test_a_second_backward_is_refused():
    x = torch.randn(4, 50, requires_grad=True) * 1
    loss = mle.masked_cross_entropy(x, torch.arange(4), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True has one backward"):
        loss.backward()


@pytest.mark.parametrize("view", [False, True])
def test_another_consumer_is_refused(view):
    leaf = torch.randn(4, 50, requires_grad=True)
    x = leaf * 1
    other = x.sin().sum()  # saves x
    logits = x[1:] if view else x
    loss = mle.masked_cross_entropy(logits, torch.arange(len(logits)), inplace_backward=True)
    loss.backward()
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


def test_a_consumer_that_went_first_is_right():
    leaf = torch.randn(4, 50, requires_grad=True)
    grads = []
    for inplace in (False, True):
        x = leaf * 1
        other = x.sin().sum()
        loss = mle.masked_cross_entropy(x, torch.arange(4), inplace_backward=inplace)
        (first,) = torch.autograd.grad(other, leaf, retain_graph=True)
        grads.append(first + torch.autograd.grad(loss, leaf)[0])
    assert_same_bits(*grads)


@pytest.mark.parametrize("kind", ["expanded", "overlapping"])
def test_rows_that_share_memory_are_refused(kind):
    base = torch.randn(64, requires_grad=True)
    x = {
        "expanded": lambda: base[:16].expand(4, 16),
        "overlapping": lambda: base.as_strided((4, 16), (8, 1)),
    }[kind]()
    before = base.detach().clone()
    with pytest.raises(ValueError, match="masked_cross_entropy: .*inplace_backward.*got"):
        mle.masked_cross_entropy(x, torch.arange(4), inplace_backward=True).backward()
    assert torch.equal(base.detach(), before)


@pytest.mark.parametrize("kind", ["transposed", "expanded"])
def test_classes_that_are_not_adjacent_are_copied(kind):
    """The gradient is that of the copy: right, and the caller's memory is as it was."""
    base = torch.randn(16, 4) if kind == "transposed" else torch.randn(1, 4).expand(16, 4)
    before = base.clone()
    x = base.detach().requires_grad_()
    loss = mle.masked_cross_entropy(x.t(), torch.arange(4), inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x)
    y = before.requires_grad_()
    plain = mle.masked_cross_entropy(y.t(), torch.arange(4))
    assert_same_bits(grad, torch.autograd.grad(plain, y)[0])
    assert torch.equal(base, before.detach())


def test_differentiating_twice_is_right_or_refused():
    """The second derivative needs the logits: never one that was computed from the gradient."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    target = torch.arange(4)
    (plain,) = torch.autograd.grad(mle.masked_cross_entropy(y, target), y, create_graph=True)
    (expected,) = torch.autograd.grad(plain.square().sum(), y)
    try:
        loss = mle.masked_cross_entropy(x, target, inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
    except RuntimeError as error:
        assert "inplace" in str(error), error
    else:
        torch.testing.assert_close(second, expected)


def test_ignored_where_nobody_owns_the_logits():
    x, target = torch.randn(4, 50), torch.arange(4)
    before = x.clone()

    def loss(x):
        return mle.masked_cross_entropy(x, target, inplace_backward=True)

    expected = torch.func.grad(lambda x: mle.masked_cross_entropy(x, target))(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,))[1], (expected * x).sum())
    leaf = x.clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(x, before) and torch.equal(leaf.detach(), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_second_tensor_of_logits(reduction):
    x = torch.randn(64, 20000, requires_grad=True)
    target, mask = torch.randint(0, 20000, (64,)), torch.rand(64) < 0.6
    options = {**EVERYTHING, "reduction": reduction, "inplace_backward": True}

    def step():
        torch.autograd.grad(mle.masked_cross_entropy(x, target, mask, **options).sum(), x)

    step()
    used = allocated_bytes(step)
    assert used < 0.01 * x.numel() * x.element_size(), f"{used} bytes"
