# SPDX-License-Identifier: BSD-3-Clause
"""A small pre-norm transformer that denoises padded batches of image tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..common.transformer import Block
from .data import Batch

# log(v / s) spans many units; without a scale the weights would take hundreds of steps to get there
LOG_RATIO_SCALE = 4.0
MEAN_ABSOLUTE_NORMAL = math.sqrt(2.0 / math.pi)


def position_embedding(positions: Tensor, dim: int) -> Tensor:
    """[B, T, 2] -> [B, T, dim]: sine and cosine of row and column at dim / 4 frequencies."""
    step = torch.arange(dim // 4, device=positions.device) / (dim // 4)
    angles = positions[..., None] * 100.0**-step  # [B, T, 2, dim / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Denoiser(nn.Module):
    r"""Noisy tokens -> estimate of the clean ones.

    From a token and those around it the network says what to expect of each coefficient before its
    own noisy value n is trusted: a mean m and a variance v. With noise of variance s the estimate
    is then the posterior mean m + v / (v + s) * (n - m). Both start from the average ``spectrum``
    of photographs (mean 0), which is the Wiener filter; what training adds is the context.
    """

    def __init__(self, spectrum: Tensor, dim: int = 192, depth: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.register_buffer("spectrum", spectrum)  # [C]
        channels = spectrum.numel()
        self.dim = dim
        self.embed = nn.Linear(2 * channels, dim)
        self.condition = nn.Linear(2, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2 * channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        noise = batch.sigma.square() + 1e-6  # [B, T, 1]; padding has sigma 0
        scaled = batch.noisy * (self.spectrum.square() + noise).rsqrt()
        # The size of a coefficient tells how much structure there is; its sign does not.
        features = torch.cat([scaled, scaled.abs() - MEAN_ABSOLUTE_NORMAL], dim=-1)
        condition = torch.stack([noise[..., 0].log() / 2, batch.edit_mask], dim=-1)
        x = self.embed(features) + self.condition(condition)
        x = x + position_embedding(batch.positions, self.dim)
        # Keys at padding are left out, so a crop's estimate is the same alone and in a batch.
        key_mask = batch.attention_mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, key_mask)
        mean, log_ratio = self.head(self.norm(x)).chunk(2, dim=-1)
        mean = self.spectrum * mean
        # v / (v + s) as a sigmoid of log(v / s): no exponential that could overflow.
        trust = torch.sigmoid(LOG_RATIO_SCALE * log_ratio + (self.spectrum.square() / noise).log())
        return mean + trust * (batch.noisy - mean)
