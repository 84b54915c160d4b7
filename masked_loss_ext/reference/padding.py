# SPDX-License-Identifier: BSD-3-Clause
"""Ragged -> padded + mask, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .squared_error import accumulate_dtype


def pad_latents_for_multi_res(
    latents: list[Tensor], max_seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """[n_i, C] latents -> zero-padded [B, T, C] and bool mask [B, T]."""
    length = max(latent.shape[0] for latent in latents) if max_seq_len is None else max_seq_len
    first = latents[0]
    rows = [F.pad(latent.to(first), (0, 0, 0, length - latent.shape[0])) for latent in latents]
    return torch.stack(rows), lengths_to_mask(
        torch.tensor([latent.shape[0] for latent in latents], device=first.device), length
    )


def lengths_to_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """[B] lengths -> bool [B, T], True at t < length."""
    length = int(lengths.max()) if max_len is None else max_len
    return torch.stack([torch.arange(length, device=lengths.device) < n for n in lengths])


def unpad(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """Padded [B, T, ...] -> list of the rows' kept entries [n_i, ...]."""
    return [row[keep != 0] for row, keep in zip(padded, mask, strict=True)]


def map_mask_to_latent(image_mask: Tensor) -> Tensor:
    """[B, H, W] -> [B, (H//16) * (W//16)]: the strongest 8x8 average of each 2x2 group."""
    if not image_mask.is_floating_point():
        image_mask = image_mask != 0
    image_mask = image_mask.to(accumulate_dtype(image_mask, image_mask))
    batch, height, width = image_mask.shape
    cells = image_mask[:, : height // 8 * 8, : width // 8 * 8]
    cells = cells.reshape(batch, height // 8, 8, width // 8, 8).mean(dim=(2, 4))
    groups = cells.reshape(batch, height // 16, 2, width // 16, 2).amax(dim=(2, 4))
    return groups.flatten(1)


def shift_labels(
    labels: Tensor,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    shift: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """Each label at the position that predicts it, ``shift`` before its own, where it counts."""
    moved = torch.full_like(labels, ignore_index)
    for t in range(labels.shape[-1] - shift):
        counts = torch.ones_like(labels[..., t], dtype=torch.bool)
        if mask is not None:
            counts = mask[..., t + shift] != 0
        if segment_ids is not None:
            counts = counts & (segment_ids[..., t] == segment_ids[..., t + shift])
        moved[..., t] = torch.where(counts, labels[..., t + shift], ignore_index)
    return moved
