# SPDX-License-Identifier: BSD-3-Clause
"""Classes in another dimension, dimensions of size 1, unsigned labels: accepted as they come."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import masked_loss_ext as mle
from tests.cross_entropy.test_shift import allocated_bytes

f = mle.masked_cross_entropy
B, S, V = 3, 5, 7


def batch(shape=(B, V, S), dtype=torch.float32):
    g = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(shape, generator=g).to(dtype)
    rows = shape[:1] + shape[2:]
    target = torch.randint(0, shape[1], rows, generator=g)
    target[torch.rand(rows, generator=g) < 0.2] = -100
    return logits, target, torch.rand(rows, generator=g) < 0.7


# --- class_dim -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(4, V), (B, V, S), (2, V, 4, 5), (2, V, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_dim_is_the_layout_of_pytorch(shape, reduction, channels_last):
    """Value and gradient; the gradient has the shape of the logits."""
    logits, target, mask = batch(shape)
    if channels_last:
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.rand(V)
    results = []
    for ours in (True, False):
        x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
        if ours:
            loss = f(x, target, mask, class_dim=1, **options)
        else:
            loss = F.cross_entropy(x, mle.mask_labels(target, mask), **options)
        loss.sum().backward()
        assert x.grad.shape == x.shape
        results.append((loss.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("class_dim", [0, 1, 2, -1, -2, -3])
def test_any_dimension(class_dim):
    logits, target, mask = batch()
    x = logits.movedim(1, class_dim)
    last = logits.movedim(1, -1)
    expected, stats = f(last, target, mask, shift=1, return_stats=True)
    for value in (class_dim, class_dim % 3, class_dim % 3 - 3):
        loss, ours = f(x, target, mask, shift=1, class_dim=value, return_stats=True)
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, stats, strict=True))
        assert torch.equal(mle.MaskedCrossEntropyLoss(class_dim=value)(x, target), f(last, target))
        only = mle.row_statistics(x, target, class_dim=value)
        assert torch.equal(only.entropy, mle.row_statistics(last, target).entropy)
    torch.testing.assert_close(
        mle.reference.masked_cross_entropy(x, target, mask, shift=1, class_dim=class_dim), expected
    )
    assert torch.equal(f(logits[0, :, 0], target[0, 0], class_dim=0), f(last[0, 0], target[0, 0]))


def test_adjacent_classes_are_not_copied():
    """channels_last: forward and backward take one gradient and no logits."""
    x = torch.randn(4, 64, 64, 512).permute(0, 3, 1, 2).requires_grad_()
    assert x.is_contiguous(memory_format=torch.channels_last)
    target, one = torch.randint(0, 512, (4, 64, 64)), x.numel() * 4

    def step(x):
        torch.autograd.grad(f(x, target, class_dim=1), x)

    step(x)
    assert one <= allocated_bytes(lambda: step(x)) < 1.02 * one
    x = x.detach().contiguous().requires_grad_()  # else one copy
    assert 2 * one <= allocated_bytes(lambda: step(x)) < 3.05 * one


def test_in_place_on_adjacent_classes():
    logits, target, mask = batch((2, V, 4, 5))
    expected = logits.clone().requires_grad_()
    f(expected, target, mask, class_dim=1).backward()
    for options in ({}, {"gradient_in_forward": True}):
        x = logits.to(memory_format=torch.channels_last).requires_grad_()
        memory = x.detach()
        f(x * 1, target, mask, class_dim=1, inplace_backward=True, **options).backward()
        torch.testing.assert_close(x.grad, expected.grad)
        y = memory.clone(memory_format=torch.preserve_format).requires_grad_()
        z = y.view_as(y)
        f(z, target, mask, class_dim=1, inplace_backward=True, **options).backward()
        torch.testing.assert_close(y.detach(), expected.grad)  # written over the logits


def test_class_dim_under_transforms():
    logits, target, mask = batch()

    def loss(x, y, m):
        return f(x, y, m, class_dim=0)

    apart = torch.stack([loss(*args) for args in zip(logits, target, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(logits, target, mask), apart)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        lambda x, y: f(x, y, class_dim=1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((B, V, S), (4, 9, 6)):
        x, y, _ = batch(shape)
        torch.testing.assert_close(compiled(x, y), f(x, y, class_dim=1))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- dimensions of size 1 ------------------------------------------------------------------------

TARGET = torch.tensor([[3, 0, -100, 6, 1]])
MASK = torch.tensor([[1, 1, 1, 0, 1]])
PER_SAMPLE = torch.tensor([[1.0], [0.0], [2.0]])
SEGMENTS = torch.tensor([[4, 4, 9, 9, 9]])
EXPANDED = [
    {"target": TARGET},
    {"mask": MASK},
    {"mask": PER_SAMPLE},
    {"mask": torch.ones(1, 1)},
    {"token_weight": torch.rand(1, S)},
    {"token_weight": PER_SAMPLE},
    {"segment_ids": SEGMENTS, "shift": 1},
    {"temperature": torch.tensor([[0.5], [1.0], [2.0]])},
    {"temperature": torch.linspace(0.5, 2, S)[None]},
    {"temperature": torch.tensor([[1.5]]), "mask": MASK},
    {"target": TARGET.to(torch.uint16), "ignore_index": 65436, "mask": MASK.to(torch.uint16)},
    {"target": TARGET, "mask": MASK, "token_weight": PER_SAMPLE, "segment_ids": SEGMENTS},
    {"target": TARGET, "mask": PER_SAMPLE, "reduction": "sequence_mean"},
    {"mask": MASK, "token_weight": PER_SAMPLE, "reduction": "weighted_mean", "shift": 2},
]


def expand(arguments):
    rows = ("target", "mask", "token_weight", "segment_ids", "temperature")
    return {n: v.expand(B, S) if n in rows else v for n, v in arguments.items()}


@pytest.mark.parametrize("arguments", EXPANDED, ids=lambda a: "-".join(a))
def test_dimensions_of_size_1(arguments):
    logits, target, _ = batch()
    x = logits.movedim(1, -1).contiguous().requires_grad_()
    given = {"target": target, **arguments}
    loss = f(x, **given)
    (grad,) = torch.autograd.grad(loss, x)
    expected = f(x, **expand(given))
    assert torch.equal(loss, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, x)[0])
    if not {"token_weight", "segment_ids", "reduction"} & set(given):
        ours, theirs = (mle.row_statistics(x, **g) for g in (given, expand(given)))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        fused = f(x, **given, gradient_in_forward=True)
        assert torch.equal(torch.autograd.grad(fused, x)[0], grad)


def test_the_gradient_of_a_weight_per_sample_is_its_sum():
    logits, target, _ = batch()
    x, weight = logits.movedim(1, -1), PER_SAMPLE.clone().requires_grad_()
    f(x, target, token_weight=weight, reduction="sum").backward()
    expected = f(x, target, reduction="none").sum(-1, keepdim=True)
    torch.testing.assert_close(weight.grad, expected)


def test_one_entry_for_a_batch_of_one_and_of_none():
    for rows in (1, 0):
        x = torch.randn(rows, S, V)
        assert torch.equal(f(x, TARGET, MASK), f(x, TARGET.expand(rows, S), MASK.expand(rows, S)))


def test_bad_labels_behind_a_mask_of_size_1_are_named():
    x = torch.zeros(B, S, V)
    with pytest.raises(IndexError, match=r"target at row \[0, 4\] .*got 99$"):
        f(x, torch.tensor([[1, 1, 1, 99, 99]]), torch.tensor([[1, 1, 1, 0, 1]]))


def test_dimensions_of_size_1_take_no_memory_of_logits():
    x = torch.randn(1, 64, 4096).expand(64, 64, 4096)
    target = torch.zeros(1, 64, dtype=torch.long)
    assert allocated_bytes(lambda: f(x, target, torch.ones(1, 64))) < 1 << 18


def test_dimensions_of_size_1_under_transforms():
    logits, target, _ = batch()
    x = logits.movedim(1, -1).contiguous()
    torch.testing.assert_close(
        torch.func.grad(f)(x, TARGET, MASK),
        torch.func.grad(f)(x, *(t.expand(B, S) for t in (TARGET, MASK))),
    )
    many = x.expand(4, B, S, V)
    together = torch.vmap(f, (0, None, None))(many, TARGET, MASK)
    torch.testing.assert_close(together, f(x, TARGET, MASK).expand(4))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 4, 6):
        x = torch.randn(n, S, V)
        torch.testing.assert_close(compiled(x, TARGET, MASK), f(x, TARGET, MASK))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_dimensions_of_size_1_are_expanded_in_what_is_traced():
    """The graphs of make_fx and export hold the operator, which takes no dimension of size 1."""
    x = torch.randn(B, S, V)
    traced = make_fx(lambda x, y, m: f(x, y, m), tracing_mode="symbolic")(x, TARGET, MASK)
    torch.testing.assert_close(traced(x, TARGET, MASK), f(x, TARGET, MASK))

    class Step(torch.nn.Module):
        def forward(self, x, target, mask):
            return f(x, target, mask)

    for strict in (False, True):
        program = torch.export.export(Step(), (x, TARGET, MASK), strict=strict)
        torch.testing.assert_close(program.module()(x, TARGET, MASK), f(x, TARGET, MASK))


def test_rows_that_data_choose_still_compile():
    """Sizes that only the data know: they may not be compared with 1."""
    torch._dynamo.reset()

    def step(x, y, on):
        return f(x[on.nonzero().squeeze(1)], y[on.nonzero().squeeze(1)])

    x, y, on = torch.randn(9, V), torch.randint(0, V, (9,)), torch.arange(9) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y, on), f(x, y, on))
    torch._dynamo.reset()


# --- unsigned labels -----------------------------------------------------------------------------

UNSIGNED = [(torch.uint16, 65436), (torch.uint32, 2**32 - 100), (torch.uint8, 156)]  # of -100


@pytest.mark.parametrize("dtype,ignored", UNSIGNED, ids=str)
def test_unsigned_labels(dtype, ignored):
    logits, target, mask = batch()
    x = logits.movedim(1, -1).contiguous().requires_grad_()
    small = target.to(dtype)
    assert (small.long() == ignored).any()
    ids = torch.tensor([[4, 4, 9, 9, 9]], dtype=dtype)
    for options in ({}, {"shift": 1, "segment_ids": ids}, {"reduction": "none"}):
        wide = {n: v.long() if n == "segment_ids" else v for n, v in options.items()}
        loss = f(x, small, mask, ignore_index=ignored, **options)
        expected = f(x, target, mask, **wide)
        assert torch.equal(loss, expected)
        (ours,) = torch.autograd.grad(loss.sum(), x)
        (theirs,) = torch.autograd.grad(expected.sum(), x)
        assert torch.equal(ours, theirs)
    with pytest.raises(IndexError, match=f"got {ignored}$"):  # -100 is not among them
        f(x, small)
    ours = mle.row_statistics(x, small, mask, ignore_index=ignored)
    assert torch.equal(ours.log_prob, mle.row_statistics(x, target, mask).log_prob)
    module = mle.MaskedCrossEntropyLoss(ignore_index=ignored)
    assert torch.equal(module(x, small, mask), f(x, target, mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype,ignored", UNSIGNED[:2], ids=str)
def test_unsigned_labels_compiled(dtype, ignored, backend):
    torch._dynamo.reset()
    logits, target, mask = batch()
    x = logits.movedim(1, -1).contiguous()
    compiled = torch.compile(
        lambda x, y, m: f(x, y, m, ignore_index=ignored), fullgraph=True, backend=backend
    )
    torch.testing.assert_close(compiled(x, target.to(dtype), mask), f(x, target, mask))
    torch._dynamo.reset()
