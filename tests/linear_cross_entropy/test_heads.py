# SPDX-License-Identifier: BSD-3-Clause
"""MultiTokenPredictionLoss of hidden states and heads: by hand, as with logits, what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import masked_loss_ext as mle

Loss = mle.MultiTokenPredictionLoss
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
B, S, D, V = 3, 7, 5, 11


def batch(dtype=torch.float64, n=4):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, D, generator=g).to(dtype).requires_grad_()
    heads = []
    for i in range(n):
        head = torch.nn.Linear(D, V, bias=i % 2 == 0, dtype=dtype)
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g).to(dtype)
        heads.append(head)
    labels = torch.randint(V, (B, S), generator=g)
    return hidden, heads, labels, mle.lengths_to_mask([7, 4, 1], S)


def parameters(heads):
    return [parameter for head in heads for parameter in head.parameters()]


# --- numbers worked out by hand ------------------------------------------------------------------


def test_by_hand():
    """Logits of head 1 are (h ln 3, 0), of head 2 their negative: p of class 0 is 1/2, 3/4 and 1/4
    for h = 0, 1 and -1."""
    hidden = torch.tensor([[[0.0], [1.0], [-1.0]]], requires_grad=True)
    one, two = torch.tensor([[LN3], [0.0]]), torch.tensor([[-LN3], [0.0]])
    total, parts = Loss(2, (3.0, 1.0))(hidden, torch.tensor([[0, 1, 0]]), heads=[one, two])
    first, second = (LN2 + math.log(4 / 3)) / 2, LN2  # 1/2 for label 1, 3/4 for label 0; 1/2
    torch.testing.assert_close(parts["loss_t1"], torch.tensor(first))
    torch.testing.assert_close(parts["loss_t2"], torch.tensor(second))
    torch.testing.assert_close(total, torch.tensor(0.75 * first + 0.25 * second))
    total.backward()
    # of head 1: 0.75 / 2 ln 3 (p_0 - [label 0]); of head 2: -0.25 ln 3 (p_0 - 1)
    at_0 = 0.375 * LN3 * 0.5 - 0.25 * LN3 * (0.5 - 1)
    expected = torch.tensor([[[at_0], [0.375 * LN3 * (0.75 - 1)], [0.0]]])
    torch.testing.assert_close(hidden.grad, expected)


# --- as with logits ------------------------------------------------------------------------------

CALLS = {
    "plain": ({}, {}),
    "packed": ({}, {"segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * B)}),
    "sources": ({"mask_sources": True, "ignore_index": 3}, {}),
    "renormalized": ({"renormalize_empty_heads": True}, {}),
    "one normalizer": ({}, {"normalizer": 9}),
    "normalizers": (
        {"renormalize_empty_heads": True},
        {"normalizer": torch.tensor([9, 8, 7, 0])},
    ),
}


@pytest.mark.parametrize("options,keywords", CALLS.values(), ids=CALLS)
def test_equals_the_loss_of_logits_and_its_gradient(options, keywords):
    hidden, heads, labels, mask = batch()
    loss_fn, leaves = Loss(**options), [hidden, *parameters(heads)]
    logits = [head(hidden) for head in heads]
    theirs, their_parts = loss_fn(logits, labels, mask, **keywords)
    ours, parts = loss_fn(hidden, labels, mask, heads=heads, **keywords)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(parts, their_parts)
    assert list(parts) == list(their_parts)
    found = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves))


def test_heads_in_every_form():
    hidden, heads, labels, mask = batch()
    heads[3] = heads[1]  # the same once more
    expected = Loss()(hidden, labels, mask, heads=heads)[0]
    forms = [
        torch.nn.ModuleList(heads),
        tuple(heads),
        [(head.weight, head.bias) for head in heads],
        [heads[0], heads[1].weight, [heads[2].weight, heads[2].bias], (heads[1].weight, None)],
    ]
    for form in forms:
        assert torch.equal(Loss()(hidden, labels, mask, heads=form)[0], expected)


def test_one_head_over_hidden_states_of_several_modules():
    hidden, heads, labels, mask = batch()
    states = [(hidden.detach() * scale).requires_grad_() for scale in (1, 2, 3, 4)]
    ours = Loss()(states, labels, mask, heads=[heads[0]] * 4)[0]
    theirs = Loss()([heads[0](one) for one in states], labels, mask)[0]
    torch.testing.assert_close(ours, theirs)
    leaves = [*states, heads[0].weight]
    found = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves))


def test_num_valid_changes_nothing_but_must_be_right():
    hidden, heads, labels, mask = batch()
    expected = Loss()(hidden, labels, mask, heads=heads)[0]
    most = int(Loss().count_targets(labels, mask).max())
    for num_valid in (most, B * S):
        found = Loss()(hidden, labels, mask, heads=heads, num_valid=num_valid)[0]
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="num_valid must be at least"):
        Loss()(hidden, labels, mask, heads=heads, num_valid=most - 1)


def test_hidden_states_without_a_target_are_not_read():
    hidden, heads, labels, mask = batch()
    poisoned = hidden.detach().clone()
    poisoned[:, -1] = math.nan  # nobody's target follows
    poisoned[1, 3:], poisoned[2] = math.nan, math.inf
    poisoned.requires_grad_()
    for one in (hidden, poisoned):
        Loss()(one, labels.masked_fill(mask == 0, 2**31), mask, heads=heads)[0].backward()
    assert torch.equal(hidden.grad, poisoned.grad) and (hidden.grad[2] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in parameters(heads))


def test_frozen_heads_and_a_frozen_trunk():
    hidden, heads, labels, mask = batch()
    for parameter in parameters(heads[1:]):
        parameter.requires_grad_(False)
    Loss()(hidden, labels, mask, heads=heads)[0].backward()
    assert hidden.grad is not None and heads[0].weight.grad is not None
    assert all(parameter.grad is None for parameter in parameters(heads[1:]))
    trunk = hidden.detach()
    heads[0].zero_grad()
    Loss()(trunk, labels, mask, heads=heads)[0].backward()
    assert trunk.grad is None and (heads[0].weight.grad != 0).any()


def test_mixed_dtypes_and_autocast():
    hidden, heads, labels, mask = batch(torch.float32)
    expected = Loss()(hidden, labels, mask, heads=heads)[0]
    half = Loss()(hidden.bfloat16(), labels, mask, heads=heads)[0]  # float32 heads
    with torch.autocast("cpu", torch.bfloat16):
        autocast = Loss()(hidden, labels, mask, heads=heads)[0]
    for loss in (half, autocast):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_compiled_with_one_graph():
    torch._dynamo.reset()
    counters.clear()
    loss_fn = Loss(2, (2.0, 1.0), mask_sources=True)
    _, heads, _, _ = batch(torch.float32, 2)

    def step(hidden, labels, mask):
        return loss_fn(hidden, labels, mask, heads=heads)[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((3, 7), (5, 9)):
        hidden = torch.randn(rows, length, D, requires_grad=True)
        arguments = hidden, torch.randint(V, (rows, length)), torch.rand(rows, length) < 0.8
        leaves = [hidden, *parameters(heads)]
        ours, theirs = compiled(*arguments), step(*arguments)
        torch.testing.assert_close(ours, theirs)
        found = torch.autograd.grad(ours, leaves)
        torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- bad input -----------------------------------------------------------------------------------


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    head = torch.nn.Linear(D, V)
    head.register_forward_hook(lambda *_: None)
    return head


def replaced():
    head = torch.nn.Linear(D, V)
    head.forward = lambda x: x
    return head


HEAD, H, Y = torch.zeros(V, D), torch.zeros(2, 3, D), torch.zeros(2, 3, dtype=torch.int64)
X = torch.zeros(2, 3, V)
A_HEAD = "heads[1] must be a torch.nn.Linear, a weight [V, D] or (weight, bias), got "
CASES = {
    "no list": (H, HEAD, TypeError, "heads must be a list of classifiers, got Tensor"),
    "too few": (H, [HEAD], ValueError, "heads must have one classifier per head, n_pred_tokens 2"),
    "no head": (H, [HEAD, None], TypeError, A_HEAD + "NoneType"),
    "another module": (H, [HEAD, torch.nn.Bilinear(D, D, V)], TypeError, A_HEAD + "Bilinear"),
    "a subclass": (H, [HEAD, Scaled(D, V)], TypeError, A_HEAD + "Scaled with a forward of its own"),
    "a forward": (H, [HEAD, replaced()], TypeError, A_HEAD + "Linear with a forward of its own"),
    "three": (H, [HEAD, (HEAD, None, None)], TypeError, A_HEAD + "tuple"),
    "hooks": (H, [HEAD, hooked()], ValueError, "heads[1] must have no forward hooks: it is not"),
    "width": (H, [HEAD, HEAD[:, :2]], ValueError, "heads[1] weight must be [V, D] with at least "),
    "bias": (H, [HEAD, (HEAD, HEAD)], ValueError, "heads[1] bias must have one entry per class"),
    "integers": (H, [HEAD.long(), HEAD], ValueError, "heads[0] weight must be a floating tensor"),
    "device": (H, [HEAD.to("meta"), HEAD], ValueError, "heads[0] weight must be on the device of"),
    "logits": (X, [HEAD, HEAD], ValueError, "the D of hidden [2, 3, 11], got [11, 5]"),
    "states": ([H], [HEAD, HEAD], ValueError, "hidden must have one tensor per head, n_pred_tok"),
    "rank": (H[0], [HEAD, HEAD], ValueError, "hidden must have 3 dimensions [B, S, D], got [3, 5]"),
    "rows": ([H, H[:1]], [HEAD, HEAD], ValueError, "hidden[1] must have the B and S of labels"),
    "none": (None, [HEAD, HEAD], TypeError, "hidden must be a list of tensors, got NoneType"),
}


@pytest.mark.parametrize("hidden,heads,kind,text", CASES.values(), ids=CASES)
def test_bad_arguments(hidden, heads, kind, text):
    with pytest.raises(kind) as caught:
        Loss(2, (1.0, 1.0))(hidden, Y, heads=heads)
    message = str(caught.value)
    assert message.startswith("MultiTokenPredictionLoss: ") and text in message


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="inplace_backward must be False with heads"):
        Loss(2, (1.0, 1.0), inplace_backward=True)(H, Y, heads=[HEAD, HEAD])
    with pytest.raises(ValueError, match="num_valid must be None without heads, got 6"):
        Loss(2, (1.0, 1.0))([X, X], Y, num_valid=6)
    with pytest.raises(TypeError, match=r"got Tensor \(hidden states\? Then give heads\)"):
        Loss(2, (1.0, 1.0))(H, Y)


def test_a_second_backward_is_refused():
    hidden, heads, labels, mask = batch()
    total = Loss()(hidden, labels, mask, heads=heads)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward of a mean or a sum"):
        total.backward()


def test_the_linear_layer_of_a_weight_equals_the_weight():
    """Of a parametrised layer the weight that it makes is read."""
    hidden, heads, labels, mask = batch(n=1)
    loss_fn = Loss(1, (1.0,))
    head = torch.nn.utils.parametrizations.weight_norm(heads[0])
    ours = loss_fn(hidden, labels, mask, heads=[head])[0]
    theirs = loss_fn([F.linear(hidden, head.weight, head.bias)], labels, mask)[0]
    torch.testing.assert_close(ours, theirs)
    (found,) = torch.autograd.grad(ours, head.parametrizations.weight.original0)
    assert (found != 0).any()
