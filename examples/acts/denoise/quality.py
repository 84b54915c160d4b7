# SPDX-License-Identifier: BSD-3-Clause
"""How good the denoised crops are, measured on pixels as they would be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import masked_loss_ext as mle

from ..common.latents import decode
from .data import Batch


@dataclass(frozen=True)
class Reconstruction:
    """One crop, images [3, H, W] on the CPU, clipped to [-1, 1]."""

    noisy: Tensor
    denoised: Tensor
    clean: Tensor
    box: tuple[int, int, int, int]  # top, left, height, width of the edit rectangle
    photo: int

    def psnr(self, image: Tensor) -> float:
        return psnr(image, self.clean)

    def detail(self) -> float:
        """How much there is to see: the sum of the steps between neighbours."""
        return sum(self.clean.diff(dim=axis).abs().sum().item() for axis in (1, 2))


@dataclass(frozen=True)
class Quality:
    """PSNR in dB, mean over the crops."""

    whole: float
    edit: float  # inside the edit rectangle
    rest: float


def psnr(image: Tensor, clean: Tensor) -> float:
    """dB, of values in [-1, 1]."""
    return (10.0 * torch.log10(4.0 / (image - clean).square().mean())).item()


def images_of(tokens: Tensor, batch: Batch) -> list[Tensor]:
    """[B, T, C] -> B images [3, H, W] on the CPU, clipped to [-1, 1]."""
    rows = mle.unpad(tokens.cpu(), batch.attention_mask.cpu())
    return [decode(row, s).clamp(-1, 1) for row, s in zip(rows, batch.shapes, strict=True)]


def quality(estimate: Tensor, batch: Batch) -> Quality:
    scores = []
    pairs = zip(images_of(estimate, batch), images_of(batch.clean, batch), strict=True)
    for (image, clean), (top, left, height, width) in zip(pairs, batch.boxes, strict=True):
        edit = torch.zeros(clean.shape[1:], dtype=torch.bool)
        edit[top : top + height, left : left + width] = True
        regions = (torch.ones_like(edit), edit, ~edit)
        scores.append([psnr(image[:, region], clean[:, region]) for region in regions])
    return Quality(*torch.tensor(scores).mean(0).tolist())


def reconstructions(estimate: Tensor, batch: Batch) -> Sequence[Reconstruction]:
    images = (images_of(x, batch) for x in (batch.noisy, estimate, batch.clean))
    return [Reconstruction(*row) for row in zip(*images, batch.boxes, batch.regions, strict=True)]
