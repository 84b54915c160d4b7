# SPDX-License-Identifier: BSD-3-Clause
"""Losses of DTensors in one graph of torch.compile."""

import pytest
import torch
from placed import data, mesh_of, placed
from torch.distributed.tensor import Replicate, Shard

from masked_loss_ext import masked_cross_entropy, masked_linear_cross_entropy, masked_mse

R = Replicate()


def loss_of_logits(logits, target, mask):
    return masked_cross_entropy(logits, target, mask, label_smoothing=0.1)


def of_logits(placements):
    d, mesh = data(torch.float32), mesh_of(placements)
    compiled = torch.compile(loss_of_logits, fullgraph=True)
    found = []
    for call in (loss_of_logits, compiled):
        logits = placed(d["logits"], mesh, placements).requires_grad_()
        loss = call(logits, d["target"], d["mask"])
        loss.backward()
        found.append((loss.item(), logits.grad.full_tensor()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(2)], [R]], ids=str)
def test_cross_entropy(ranks, placements):
    ranks(2).run(of_logits, placements)


def test_cross_entropy_of_both(ranks):
    ranks(4).run(of_logits, [Shard(0), Shard(2)])


def of_hidden(hidden_placements, weight_placements):
    d, mesh = data(torch.float32), mesh_of([R])
    found = []
    for call in (
        masked_linear_cross_entropy,
        torch.compile(masked_linear_cross_entropy, fullgraph=True),
    ):
        hidden = placed(d["hidden"], mesh, hidden_placements).requires_grad_()
        weight = placed(d["head"], mesh, weight_placements).requires_grad_()
        loss = call(hidden, weight, d["target"])
        loss.backward()
        found.append((loss.item(), hidden.grad.full_tensor(), weight.grad.full_tensor()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("placements", [([Shard(0)], [R]), ([R], [Shard(0)])], ids=str)
def test_linear(ranks, placements):
    ranks(2).run(of_hidden, *placements)


def squared_error():
    d, mesh = data(torch.float32), mesh_of([R])
    for placement in (Shard(0), Shard(2)):
        found = []
        for call in (masked_mse, torch.compile(masked_mse, fullgraph=True)):
            prediction = placed(d["prediction"], mesh, [placement]).requires_grad_()
            loss = call(prediction, d["truth"], d["mask"])
            loss.backward()
            found.append((loss.item(), prediction.grad.full_tensor()))
        torch.testing.assert_close(found[0], found[1])


def test_squared_error(ranks):
    ranks(2).run(squared_error)
