# SPDX-License-Identifier: BSD-3-Clause
"""How many messages, and of how many bytes, a loss of DTensors costs."""

import torch
import torch.nn.functional as F
from messages import Messages
from placed import mesh_of, placed
from torch.distributed.tensor import Replicate, Shard

from masked_loss_ext import masked_cross_entropy, masked_linear_cross_entropy, masked_mse

N, V, D = 64, 4096, 32
R = Replicate()


def counted(call):
    """Messages of a forward and of the backward."""
    with Messages() as forward:
        loss = call()
    with Messages() as backward:
        loss.backward()
    return [tuple(m) for m in forward.all], [tuple(m) for m in backward.all]


def inputs():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=g)
    return logits, torch.randint(V, (N,), generator=g), mesh_of([R])


def of_rows():
    logits, target, mesh = inputs()
    logits = placed(logits, mesh, [Shard(0)]).requires_grad_()
    rows = placed(target, mesh, [Shard(0)])
    return {
        "labels known to all": counted(lambda: masked_cross_entropy(logits, target)),
        "labels cut": counted(lambda: masked_cross_entropy(logits, rows)),
        "normalizer": counted(lambda: masked_cross_entropy(logits, rows, normalizer=N)),
        "squared error": counted(lambda: masked_mse(logits, logits.detach(), target != 0)),
    }


def test_rows_cost_a_number_or_two(ranks):
    for found in ranks(2).run(of_rows):
        loss, count = ("all_reduce", 4), ("all_reduce", 8)
        assert found == {
            "labels known to all": ([loss], []),
            "labels cut": ([count, loss], []),
            "normalizer": ([loss], []),
            "squared error": ([loss], []),
        }


def of_classes():
    logits, target, mesh = inputs()
    leaf = placed(logits, mesh, [Shard(1)]).requires_grad_()
    ours = counted(lambda: masked_cross_entropy(leaf, target))
    # Where the sharding is given up, the whole vocabulary goes round: V / 2 floats a row.
    rows = placed(target, mesh, [R])
    usual = counted(lambda: F.cross_entropy(leaf.redistribute(placements=[R]), rows))
    # What F.cross_entropy does by itself, where nobody asks for loss_parallel.
    by_itself = counted(lambda: F.cross_entropy(leaf, rows))
    return ours, usual, by_itself


def test_the_vocabulary_stays_where_it_is(ranks):
    for (forward, backward), usual, by_itself in ranks(2).run(of_classes):
        assert [kind for kind, _ in forward] == ["all_gather"] and not backward
        assert sum(size for _, size in forward) <= 32 * N + 48  # bytes
        for messages, _ in (usual, by_itself):
            assert max(size for _, size in messages) == N * V // 2 * 4


def of_hidden():
    g = torch.Generator().manual_seed(0)
    mesh = mesh_of([R])
    hidden = placed(torch.randn(N, D, generator=g), mesh, [R]).requires_grad_()
    weight = placed(torch.randn(V, D, generator=g), mesh, [Shard(0)]).requires_grad_()
    target = torch.randint(V, (N,), generator=g)
    return counted(lambda: masked_linear_cross_entropy(hidden, weight, target))


def test_the_gradient_of_hidden_states_goes_round_once(ranks):
    for forward, backward in ranks(2).run(of_hidden):
        assert [kind for kind, _ in forward] == ["all_gather"]
        assert backward == [("all_reduce", N * D * 4)]
