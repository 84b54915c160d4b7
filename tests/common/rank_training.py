# SPDX-License-Identifier: BSD-3-Clause
"""A tiny model, windows of micro-batches for each rank, and what one process makes of them."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import masked_loss_ext as mle

VOCABULARY, WIDTH = 11, 6
LEARNING_RATE, STEPS = 0.5, 2
# Of float64 numbers that are added in another order.
ROUNDING = dict(rtol=1e-12, atol=1e-14)

# Of each of four ranks two micro-batches, of each the lengths of its rows, which are padded to the
# longest of them and 2 more. The first token of a row is no target: a row of 1 counts for nothing.
WINDOWS = {
    "unequal": [[(9, 2), (5,)], [(3, 1), (1, 2, 2)], [(12,), (4, 4)], [(2,), (7, 1, 6)]],
    "one_without": [[(9, 2), (5,)], [(1, 1), (1, 0)], [(12,), (4, 4)], [(2,), (7, 1, 6)]],
    "one_batch_without": [[(1, 1), (5,)], [(3, 1), (1, 2, 2)], [(12,), (4, 4)], [(2,), (7, 6)]],
    "all_without": [[(1, 1), (0,)]] * 4,
}


def make_model():
    """Not quite fresh: its losses differ from token to token."""
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        head.weight.mul_(5)
    body = [nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*body, head).double()


def make_batch(lengths, seed):
    """(tokens, mask) of padded rows; what stands in the padding is no smaller than a token."""
    g = torch.Generator().manual_seed(seed)
    mask = mle.lengths_to_mask(lengths, max(lengths) + 2)
    return torch.randint(VOCABULARY, mask.shape, generator=g), mask


def make_window(name, rank):
    return [make_batch(lengths, 10 * rank + i) for i, lengths in enumerate(WINDOWS[name][rank])]


def as_one_process(name, size):
    """(loss of each step, weights): the mean over the targets of all rows, each by itself."""
    model, losses = make_model(), []
    windows = [make_window(name, rank) for rank in range(size)]
    for _ in range(STEPS):
        rows = [row for window in windows for batch in window for row in mle.unpad(*batch)]
        parts = [
            F.cross_entropy(model(row[:-1]), row[1:], reduction="none") for row in rows if len(row)
        ]
        total = torch.cat(parts)
        loss = total.sum() / max(len(total), 1)
        losses.append(loss.item())
        loss.backward()
        update(model.parameters())
    return losses, weights(model)


def update(parameters):
    with torch.no_grad():
        for p in parameters:
            p -= LEARNING_RATE * p.grad
            p.grad = None


def weights(model):
    whole = [getattr(p.detach(), "full_tensor", p.detach)() for p in model.parameters()]
    return torch.cat([p.flatten() for p in whole])


def token_losses(model, window):
    """Of each micro-batch the losses of its targets, from PyTorch alone."""
    return [
        F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")[
            mask[:, 1:]
        ]
        for tokens, mask in window
    ]


def gradient(model, loss):
    """As one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def average_over_ranks(tensor):
    """What gradient averaging makes of a gradient, or of a loss."""
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()
