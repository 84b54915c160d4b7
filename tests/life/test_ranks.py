# SPDX-License-Identifier: BSD-3-Clause
"""Losses in wrapped models that skip parts of themselves, and models that are made on meta, sharded
and then loaded: several ranks train as replicas of one process."""

import copy

import pytest
import rank_models
import torch
import torch.distributed as dist
from rank_models import H, V, make_model, whole, window
from ranks import ranks  # noqa: F401 (the fixture)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import keep_state_local

STEPS, RATE = 4, 0.5


class Skipping(torch.nn.Module):
    """The loss's own heads have a gradient in some steps only, and so has another layer."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed, self.extra = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V)
        self.loss = mle.UnifiedLoss(V, H, use_mtp=True, num_future_tokens=2)

    def forward(self, tokens, mask, everything):
        hidden = self.embed(tokens)
        if everything:
            hidden = hidden + self.extra(hidden)
        if self.way == "unified":
            given = {"hidden_states": hidden} if everything else {}
            return self.loss(self.head(hidden), tokens.roll(-1, 1), mask, **given)
        if self.way == "linear":  # the head is read and not called
            given = {"bias": self.head.bias} if everything else {}
            return mle.masked_linear_cross_entropy(
                hidden, self.head.weight, tokens, mask, shift=1, **given
            )
        return mle.masked_cross_entropy(
            self.head(hidden), tokens, mask, shift=1, gradient_in_forward=True,
            inplace_backward=True,
        )  # fmt: skip


def everything(step, rank):
    """Neither the same in every step nor on every rank."""
    return (step + rank) % 2 == 0


def backward(model, inner, step, rank):
    tokens, mask = window(step, rank)[0]
    model(tokens, mask, everything(step, rank)).backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in inner.parameters()]


@torch.no_grad()
def descend(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.sub_(RATE * gradient)
    model.zero_grad()


def train_skipping(way):
    model = keep_state_local(Skipping(way).double())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        descend(model, backward(wrapped, model, step, dist.get_rank()))
    return whole(model), {name: x.clone() for name, x in model.named_buffers()}


def skipping_replicas(way, size):
    first = Skipping(way).double()
    models = [copy.deepcopy(first) for _ in range(size)]
    for step in range(STEPS):
        found = [backward(model, model, step, rank) for rank, model in enumerate(models)]
        means = [torch.stack(same).mean(0) for same in zip(*found, strict=True)]
        for model in models:
            descend(model, means)
    return [(whole(model), dict(model.named_buffers())) for model in models]


@pytest.mark.filterwarnings("ignore:UnifiedLoss. use_mtp is on but")
@pytest.mark.parametrize("way", ["unified", "linear", "gradient in forward and place"])
def test_ddp_finds_parameters_that_a_step_does_not_use(ranks, way):  # noqa: F811
    expected = skipping_replicas(way, 2)
    for found, (weights, buffers) in zip(ranks(2).run(train_skipping, way), expected, strict=True):
        torch.testing.assert_close(found[0], weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], buffers, rtol=1e-6, atol=1e-6)
        assert any(
            (found[0][n] - p).abs().max() > 1e-3 for n, p in Skipping(way).named_parameters()
        )


# --- made on meta, sharded, loaded ---------------------------------------------------------------


def made_on_meta():
    """Weights and state after a step of a model whose checkpoint is loaded into shards."""
    model = rank_models.wrapped(make_model(), "fsdp2")
    full = StateDictOptions(full_state_dict=True)
    saved = get_model_state_dict(model, options=full)
    with torch.device("meta"):
        empty = make_model()
    fully_shard(empty)
    empty.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, saved, options=options)
    found = []
    for one in (model, empty):
        for tokens, mask in window(0, dist.get_rank()):
            one(tokens, mask).backward()
        torch.optim.SGD(one.parameters(), RATE).step()
        found.append((whole(one), {n: x for n, x in one.named_buffers() if n != "seen"}))
    return found


def test_fsdp2_of_a_model_that_was_made_on_meta(ranks):  # noqa: F811
    for (weights, buffers), (others, other_buffers) in ranks(2).run(made_on_meta):
        torch.testing.assert_close(others, weights, rtol=0, atol=0)
        torch.testing.assert_close(other_buffers, buffers, rtol=0, atol=0)
