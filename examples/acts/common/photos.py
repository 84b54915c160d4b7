# SPDX-License-Identifier: BSD-3-Clause
"""Random crops, of unequal size, of the photographs that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

# Columns never trained on, a strip of each photograph: the right half of the pagoda and of the
# dahlia, so that what is held out has structure, and structure of a kind that can be learnt.
HELD_OUT_COLUMNS = ((208, 368), (304, 464))


def load_photos() -> list[Tensor]:
    """[3, H, W] in [-1, 1]."""
    images = load_sample_images().images
    return [torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1.0 for i in images]


def split_photos(photos: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(regions to train on, regions held out), without a pixel in common."""
    train, held_out = [], []
    for photo, (left, right) in zip(photos, HELD_OUT_COLUMNS, strict=True):
        train += [photo[:, :, :left], photo[:, :, right:]]
        held_out.append(photo[:, :, left:right])
    return train, held_out


class CropSource:
    """Draws crops whose sides are whole cells; the same seed gives the same crops."""

    def __init__(
        self,
        regions: Sequence[Tensor],
        seed: int,
        cell: int,
        cells: tuple[int, int],
        *,
        turn: bool = False,
    ) -> None:
        """``cells``: fewest and most of a side. ``turn``: crops are flipped and transposed at
        random, so that few photographs go far."""
        self.regions = regions
        self.areas = torch.tensor([r.shape[1] * r.shape[2] for r in regions]).float()
        self.cell = cell
        self.cells = cells
        self.turn = turn
        self.rng = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.rng))

    def region(self) -> int:
        """Any pixel is as likely as any other."""
        return int(torch.multinomial(self.areas, 1, generator=self.rng))

    def crop(self, region: int) -> Tensor:
        whole = self.regions[region]
        height, width = (self.cell * self.integer(*self.cells) for _ in range(2))
        top = self.integer(0, whole.shape[1] - height)
        left = self.integer(0, whole.shape[2] - width)
        crop = whole[:, top : top + height, left : left + width]
        if not self.turn:
            return crop
        crop = crop.flip(1) if self.integer(0, 1) else crop
        crop = crop.flip(2) if self.integer(0, 1) else crop
        return crop.transpose(1, 2) if self.integer(0, 1) else crop
