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
OFTEN = 30  # a pair of bytes seen so many times is an entry of its own in the model's input


class Counts(nn.Module):
    """What was counted in ``texts``: which pairs of bytes are frequent, and what follows a byte.

    ``index[before, byte]`` is the number of a frequent pair, or else of the byte alone;
    ``log_probs[k, byte]`` [256] says which byte comes k + 1 positions on.
    """

    def __init__(self, texts: Sequence[bytes], ahead: int) -> None:
        super().__init__()
        joined = bytearray(bytes([END] * ahead).join([b"", *texts, b""]))
        stream = torch.frombuffer(joined, dtype=torch.uint8).long()
        last = len(stream) - ahead
        at = torch.arange(1, last)[stream[1:last] != END]  # padding or another text follows an END
        often = count(stream[at - 1], stream[at]).flatten().ge(OFTEN).nonzero()[:, 0]
        index = torch.arange(BYTES**2) % BYTES
        index[often] = BYTES + torch.arange(len(often))
        self.entries = BYTES + len(often)
        self.register_buffer("index", index)
        # 0.1: what was never seen is not impossible.
        follow = torch.stack([count(stream[at], stream[at + k + 1]) for k in range(ahead)]) + 0.1
        self.register_buffer("log_probs", (follow / follow.sum(-1, keepdim=True)).log())

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] bytes -> [B, S] entries."""
        before = F.pad(tokens, (1, 0), value=END)[:, :-1]
        return self.index[before * BYTES + tokens]


def count(source: Tensor, target: Tensor) -> Tensor:
    """[256, 256] how often each byte goes with each."""
    return torch.bincount(source * BYTES + target, minlength=BYTES**2).view(BYTES, BYTES).float()


class ByteModel(nn.Module):
    """[B, S] bytes -> a list of logits [B, S, 256]: of the next byte, of the one after it, ...

    Every head adds to what the last byte alone says, and starts at 0: before training the model is
    a table of counts, and what training adds is the context. Padding stands on the right, where
    a causal model does not look, so that no mask is needed here.
    """

    def __init__(self, counts: Counts, longest: int, dim: int, depth: int) -> None:
        super().__init__()
        self.counts = counts
        self.embed = nn.Embedding(counts.entries, dim)
        self.position = nn.Embedding(longest, dim)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, BYTES) for _ in counts.log_probs)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        x = self.embed(self.counts(tokens)) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        tables = self.counts.log_probs
        return [head(x) + table[tokens] for head, table in zip(self.heads, tables, strict=True)]


@torch.no_grad()
def write(model: ByteModel, prompt: str, length: int, seed: int, temperature: float) -> str:
    """Continues ``prompt`` byte by byte, until it ends the text or ``length`` is reached."""
    device = model.embed.weight.device
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    while tokens.shape[1] < length:
        logits = model(tokens.to(device))[0][0, -1].float().cpu()
        byte = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        if byte == END:
            break
        tokens = torch.cat([tokens, byte[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
