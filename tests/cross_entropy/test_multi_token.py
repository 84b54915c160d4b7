# SPDX-License-Identifier: BSD-3-Clause
"""MultiTokenPredictionLoss: head i scores position t against the label at t + i + 1."""

import math

import pytest
import torch
import torch.nn.functional as F

import masked_loss_ext as mle
from masked_loss_ext import reference

Loss = mle.MultiTokenPredictionLoss
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def heads(n=4, batch=3, length=7, classes=11, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, length, classes, generator=g).to(dtype) for _ in range(n)]
    labels = torch.randint(classes, (batch, length), generator=g)
    return [x.requires_grad_() for x in logits], labels


def right_padded(lengths, length):
    return torch.tensor([[int(t < n) for t in range(length)] for n in lengths])


def detached(logits_list):
    return [x.detach().clone().requires_grad_() for x in logits_list]


# --- numbers worked out by hand ------------------------------------------------------------------


def hand_worked():
    """One row of three tokens, two classes, two heads; names say the probability of class 0."""
    half, three_quarters, quarter = [0.0, 0.0], [LN3, 0.0], [0.0, LN3]
    first = torch.tensor([[half, three_quarters, quarter]], requires_grad=True)
    second = torch.tensor([[quarter, half, half]], requires_grad=True)
    return [first, second], torch.tensor([[0, 1, 0]])


def test_by_hand():
    logits, labels = hand_worked()
    total, loss_dict = Loss(2, (3.0, 1.0))(logits, labels)
    one = (LN2 + math.log(4 / 3)) / 2  # half for label 1, three quarters for label 0
    two = LN4  # a quarter for label 0
    expected = {"loss_t1": one, "loss_t2": two, "total_multitoken_loss": 0.75 * one + 0.25 * two}
    assert list(loss_dict) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(loss_dict[name], torch.tensor(value))
    torch.testing.assert_close(total, torch.tensor(expected["total_multitoken_loss"]))
    total.backward()
    # weight / counted positions * (p - one-hot)
    grad_one = [[0.375 * 0.5, -0.375 * 0.5], [-0.375 * 0.25, 0.375 * 0.25], [0.0, 0.0]]
    grad_two = [[-0.25 * 0.75, 0.25 * 0.75], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(logits[0].grad, torch.tensor([grad_one]))
    torch.testing.assert_close(logits[1].grad, torch.tensor([grad_two]))


@pytest.mark.parametrize("renormalize,expected", [(False, 0.75 * LN2), (True, LN2)])
def test_by_hand_with_the_last_token_padded(renormalize, expected):
    """Head 1 has one target left, head 2 none: its loss is 0, its weight stays or is given away."""
    logits, labels = hand_worked()
    loss_fn = Loss(2, (3.0, 1.0), renormalize_empty_heads=renormalize)
    total, loss_dict = loss_fn(logits, labels, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(total, torch.tensor(expected))
    torch.testing.assert_close(loss_dict["loss_t1"], torch.tensor(LN2))
    assert loss_dict["loss_t2"] == 0
    total.backward()
    assert (logits[1].grad == 0).all() and (logits[0].grad[0, 1:] == 0).all()


@pytest.mark.parametrize("sources,expected", [(False, (LN2 + math.log(4 / 3)) / 2), (True, None)])
def test_by_hand_with_the_first_token_padded(sources, expected):
    """The mask is the target's; mask_sources asks for the position's own as well."""
    logits, labels = hand_worked()
    loss_dict = Loss(2, (1.0, 1.0), mask_sources=sources)(
        logits, labels, torch.tensor([[0, 1, 1]])
    )[1]
    expected = math.log(4 / 3) if sources else expected
    torch.testing.assert_close(loss_dict["loss_t1"], torch.tensor(expected))
    torch.testing.assert_close(loss_dict["loss_t2"], torch.tensor(0.0 if sources else LN4))


def test_by_hand_with_segments():
    """Documents [0, 1] and [0]: only position 0 of head 1 has its target in its own document."""
    logits, labels = hand_worked()
    total, loss_dict = Loss(2, (1.0, 1.0))(logits, labels, segment_ids=torch.tensor([[5, 5, 6]]))
    torch.testing.assert_close(total, torch.tensor(LN2 / 2))
    assert loss_dict["loss_t2"] == 0


@pytest.mark.parametrize("sources", [False, True])
def test_one_row_of_mask_and_segments_for_a_batch(sources):
    logits, labels = heads(2)
    mask, segments = right_padded([6], 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    loss_fn = Loss(2, (2.0, 1.0), mask_sources=sources)
    rows = mask.expand(3, 7).contiguous(), segments.expand(3, 7).contiguous()
    expected = loss_fn(logits, labels, rows[0], segment_ids=rows[1])[0]
    assert torch.equal(loss_fn(logits, labels, mask, segment_ids=segments)[0], expected)
    counts = loss_fn.count_targets(labels, mask, segment_ids=segments)
    assert counts.tolist() == [12, 6]  # 2 + 2 and 1 + 1 in each of three rows


def test_default_weights():
    assert Loss().aux_loss_weights == pytest.approx((0.5, 0.25, 0.15, 0.1), abs=1e-15)
    assert Loss(3, [1, 1, 2]).aux_loss_weights == (0.25, 0.25, 0.5)
    assert Loss(1, torch.tensor([4.0])).aux_loss_weights == (1.0,)


def test_an_untrained_model_is_at_ln_of_the_vocabulary():
    labels = torch.randint(50257, (1, 6))
    total, _ = Loss()([torch.zeros(1, 6, 50257)] * 4, labels)
    assert total.item() == pytest.approx(10.825, abs=5e-4)


# --- against PyTorch, head by head ---------------------------------------------------------------


def by_torch(logits, labels, mask, k, ignore_index=-100):
    """Head k by F.cross_entropy; 0 where it has no target, where PyTorch gives NaN."""
    if mask is not None:
        labels = labels.masked_fill(mask == 0, ignore_index)
    rows, targets = logits[:, :-k].flatten(0, 1).float(), labels[:, k:].flatten()
    if (targets == ignore_index).all():
        return rows.sum() * 0
    return F.cross_entropy(rows, targets, ignore_index=ignore_index)


def compare_with_torch(loss_fn, logits, labels, mask):
    theirs = detached(logits)
    total, loss_dict = loss_fn(logits, labels, mask)
    expected = [
        by_torch(x, labels, mask, i + 1, loss_fn.ignore_index) for i, x in enumerate(theirs)
    ]
    for i, value in enumerate(expected):
        torch.testing.assert_close(loss_dict[f"loss_t{i + 1}"], value.detach())
    expected = sum(w * x for w, x in zip(loss_fn.aux_loss_weights, expected, strict=True))
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for x, y in zip(logits, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    return total


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("n", [1, 4])
def test_equals_torch(n, mask_dtype):
    logits, labels = heads(n)
    mask = None if mask_dtype is None else right_padded([7, 4, 1], 7).to(mask_dtype)
    compare_with_torch(Loss(n, (1.0, 0.5, 0.3, 0.2)[:n]), logits, labels, mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_dtypes(dtype):
    logits, labels = heads()
    mask = right_padded([7, 4, 2], 7)
    expected = Loss()(logits, labels, mask)[0]
    assert torch.equal(Loss()(logits, labels.to(dtype), mask)[0], expected)


def test_ignored_labels_and_mask_together():
    logits, labels = heads()
    labels[0, :3], labels[2, 5] = 3, 3  # a prompt
    compare_with_torch(Loss(ignore_index=3), logits, labels, right_padded([7, 4, 6], 7))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_rows_shorter_than_a_head_reaches(length):
    logits, labels = heads(length=length)
    total = compare_with_torch(Loss(), logits, labels, None)
    assert total.isfinite() and (total > 0) == (length > 1)


def test_two_real_tokens_and_four_heads():
    logits, labels = heads(length=8)
    mask = right_padded([2, 2, 2], 8)
    total = compare_with_torch(Loss(), logits, labels, mask)
    assert total > 0 and all((x.grad == 0).all() for x in logits[1:])


def test_nothing_to_predict():
    for mask in (torch.zeros(3, 7), right_padded([1, 1, 0], 7)):
        logits, labels = heads()
        total = compare_with_torch(Loss(), logits, labels, mask)
        assert total == 0 and total.requires_grad
        logits, _ = heads()
        total, _ = Loss(renormalize_empty_heads=True)(logits, labels, mask)
        total.backward()
        assert total == 0 and all((x.grad == 0).all() for x in logits)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_empty_batch(shape):
    logits = [torch.zeros(*shape, 5, requires_grad=True) for _ in range(4)]
    total, loss_dict = Loss()(logits, torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
    total.backward()
    assert total == 0 and len(loss_dict) == 5 and logits[0].grad.shape == (*shape, 5)


def test_heads_may_differ_in_dtype_and_strides():
    logits, labels = heads(3)
    mixed = [logits[0].detach().bfloat16(), logits[1].detach().double(), logits[2].detach()]
    mixed[2] = mixed[2].transpose(0, 1).contiguous().transpose(0, 1)
    total, loss_dict = Loss(3, (1, 1, 1))([x.requires_grad_() for x in mixed], labels)
    assert loss_dict["loss_t1"].dtype == torch.float32 and total.dtype == torch.float64
    plain = Loss(3, (1, 1, 1))([x.double() for x in mixed], labels)[0]
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=0)


def test_bfloat16_is_summed_in_float32():
    logits, labels = heads(dtype=torch.bfloat16, batch=4, length=64)
    mask = right_padded([64, 33, 5, 2], 64)
    total, _ = Loss()(logits, labels, mask)
    wide = [x.detach().double().requires_grad_() for x in logits]
    truth, _ = Loss()(wide, labels, mask)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), truth, rtol=1e-6, atol=0)
    total.backward()
    truth.backward()
    for x, y in zip(logits, wide, strict=True):
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=2**-8, atol=1e-9)


# --- segments, sources, reference ----------------------------------------------------------------


@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("normalizer", [None, 17])
def test_equals_reference(sources, renormalize, normalizer):
    g = torch.Generator().manual_seed(3)
    for length in (2, 5, 9):
        logits, labels = heads(dtype=torch.float64, length=length, seed=length)
        mask = torch.rand(3, length, generator=g) < 0.7
        for segments in (None, torch.randint(2, (3, length), generator=g).sort(1).values):
            loss_fn = Loss(mask_sources=sources, renormalize_empty_heads=renormalize)
            total, loss_dict = loss_fn(
                logits, labels, mask, segment_ids=segments, normalizer=normalizer
            )
            expected, losses = reference.multi_token_prediction_loss(
                logits,
                labels,
                mask,
                loss_fn.aux_loss_weights,
                segment_ids=segments,
                mask_sources=sources,
                renormalize_empty_heads=renormalize,
                normalizer=normalizer,
            )
            torch.testing.assert_close(total, expected)
            for i, loss in enumerate(losses):
                torch.testing.assert_close(loss_dict[f"loss_t{i + 1}"], loss.detach())


def test_packed_documents_equal_padded_ones():
    lengths = [3, 6, 2]
    logits, labels = heads(batch=3, length=6)
    mask = right_padded(lengths, 6)
    packed = [torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None] for x in logits]
    packed_labels = torch.cat([labels[b, :n] for b, n in enumerate(lengths)])[None]
    segments = torch.tensor([[0] * 3 + [1] * 6 + [2] * 2], dtype=torch.uint8)
    total = Loss()(packed, packed_labels, segment_ids=segments)[0]
    torch.testing.assert_close(total, Loss()(logits, labels, mask)[0])
    sources = Loss(mask_sources=True)(
        packed, packed_labels, torch.ones(1, 11), segment_ids=segments
    )
    torch.testing.assert_close(sources[0], total)


# --- what the mask excludes ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_logits_without_a_target_are_not_read(garbage, dtype):
    logits, labels = heads(dtype=dtype)
    mask = right_padded([7, 4, 1], 7)
    poisoned = detached(logits)
    dropped = []
    for k, x in enumerate(poisoned, 1):
        off = torch.ones(3, 7, dtype=torch.bool)
        off[:, :-k] = mask[:, k:] == 0
        x.data[off] = garbage
        dropped.append(off)
    poisoned_labels = labels.masked_fill(mask == 0, 2**31 - 1)
    total, other = Loss()(logits, labels, mask)[0], Loss()(poisoned, poisoned_labels, mask)[0]
    assert torch.equal(total, other)
    total.backward()
    other.backward()
    for x, y, off in zip(logits, poisoned, dropped, strict=True):
        assert torch.equal(x.grad, y.grad) and (y.grad[off] == 0).all()
