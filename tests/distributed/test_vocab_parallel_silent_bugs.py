# SPDX-License-Identifier: BSD-3-Clause
"""What other programs get wrong, in silence, where a vocabulary is spread over ranks: their number
beside ours."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from masked_loss_ext.distributed import vocab_parallel_cross_entropy


def smoothing_over_the_shard():
    """Megatron-LM issue 737: the smoothed classes of one's own shard, by their number."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).double()
    target, epsilon = torch.tensor([0]), 0.3
    right = F.cross_entropy(logits, target, label_smoothing=epsilon)
    own = logits.chunk(2, -1)[dist.get_rank()]
    log_p = own - logits.logsumexp(-1, keepdim=True)
    nll = -logits.log_softmax(-1)[0, 0]
    wrong = (1 - epsilon) * nll - epsilon * log_p.mean()
    ours = vocab_parallel_cross_entropy(own, target, label_smoothing=epsilon)
    return right.item(), wrong.item(), ours.item()


def test_label_smoothing_over_the_local_shard(ranks):
    for i, (right, wrong, ours) in enumerate(ranks(2).run(smoothing_over_the_shard)):
        assert ours == pytest.approx(right, rel=1e-12)
        assert right == pytest.approx(0.890, abs=1e-3)  # wrong is another on each rank
        assert wrong == pytest.approx((0.740, 1.040)[i], abs=1e-3)


def a_label_elsewhere():
    """apple/ml-cross-entropy issue 59: a sentinel in the place of another rank's label."""
    logits = torch.tensor([[1.0, 2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    target = torch.tensor([1, -100])
    own = logits.chunk(2, -1)[dist.get_rank()]
    label = target[:1] - 2 * dist.get_rank()
    found = own[0, label].item() if 0 <= label < 2 else -math.inf
    total = torch.tensor(found)
    dist.all_reduce(total)
    wrong = logits[0].logsumexp(0) - total
    return wrong.item(), vocab_parallel_cross_entropy(own, target).item()


def test_a_label_of_another_rank(ranks):
    expected = math.log(sum(map(math.exp, (1, 2, 0.5, 0)))) - 2
    for wrong, ours in ranks(2).run(a_label_elsewhere):
        assert wrong == math.inf
        assert ours == pytest.approx(expected, rel=1e-12)


def equal_shards_only():
    """Where a rank takes its place times its own size for its first class: 5 classes, 2 + 3."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]).double()
    target = torch.tensor([2])
    rank = dist.get_rank()
    own = logits.split([2, 3], -1)[rank]
    assumed = rank * own.shape[-1]  # 3, and it is 2: nobody has class 2
    has = assumed <= target.item() < assumed + own.shape[-1]
    label = own[0, target.item() - assumed] if has else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(label)
    wrong = logits[0].logsumexp(0) - label
    return wrong.item(), vocab_parallel_cross_entropy(own, target).item()


def test_shards_of_other_sizes(ranks):
    right = math.log(sum(math.exp(i) for i in range(5))) - 2
    for wrong, ours in ranks(2).run(equal_shards_only):
        assert ours == pytest.approx(right, rel=1e-12)
        assert wrong == pytest.approx(right + 2)
