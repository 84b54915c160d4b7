# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of both forms: that of one number, whose gradients are made with it, and that of any
incoming gradients, whose backward makes the logits again."""

import weakref

import pytest
import torch
from accuracy import assert_same_bits
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import masked_loss_ext as mle
from masked_loss_ext import reference

TARGET = torch.tensor([[1, 4, -100, 0, 3], [2, 2, 0, 77, 4]])
MASK = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 0, 1]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]])
CLASS_WEIGHT = torch.tensor([1.0, 0.5, 2, 0, 1.5], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class_weight": {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.3, "reduction": "none"},
    "segments": {"shift": 1, "segment_ids": SEGMENTS},
    "normalizer": {"normalizer": 3.5},
    "temperatures": {"temperature": torch.linspace(0.5, 2, 10).reshape(2, 5)},
    "sequence_mean": {"reduction": "sequence_mean"},
    "weighted_mean": {"reduction": "weighted_mean"},
    "everything": {
        "label_smoothing": 0.1,
        "class_weight": CLASS_WEIGHT,
        "temperature": 0.7,
        "softcap": 3.0,
        "z_loss": 0.05,
        "focal_gamma": 1.5,
        "shift": 1,
        "segment_ids": SEGMENTS,
    },
}
ONCE = "masked_linear_cross_entropy: there is one backward of a mean or a sum"
every_option = pytest.mark.parametrize("name", OPTIONS)


def leaves(dtype=torch.float64):
    """hidden, weight, bias, token_weight."""
    g = torch.Generator().manual_seed(3)
    shapes = ((2, 5, 3), (5, 3), (5,), (2, 5))
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[3] = tensors[3].abs() + 0.5
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)


def test_a_single_token_and_its_weight():
    """Hidden states [D]: all that is per row is a number, and so is the gradient of its weight."""
    hidden, head = torch.tensor([1.0, 2.0]), torch.eye(2)
    weight = torch.tensor(0.5, requires_grad=True)
    target = torch.tensor(1)
    loss = mle.masked_linear_cross_entropy(hidden, head, target, token_weight=weight)
    (3 * loss).backward()
    expected = 3 * torch.nn.functional.cross_entropy(hidden, target)
    torch.testing.assert_close(weight.grad, expected)


def loss_of(module=mle, name="plain", **more):
    def loss(h, w, b=None, t=None):
        options = {**OPTIONS[name], **more}
        if name == "weighted_mean" and t is None:
            t = torch.ones(2, 5, dtype=h.dtype)
        if "class_weight" in options:
            options["class_weight"] = options["class_weight"].to(h.dtype)
        if module is mle:
            options["chunk_rows"] = 3
        return module.masked_linear_cross_entropy(
            h, w, TARGET, MASK, bias=b, token_weight=t, **options
        )

    return loss


def outputs_of(module=mle, name="plain"):
    def outputs(h, w, b=None, t=None):
        loss, stats = loss_of(module, name, return_stats=True)(h, w, b, t)
        return loss, *stats[:3]

    return outputs


# --- first and second derivatives ----------------------------------------------------------------


@every_option
def test_first_derivatives(name):
    assert gradcheck(outputs_of(name=name), leaves())
    assert gradcheck(outputs_of(name=name), leaves()[:2])


@every_option
def test_first_derivatives_of_the_loss_alone(name):
    """Where that is one number gradcheck, which asks twice, has no say."""
    for count in (2, 3, 4):
        found = []
        for module in (mle, reference):
            x = leaves()[:count]
            loss = loss_of(module, name)(*x)
            g = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            found.append(torch.autograd.grad(loss, x, g))
        torch.testing.assert_close(*found)


@every_option
def test_second_derivatives(name):
    assert gradgradcheck(loss_of(name=name), leaves(), fast_mode=True)
    assert gradgradcheck(outputs_of(name=name), leaves(), fast_mode=True)


@pytest.mark.parametrize("which", ["lse", "entropy", "log_prob"])
@pytest.mark.parametrize("labelled", [False, True])
def test_derivatives_of_each_statistic(which, labelled):
    def statistic(h, w, b):
        target = TARGET if labelled else None
        stats = mle.linear_row_statistics(h, w, target, MASK, bias=b, softcap=2.5, chunk_rows=2)
        return getattr(stats, which)

    if which == "log_prob" and not labelled:
        assert statistic(*leaves()[:3]) is None
        return
    assert gradcheck(statistic, leaves()[:3])
    assert gradgradcheck(statistic, leaves()[:3], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "none", "everything"])
def test_second_derivatives_agree_with_the_reference(name, dtype):
    found = []
    for module in (mle, reference):
        x = leaves(dtype)
        loss = loss_of(module, name)(*x).sum()
        grads = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in grads), x))
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*found, **tolerance)


def test_a_second_derivative_with_poison():
    off = ~((MASK != 0) & (TARGET != -100))
    found = []
    for fill in (0.0, float("nan")):
        h, w, b, t = leaves()
        h = h.detach().masked_fill(off.unsqueeze(-1), fill).requires_grad_()
        (grad,) = torch.autograd.grad(loss_of()(h, w, b, t), w, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (h, w, b, t)))
    for clean, bad in zip(*found, strict=True):
        assert_same_bits(bad, clean)


# --- how often -----------------------------------------------------------------------------------

HOOKS = {
    "none": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "wrapped": lambda: saved_tensors_hooks(lambda t: (t,), lambda t: t[0]),
    "copied": lambda: saved_tensors_hooks(torch.clone, lambda t: t),
    "save_on_cpu": save_on_cpu,
}


@pytest.mark.parametrize("name", ["none", "class_weight", "sequence_mean"])
def test_the_recomputing_form_has_any_number_of_backwards(name):
    x = leaves(torch.float32)
    loss = loss_of(name=name)(*x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, x, retain_graph=True), first, strict=True):
            assert_same_bits(a, b)
    torch.autograd.grad(loss, x)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("hooks", [None, *HOOKS])
@pytest.mark.parametrize("name", ["plain", "sum", "everything"])
def test_the_second_backward_of_one_number_is_a_sentence(name, hooks, retain_graph):
    x = leaves(torch.float32)
    if hooks is None:
        loss = loss_of(name=name)(*x)
    else:
        with HOOKS[hooks]():
            loss = loss_of(name=name)(*x)
    loss.backward(retain_graph=retain_graph)
    expected = torch.autograd.grad(loss_of(reference, name)(*x), x)
    for leaf, gradient in zip(x, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)
    kept = [leaf.grad.clone() for leaf in x]
    for second in (loss.backward, lambda: torch.autograd.grad(2 * loss, x)):
        with pytest.raises(RuntimeError, match=ONCE):
            second()
    for leaf, gradient in zip(x, kept, strict=True):
        assert_same_bits(leaf.grad, gradient)


def test_create_graph_leaves_the_gradients_where_they_are():
    """A second derivative goes by plain PyTorch, as often as wanted, before the one backward."""
    x = leaves()
    loss = loss_of()(*x)
    for _ in range(2):
        grads = torch.autograd.grad(loss, x, create_graph=True)
        assert all(g.requires_grad for g in grads)
    plain = torch.autograd.grad(loss, x)
    torch.testing.assert_close(plain, tuple(g.detach() for g in grads))


def test_accumulation_into_grad():
    x = leaves(torch.float32)
    for _ in range(3):
        loss_of()(*x).backward()
    once = torch.autograd.grad(loss_of()(*x), x)
    for leaf, gradient in zip(x, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, float("inf")])
def test_what_comes_in(factor):
    """A factor of infinity makes no NaN of what did not count."""
    x = leaves(torch.float32)
    grads = torch.autograd.grad(loss_of()(*x) * factor, x)
    expected = torch.autograd.grad(loss_of()(*x), x)
    for gradient, one in zip(grads, expected, strict=True):
        torch.testing.assert_close(gradient, torch.where(one == 0, 0, one * factor))


# --- which ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", ["plain", "none", "everything"])
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_what_needs_a_gradient(name, wanted, statistics):
    """Each combination of frozen trunk, frozen head, frozen bias, constant weights."""
    function = loss_of(name=name)
    if statistics:

        def function(*x):
            loss, lse, entropy, log_prob = outputs_of(name=name)(*x)
            return loss.sum() + (lse * entropy).sum() + log_prob.sum()

    every = leaves(torch.float32)
    expected = torch.autograd.grad(function(*every).sum(), every)
    some = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(every)]
    loss = function(*some).sum()
    found = torch.autograd.grad(loss, [x for x in some if x.requires_grad])
    chosen = [g for x, g in zip(some, expected, strict=True) if x.requires_grad]
    for a, b in zip(found, chosen, strict=True):
        assert_same_bits(a, b)


def test_nothing_is_made_for_a_frozen_part():
    """Neither gradient nor memory of the head's size where the head is frozen."""
    h = torch.randn(4, 16, requires_grad=True)
    w, target = torch.randn(5000, 16), torch.randint(0, 5000, (4,))
    sweep = torch.ops.masked_loss_ext._linear_cross_entropy_sweep
    needs = {"needs_linear_weight": False, "needs_bias": False, "needs_token_weight": False}
    _, grad_h, grad_w, grad_b, grad_t = sweep(h.detach(), w, None, target, **needs)
    assert grad_h.shape == h.shape and grad_w.numel() == grad_b.numel() == grad_t.numel() == 0
    loss = mle.masked_linear_cross_entropy(h, w, target)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], grad_h)


def test_without_gradients():
    h, w, b, t = leaves(torch.float32)
    with torch.no_grad():
        loss = loss_of()(h, w, b, t)
        stats = mle.linear_row_statistics(h, w, TARGET, MASK)
    assert not loss.requires_grad and not any(s.requires_grad for s in stats)
    with torch.inference_mode():
        again = loss_of()(h, w, b, t)
        assert torch.equal(again, loss)
        assert torch.equal(mle.linear_row_statistics(h, w, TARGET, MASK).lse, stats.lse)
    assert torch.equal(loss_of()(*(x.detach() for x in (h, w, b, t))), loss)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        h, w = torch.randn(2, 5, 3), torch.randn(5, 3)
    target = TARGET.clamp(0, 4)
    assert torch.equal(
        mle.masked_linear_cross_entropy(h, w, target),
        mle.masked_linear_cross_entropy(h.clone(), w.clone(), target),
    )
    trained = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        mle.masked_linear_cross_entropy(h, trained, target)


def test_outputs_that_are_not_differentiable():
    h, w, b, t = leaves()
    _, stats = loss_of(return_stats=True)(h, w, b, t)
    assert not stats.hit.requires_grad
    assert all(getattr(stats, name).requires_grad for name in ("lse", "entropy", "log_prob"))
    (grad,) = torch.autograd.grad(stats.lse.sum(), t, allow_unused=True)
    assert grad is None or not grad.any()


def test_a_head_tied_to_what_made_the_hidden_states():
    """The head's weight is the embedding: one leaf by two ways."""
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (mle, reference):
        hidden = torch.tanh(table[TARGET.clamp(0, 4)])
        loss = module.masked_linear_cross_entropy(hidden, table, TARGET, MASK)
        found.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*found)


# --- around a training step ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "sum", "none", "everything"])
def test_gradients_in_a_batch(name):
    x = leaves()
    loss = loss_of(name=name)(*x)
    ones = torch.ones_like(loss)
    upstream = torch.stack([ones, -3 * ones, 0 * ones])
    for _ in range(2):
        found = torch.autograd.grad(loss, x, upstream, is_grads_batched=True, retain_graph=True)
        expected = torch.autograd.grad(loss_of(reference, name)(*x).sum(), x)
        for batch, one in zip(found, expected, strict=True):
            torch.testing.assert_close(batch, torch.stack([one, -3 * one, 0 * one]))


@pytest.mark.parametrize("argument", ["hidden", "weight", "bias", "target", "token_weight"])
def test_the_recomputing_backward_refuses_inputs_that_were_changed(argument):
    h, w, b, t = (x.detach().clone() for x in leaves())
    h.requires_grad_()
    given = {"hidden": h * 1, "weight": w, "bias": b, "target": TARGET.clone(), "token_weight": t}
    loss = mle.masked_linear_cross_entropy(**given, mask=MASK, reduction="none").sum()
    with torch.no_grad():
        given[argument].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compiled_forward", [False, True])
@pytest.mark.parametrize("name", ["plain", "none", "everything"])
def test_compiled_autograd(name, compiled_forward):
    torch._dynamo.reset()
    function = loss_of(name=name)
    x = leaves()
    expected = torch.autograd.grad(function(*x).sum(), x)
    call = torch.compile(function, backend="aot_eager") if compiled_forward else function
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = leaves()
        with torch._dynamo.compiled_autograd._enable(compiler):
            call(*x).sum().backward()
        torch.testing.assert_close(tuple(leaf.grad for leaf in x), expected)
    torch._dynamo.reset()


# --- nothing there -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "weighted_mean"])
def test_empty_batches(rows, reduction):
    h = torch.randn(*rows, 3, requires_grad=True)
    w, b = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    t = torch.rand(rows, requires_grad=True)
    loss, stats = mle.masked_linear_cross_entropy(
        h, w, torch.zeros(rows, dtype=torch.long), bias=b, token_weight=t, reduction=reduction,
        return_stats=True,
    )  # fmt: skip
    assert loss.shape == (rows if reduction == "none" else ()) and not loss.any()
    assert loss.requires_grad and stats.lse.shape == rows
    alone = mle.masked_linear_cross_entropy(
        h, w, torch.zeros(rows, dtype=torch.long), bias=b, token_weight=t, reduction=reduction
    )
    for one in (loss, alone):
        grads = torch.autograd.grad(one.sum() * 3, (h, w, b, t))
        assert all(g.shape == x.shape for g, x in zip(grads, (h, w, b, t), strict=True))
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(reduction):
    h, w, b, t = leaves()
    loss = mle.masked_linear_cross_entropy(
        h * float("nan"), w, TARGET, MASK * 0, bias=b, token_weight=t, reduction=reduction
    )
    assert loss.requires_grad and not loss.any()
    grads = torch.autograd.grad(loss.sum(), (w, b, t))
    assert not any(g.any() for g in grads)


def test_hidden_states_do_not_outlive_the_backward():
    """Though the loss does: what second derivatives need is autograd's to let go of."""
    leaf = torch.randn(4, 3, requires_grad=True)
    hidden = leaf * 1
    kept = weakref.ref(hidden)
    loss = mle.masked_linear_cross_entropy(hidden, torch.randn(5, 3), torch.tensor([0, 1, 2, 3]))
    del hidden
    assert kept() is not None
    loss.backward()
    assert kept() is None
