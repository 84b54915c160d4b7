#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Data parallel training that equals one process: DDP, padded batches, accumulated steps.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import contextlib
import sys

import ranks_common as common
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import global_token_count


def train() -> int:
    wanted = common.parse_arguments("DDP with one denominator for the step.")
    world = common.start(wanted.device)
    model = common.make_model(wanted, world)
    report = common.Report.of(model, world, "DDP")
    ddp = DistributedDataParallel(model)
    optimizer = common.make_optimizer(ddp)
    for window in common.windows(wanted, world):
        batches = window.of_rank(world.rank)
        # The targets of the whole step, over micro-batches and ranks; divided by the number of
        # ranks, as DDP will divide the gradients by it.
        count = global_token_count([batch.attention_mask for batch in batches], shift=1)
        loss, rank_means = torch.zeros((), device=world.device), []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                logits = ddp(batch.tokens)
                target = (batch.tokens, batch.attention_mask)
                part = mle.masked_cross_entropy(logits, *target, shift=1, normalizer=count)
                part.backward()
            loss += part.detach()
            rank_means.append(mle.masked_cross_entropy(logits.detach(), *target, shift=1))
        optimizer.step()
        optimizer.zero_grad()
        usual = common.mean_over_ranks(torch.stack(rank_means).mean(), world)
        report.step(window, common.mean_over_ranks(loss, world), usual)
    return report.finish(dict(model.named_parameters()))


if __name__ == "__main__":
    code = train()
    dist.destroy_process_group()
    sys.exit(code)
