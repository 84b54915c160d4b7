# SPDX-License-Identifier: BSD-3-Clause
"""Sequences cut over ranks: labels are shifted before, and counted over all parts."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_training import (
    ROUNDING,
    VOCABULARY,
    average_over_ranks,
    gradient,
    make_model,
    update,
    weights,
)
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import global_token_count

LENGTH = 16


def contiguous(length, size):
    """Positions of each rank."""
    return list(torch.arange(length).chunk(size))


def head_tail(length, size):
    """As context parallelism balances causal attention: of 2 R pieces the r-th of both ends."""
    pieces = torch.arange(length).chunk(2 * size)
    return [torch.cat([pieces[r], pieces[-1 - r]]) for r in range(size)]


LAYOUTS = [contiguous, head_tail]


def make_rows(seed=0):
    """(tokens, mask, documents): padding on the right; one row is one document, others two."""
    g = torch.Generator().manual_seed(seed)
    mask = mle.lengths_to_mask([16, 11, 4], LENGTH)
    tokens = torch.randint(VOCABULARY, mask.shape, generator=g)
    documents = torch.arange(LENGTH).ge(6) & torch.tensor([[False], [True], [True]])
    return tokens, mask, documents.long()


def whole_loss(model, rows):
    """The mean over the targets of whole sequences, in PyTorch."""
    tokens, mask, documents = rows
    counts = mask[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    losses = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses[counts].mean()


def part_loss(model, rows, positions, way):
    """Of the part of one rank, such that the mean over ranks is the loss."""
    tokens, mask, documents = (x[:, positions] for x in rows)
    logits = model(tokens)
    if way == "shifted after the cut":
        options = dict(shift=1, segment_ids=documents)
        count = global_token_count(mask, **options)
        return mle.masked_cross_entropy(logits, tokens, mask, normalizer=count, **options)
    labels = mle.shift_labels(*rows)[:, positions]
    count = global_token_count(labels=labels)
    if way == "counted by part":
        count = (labels != -100).sum()
    return mle.masked_cross_entropy(logits, labels, normalizer=count)


def wrong_loss(model, rows, parts):
    """What labels shifted after the cut give, pair by pair: (loss, pairs, pairs of strangers)."""
    tokens, mask, documents = rows
    losses, strangers = [], 0
    for positions in parts:
        for t, u in zip(positions[:-1].tolist(), positions[1:].tolist(), strict=True):
            for b in range(len(tokens)):
                if mask[b, u] and documents[b, t] == documents[b, u]:
                    losses.append(F.cross_entropy(model(tokens[b, t]), tokens[b, u]))
                    strangers += u != t + 1
    return torch.stack(losses).mean(), len(losses), strangers


def losses_of_parts(layout, way):
    """(loss, gradient), averaged over ranks."""
    model, size = make_model(), dist.get_world_size()
    positions = layout(LENGTH, size)[dist.get_rank()]
    loss = part_loss(model, make_rows(), positions, way)
    return average_over_ranks(loss).item(), average_over_ranks(gradient(model, loss))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shifted_before_the_cut(ranks, layout, size):
    model = make_model()
    expected = whole_loss(model, make_rows())
    for loss, of_ranks in ranks(size).run(losses_of_parts, layout, "shift_labels"):
        torch.testing.assert_close(loss, expected.item(), **ROUNDING)
        torch.testing.assert_close(of_ranks, gradient(model, expected), **ROUNDING)


# What shifting after the cut gives: the loss, how many targets are left of 27, and how many of
# these are no successor. Right is a loss of 3.2496.
AFTER_THE_CUT = [
    (contiguous, 2, 3.2883, 25, 0),
    (contiguous, 4, 3.2199, 22, 0),
    (head_tail, 2, 3.1882, 25, 1),
    (head_tail, 4, 3.3853, 20, 3),
]


@pytest.mark.parametrize("layout,size,loss,left,strangers", AFTER_THE_CUT)
def test_shifted_after_the_cut(ranks, layout, size, loss, left, strangers):
    """The label behind each part is lost, and where pieces of both ends meet a stranger takes its
    place. The loss looks well; the gradient is off by 14 to 37 % of its length."""
    model, rows = make_model(), make_rows()
    right, parts = whole_loss(model, rows), layout(LENGTH, size)
    assert (mle.shift_labels(*rows) != -100).sum() == 27
    wrong, pairs, others = wrong_loss(model, rows, parts)
    assert (pairs, others) == (left, strangers)
    torch.testing.assert_close(wrong.item(), loss, rtol=0, atol=1e-4)
    torch.testing.assert_close(right.item(), 3.2496, rtol=0, atol=1e-4)
    length = gradient(model, right).norm()
    for found, of_ranks in ranks(size).run(losses_of_parts, layout, "shifted after the cut"):
        torch.testing.assert_close(found, wrong.item(), **ROUNDING)
        torch.testing.assert_close(of_ranks, gradient(model, wrong), **ROUNDING)
        assert 0.13 < (of_ranks - gradient(model, right)).norm() / length < 0.4


@pytest.mark.parametrize("size", [2, 4])
def test_counted_by_part(ranks, size):
    """The mean of the parts' means: 3.254 on two ranks, beside 3.250, and a gradient 13 % off."""
    model, rows = make_model(), make_rows()
    right, labels = whole_loss(model, rows), mle.shift_labels(*rows)
    logits = model(rows[0])
    means = [
        F.cross_entropy(logits[:, part].flatten(0, 1), labels[:, part].flatten())
        for part in contiguous(LENGTH, size)
    ]
    wrong = sum(means) / size
    for loss, of_ranks in ranks(size).run(losses_of_parts, contiguous, "counted by part"):
        torch.testing.assert_close(loss, wrong.item(), **ROUNDING)
        off = (of_ranks - gradient(model, right)).norm() / gradient(model, right).norm()
        assert abs(loss - right.item()) > 0.003 and off > 0.12, (loss, off)


def one_target():
    """Eight positions in parts, a target at the third, two classes of equal logits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    labels = torch.full((1, 8), -100)
    labels[0, 2] = 1
    labels = labels.chunk(size, 1)[rank]
    found = []
    for count in (global_token_count(labels=labels), (labels != -100).sum()):
        logits = torch.zeros(1, 8 // size, 2, requires_grad=True)
        loss = mle.masked_cross_entropy(logits, labels, normalizer=count)
        loss.backward()
        averaged = logits.grad.sum((0, 1)) / size  # of a parameter that is added everywhere
        dist.all_reduce(averaged)
        found.append((average_over_ranks(loss).item(), averaged.tolist()))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_one_target_among_all_parts(ranks, size):
    """A count of the own part divides its gradient by the number of parts."""
    for ours, usual in ranks(size).run(one_target):
        assert ours == (pytest.approx(math.log(2)), [0.5, -0.5])
        assert usual == (pytest.approx(math.log(2) / size), [0.5 / size, -0.5 / size])


def train_parts(layout):
    """Two steps of four ranks, two sequences of two parts: DDP averages over all of them."""
    rank, model = dist.get_rank(), DistributedDataParallel(make_model())
    rows, positions = make_rows(rank // 2), layout(LENGTH, 2)[rank % 2]
    for _ in range(2):
        part_loss(model, rows, positions, "shift_labels").backward()
        update(model.parameters())
    return weights(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_and_sequence_parallel(ranks, layout):
    model = make_model()
    rows = [torch.cat(both) for both in zip(make_rows(0), make_rows(1), strict=True)]
    for _ in range(2):
        whole_loss(model, rows).backward()
        update(model.parameters())
    for trained in ranks(4).run(train_parts, layout):
        torch.testing.assert_close(trained, weights(model), **ROUNDING)
