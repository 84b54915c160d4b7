# SPDX-License-Identifier: BSD-3-Clause
"""How well few registers do, and what dropping the others saves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import masked_loss_ext as mle

from .data import PAD_TO, REGISTERS, Batch
from .model import Tokenizer, pack_targets, patch_mask, reconstruction_loss

KEEP_K = (1, 2, 4, 8, 16, 32, 64)
BLOCK = PAD_TO  # tokens of a block's side; FlexAttention computes the blocks that are not empty


@dataclass(frozen=True)
class Blocks:
    """Of one attention over the whole packed batch."""

    computed: int
    all: int
    pairs: float  # share of all pairs of tokens that are allowed


@dataclass(frozen=True)
class Quality:
    mse: float  # of pixels in [-1, 1], mean over the patches of all crops
    blocks: Blocks

    @property
    def psnr(self) -> float:
        return 10.0 * math.log10(4.0 / self.mse)


@dataclass(frozen=True)
class StepCost:
    """Forward and backward of one training batch."""

    milliseconds: float
    tokens: int
    blocks: Blocks
    loss: float


def blocks_of(layout: mle.PackedLayout) -> Blocks:
    stats = layout.intervals("full").stats(BLOCK)
    return Blocks(stats.full_blocks + stats.partial_blocks, stats.blocks, stats.density)


@dataclass(frozen=True)
class FlatErrors:
    """Of images that say nothing, or one thing."""

    grey: float  # 0 everywhere
    mean_colour: float  # the mean of each crop, three exact numbers


def flat_errors(batch: Batch) -> FlatErrors:
    images = batch.images(batch.patches)
    pixels = sum(image.numel() for image in images)
    centred = (image - image.mean(dim=(1, 2), keepdim=True) for image in images)
    grey, mean_colour = (
        sum(x.square().sum().item() for x in group) / pixels for group in (images, centred)
    )
    return FlatErrors(grey, mean_colour)


@torch.no_grad()
def error_by_keep_k(model: Tokenizer, batch: Batch) -> dict[int, Quality]:
    found = {}
    for keep_k in KEEP_K:
        layout = batch.layout(keep_k)
        loss = reconstruction_loss(model, batch, layout).item()
        found[keep_k] = Quality(loss, blocks_of(layout))
    return found


@torch.no_grad()
def reconstruct(model: Tokenizer, batch: Batch, keep_k: int) -> list[Tensor]:
    layout = batch.layout(keep_k)
    return batch.images(model(batch, layout)[patch_mask(layout)])


@torch.no_grad()
def same_bits_with_nan(model: Tokenizer, batch: Batch, keep_k: int = REGISTERS // 4) -> bool:
    """Is the decoder's loss the same, bit by bit, when every dropped register is NaN?"""
    layout = batch.layout(keep_k)
    codes = model.encode(batch, layout)
    spoiled = [code.clone() for code in codes]
    for code in spoiled:
        code[keep_k:] = torch.nan
    clean, other = (
        mle.masked_mse(
            model.decode(batch, c, layout), pack_targets(batch, layout), patch_mask(layout)
        )
        for c in (codes, spoiled)
    )
    return torch.equal(clean, other)


def step_costs(model: Tokenizer, batch: Batch, keep_k: Tensor, rounds: int) -> dict[str, StepCost]:
    """The same batch with every register, with those of keep_k, and with the others taken out."""
    masked = batch.layout(keep_k)
    layouts = {
        "all registers kept": batch.layout(None),
        "the rest masked": masked,
        "the rest taken out": masked.compact(bucket=PAD_TO).layout,
    }
    steps = {name: training_step(model, batch, layout) for name, layout in layouts.items()}
    losses = {name: step() for name, step in steps.items()}  # and warm
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - begin))
    model.zero_grad()
    return {
        name: StepCost(statistics.median(times[name]), x.padded_len, blocks_of(x), losses[name])
        for name, x in layouts.items()
    }


def training_step(model: Tokenizer, batch: Batch, layout: mle.PackedLayout) -> Callable[[], float]:
    def step() -> float:
        model.zero_grad()
        loss = reconstruction_loss(model, batch, layout)
        loss.backward()
        return loss.item()  # waits for a GPU too: the backward pass is behind it

    return step
