# SPDX-License-Identifier: BSD-3-Clause
"""MultiTokenPredictionLoss of hidden states: by hand, against PyTorch, what memory it makes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from masked_loss_ext.unified import MultiTokenPredictionLoss as Loss

LN2, LN3 = math.log(2), math.log(3)
B, S, H, V = 3, 6, 4, 7


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, S), generator=g)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    return hidden, targets, mask


def by_torch(loss_fn, hidden, targets, mask, sources=None):
    """Every head by F.cross_entropy; 0 for one without a target."""
    labels = targets.masked_fill(mask == 0, -100)
    normal, losses = loss_fn.layer_norm(hidden), []
    for k in range(1, loss_fn.num_future_tokens + 1):
        logits = loss_fn.projections[k - 1](normal)[:, :-k].flatten(0, 1) / loss_fn.temperature
        y = labels[:, k:] if sources is None else labels[:, k:].masked_fill(
            sources[:, :-k] == 0, -100
        )  # fmt: skip
        y = y.flatten()
        none = (y == -100).all()
        losses.append(logits.sum() * 0 if none else F.cross_entropy(logits, y))
    return losses


def test_by_hand():
    """LayerNorm makes (1, -1) of (2, 0) and (-1, 1) of (0, 2). The head's logit of class 0 is
    ln 3 / 2 times the first entry, of class 1 the same of the second: p = 3/4 for the one of the
    larger entry."""
    loss_fn = Loss(vocab_size=2, hidden_size=2, num_future_tokens=2)
    with torch.no_grad():
        for head in loss_fn.projections:
            head.weight.copy_(torch.eye(2) * LN3 / 2)
            head.bias.zero_()
    hidden = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]])
    targets = torch.tensor([[9, 0, 0]])  # nobody predicts the first
    out = loss_fn(hidden, targets)
    assert list(out) == ["mtp_loss", "per_token_losses", "mtp_weight"] and out["mtp_weight"] == 0.1
    one = (math.log(4 / 3) + math.log(4)) / 2  # head 1: 3/4 for 0 at 0, 1/4 for 0 at 1
    two = math.log(4 / 3)  # head 2: 3/4 for 0 at 0
    close = {"rtol": 1e-4, "atol": 0}  # LayerNorm's eps
    torch.testing.assert_close(out["mtp_loss"], torch.tensor(0.1 * (one + two) / 2), **close)
    found = torch.stack(out["per_token_losses"])
    torch.testing.assert_close(found, torch.tensor([one, two]), **close)
    assert not found.requires_grad
    # Two tokens: min(K, S - 1) = 1 head has a target, and it is not halved
    out = loss_fn(hidden[:, :2], targets[:, :2])
    torch.testing.assert_close(out["mtp_loss"], torch.tensor(0.1 * math.log(4 / 3)), **close)
    assert out["per_token_losses"][1] == 0


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_torch_and_its_gradient(heads, temperature):
    hidden, targets, mask = batch()
    targets[0, 2] = -100
    loss_fn = Loss(V, H, heads, 0.3, temperature=temperature).double()
    out = loss_fn(hidden, targets, mask)
    losses = by_torch(loss_fn, hidden, targets, mask)
    expected = 0.3 * sum(losses) / heads
    torch.testing.assert_close(out["mtp_loss"], expected)
    torch.testing.assert_close(out["per_token_losses"], [x.detach() for x in losses])
    leaves = [hidden, *loss_fn.parameters()]
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (out["mtp_loss"], expected))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_the_shared_projection_is_the_heads_in_one_weight():
    hidden, targets, mask = batch()
    apart, shared = Loss(V, H).double(), Loss(V, H, shared_projection=True).double()
    assert [name for name, _ in apart.named_parameters()] == [
        *(f"projections.{k}.{part}" for k in range(3) for part in ("weight", "bias")),
        "layer_norm.weight",
        "layer_norm.bias",
    ]
    assert shared.projection.weight.shape == (3 * V, H)
    with torch.no_grad():
        shared.projection.weight.copy_(torch.cat([head.weight for head in apart.projections]))
        shared.projection.bias.copy_(torch.cat([head.bias for head in apart.projections]))
    one, other = (x(hidden, targets, mask)["mtp_loss"] for x in (apart, shared))
    torch.testing.assert_close(one, other)
    one.backward()
    other.backward()
    expected = torch.cat([head.weight.grad for head in apart.projections])
    torch.testing.assert_close(shared.projection.weight.grad, expected)


class Made(TorchDispatchMode):
    """Every tensor that an operation returns, kept alive so that no memory is used twice."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        several = isinstance(result, (tuple, list))
        self.tensors += [x for x in (result if several else [result]) if torch.is_tensor(x)]
        return result

    def storages(self):
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_no_logits_leave_the_operator(shared, inplace):
    """In the forward nothing but gradients has as many numbers as a head has logits."""
    hidden, targets, mask = batch(torch.float32)
    loss_fn = Loss(101, H, shared_projection=shared, inplace_backward=inplace)
    with Made() as made:
        loss_fn(hidden, targets, mask)
    given = {p.untyped_storage().data_ptr() for p in loss_fn.parameters()}
    sizes = [size for pointer, size in made.storages().items() if pointer not in given]
    large = [size // 4 for size in sizes if size >= B * 101 * 4]
    assert large == ([101 * H] * 3 if inplace else [])  # of the weights


def products(call):
    """The sizes of the right factor of every product; with biases the logits are no aten::mm."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        call()
    return [event.input_shapes[1] for event in profile.function_events if event.name == "aten::mm"]


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_frozen_takes_no_product(inplace):
    hidden, targets, mask = batch(torch.float32)
    loss_fn = Loss(V, H, 2, inplace_backward=inplace)
    rows = [int((mask[:, k:] != 0).sum()) for k in (1, 2)]  # that have a target
    for_hidden, for_weight = [[V, H]] * 2, [[n, H] for n in rows]

    def step():
        hidden.grad = None
        loss_fn.zero_grad()
        loss_fn(hidden, targets, mask)["mtp_loss"].backward()

    assert sorted(products(step)) == sorted(for_hidden + for_weight)
    loss_fn.projections.requires_grad_(False)
    assert products(step) == for_hidden
    assert hidden.grad is not None and loss_fn.layer_norm.weight.grad is not None
    assert all(p.grad is None for p in loss_fn.projections.parameters())
    loss_fn.projections.requires_grad_(True)
    loss_fn.layer_norm.requires_grad_(False)
    hidden.requires_grad_(False)
    assert sorted(products(step)) == sorted(for_weight)
    assert hidden.grad is None and loss_fn.projections[0].weight.grad is not None


def test_a_second_backward_unless_gradients_are_made_in_the_forward():
    hidden, targets, mask = batch()
    loss_fn = Loss(V, H).double()
    leaves = [hidden, *loss_fn.parameters()]
    loss = loss_fn(hidden, targets, mask)["mtp_loss"]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(
        torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, leaves), strict=True)
    )
    loss_fn.inplace_backward = True
    loss = loss_fn(hidden, targets, mask)["mtp_loss"]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), first)
    with pytest.raises(RuntimeError, match="one backward of a mean"):
        torch.autograd.grad(loss, leaves)


def test_a_masked_source_still_predicts_unless_told_otherwise():
    """Padding first: its last position predicts the first token."""
    hidden, targets, _ = batch()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    for sources in (False, True):
        loss_fn = Loss(V, H, mask_sources=sources).double()
        losses = by_torch(loss_fn, hidden, targets, mask, mask if sources else None)
        out = loss_fn(hidden, targets, mask)
        torch.testing.assert_close(out["per_token_losses"], [x.detach() for x in losses])


def test_hidden_states_without_a_target_are_not_read():
    hidden, targets, mask = batch()
    loss_fn = Loss(V, H).double()
    expected = torch.autograd.grad(
        loss_fn(hidden, targets, mask)["mtp_loss"], [hidden, *loss_fn.parameters()]
    )
    poisoned = hidden.detach().masked_fill(mask.unsqueeze(-1) == 0, math.nan).requires_grad_()
    loss = loss_fn(poisoned, targets.masked_fill(mask == 0, 2**31 - 1), mask)["mtp_loss"]
    for x, y in zip(
        torch.autograd.grad(loss, [poisoned, *loss_fn.parameters()]), expected, strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_rows_shorter_than_a_head_reaches(length):
    hidden, targets, _ = batch(torch.float32)
    loss_fn = Loss(V, H)
    out = loss_fn(hidden[:, :length], targets[:, :length])
    out["mtp_loss"].backward()
    assert len(out["per_token_losses"]) == 3
    assert [x > 0 for x in out["per_token_losses"]] == [k < length for k in (1, 2, 3)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss_fn.parameters())


def test_gradcheck():
    hidden, targets, mask = batch()
    loss_fn = Loss(V, H, 2).double()
    assert gradcheck(lambda x, w: torch.func.functional_call(
        loss_fn, {"projections.0.weight": w}, (x, targets, mask)
    )["mtp_loss"], [hidden, loss_fn.projections[0].weight])  # fmt: skip


def test_mixed_precision():
    hidden, targets, mask = batch(torch.bfloat16)
    loss_fn = Loss(V, H)
    plain = loss_fn(hidden, targets, mask)["mtp_loss"]  # float32 parameters
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss_fn(hidden, targets, mask)["mtp_loss"]
    half = copy.deepcopy(loss_fn).bfloat16()(hidden, targets, mask)["mtp_loss"]
    for loss in (plain, autocast, half):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)
    assert torch.autograd.grad(half, hidden)[0].dtype == torch.bfloat16


def test_projections_with_hooks_are_refused():
    loss_fn = Loss(V, H)
    loss_fn.projections[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"projections\[1\] must have no forward hooks: it is not"):
        loss_fn(*batch(torch.float32))


def test_num_valid_changes_nothing_but_must_be_right():
    hidden, targets, mask = batch()
    loss_fn = Loss(V, H).double()
    expected = loss_fn(hidden, targets, mask)["mtp_loss"]
    most = int(mask[:, 1:].sum())
    for num_valid in (most, B * S):
        found = loss_fn(hidden, targets, mask, num_valid=num_valid)["mtp_loss"]
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="^HiddenStateMTPLoss: num_valid must be at least"):
        loss_fn(hidden, targets, mask, num_valid=most - 1)


def test_a_label_out_of_range_is_named():
    hidden, targets, mask = batch(torch.float32)
    targets[1, 2] = V
    with pytest.raises(IndexError, match="^HiddenStateMTPLoss: target_ids .* got 7"):
        Loss(V, H)(hidden, targets, mask)


def call(hidden=(B, S, H), targets=(B, S), mask=None, **keywords):
    mask = None if mask is None else torch.ones(mask)
    return Loss(V, H, **keywords)(
        torch.zeros(hidden), torch.zeros(targets, dtype=torch.int64), mask
    )


BAD = [
    (lambda: Loss(0, H), "vocab_size must be at least 1, got 0"),
    (lambda: Loss(V, H, 0), "num_future_tokens must be at least 1, got 0"),
    (lambda: call(temperature=0.0), "temperature must be a finite number above 0, got 0.0"),
    (lambda: call((B, S, H + 1)), "hidden_states must have hidden_size 4 as its last dimension"),
    (lambda: call((B, H)), "hidden_states must have 3 dimensions [B, S, H], got [3, 4]"),
    (lambda: call(targets=(B, S - 1)), "target_ids must have the B and S of hidden_states"),
    (lambda: call(mask=(B, S + 1)), "attention_mask shape must be [3, 6]"),
]


@pytest.mark.parametrize("function,text", BAD)
def test_errors(function, text):
    with pytest.raises(ValueError) as caught:
        function()
    assert str(caught.value).startswith("HiddenStateMTPLoss: ") and text in str(caught.value)


# --- a normalizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_normalizer(inplace_backward):
    """Parts of a batch, divided by what all of it counts, add up to its loss and gradient."""
    loss_fn = Loss(5, 3, 2, inplace_backward=inplace_backward).double()
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.tensor([[1, 2, 3, 4], [0, 1, -100, -100]])
    assert loss_fn.count_targets(y).tolist() == [4, 2]
    whole = loss_fn(hidden, y)["mtp_loss"]
    expected = torch.autograd.grad(whole, list(loss_fn.parameters()))
    counts = loss_fn.count_targets(y[:1]) + loss_fn.count_targets(y[1:])
    parts = [loss_fn(hidden[b : b + 1], y[b : b + 1], normalizer=counts) for b in range(2)]
    total = sum(part["mtp_loss"] for part in parts)
    torch.testing.assert_close(total, whole)
    found = torch.autograd.grad(total, list(loss_fn.parameters()))
    torch.testing.assert_close(found, expected)
    # the mean of the means of both is another number
    usual = sum(loss_fn(hidden[b : b + 1], y[b : b + 1])["mtp_loss"] for b in range(2)) / 2
    assert abs(usual - whole) > 1e-4
    # one number for all heads, and heads that reach past the end of one batch's rows
    first = loss_fn(hidden, y, normalizer=8)["per_token_losses"]
    torch.testing.assert_close(2 * first[0], loss_fn(hidden, y)["per_token_losses"][0])
    short = loss_fn(hidden[:, :2], y[:, :2], normalizer=torch.tensor([2, 1]))
    mean = loss_fn(hidden[:, :2], y[:, :2])
    torch.testing.assert_close(2 * short["mtp_loss"], mean["mtp_loss"])


def test_count_targets_knows_masks_and_documents():
    loss_fn = Loss(5, 3, 2, mask_sources=True)
    y, mask = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[0, 1, 1, 1, 1]])
    assert loss_fn.count_targets(y, mask).tolist() == [3, 2]
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    assert loss_fn.count_targets(y, mask, segment_ids=ids).tolist() == [2, 0]


@pytest.mark.parametrize(
    "normalizer, text",
    [
        (torch.ones(3), r"be a number or have one entry per head \[2\], got \[3\]"),
        (-1.0, "be a finite number at least 0, got -1"),
    ],
)
def test_normalizer_errors(normalizer, text):
    loss_fn = Loss(5, 3, 2)
    with pytest.raises(ValueError, match=f"^HiddenStateMTPLoss: normalizer must {text}"):
        loss_fn(torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64), normalizer=normalizer)
