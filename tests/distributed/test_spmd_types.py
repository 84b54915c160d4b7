# SPDX-License-Identifier: BSD-3-Clause
"""Types of SPMD programs (spmd_types): per mesh axis a tensor is the same on all ranks (R), another
on each (V), each rank's share of a sum (P), or the same with the same gradient (I). One process and
a fake group; nothing is sent.

What a raw collective makes of its tensors, and an operator of what is the same and what is not, no
checker can know. That is declared here: for the one all-gather of vocab_parallel and the operator
that reads its messages, and for the one all-reduce of global_token_count. All else is inferred.
That what is declared is so is shown by numbers, in the other files of this room.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from masked_loss_ext import masked_cross_entropy
from masked_loss_ext.distributed import (
    _count,
    _group,
    global_token_count,
    vocab_parallel,
    vocab_parallel_cross_entropy,
)

spmd = pytest.importorskip("spmd_types", reason="spmd_types is not installed: pip install .[test]")
pytest.importorskip("spmd_types.checker")

R, V, P, SAME = spmd.R, spmd.V, spmd.P, spmd.I


@pytest.fixture(scope="module")
def axes():
    """(mesh, dp, tp) of 2 x 4 ranks that are not there."""
    dist.init_process_group(backend="fake", rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    yield mesh, mesh.get_group("dp"), mesh.get_group("tp")
    dist.destroy_process_group()


@pytest.fixture
def typed(axes, monkeypatch):
    """typed(tensor, dp=..., tp=...): inside of the checker, with collectives that are declared."""
    mesh, dp, tp = axes
    all_gather, all_reduce = _group._all_gather, dist.all_reduce

    def gather(every, tensor, group):
        spmd.mutate_type(every, group, src=V, dst=R)
        all_gather(every, tensor, group=group)
        with spmd.no_typecheck():  # the fake group gives everybody's as this rank's: the first
            everybody = every.view(4, -1)  # class stands six numbers before the end
            everybody[:, -6] = 5.0 * torch.arange(4)

    def add_up(total, group, **options):
        spmd.mutate_type(total, group, src=V, dst=P)  # each rank's own count
        return all_reduce(total, group=group, **options)

    results_of = vocab_parallel.ops.results_of

    def merged(*args):
        results = results_of(*args)
        for result in results:  # of messages that are the same, on ranks that all go backward
            spmd.mutate_type(result, tp, src=V, dst=SAME)
        return results

    monkeypatch.setattr(vocab_parallel.ops, "results_of", merged)
    monkeypatch.setattr(_group, "_all_gather", gather)
    monkeypatch.setattr(_count.dist, "all_reduce", add_up)

    def put(tensor, **types):
        spmd.assert_type(tensor, {{"dp": dp, "tp": tp}[name]: t for name, t in types.items()})
        return tensor

    with contextlib.ExitStack() as stack:
        batch = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
        stack.enter_context(spmd.set_current_mesh(mesh))
        stack.enter_context(spmd.checker.typecheck())
        yield put, batch


def test_a_spread_vocabulary_gives_every_rank_the_loss(axes, typed):
    _, _, tp = axes
    put, (logits, target) = typed
    put(logits, dp=V, tp=V), put(target, dp=V, tp=R)
    where = {"group": tp, "vocab_start": 0, "vocab_size": 20}
    put(vocab_parallel_cross_entropy(logits, target, label_smoothing=0.1, **where), dp=V, tp=SAME)


def test_smoothing_over_the_local_shard_is_noticed(axes, typed):
    put, (logits, target) = typed
    put(logits, dp=V, tp=V), put(target, dp=V, tp=R)
    with pytest.raises(spmd.SpmdTypeError):
        put(masked_cross_entropy(logits, target, label_smoothing=0.1), dp=V, tp=SAME)


def shares(axes, typed):
    """The sum of each data-parallel rank, as a share of that of all, and its mask."""
    _, dp, _ = axes
    put, (logits, target) = typed
    mask = target == 0
    put(logits, dp=V, tp=R)
    total = masked_cross_entropy(put(logits, dp=V, tp=R), target, reduction="sum")
    return spmd.reinterpret(total, dp, src=V, dst=P), mask


def test_the_count_of_all_ranks_divides_shares(axes, typed):
    _, dp, _ = axes
    put, (_, target) = typed
    put(target, dp=V, tp=R)
    total, mask = shares(axes, typed)
    put(total / global_token_count(mask, group=dp, average=False), dp=P, tp=R)


def test_a_local_count_is_noticed(axes, typed):
    put, (_, target) = typed
    put(target, dp=V, tp=R)
    total, mask = shares(axes, typed)
    with pytest.raises(spmd.SpmdTypeError):
        total / mask.sum()
