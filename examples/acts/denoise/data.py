# SPDX-License-Identifier: BSD-3-Clause
"""Noisy crops of real photographs, of unequal size, as one padded batch.

In each crop one rectangle is noisier than the rest: it is the edit region, the foreground of the
loss. Letters: B crops, T tokens of the longest crop, C values of a token (common/latents.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import masked_loss_ext as mle

from ..common.latents import CELL, cell_positions, encode
from ..common.photos import CropSource

DATA_STD = 0.5  # of pixels scaled to [-1, 1]; about that of the two photographs
SIGMA_RANGE = (0.15, 0.6)  # noise of a crop, log-uniform: its "timestep"
EDIT_FACTOR = 2.5  # how much stronger the noise of the edit rectangle is


@dataclass
class Batch:
    """A padded batch; every tensor is 0 (False) at padding."""

    noisy: Tensor  # [B, T, C]
    clean: Tensor  # [B, T, C]
    sigma: Tensor  # [B, T, 1] noise level of the token
    positions: Tensor  # [B, T, 2] row and column of the token in its crop
    edit_mask: Tensor  # [B, T] share of the edit region, in [0, 1]
    attention_mask: Tensor  # [B, T] bool, True = a token of the crop
    weighting: Tensor  # [B, 1, 1] weight of the crop's noise level
    shapes: list[tuple[int, int]]  # height and width of each crop in pixels
    boxes: list[tuple[int, int, int, int]]  # top, left, height, width of each edit rectangle
    regions: list[int]  # which of the sampler's regions each crop is from

    def to(self, device: torch.device) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()})

    def loss_arguments(self) -> dict[str, Tensor]:
        """The keywords that every loss here is called with, besides the prediction."""
        names = ("attention_mask", "edit_mask", "weighting")
        return {"target": self.clean, **{name: getattr(self, name) for name in names}}


def level_weight(sigma: Tensor) -> Tensor:
    """Makes every noise level count alike: 1 / the error of the best guess pixel by pixel."""
    return (sigma**2 + DATA_STD**2) / (sigma * DATA_STD) ** 2


@dataclass
class NoisyCrop:
    clean: Tensor  # [3, H, W]
    noisy: Tensor  # [3, H, W]
    sigma: Tensor  # [3, H, W] standard deviation of the noise
    edit: Tensor  # [H, W] 1 in the edit rectangle
    box: tuple[int, int, int, int]
    level: float  # sigma outside the edit rectangle
    region: int


class CropSampler(CropSource):
    """Draws batches of noisy crops; the same seed gives the same batches."""

    def __init__(
        self, regions: Sequence[Tensor], seed: int, max_cells: int, *, turn: bool = False
    ) -> None:
        super().__init__(regions, seed, CELL, (2, max_cells), turn=turn)

    def batch(self, size: int) -> Batch:
        return collate([self.noisy_crop() for _ in range(size)])

    def noisy_crop(self) -> NoisyCrop:
        region = self.region()
        return self.add_noise(self.crop(region), region)

    def add_noise(self, clean: Tensor, region: int) -> NoisyCrop:
        low, high = (math.log(s) for s in SIGMA_RANGE)
        level = math.exp(torch.empty(()).uniform_(low, high, generator=self.rng).item())
        _, rows, columns = clean.shape
        height, width = (self.integer(n // 4, n // 2) for n in (rows, columns))
        top, left = self.integer(0, rows - height), self.integer(0, columns - width)
        edit = torch.zeros(rows, columns)
        edit[top : top + height, left : left + width] = 1.0
        sigma = (level * (1.0 + (EDIT_FACTOR - 1.0) * edit)).expand_as(clean)
        noisy = clean + sigma * torch.randn(clean.shape, generator=self.rng)
        return NoisyCrop(clean, noisy, sigma, edit, (top, left, height, width), level, region)


def collate(crops: Sequence[NoisyCrop]) -> Batch:
    """Crops of any sizes -> one padded batch."""

    def padded(rows: list[Tensor]) -> Tensor:
        return mle.pad_latents_for_multi_res(rows)[0]

    shapes = [tuple(crop.clean.shape[1:]) for crop in crops]
    clean, attention_mask = mle.pad_latents_for_multi_res([encode(c.clean) for c in crops])
    # The basis is orthonormal, so a token's noise has the mean variance of its pixels.
    variances = [cell_mean(c.sigma.square()) for c in crops]
    edit = [mle.map_mask_to_latent(c.edit[None]).T for c in crops]
    return Batch(
        noisy=padded([encode(c.noisy) for c in crops]),
        clean=clean,
        sigma=padded(variances).sqrt(),
        positions=padded([cell_positions(s) for s in shapes]),
        edit_mask=padded(edit).squeeze(-1),
        attention_mask=attention_mask,
        weighting=level_weight(torch.tensor([c.level for c in crops]))[:, None, None],
        shapes=shapes,
        boxes=[c.box for c in crops],
        regions=[c.region for c in crops],
    )


def cell_mean(image: Tensor) -> Tensor:
    """[3, H, W] -> [T, 1] mean of each cell."""
    cells = torch.nn.functional.avg_pool2d(image.mean(0, keepdim=True), CELL)
    return cells.reshape(-1, 1)
