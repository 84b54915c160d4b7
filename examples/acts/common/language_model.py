# SPDX-License-Identifier: BSD-3-Clause
"""The smallest language model of the examples: a causal transformer over bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .transformer import Block

BYTES, WIDTH, DEPTH = 256, 64, 2


class LanguageModel(nn.Module):
    """[B, S] bytes -> logits [B, S, 256] of the byte that follows."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Embedding(longest, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, WIDTH // 32, causal=True) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))
