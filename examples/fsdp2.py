#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Sharded training that equals one process: FSDP2, a loss without logits, accumulated steps.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import sys

import ranks_common as common
import torch
import torch.distributed as dist
from acts.language.data import Batch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import masked_loss_ext as mle
from masked_loss_ext.distributed import global_token_count


class WithLoss(common.LanguageModel):
    """The loss is made inside of the forward: there the head's weight, which is read and not
    called, is whole. Outside it is a shard."""

    # Of the step. Not an argument of forward: mixed precision would round it with the others.
    normalizer: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        hidden, target = self.hidden(batch.tokens), (batch.tokens, batch.attention_mask)
        return mle.masked_linear_cross_entropy(
            hidden, self.head.weight, *target, shift=1, normalizer=self.normalizer
        )


def sharded(model: common.LanguageModel, world: common.World) -> WithLoss:
    ours = WithLoss(model.position.num_embeddings).to(world.device)
    ours.load_state_dict(model.state_dict())
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in ours.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(ours, mesh=mesh)


def train() -> int:
    wanted = common.parse_arguments("FSDP2 with one denominator for the step.")
    world = common.start(wanted.device)
    whole = common.make_model(wanted, world)
    report = common.Report.of(whole, world, "FSDP2")
    model = sharded(whole, world)
    optimizer = common.make_optimizer(model)
    for window in common.windows(wanted, world):
        batches = window.of_rank(world.rank)
        # The targets of the whole step, over micro-batches and ranks; divided by the number of
        # ranks, as FSDP will divide the gradients by it.
        count = global_token_count([batch.attention_mask for batch in batches], shift=1)
        loss, rank_means = torch.zeros((), device=world.device), []
        for i, batch in enumerate(batches):
            model.normalizer = None
            with torch.no_grad():
                rank_means.append(model(batch))
            model.normalizer = count
            model.set_requires_gradient_sync(i == len(batches) - 1)
            part = model(batch)
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        usual = common.mean_over_ranks(torch.stack(rank_means).mean(), world)
        report.step(window, common.mean_over_ranks(loss, world), usual)
    return report.finish({name: p.full_tensor() for name, p in model.named_parameters()})


if __name__ == "__main__":
    code = train()
    dist.destroy_process_group()
    sys.exit(code)
