# SPDX-License-Identifier: BSD-3-Clause
"""Saved tensors that come back with other strides, gradients that come in expanded, what has no
elements and lengths beyond the row: read right, or refused. Cross entropy and its terms."""

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

saved_hooks = torch.autograd.graph.saved_tensors_hooks


def transposed(x):
    """The same values, first dimension fastest."""
    if x.dim() < 2:
        return torch.stack([x, x], -1)[..., 0]
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def spread(x):
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def constant(x):
    """What is all one number comes back as that number, expanded."""
    flat = x.reshape(-1)
    if flat.numel() > 0 and bool((flat == flat[0]).all()):
        return flat[0].clone().expand(x.shape)
    return x


REPACK = {"transposed": transposed, "spread": spread, "constant": constant}
every_packing = pytest.mark.parametrize("repack", REPACK.values(), ids=REPACK)


def cross_entropy(x, y, w):
    loss, s = mle.masked_cross_entropy(
        x, y, weight=w, label_smoothing=0.1, focal_gamma=1.0, reduction="none", return_stats=True
    )
    return loss.sum() + (s.entropy * s.log_prob).sum() + s.lse.square().sum()


def plain_mean(x, y, w):
    return mle.masked_cross_entropy(x, y, token_weight=torch.ones(y.shape))


def statistics(x, y, w):
    s = mle.row_statistics(x)
    return s.lse.sum() + s.entropy.sum()


def terms(x, y, w):
    t = cross_entropy_terms(x, y, temperature=0.8, classes=y[..., None].expand(*y.shape, 3))
    return sum(term.sum() for term in t if term is not None)


FUNCTIONS = (cross_entropy, plain_mean, statistics, terms)
every_function = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)


def rows(kind):
    torch.manual_seed(3)
    y = torch.randint(8, (40, 50))
    if kind == "equal":  # what the forward saves of all of them is one number
        return torch.arange(8.0).repeat(40, 50, 1), torch.full_like(y, 3)
    return torch.randn(40, 50, 8), y


@every_function
@every_packing
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_saved_tensors_come_back_in_another_way(f, repack, kind):
    x, y = rows(kind)
    w = torch.rand(8) + 0.5
    (expected,) = torch.autograd.grad(f(leaf := x.clone().requires_grad_(), y, w), leaf)
    with saved_hooks(lambda t: t, repack):
        loss = f(leaf := x.clone().requires_grad_(), y, w)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)


@every_packing
def test_class_weights_that_come_back_in_another_way(repack):
    x, y = rows("random")
    grads = []
    for how in (lambda t: t, repack):
        leaf = x.clone().requires_grad_()
        with saved_hooks(lambda t: t, how):
            loss = mle.masked_cross_entropy(leaf, y, weight=torch.full((8,), 2.0))
        grads += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@every_function
def test_gradients_that_come_in_expanded(f):
    """A sum hands a number over in the shape of what was summed."""
    x, y = rows("random")
    leaf = x.clone().requires_grad_()
    loss, s = mle.masked_cross_entropy(leaf, y, reduction="none", return_stats=True)
    t = cross_entropy_terms(leaf, y, classes=y[..., None])
    results = (loss, s.lse, s.entropy, s.log_prob, t.log_prob, t.class_log_prob)
    for result in results:
        ones = torch.ones_like(result)
        (expected,) = torch.autograd.grad(result, leaf, ones, retain_graph=True)
        one = torch.ones(()).expand(result.shape)
        (grad,) = torch.autograd.grad(result, leaf, one, retain_graph=True)
        assert grad.equal(expected)
        other = transposed(ones)
        (grad,) = torch.autograd.grad(result, leaf, other, retain_graph=True)
        assert grad.equal(expected)


def test_saved_tensors_of_another_size_are_refused():
    x, y = rows("random")

    def cut(t):
        return t[:3] if t.dim() == 2 and t.is_floating_point() else t

    with saved_hooks(lambda t: t, cut):
        loss = mle.masked_cross_entropy(leaf := x.requires_grad_(), y, reduction="none")
    with pytest.raises(ValueError, match=r"log_prob must have the shape of logits \[40, 50, 8\]"):
        torch.autograd.grad(loss.sum(), leaf)


# --- no elements, and lengths beyond the row --------------------------------------------------

backward = torch.ops.masked_loss_ext._masked_cross_entropy_backward
op = torch.ops.masked_loss_ext.masked_cross_entropy


@pytest.mark.parametrize("shape", [(0, 10, 4), (3, 10, 0), (0, 10, 0)])
def test_an_empty_batch_with_its_classes_moved_last(shape):
    """Strides of what has no elements say nothing."""
    x = torch.randn(shape).movedim(1, -1)
    y = torch.empty(shape[0], shape[2], dtype=torch.long)
    for reduction, result in (("mean", ()), ("sum", ()), ("none", y.shape)):
        loss, *rest = op(x, y, reduction=reduction, statistics=True)
        assert loss.shape == result and not loss.any()
        assert rest[0].shape == y.shape
    assert torch.ops.masked_loss_ext.cross_entropy_terms(x, y)[0].shape == y.shape
    for inplace in (False, True):
        sweep = f"_masked_cross_entropy_sweep{'_' * inplace}"
        loss = getattr(torch.ops.masked_loss_ext, sweep)(x, y)
        assert (loss if inplace else loss[0]).item() == 0


SHIFTS = (4, 5, 2**31, 2**48, 2**63 - 4, 2**63 - 1)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_shift_beyond_the_row_scores_nothing(shift, masked):
    x, y = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)
    options = {
        "mask": torch.ones(2, 4) if masked else None,
        "segment_ids": torch.zeros(2, 4, dtype=torch.long) if masked else None,
        "token_weight": torch.ones(2, 4, requires_grad=True),
    }
    for reduction in ("mean", "sum", "none"):
        leaf = x.clone().requires_grad_()
        for inplace in (False, True):
            loss = mle.masked_cross_entropy(
                leaf, y, shift=shift, reduction=reduction, inplace_backward=inplace, **options
            )
            assert not loss.any() and loss.requires_grad
            leaves = (leaf, options["token_weight"])
            assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))
            leaf = x.clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    loss = mle.masked_cross_entropy(leaf, y, shift=shift, gradient_in_forward=True)
    assert loss.item() == 0 and not torch.autograd.grad(loss, leaf)[0].any()


@pytest.mark.parametrize("ignored", [-(2**63), 2**63 - 1, 2**40])
def test_any_integer_may_be_ignored(ignored):
    x, y = torch.randn(3, 5), torch.tensor([1, ignored, ignored])
    expected = mle.masked_cross_entropy(x[:1], y[:1])
    assert mle.masked_cross_entropy(x, y, ignore_index=ignored).equal(expected)
    terms = cross_entropy_terms(x, y, ignore_index=ignored)
    assert (terms.log_prob != 0).tolist() == [True, False, False]
    for label in (-(2**63), 2**63 - 1):
        if label != ignored:
            with pytest.raises(IndexError, match="target at row"):
                mle.masked_cross_entropy(x, torch.tensor([0, label, 0]), ignore_index=ignored)


def test_classes_asked_for_may_be_any_integer():
    x, y = torch.randn(1, 5), torch.tensor([1])
    smallest = torch.tensor([[-(2**63)]])
    assert cross_entropy_terms(x, y, classes=smallest).class_log_prob.item() == 0
    with pytest.raises(IndexError, match="classes at row"):
        cross_entropy_terms(x, y, classes=torch.tensor([[2**63 - 1]]))


def test_links_may_be_any_integer():
    """The walk goes backwards and stays inside the sequence."""
    x, y = torch.randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    ends = torch.tensor([[-(2**31), 2**31 - 1, 2**31 - 1, -1]], dtype=torch.int32)
    terms = cross_entropy_terms(x, y, links=(ends, torch.full_like(ends, 2**31 - 1)))
    assert not terms.candidates.any() and not terms.unlikelihood.any()
