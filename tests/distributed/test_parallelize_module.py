# SPDX-License-Identifier: BSD-3-Clause
"""Tensor-parallel models that parallelize_module makes: they train unchanged, with the loss and the
weights of one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from masked_loss_ext import masked_cross_entropy, masked_linear_cross_entropy
from masked_loss_ext.distributed import vocab_parallel_cross_entropy
from masked_loss_ext.integrations.transformers import causal_lm_loss

B, S, V, WIDTH, HEADS = 2, 8, 33, 16, 4  # 33 classes: 17 and 16; 9, 9, 9 and 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm_attention(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)  # the heads that are here
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(V, WIDTH), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, V, bias=False)

    def hidden(self, tokens):
        return self.norm(self.block(self.embed(tokens)))

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


def batch():
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (B, S), generator=g)
    return tokens, torch.tensor([[1] * S, [1] * 3 + [0] * (S - 3)])


def tensor_parallel(mesh, head, sequence=False):
    """The usual plan; sequence: norms and sums between the layers on cut sequences."""
    torch.manual_seed(0)
    whole = Model()
    model = copy.deepcopy(whole)
    to = {"output_layouts": Shard(1)} if sequence else {}
    come = {"input_layouts": Shard(1)} if sequence else {}
    plan = {f"block.{name}": ColwiseParallel(**come) for name in ("query", "key", "value", "up")}
    plan |= {f"block.{name}": RowwiseParallel(**to) for name in ("out", "down")}
    plan["head"] = head
    if sequence:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        norms = ("block.norm_attention", "block.norm_mlp", "norm")
        plan |= {name: SequenceParallel() for name in norms}
    return whole, parallelize_module(model, mesh, plan)


def trained(whole, model, loss_of_whole, loss_of_model):
    """Three steps of each, which must not differ; the last loss."""
    tokens, mask = batch()
    optimizers = [torch.optim.SGD(m.parameters(), 0.5, foreach=False) for m in (whole, model)]
    for _ in range(3):
        expected, loss = loss_of_whole(whole, tokens, mask), loss_of_model(model, tokens, mask)
        torch.testing.assert_close(loss.item(), expected.item(), rtol=2e-6, atol=0)
        for optimizer, one in zip(optimizers, (expected, loss), strict=True):
            optimizer.zero_grad()
            one.backward()
            optimizer.step()
    parameters = dict(model.named_parameters())
    for name, p in whole.named_parameters():
        found = parameters[name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        torch.testing.assert_close(found, p, rtol=1e-5, atol=1e-6, msg=name)
    return loss.item()


def of_logits(model, tokens, mask):
    return masked_cross_entropy(model(tokens), tokens, mask, shift=1, label_smoothing=0.1)


def of_one(model, tokens, mask):
    return masked_cross_entropy(model(tokens), tokens, mask, shift=1)


CUT = {"output_layouts": Shard(-1), "use_local_output": False}


def logits_as_dtensor(sequence):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    come = {"input_layouts": Shard(1)} if sequence else {}
    whole, model = tensor_parallel(mesh, ColwiseParallel(**CUT, **come), sequence)
    logits = model(batch()[0])
    assert isinstance(logits, DTensor) and logits.placements == (Shard(2),)
    return trained(whole, model, of_logits, of_logits)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "SequenceParallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_loss_function_stays_as_it_is(ranks, size, sequence):
    losses = ranks(size).run(logits_as_dtensor, sequence)
    assert len(set(losses)) == 1  # every rank has the number of the whole


def whole_logits():
    """What RowwiseParallel and ColwiseParallel give where nobody says otherwise: whole tensors."""
    mesh = init_device_mesh("cpu", (2,))
    head = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    whole, model = tensor_parallel(mesh, head)
    return trained(whole, model, of_logits, of_logits)


def local_logits():
    mesh = init_device_mesh("cpu", (2,))
    whole, model = tensor_parallel(mesh, ColwiseParallel(output_layouts=Shard(-1)))

    def loss(model, tokens, mask):
        logits = model(tokens)
        assert type(logits) is torch.Tensor and logits.shape[-1] < V
        return vocab_parallel_cross_entropy(logits, tokens, mask, shift=1, group=mesh)

    return trained(whole, model, of_one, loss)


def causal():
    mesh = init_device_mesh("cpu", (2,))
    whole, model = tensor_parallel(mesh, ColwiseParallel(**CUT))

    def loss(model, tokens, mask):
        return causal_lm_loss({"logits": model(tokens)}, tokens, mask=mask)

    return trained(whole, model, of_one, loss)


def without_logits():
    mesh = init_device_mesh("cpu", (2,))
    whole, model = tensor_parallel(mesh, ColwiseParallel(**CUT))
    everywhere = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )
    model.norm = parallelize_module(model.norm, mesh, everywhere)

    def loss(model, tokens, mask):
        hidden, weight = model.hidden(tokens), model.head.weight
        return masked_linear_cross_entropy(hidden, weight, tokens, mask, shift=1)

    return trained(whole, model, of_one, loss)


@pytest.mark.parametrize("way", [whole_logits, local_logits, causal, without_logits])
def test_other_ways(ranks, way):
    losses = ranks(2).run(way)
    assert losses[0] == losses[1]


def beside_pytorch():
    """F.cross_entropy under loss_parallel: the same where it can, an error with smoothing."""
    mesh = init_device_mesh("cpu", (2,))
    _, model = tensor_parallel(mesh, ColwiseParallel(**CUT))
    tokens, mask = batch()
    labels = tokens.masked_fill(mask == 0, -100)
    logits = model(tokens)
    ours = masked_cross_entropy(logits, labels).item()
    smoothed = masked_cross_entropy(logits, labels, label_smoothing=0.1).item()
    with loss_parallel():
        theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        # With PyTorch 2.13: aten.masked_fill_ got mixed torch.Tensor and DTensor.
        with pytest.raises((NotImplementedError, RuntimeError)):
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    plain = F.cross_entropy(
        logits.full_tensor().flatten(0, 1), labels.flatten(), label_smoothing=0.1
    ).item()
    return ours, theirs, smoothed, plain


def test_beside_loss_parallel(ranks):
    for ours, theirs, smoothed, plain in ranks(2).run(beside_pytorch):
        assert ours == pytest.approx(theirs, rel=2e-6)
        assert smoothed == pytest.approx(plain, rel=2e-6)
