# SPDX-License-Identifier: BSD-3-Clause
"""Ranks, shards and derivatives that do not fit: what is told, and where nothing hangs."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankError

from masked_loss_ext.distributed import vocab_parallel_cross_entropy


def refused(calls, text, kind):
    logits, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 5])
    options = calls[dist.get_rank()]
    with pytest.raises(kind, match=text):
        vocab_parallel_cross_entropy(logits, target, **options)


@pytest.mark.parametrize(
    "calls, text",
    [
        ([{"label_smoothing": 0.1}, {"label_smoothing": 0.2}], "all keywords must be the same"),
        ([{"temperature": 2.0}, {}], "temperature must be the same on all ranks, got 2 on"),
        ([{"reduction": "sum"}, {"reduction": "none"}], "all keywords must be the same"),
        ([{"vocab_start": 0, "vocab_size": 6}] * 2, "vocab_start must be where the shards"),
        ([{"vocab_start": 0, "vocab_size": 7}, {"vocab_start": 3, "vocab_size": 7}], "got of the"),
        ([{"vocab_start": 3}, {"vocab_start": 0}], "vocab_start must be where the shards"),
        ([{"vocab_start": -1}] * 2, "vocab_start must not be negative"),
        ([{"vocab_size": 2}] * 2, "vocab_size must be at least vocab_start"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_told(ranks, calls, text):
    ranks(2).run(refused, calls, text, ValueError)


def test_a_bad_label_is_told_on_all_ranks(ranks):
    text = r"vocab_parallel_cross_entropy: target at row \[1\] must be in \[0, 6\)"
    ranks(2).run(bad_label, text)


def bad_label(text):
    with pytest.raises(IndexError, match=text):
        vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 6]))


def orders_that_do_not_exist():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 5])
    (grad,) = torch.autograd.grad(
        vocab_parallel_cross_entropy(logits, target), logits, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives would need further messages"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives would need"):
        torch.func.jvp(lambda x: vocab_parallel_cross_entropy(x, target), (logits,), (logits,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.vmap(lambda x: vocab_parallel_cross_entropy(x, target))(logits.expand(2, 2, 3))


def test_derivatives_that_would_need_messages(ranks):
    ranks(2).run(orders_that_do_not_exist)


def other_numbers_of_rows():
    """Messages of other lengths: torch.distributed's business, and no number comes of it."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    rows = 2 + dist.get_rank()
    target = torch.zeros(rows, dtype=torch.int64)
    at = {"vocab_start": 3 * dist.get_rank(), "vocab_size": 6}
    loss = vocab_parallel_cross_entropy(torch.randn(rows, 3), target, group=group, **at)
    return loss.item()


def test_other_numbers_of_rows(ranks):
    with pytest.raises(RankError, match="other_numbers_of_rows failed"):
        ranks(2).run(other_numbers_of_rows, timeout=60)


def dies_in_the_message():
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    if dist.get_rank() == 1:
        os._exit(3)
    with pytest.raises(RuntimeError):
        vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), group=group)
    return "told"


def test_a_rank_that_dies(ranks):
    outcomes = ranks(2).outcomes(dies_in_the_message, timeout=60)
    assert outcomes[0].value == "told", outcomes[0].error
    assert "died with exit code 3" in outcomes[1].error


def test_a_world_of_one():
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, -100])
    loss = vocab_parallel_cross_entropy(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    with pytest.raises(ValueError, match="group must be None where torch.distributed is not"):
        vocab_parallel_cross_entropy(logits, target, group=3)
    with pytest.raises(TypeError, match="target must be a torch.Tensor, got NoneType"):
        vocab_parallel_cross_entropy(logits, None)
