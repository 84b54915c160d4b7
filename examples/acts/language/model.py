# SPDX-License-Identifier: BSD-3-Clause
"""A small causal transformer over bytes with a head for each of the next few bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.transformer import Block
from .data import END

BYTES = 256
TRIPLES = 1 << 14  # entries of the table of byte triples; two triples may share one
HASH = (31, 7919, 104729)  # primes: mixes the bytes of a triple


def pair_log_probs(texts: Sequence[bytes], ahead: int) -> Tensor:
    """[ahead, 256, 256]: log probability of the byte k + 1 positions after each byte."""
    counts = torch.full((ahead, BYTES * BYTES), 0.1)  # nothing seen is no reason for -inf
    stream = torch.tensor(list(bytes([END] * ahead).join([*texts, b""])))
    for k in range(ahead):
        source, target = stream[: -k - 1], stream[k + 1 :]
        # Whatever follows the end of a text is padding, or another text.
        pairs = (source * BYTES + target)[source != END]
        counts[k] += torch.bincount(pairs, minlength=BYTES * BYTES)
    counts = counts.view(ahead, BYTES, BYTES)
    return (counts / counts.sum(-1, keepdim=True)).log()


class ByteModel(nn.Module):
    """[B, S] bytes -> a list of logits [B, S, 256]: of the next byte, of the one after it, ...

    Every head adds to a table of byte pairs, counted in the training texts, and starts at 0: before
    training the model is that table, and what training adds is the context. Padding stands on the
    right, where a causal model does not look, so that no mask is needed here.
    """

    def __init__(self, pairs: Tensor, longest: int, dim: int, depth: int) -> None:
        super().__init__()
        ahead = len(pairs)  # pairs [ahead, 256, 256]
        self.pairs = nn.ModuleList(nn.Embedding.from_pretrained(p, freeze=False) for p in pairs)
        self.byte = nn.Embedding(BYTES, dim)
        self.triple = nn.Embedding(TRIPLES, dim)  # what a first layer would take long to learn
        self.position = nn.Embedding(longest, dim)
        for table in (self.byte, self.triple, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, BYTES) for _ in range(ahead))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        before = [F.pad(tokens, (k, 0))[:, : tokens.shape[1]] for k in range(3)]
        triple = sum(prime * b for prime, b in zip(HASH, before, strict=True)) % TRIPLES
        x = self.byte(tokens) + self.triple(triple) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return [head(x) + pairs(tokens) for head, pairs in zip(self.heads, self.pairs, strict=True)]


@torch.no_grad()
def write(model: ByteModel, prompt: str, length: int, seed: int, temperature: float) -> str:
    """Continues ``prompt`` byte by byte, until it ends the text or ``length`` is reached."""
    device = model.byte.weight.device
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    while tokens.shape[1] < length:
        logits = model(tokens.to(device))[0][0, -1].float().cpu()
        byte = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        if byte == END:
            break
        tokens = torch.cat([tokens, byte[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
