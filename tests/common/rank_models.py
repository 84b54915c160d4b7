# SPDX-License-Identifier: BSD-3-Clause
"""A model with its loss inside, and what several ranks make of it: as DDP, FSDP2, or replicas of
one process whose gradients are averaged by hand."""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.distributed import keep_state_local

V, H, EXPERTS, LENGTH = 7, 4, 4, 6
STEPS, MICRO_BATCHES, RATE = 3, 2, 0.5


class Model(torch.nn.Module):
    """Tokens [B, S] to the loss of the next; a buffer counts what its rank has seen."""

    def __init__(self, **options):
        super().__init__()
        self.embed = torch.nn.Embedding(V, H)
        self.gate = torch.nn.Linear(H, EXPERTS)
        self.head = torch.nn.Linear(H, V)
        self.loss = UnifiedLoss(V, H, num_experts=EXPERTS, use_moe_balancing=True, **options)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens, mask):
        self.seen += mask.sum()
        hidden = self.embed(tokens)
        gate = self.gate(hidden).flatten(0, 1)
        return self.loss(
            self.head(hidden),
            tokens.roll(-1, 1),
            mask,
            hidden_states=hidden,
            gate_logits=gate,
            expert_indices=gate.detach().topk(2).indices,
        )


def make_model(**options):
    """The same on every rank; T is about to move."""
    torch.manual_seed(0)
    model = Model(use_mtp=True, num_future_tokens=2, **options).double()
    main = model.loss.main_loss
    main.loss_history[:9] = torch.tensor([1.0, 3.0, 2.0]).repeat(3)
    for name in ("history_ptr", "history_size"):
        getattr(main, name).fill_(9)
    return model


def window(step, rank):
    """The micro-batches of a rank: tokens and mask, with padding of unequal length."""
    rng = torch.Generator().manual_seed(100 * step + rank)
    batches = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(V, (3, LENGTH), generator=rng)
        lengths = torch.randint(2, LENGTH + 1, (3, 1), generator=rng)
        batches.append((tokens, torch.arange(LENGTH) < lengths))
    return batches


def wrapped(model, way):
    """way: "ddp", "ddp static_graph", "ddp compile", or "fsdp2" and the submodules that are units
    of their own."""
    name, *units = way.split()
    if name == "ddp":
        model = keep_state_local(model)
        if units == ["compile"]:
            model.compile(backend="aot_eager")
        return DistributedDataParallel(model, static_graph=units == ["static_graph"])
    for unit in units:
        fully_shard(model.get_submodule(unit))
    return fully_shard(model)


def train(way, steps=STEPS):
    """On one rank: (whole weights, buffers)."""
    model = make_model()
    step_model = wrapped(model, way)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(steps):
        for i, (tokens, mask) in enumerate(window(step, dist.get_rank())):
            last = i == MICRO_BATCHES - 1
            with _unsynced(step_model, way, last):
                (step_model(tokens, mask) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), {name: buffer.clone() for name, buffer in model.named_buffers()}


def _unsynced(model, way, last):
    if way.startswith("fsdp2"):
        model.set_requires_gradient_sync(last)
    elif way != "ddp static_graph" and not last:  # which cannot begin without synchronising
        return model.no_sync()
    return contextlib.nullcontext()


def whole(model):
    """Its weights, gathered where they are sharded."""
    found = {}
    for name, p in model.named_parameters():
        p = p.detach()
        found[name] = p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
    return found


def replicas(ranks, steps=STEPS):
    """What ``train`` gives on each rank, by one process."""
    first = make_model()
    models = [copy.deepcopy(first) for _ in range(ranks)]
    for step in range(steps):
        for rank, model in enumerate(models):
            model.zero_grad()
            for tokens, mask in window(step, rank):
                (model(tokens, mask) / MICRO_BATCHES).backward()
        for same in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.stack([p.grad for p in same]).mean(0)
            with torch.no_grad():
                for p in same:
                    p.sub_(RATE * gradient)
    return [(whole(model), dict(model.named_buffers())) for model in models]
