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
OFTEN = 30  # a pair of bytes seen so many times is a context of its own
TRUST = 4.0  # how many times one must be seen to outweigh the byte alone


class Contexts(nn.Module):
    """What is likely after the last two bytes, counted in ``texts``; after one where two are rare.

    ``index[before, byte]`` is the number of the context, ``log_probs[k, context]`` [256] says which
    byte comes k + 1 positions on.
    """

    def __init__(self, texts: Sequence[bytes], ahead: int) -> None:
        super().__init__()
        stream = torch.frombuffer(
            bytearray(bytes([END] * ahead).join([b"", *texts, b""])), dtype=torch.uint8
        ).long()
        last = len(stream) - ahead
        at = torch.arange(1, last)[stream[1:last] != END]  # padding or another text follows an END
        byte, pair = stream[at], stream[at - 1] * BYTES + stream[at]
        often = (torch.bincount(pair, minlength=BYTES**2) >= OFTEN).nonzero()[:, 0]
        index = torch.arange(BYTES**2) % BYTES
        index[often] = BYTES + torch.arange(len(often))
        self.register_buffer("index", index)
        follow = [stream[at + k + 1] for k in range(ahead)]
        after_byte = [count(byte, next_byte, BYTES) + 0.1 for next_byte in follow]
        after_pair = [count(index[pair], next_byte, BYTES + len(often)) for next_byte in follow]
        self.register_buffer(
            "log_probs", torch.stack([*map(self.blend, after_byte, after_pair)]).log()
        )

    def blend(self, after_byte: Tensor, after_pair: Tensor) -> Tensor:
        by_byte = after_byte / after_byte.sum(-1, keepdim=True)
        pair_of = torch.zeros(len(after_pair), dtype=torch.long)
        pair_of[self.index] = torch.arange(BYTES**2) % BYTES  # the last byte of each context
        after_pair[:BYTES] = 0.0
        mixed = after_pair + TRUST * by_byte[pair_of]
        return mixed / mixed.sum(-1, keepdim=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] bytes -> [B, S] contexts."""
        before = F.pad(tokens, (1, 0), value=END)[:, :-1]
        return self.index[before * BYTES + tokens]


def count(source: Tensor, target: Tensor, sources: int) -> Tensor:
    """[sources, 256] how often each byte follows each source."""
    counts = torch.bincount(source * BYTES + target, minlength=sources * BYTES)
    return counts.view(sources, BYTES).float()


class ByteModel(nn.Module):
    """[B, S] bytes -> a list of logits [B, S, 256]: of the next byte, of the one after it, ...

    Every head adds to what the last two bytes alone say, and starts at 0: before training the model
    is a table of counts, and what training adds is the context. Padding stands on the right, where
    a causal model does not look, so that no mask is needed here.
    """

    def __init__(self, contexts: Contexts, longest: int, dim: int, depth: int) -> None:
        super().__init__()
        self.contexts = contexts
        ahead, number, _ = contexts.log_probs.shape
        self.embed = nn.Embedding(number, dim)
        self.position = nn.Embedding(longest, dim)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, BYTES) for _ in range(ahead))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        contexts = self.contexts(tokens)
        x = self.embed(contexts) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        tables = self.contexts.log_probs
        return [head(x) + table[contexts] for head, table in zip(self.heads, tables, strict=True)]


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
