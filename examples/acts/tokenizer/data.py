# SPDX-License-Identifier: BSD-3-Clause
"""Crops of photographs, of unequal size, as the patches of one packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import masked_loss_ext as mle

from ..common.latents import cell_positions, decode, encode, grid
from ..common.photos import CropSource

CELL = 8  # pixels of a patch's side
REGISTERS = 64  # of a crop, before dropout
PAD_TO = 32  # the packed length is a multiple of this, which is also the block counted in


@dataclass
class Batch:
    """N crops; P patches of all of them together, crop by crop."""

    patches: Tensor  # [P, C]
    places: (
        Tensor  # [P, 4] centre of the patch in its crop, in (0, 1); height and width of the crop
    )
    shapes: list[tuple[int, int]]  # height and width of each crop in pixels

    def to(self, device: torch.device) -> Batch:
        return Batch(self.patches.to(device), self.places.to(device), self.shapes)

    def lengths(self) -> list[int]:
        """Patches of each crop."""
        return [rows * columns for rows, columns in (grid(s, CELL) for s in self.shapes)]

    def layout(self, keep_k: Sequence[int] | Tensor | int | None) -> mle.PackedLayout:
        """Patches, then registers, of which the first ``keep_k`` stay: a number, or one a crop."""
        if isinstance(keep_k, int):
            keep_k = [keep_k] * len(self.shapes)
        return mle.PackedLayout(
            [[patches, REGISTERS] for patches in self.lengths()],
            keep_k,
            pad_to_multiple=PAD_TO,
            device=self.patches.device,
        )

    def images(self, patches: Tensor) -> list[Tensor]:
        """[P, C] -> N images [3, H, W] on the CPU, clipped to [-1, 1]."""
        rows = patches.cpu().split(self.lengths())
        return [decode(r, s, CELL).clamp(-1, 1) for r, s in zip(rows, self.shapes, strict=True)]


def collate(crops: Sequence[Tensor]) -> Batch:
    shapes = [tuple(crop.shape[1:]) for crop in crops]
    places = []
    for shape in shapes:
        sides = torch.tensor(grid(shape, CELL)).float()
        centres = (cell_positions(shape, CELL) + 0.5) / sides
        places.append(torch.cat([centres, (sides / 8.0).expand_as(centres)], dim=1))
    return Batch(torch.cat([encode(crop, CELL) for crop in crops]), torch.cat(places), shapes)


def draw(source: CropSource, size: int, candidates: int = 1) -> Batch:
    """Of so many candidates the crop that varies most, for the photographs are mostly sky and blur:
    crops that anything can reconstruct teach little."""

    def crop() -> Tensor:
        drawn = [source.crop(source.region()) for _ in range(candidates)]
        return max(drawn, key=lambda image: image.var(dim=(1, 2)).sum().item())

    return collate([crop() for _ in range(size)])
