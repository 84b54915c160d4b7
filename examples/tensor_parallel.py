#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Tensor parallel training that equals one process: logits whose classes are spread over ranks.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import copy
import sys

import ranks_common as common
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import masked_loss_ext as mle


def cut(model: common.LanguageModel, world: common.World) -> nn.Module:
    """MLPs and the head are cut; the attention, whose heads lie side by side in one matrix, is
    not."""
    plan = {
        "blocks.*.mlp.0": ColwiseParallel(),
        "blocks.*.mlp.2": RowwiseParallel(),
        # The logits stay where they are made, as a DTensor that says so.
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    mesh = init_device_mesh(world.device.type, (world.size,))
    return parallelize_module(copy.deepcopy(model), mesh, plan)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def train() -> int:
    wanted = common.parse_arguments("A vocabulary that is spread over ranks.")
    world = common.start(wanted.device)
    everything = common.make_model(wanted, world)
    report = common.Report.of(everything, world, "Tensor parallel", rank_means=False)
    model = cut(everything, world)
    # Some parameters are DTensors and some are not: one by one, as foreach takes one kind.
    optimizer = torch.optim.AdamW(model.parameters(), common.LEARNING_RATE, foreach=False)
    for window in common.windows(wanted, world, ranks=1):
        batches = window.of_rank(0)  # the same texts on every rank
        count = sum(batch.attention_mask[:, 1:].sum() for batch in batches)
        loss = torch.zeros((), device=world.device)
        for batch in batches:
            logits = model(batch.tokens)
            # As in one process. 32 bytes a token go round, whatever the size of the vocabulary.
            part = mle.masked_cross_entropy(
                logits, batch.tokens, batch.attention_mask, shift=1, normalizer=count
            )
            part.backward()
            loss += part.detach().to_local()
        optimizer.step()
        optimizer.zero_grad()
        report.step(window, loss.item())
    return report.finish({name: whole(p) for name, p in model.named_parameters()})


if __name__ == "__main__":
    code = train()
    dist.destroy_process_group()
    sys.exit(code)
