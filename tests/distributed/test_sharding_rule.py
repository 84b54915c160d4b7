# SPDX-License-Identifier: BSD-3-Clause
"""Why the operators have no sharding rule of DTensor's: what one would do in silence."""

import torch
from placed import mesh_of, placed
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from masked_loss_ext import aggregate_tokens


def probe():
    """An operator whose second argument is a word, with a rule that knows it."""

    @torch.library.custom_op("masked_loss_ext_probe::total", mutates_args=())
    def total(x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x.clone() if reduction == "none" else x.sum()

    @total.register_fake
    def _(x, reduction):
        return torch.empty_like(x) if reduction == "none" else x.new_empty(())

    @register_sharding(torch.ops.masked_loss_ext_probe.total.default)
    def rule(x, reduction):
        result = Shard(0) if reduction == "none" else Partial()
        return [([Replicate()], [Replicate(), None]), ([result], [Shard(0), None])]

    return torch.ops.masked_loss_ext_probe.total


def two_reductions():
    """The sum of 0 1 2 3 over two ranks, after the same call with "none"."""
    operator, x = probe(), placed(torch.arange(4.0), mesh_of([Replicate()]), [Shard(0)])
    operator(x, "none")
    by_rule = operator(x, "sum")
    ours = aggregate_tokens(x, None, "sum")
    return by_rule.placements, by_rule.to_local().item(), ours.placements, ours.item()


def test_two_reductions_share_a_rule(ranks):
    shares = (1.0, 5.0)
    for share, (lies, rule, ours_lies, ours) in zip(
        shares, ranks(2).run(two_reductions), strict=True
    ):
        # The sum of a rank's own, said to be a part of a vector: nobody will add it up.
        assert lies == (Shard(0),) and rule == share
        assert ours_lies == (Replicate(),) and ours == 6.0
