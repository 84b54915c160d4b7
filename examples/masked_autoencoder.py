#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Masked autoencoding of images of unequal size: three of four patches are hidden and predicted.

The loss is that of the hidden patches alone (`masked_mse`): what is shown and what is padding is
not even read. Beside it guesses without a model, of which the model starts at the better one.

python examples/masked_autoencoder.py          about 40 seconds on two cores
python examples/masked_autoencoder.py --quick
"""

from __future__ import annotations

from dataclasses import dataclass

import examples_common as common
import torch
from acts.common.latents import cell_positions, channels, encode, spectrum
from acts.common.photos import CropSource, load_photos, split_photos
from acts.common.transformer import Block
from acts.denoise.model import position_embedding
from torch import Tensor, nn

import masked_loss_ext as mle

CELL, CELLS, HIDDEN = 8, (3, 10), 0.75  # pixels of a patch's side, patches of a crop's side, share
ROWS, LEARNING_RATE = 12, 2e-3


@dataclass
class Batch:
    patches: Tensor  # [B, T, C] coefficients, in units of their root mean square
    places: Tensor  # [B, T, 2]
    real: Tensor  # [B, T] bool, False at padding
    hidden: Tensor  # [B, T] bool, to be predicted


def draw(source: CropSource, unit: Tensor, size: int) -> Batch:
    crops = [source.crop(source.region()) for _ in range(size)]
    patches, real = mle.pad_latents_for_multi_res([encode(crop, CELL) / unit for crop in crops])
    shapes = [tuple(crop.shape[1:]) for crop in crops]
    places, _ = mle.pad_latents_for_multi_res([cell_positions(s, CELL) for s in shapes])
    drawn = torch.rand(real.shape, generator=source.rng)
    return Batch(patches, places, real, real.bool() & (drawn < HIDDEN))


def mean_of_shown(batch: Batch) -> Tensor:
    """[B, T, C] of each crop the mean of its patches that are not hidden, everywhere."""
    shown = (batch.real.bool() & ~batch.hidden)[..., None]
    mean = (batch.patches * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(batch.patches)


class Autoencoder(nn.Module):
    def __init__(self, dim: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.embed = nn.Linear(channels(CELL), dim)
        self.unknown = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(Block(dim, 3) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, channels(CELL))
        nn.init.zeros_(self.head.weight)  # before training: the mean of what is shown
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        mean = mean_of_shown(batch)
        x = self.embed(batch.patches - mean)
        x = torch.where(batch.hidden[..., None], self.unknown, x)
        x = x + position_embedding(batch.places, self.dim)
        for block in self.blocks:
            x = block(x, batch.real.bool()[:, None, None, :])
        return mean + self.head(self.norm(x))


def train(wanted, source: CropSource, unit: Tensor) -> Autoencoder:
    torch.manual_seed(wanted.seed)
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=wanted.steps, pct_start=0.2
    )
    for _ in common.progress(wanted.steps, "hidden patches"):
        batch = draw(source, unit, ROWS)
        loss = mle.masked_mse(model(batch), batch.patches, batch.hidden)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=300, quick=4)
    regions, others = split_photos(load_photos())
    unit = spectrum(regions, CELL).square().mean().sqrt()
    held_out = draw(CropSource(others, 5, CELL, CELLS), unit, 64)
    with torch.enable_grad():
        model = train(wanted, CropSource(regions, 1, CELL, CELLS, turn=True), unit)
    guesses = {
        "by the model": model(held_out),
        "by the mean of what is shown": mean_of_shown(held_out),
        "by grey": torch.zeros_like(held_out.patches),
    }
    errors = {
        name: mle.masked_mse(guess, held_out.patches, held_out.hidden).item()
        for name, guess in guesses.items()
    }
    padding = 1 - held_out.real.float().mean()
    plain = (guesses["by the model"] - held_out.patches).square().mean()
    print(f"{padding:.0%} of the held-out batch is padding; a mean over everything: {plain:.4f}")
    text = ", ".join(f"{error:.4f} {name}" for name, error in errors.items())
    print(f"squared error of hidden patches, held out: {text}")


if __name__ == "__main__":
    main()
