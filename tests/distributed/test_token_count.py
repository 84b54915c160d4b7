# SPDX-License-Identifier: BSD-3-Clause
"""global_token_count: what counts, on one rank and on several, and what is refused."""

import math
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import masked_loss_ext as mle
from masked_loss_ext.distributed import PendingCount, global_token_count
from masked_loss_ext.reference.cross_entropy import shifted

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LABELS = torch.tensor([[3, -100, 4, 5, 6], [0, 1, 2, 3, 4]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
WEIGHT = torch.tensor([[1.0, 2, 3, 4, 5], [0.5, 0.25, 7, 8, 9]])

BY_HAND = {
    "mask": (dict(masks=MASK), 6),
    "shift": (dict(masks=MASK, shift=1), 4),  # the first of a row is no target
    "shift_2": (dict(masks=MASK, shift=2), 2),
    "shift_beyond": (dict(masks=MASK, shift=9), 0),
    "labels": (dict(labels=LABELS), 9),
    "labels_ignored": (dict(labels=LABELS, ignore_index=3), 8),
    "both": (dict(masks=MASK, labels=LABELS, shift=1), 3),
    "documents": (dict(masks=MASK, labels=LABELS, shift=1, segment_ids=DOCUMENTS), 1),
    "documents_alone": (dict(masks=MASK, shift=1, segment_ids=DOCUMENTS), 2),
    "two": (dict(masks=[MASK, MASK[:1, :3]], labels=(LABELS, LABELS[:1, :3])), 5 + 2),
    "weights": (dict(masks=MASK, token_weight=WEIGHT), 10.75),
    "weights_shifted": (dict(masks=MASK, shift=1, token_weight=WEIGHT), 9.25),
    "one_for_all": (dict(masks=MASK[:1], labels=LABELS, token_weight=WEIGHT[:1]), 18),
    "nothing": (dict(masks=MASK * 0), 0),
    "empty": (dict(masks=torch.zeros(0)), 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    options, expected = BY_HAND[name]
    for average in (True, False):
        count = global_token_count(**options, average=average)
        assert count.dtype == torch.float64 and count.shape == () and count == expected
    pending = global_token_count(**options, async_op=True)
    assert isinstance(pending, PendingCount) and pending.wait() == expected
    assert pending.wait() == expected  # again


def weights_on_one_rank():
    """The other has no micro-batch, and no weight of one. In the bits of the usual message, too."""
    has = dist.get_rank() == 0
    mask, weight = torch.ones(2 * has, 3), torch.full((2, 3), 0.5) if has else None
    usual = mask.sum().long() if weight is None else (mask * weight).sum().double()
    dist.all_reduce(usual)
    return usual.item(), global_token_count(mask, token_weight=weight, average=False).item()


def test_weights_on_some_ranks_alone(ranks):
    (_, first), (wrong, second) = ranks(2).run(weights_on_one_rank)
    assert first == second == 3 and wrong == 4613937818241073152  # the bits of 3.0


def compiled_with_a_handle():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(mask, values):
        pending = global_token_count([mask, mask[:1]], async_op=True)
        total = values.sum()
        return total / pending.wait()

    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 5):
        mask = torch.ones(rows, 4)
        mask[0, dist.get_rank() :] = 0
        torch.testing.assert_close(fast(mask, mask + 1), step(mask, mask + 1))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_with_a_handle(ranks):
    assert ranks(2).run(compiled_with_a_handle) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.uint16])
def test_masks_of_any_dtype(dtype):
    masks = [MASK.to(dtype), (200 * MASK[:1]).to(dtype)]
    assert global_token_count(masks) == 10
    assert global_token_count(MASK.bool().to(torch.float8_e4m3fn)) == 6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_labels_of_any_dtype(dtype):
    labels = (LABELS % 256).to(dtype)
    ignored = int(labels[0, 1])  # -100 or 156, which uint8 can hold
    assert global_token_count(labels=labels, ignore_index=ignored) == 9
    assert global_token_count(labels=labels, ignore_index=200) == 10


@pytest.mark.parametrize("shift", [0, 1, 2, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_counts_what_the_losses_count(shift, packed):
    """Dividing by it changes nothing on one rank, whatever the batch is."""
    g = torch.Generator().manual_seed(shift)
    logits = torch.randn(4, 6, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(5, (4, 6), generator=g)
    labels[torch.rand(4, 6, generator=g) < 0.2] = -100
    mask = (torch.rand(4, 6, generator=g) < 0.7).to(torch.float32)
    weight, class_weight = torch.rand(4, 6, generator=g), torch.rand(5, generator=g).double()
    rows = dict(shift=shift, segment_ids=torch.arange(6).expand(4, 6) // 4 if packed else None)
    for own, options in [
        ({}, {}),
        (dict(token_weight=weight), {}),
        (dict(token_weight=weight, reduction="weighted_mean"), dict(token_weight=weight)),
        (dict(weight=class_weight), dict(token_weight=class_weight[labels.clamp(min=0)])),
    ]:
        expected = mle.masked_cross_entropy(logits, labels, mask, **rows, **own)
        count = global_token_count(mask, labels=labels, **rows, **options)
        assert shift > 5 or count > 0
        loss = mle.masked_cross_entropy(logits, labels, mask, normalizer=count, **rows, **own)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def losses_with_a_normalizer():
    """name: loss(count), for a batch of which the mask keeps 6 positions."""
    g = torch.Generator().manual_seed(0)
    logits, x = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 4, generator=g)
    labels, head = LABELS.clamp(min=0), torch.randn(7, 4, generator=g)
    mtp = mle.MultiTokenPredictionLoss(1, (1.0,))
    tokens = mle.AttentionMaskMseLoss()
    cross_entropy, linear = mle.MaskedCrossEntropyLoss(), mle.MaskedLinearCrossEntropyLoss()
    target = torch.zeros_like(x)
    return {
        "masked_cross_entropy": (0, lambda n: mle.masked_cross_entropy(
            logits, labels, MASK, normalizer=n)),
        "MaskedCrossEntropyLoss": (0, lambda n: cross_entropy(logits, labels, MASK, normalizer=n)),
        "masked_linear_cross_entropy": (0, lambda n: mle.masked_linear_cross_entropy(
            x, head, labels, MASK, normalizer=n)),
        "MaskedLinearCrossEntropyLoss": (0, lambda n: linear(
            x, head, labels, MASK, normalizer=n)),
        "aggregate_tokens": (0, lambda n: mle.aggregate_tokens(logits[..., 0], MASK, normalizer=n)),
        "masked_edit_token_mean_loss": (0, lambda n: mle.masked_edit_token_mean_loss(
            x, target, MASK, normalizer=n)),
        "AttentionMaskMseLoss": (0, lambda n: tokens(x, target, MASK, normalizer=n)),
        "MultiTokenPredictionLoss": (1, lambda n: mtp([logits], labels, MASK, normalizer=n)[0]),
    }  # fmt: skip


@pytest.mark.parametrize("name", losses_with_a_normalizer())
def test_is_the_normalizer_of_every_loss(name):
    shift, loss = losses_with_a_normalizer()[name]
    expected = loss(None)
    count = global_token_count(MASK, shift=shift)
    torch.testing.assert_close(loss(count), expected)
    torch.testing.assert_close(loss(2 * count), expected / 2)
    assert loss(global_token_count(0 * MASK)) == 0
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(count), expected)


def test_weights_have_no_gradient():
    weight = WEIGHT.clone().requires_grad_()
    assert not global_token_count(MASK, token_weight=weight).requires_grad


BAD = {
    "nothing": ({}, ValueError, "masks must be given, or labels, got None for both"),
    "weights_alone": (dict(token_weight=WEIGHT), ValueError, "masks must be given, or labels"),
    "no_tensor": (dict(masks=3), TypeError, "masks must be a torch.Tensor, got int"),
    "none_in_a_list": (dict(masks=[MASK, None]), TypeError, r"masks\[1\] must be a torch.Tensor"),
    "empty_list": (dict(masks=[]), ValueError, "masks must hold a tensor, got an empty list; a "
                   "rank without micro-batches gives an empty tensor"),
    "number": (dict(masks=torch.tensor(3)), ValueError, r"masks must be \[..., S\], got \[\]"),
    "shape": (dict(masks=MASK[:, :3], labels=LABELS), ValueError,
              r"masks must have the shape of labels \[2, 5\], got \[2, 3\]"),
    "shape_in_a_list": (dict(masks=[MASK, MASK[:, 1:]], labels=[LABELS, LABELS]), ValueError,
                        r"masks\[1\] must have the shape of labels\[1\] \[2, 5\], got \[2, 4\]"),
    "length": (dict(masks=[MASK, MASK], labels=[LABELS]), ValueError,
               "labels must have one tensor for each of masks, 2, got 1"),
    "one_and_a_list": (dict(masks=MASK, segment_ids=[MASK, MASK]), ValueError,
                       "segment_ids must have one tensor for each of masks, 1, got 2"),
    "device": (dict(masks=MASK.to("meta"), labels=LABELS), ValueError,
               r"masks must be on the device of labels \(cpu\), got meta"),
    "devices": (dict(masks=[MASK, MASK.to("meta")]), ValueError,
                r"masks\[1\] must be on the device of masks\[0\] \(cpu\), got meta"),
    "additive": (dict(masks=MASK - 1.0), ValueError, "must be on where it is not 0, got negative"),
    "complex": (dict(masks=MASK * 1j), ValueError, "masks must be bool, integer or floating"),
    "floating_labels": (dict(labels=WEIGHT), ValueError, "labels must be integers"),
    "floating_ids": (dict(masks=MASK, segment_ids=WEIGHT), ValueError, "segment_ids must be int"),
    "integer_weights": (dict(masks=MASK, token_weight=MASK), ValueError,
                        "token_weight must be a floating tensor"),
    "shift": (dict(masks=MASK, shift=-1), ValueError, "shift must not be negative"),
    "ignore_index": (dict(masks=MASK, ignore_index=3), ValueError,
                     "labels must be given beside ignore_index"),
    "average": (dict(masks=MASK, average="yes"), TypeError, "average must be a bool"),
    "async_op": (dict(masks=MASK, async_op=3), TypeError, "async_op must be a bool"),
    "group": (dict(masks=MASK, group=[0, 1]), ValueError,
              "group must be None where torch.distributed is not initialized, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    options, error, text = BAD[name]
    with pytest.raises(error, match=f"^global_token_count: .*{text}"):
        global_token_count(**options)


# --- several ranks -------------------------------------------------------------------------------


def count_on_ranks():
    """Of rank r: a row of r + 1 tokens and, but on rank 0, one of 10 more; ranks send 8 bytes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    masks = [mle.lengths_to_mask([rank + 1]), mle.lengths_to_mask([10 * (rank > 0)], 12)]
    expected = size * (size + 1) / 2 + 10 * (size - 1)
    weights = [torch.full(mask.shape, 0.5) for mask in masks]
    sent = []

    def all_reduce(tensor, *args, **kwargs):
        sent.append((tensor.numel() * tensor.element_size(), tensor.dtype))
        return reduce(tensor, *args, **kwargs)

    reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", all_reduce):
        average, total = (global_token_count(masks, average=a) for a in (True, False))
        pending = global_token_count(masks, average=False, async_op=True)
        assert average == expected / size and total == expected and pending.wait() == expected
        assert pending.wait() == expected
        assert global_token_count(masks, token_weight=weights, average=False) == expected / 2
        alone = [dist.new_group([r]) for r in range(size)][rank]
        assert global_token_count(masks, group=alone) == masks[0].sum() + masks[1].sum()
    assert sent == 4 * [(8, torch.float64)]

    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    of_pair = 2 * (rank // 2 * 2 + 1) + 1 + 10 * (2 if rank > 1 else 1)
    assert global_token_count(masks, group=mesh["cp"], average=False) == of_pair
    none = torch.zeros(0) if rank else torch.ones(3, 2)  # a rank that has no micro-batch
    assert global_token_count(none, average=False) == 6
    assert global_token_count(none * 0) == 0


def refused_on_ranks():
    """Before any message, so that all ranks go on."""
    rank = dist.get_rank()
    others = [dist.new_group([0]), dist.new_group([1])][1 - rank]
    with pytest.raises(ValueError, match=f"group must contain the rank that calls, got .* {rank}"):
        global_token_count(MASK, group=others)
    from torch.distributed.tensor import Shard, distribute_tensor

    spread = distribute_tensor(MASK, init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(
        ValueError, match=r"got a DTensor placed .*: give the part of this rank, to_local\(\)"
    ):
        global_token_count(spread)
    return global_token_count(spread.to_local(), average=False).item()


def dies_before_counting():
    if dist.get_rank() == 1:
        os._exit(1)
    return global_token_count(MASK)


def dies_while_counting():
    """The other rank has started, and never comes to the end."""
    global_token_count(MASK)
    if dist.get_rank() == 1:
        os._exit(1)
    return global_token_count(MASK, async_op=True).wait()


@pytest.mark.parametrize("size", [2, 4])
def test_on_ranks(ranks, size):
    ranks(size).run(count_on_ranks)


def test_refusals_on_ranks(ranks):
    assert ranks(2).run(refused_on_ranks) == [6, 6]


@pytest.mark.parametrize("function", [dies_before_counting, dies_while_counting])
def test_a_rank_that_dies(ranks, function):
    living, dead = ranks(2).outcomes(function, grace=45)
    assert "died with exit code 1" in dead.error
    assert "RuntimeError" in living.error


def test_rank_means_are_another_number():
    """Two ranks with 1 and 3 targets of losses ln 2 and ln 4: the mean over the four is 7/4 ln 2,
    that of the two means 6/4 ln 2."""
    one, three = torch.full((1,), math.log(2)), torch.full((3,), math.log(4))
    usual = (one.mean() + three.mean()) / 2
    count = global_token_count([torch.ones(1), torch.ones(3)]) / 2  # as two ranks would have it
    ours = sum(mle.aggregate_tokens(x, normalizer=count) for x in (one, three)) / 2
    torch.testing.assert_close(usual.item(), 1.5 * math.log(2))
    torch.testing.assert_close(ours.item(), 1.75 * math.log(2))


def test_shifted_is_what_is_counted():
    """The mask of the targets, which ``shift`` makes of that of the tokens."""
    assert global_token_count(shifted(MASK, 1, 0)) == global_token_count(MASK, shift=1)
    assert torch.equal(shifted(MASK, 1, 0), F.pad(MASK[:, 1:], (0, 1)))
