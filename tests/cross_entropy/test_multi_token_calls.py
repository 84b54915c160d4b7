# SPDX-License-Identifier: BSD-3-Clause
"""MultiTokenPredictionLoss in use: accumulation, what it returns, that nothing waits, bad input."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cross_entropy.test_multi_token import Loss, by_torch, detached, heads, right_padded

# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
def test_accumulated_micro_batches_equal_one_batch(renormalize):
    """Rows of 7, 2, 4, 1, 6, 3 tokens, two at a time: the sum with the whole count is the whole."""
    logits, labels = heads(batch=6)
    mask = right_padded([7, 2, 4, 1, 6, 3], 7)
    loss_fn = Loss(renormalize_empty_heads=renormalize)
    whole = loss_fn(logits, labels, mask)[0]
    whole.backward()
    parts = [slice(b, b + 2) for b in (0, 2, 4)]
    counts = sum(loss_fn.count_targets(labels[p], mask[p]) for p in parts)
    assert counts.tolist() == [6 + 1 + 3 + 5 + 2, 5 + 2 + 4 + 1, 4 + 1 + 3, 3 + 2]
    pieces = detached(logits)
    total = 0.0
    for part in parts:
        step = loss_fn([x[part] for x in pieces], labels[part], mask[part], normalizer=counts)[0]
        step.backward()
        total += step.detach()
    torch.testing.assert_close(total, whole.detach())
    for x, y in zip(logits, pieces, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_one_normalizer_for_all_heads():
    logits, labels = heads()
    mask = right_padded([7, 4, 2], 7)
    expected = [by_torch(x, labels, mask, k) for k, x in enumerate(logits, 1)]
    counts = Loss().count_targets(labels, mask)
    for normalizer in (40, 40.0, torch.tensor(40), torch.tensor(40.0)):
        _, loss_dict = Loss()(logits, labels, mask, normalizer=normalizer)
        for i, value in enumerate(expected):
            torch.testing.assert_close(loss_dict[f"loss_t{i + 1}"], value * counts[i] / 40)


def test_targets_are_counted_as_they_are_scored():
    labels = torch.tensor([[156, 1, -100, 3, 4], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 1], [4, 4, 4, 4, 4]])
    assert Loss().count_targets(labels).tolist() == [7, 5, 4, 2]
    assert Loss().count_targets(labels, mask).tolist() == [5, 3, 2, 1]
    assert Loss().count_targets(labels, mask, segment_ids=segments).tolist() == [4, 2, 1, 0]
    sources = Loss(mask_sources=True)
    assert sources.count_targets(labels, mask, segment_ids=segments).tolist() == [3, 1, 1, 0]
    small = torch.tensor([[1, 156, 2]], dtype=torch.uint8)  # 156 is -100 in eight bits
    assert Loss().count_targets(small).tolist() == [2, 1, 0, 0]


# --- the dictionary, and no synchronisation ------------------------------------------------------


def test_the_dictionary_is_a_record():
    logits, labels = heads()
    total, loss_dict = Loss()(logits, labels)
    assert isinstance(loss_dict, dict) and len(loss_dict) == 5
    before = {name: value.clone() for name, value in loss_dict.items()}
    with torch.no_grad():
        total.mul_(8)  # as trainers do
    for name, value in loss_dict.items():
        assert value.shape == () and not value.requires_grad and torch.equal(value, before[name])
        assert f"{value:.3f}" == f"{float(value):.3f}"


class RefuseToWait(TorchDispatchMode):
    """Fails on operators that need data on the host: on a GPU each would wait for it."""

    waiting = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waiting, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def everything():
    """A loss with every option on, and what it is called with."""
    logits, labels = heads()
    loss_fn = Loss(mask_sources=True, renormalize_empty_heads=True)
    mask, segments = right_padded([7, 4, 0], 7), torch.zeros(3, 7, dtype=torch.int64)
    return loss_fn, (logits, labels, mask), {"segment_ids": segments}


@pytest.mark.parametrize("normalizer", [None, torch.tensor(30), torch.tensor([9, 8, 7, 0])])
def test_nothing_waits_for_the_device(normalizer):
    loss_fn, arguments, keywords = everything()
    with pytest.raises(AssertionError, match="waits for the device"), RefuseToWait():
        torch.ones(()).item()
    with RefuseToWait():
        loss_fn(*arguments, **keywords, normalizer=normalizer)[0].backward()
    assert all(x.grad.isfinite().all() for x in arguments[0])


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_runs_without_data(device):
    loss_fn, (logits, labels, mask), keywords = everything()
    mode = FakeTensorMode()
    convert = mode.from_tensor if device == "fake" else lambda x: x.to("meta")
    logits = [convert(x.detach()).requires_grad_() for x in logits]
    with mode if device == "fake" else torch.device("cpu"):
        total, loss_dict = loss_fn(
            logits, convert(labels), convert(mask), segment_ids=convert(keywords["segment_ids"])
        )
        total.backward()
    assert total.shape == () and len(loss_dict) == 5 and logits[3].grad.shape == (3, 7, 11)


def test_compiled_with_one_graph():
    torch._dynamo.reset()
    counters.clear()
    loss_fn = Loss(2, (2.0, 1.0), mask_sources=True, renormalize_empty_heads=True)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((3, 7), (5, 9), (4, 13)):
        logits, labels = heads(2, batch, length)
        mask, segments = torch.rand(batch, length) < 0.8, torch.randint(2, (batch, length))
        total, loss_dict = compiled(logits, labels, mask, segment_ids=segments)
        total.backward()
        eager = detached(logits)
        expected, parts = loss_fn(eager, labels, mask, segment_ids=segments)
        expected.backward()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(loss_dict, parts)
        for x, y in zip(logits, eager, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_gradients_written_over_the_logits():
    logits, labels = heads()
    mask = right_padded([7, 4, 2], 7)
    Loss()(logits, labels, mask)[0].backward()
    values = detached(logits)
    work = [x + 0 for x in values]
    Loss(inplace_backward=True)(work, labels, mask)[0].backward()
    for x, y, z in zip(logits, values, work, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
        assert torch.equal(z, y.grad), "the logits' memory holds the gradient"


# --- bad input -----------------------------------------------------------------------------------

X, Y = [torch.zeros(2, 3, 5)] * 2, torch.zeros(2, 3, dtype=torch.int64)
META = torch.zeros(2, 3, device="meta")
NESTED = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
both = (ValueError, AssertionError)
CASES = [
    ((X[:1], Y), both, "logits_list must have one tensor per head, n_pred_tokens 2, got 1"),
    ((X + X, Y), both, "logits_list must have one tensor per head, n_pred_tokens 2, got 4"),
    ((X[0], Y), TypeError, "logits_list must be a list of tensors, got Tensor"),
    (([X[0], None], Y), TypeError, "logits_list[1] must be a torch.Tensor, got NoneType"),
    (([X[0], X[0][0]], Y), ValueError, "logits_list[1] must have 3 dimensions [B, S, V], got"),
    (([X[0][:1], X[0]], Y), ValueError, "logits_list[0] must have the B and S of labels [2, 3]"),
    (([X[0].to("meta")] * 2, Y), ValueError, "logits_list[0] must be on the device of labels"),
    (([X[0], X[0].long()], Y), ValueError, "logits_list[1] must be a floating tensor, got torch.i"),
    ((X, None), TypeError, "labels must be a torch.Tensor, got NoneType"),
    ((X, Y.float()), ValueError, "labels must be integers, got torch.float32"),
    ((X, Y[0]), ValueError, "labels must have 2 dimensions [B, S], got [3]"),
    ((X, Y, [[1]]), TypeError, "attention_mask must be a torch.Tensor, got list"),
    ((X, Y, torch.zeros(2, 1, 3, 3)), ValueError, "attention_mask must have 2 dimensions [B, S]"),
    ((X, Y, torch.zeros(2, 1, 3, 3)), ValueError, "got [2, 1, 3, 3] (a 4-D mask [B, 1, S, S]"),
    ((X, Y, Y[0]), ValueError, "attention_mask must have 2 dimensions [B, S]"),
    ((X, Y, Y[:1, :2]), ValueError, "attention_mask shape must be [2, 3]"),
    ((X, Y, Y.to_sparse()), ValueError, "attention_mask must be a dense tensor"),
    ((X, Y, NESTED), ValueError, "attention_mask must be a plain tensor"),
    (
        (X, Y, torch.empty(2, 3, dtype=torch.int1)),
        ValueError,
        "attention_mask must be bool, integer",
    ),
    ((X, torch.empty(2, 3, dtype=torch.uint4)), ValueError, "labels must be integers, got torch.u"),
    (([X[0].to(torch.float8_e5m2)] * 2, Y), ValueError, "logits_list[0] must be float16, bfloat16"),
    ((X, Y, META), ValueError, "attention_mask must be on the device of labels (cpu), got meta"),
    ((X, Y, -torch.ones(2, 3)), ValueError, "an additive mask?"),
]
KEYWORDS = [
    ({"segment_ids": Y.float()}, ValueError, "segment_ids must be integers, got torch.float32"),
    ({"segment_ids": Y[:1, :2]}, ValueError, "segment_ids must have the shape of labels [2, 3]"),
    ({"normalizer": [1, 2]}, TypeError, "normalizer must be a number, got list"),
    ({"normalizer": "3"}, TypeError, "normalizer must be a number, got str"),
    (
        {"normalizer": math.nan},
        ValueError,
        "normalizer must be a finite number at least 0, got nan",
    ),
    ({"normalizer": -1}, ValueError, "normalizer must be a finite number at least 0, got -1"),
    ({"segment_ids": META.long()}, ValueError, "segment_ids must be on the device of labels"),
    ({"normalizer": torch.ones(3)}, both, "normalizer must be a number or have one entry per head"),
]


def check_refused(call, kinds, text):
    with pytest.raises(Exception) as caught:
        call()
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    assert all(isinstance(caught.value, kind) for kind in kinds), repr(caught.value)
    assert text in str(caught.value) and "MultiTokenPredictionLoss: " in str(caught.value)


@pytest.mark.parametrize("arguments,kinds,text", CASES)
def test_bad_arguments(arguments, kinds, text):
    check_refused(lambda: Loss(2, (1.0, 1.0))(*arguments), kinds, text)


@pytest.mark.parametrize("keywords,kinds,text", KEYWORDS)
def test_bad_keywords(keywords, kinds, text):
    check_refused(lambda: Loss(2, (1.0, 1.0))(X, Y, **keywords), kinds, text)


def test_bad_construction():
    check_refused(lambda: Loss(2), both, "aux_loss_weights must have one entry per head")
    check_refused(lambda: Loss(4, (1.0,)), both, "n_pred_tokens 4, got 1")
    for weights in ((0.0, 0.0), (1.7e308, 1.7e308)):
        text = "aux_loss_weights must have a positive, finite sum"
        check_refused(lambda w=weights: Loss(2, w), ValueError, text)
    for bad in (-1, math.nan, math.inf, 10**400):  # (2, -1) has a positive sum
        text = "aux_loss_weights[1] must be a finite number at least 0, got "
        check_refused(lambda w=bad: Loss(2, (2, w)), ValueError, text)
    for bad in ("1", None, 1j, True, torch.tensor(1.0)):
        text = "aux_loss_weights[1] must be a number, got "
        check_refused(lambda w=bad: Loss(2, (2, w)), TypeError, text)
    for bad in ("12", None, 3.0):
        text = "aux_loss_weights must be a list of numbers, got "
        check_refused(lambda w=bad: Loss(2, w), TypeError, text)
    check_refused(lambda: Loss(2, torch.ones(2, 1)), ValueError, "aux_loss_weights must have 1 dim")
    check_refused(lambda: Loss(True, (1.0,)), TypeError, "n_pred_tokens must be an int, got bool")
    check_refused(lambda: Loss(-1, ()), ValueError, "n_pred_tokens must not be negative, got -1")
    check_refused(lambda: Loss(ignore_index=True), TypeError, "ignore_index must be an int, got b")
    check_refused(lambda: Loss(0, ()), ValueError, "positive, finite sum")
    check_refused(lambda: Loss(2.0, (1.0, 1.0)), TypeError, "n_pred_tokens must be an int")
