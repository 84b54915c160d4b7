#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Diffusion-style training on several resolutions, with an edit region that counts more.

Crops of unequal size are noised at levels of their own, an edit rectangle of each more strongly.
`AttentionMaskMseLoss` weighs the rectangle four times and each noise level alike, and reads no
padding: the held-out crops are measured again with more padding behind them.

python examples/edit_masks.py          about 30 seconds on two cores
python examples/edit_masks.py --quick
"""

from __future__ import annotations

import examples_common as common
import torch
import torch.nn.functional as F
from acts.common.latents import spectrum
from acts.common.photos import load_photos, split_photos
from acts.denoise.data import Batch, CropSampler
from acts.denoise.model import Denoiser
from acts.denoise.quality import quality
from torch import nn

import masked_loss_ext as mle

CELLS, ROWS, LEARNING_RATE = 6, 10, 1e-3

criterion = mle.AttentionMaskMseLoss(foreground_weight=4.0, background_weight=1.0)


def loss_of(prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
    return criterion(
        prediction, batch.clean, batch.attention_mask, batch.edit_mask, weighting=batch.weighting
    )


def train(wanted, regions: list) -> nn.Module:
    torch.manual_seed(wanted.seed)
    model = Denoiser(spectrum(regions), dim=96, depth=2, heads=3)
    sampler = CropSampler(regions, wanted.seed + 1, CELLS, turn=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    for _ in common.progress(wanted.steps, "denoising"):
        batch = sampler.batch(ROWS)
        loss = loss_of(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def longer(batch: Batch, tokens: int) -> Batch:
    """The same crops, each with so many more tokens of padding."""
    names = ("noisy", "clean", "sigma", "positions", "edit_mask", "attention_mask")
    values = vars(batch).copy()
    for name in names:
        value = values[name]
        shape = (len(value), tokens, *value.shape[2:])
        values[name] = torch.cat([value, value.new_zeros(shape)], 1)
    return Batch(**values)


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=200, quick=4)
    regions, others = split_photos(load_photos())
    held_out = CropSampler(others, wanted.seed + 2, CELLS).batch(8 if wanted.quick else 48)
    model = train(wanted, regions)
    with torch.no_grad():
        for name, estimate in {"noisy": held_out.noisy, "denoised": model(held_out)}.items():
            psnr, loss = quality(estimate, held_out), loss_of(estimate, held_out)
            print(
                f"{name}: PSNR {psnr.edit:.2f} dB in edit regions, {psnr.whole:.2f} dB of whole "
                f"crops, loss {loss:.4f}"
            )
        padded = {
            1 - b.attention_mask.float().mean().item(): b for b in (held_out, longer(held_out, 40))
        }
        masked = {share: loss_of(model(b), b).item() for share, b in padded.items()}
        plain = {share: F.mse_loss(model(b), b.clean).item() for share, b in padded.items()}
    (share, loss), (more, same) = masked.items()
    print(
        f"loss, held out: {loss:.6f} with {share:.0%} of padding, {same:.6f} with {more:.0%}; a "
        f"mean over everything says {plain[share]:.6f} and {plain[more]:.6f}"
    )


if __name__ == "__main__":
    main()
