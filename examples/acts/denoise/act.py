# SPDX-License-Identifier: BSD-3-Clause
"""Act "denoise": a transformer learns to denoise crops of photographs, of unequal size."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import masked_loss_ext as mle

from .. import Options
from ..common.latents import spectrum
from ..common.photos import load_photos, split_photos
from .data import Batch, CropSampler
from .measure import loss_forms_on, time_and_memory
from .model import Denoiser
from .plots import plot_reconstructions, plot_training
from .quality import quality, reconstructions
from .report import print_comparison, print_quality

FULL = {"steps": 200, "crops": 16, "cells": 7, "held_out": 32, "dim": 192, "depth": 4}
QUICK = {"steps": 6, "crops": 4, "cells": 3, "held_out": 6, "dim": 48, "depth": 1}
EVALUATIONS = 10  # of the held-out batch, spread over the training
LEARNING_RATE = 1e-3


@dataclass
class History:
    train: list[float] = field(default_factory=list)  # a loss each step
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # step, loss, PSNR
    seconds: float = 0.0


def run(options: Options) -> None:
    settings = dict(QUICK if options.quick else FULL)
    settings["steps"] = options.steps or settings["steps"]
    torch.manual_seed(options.seed)
    train, held_out = split_photos(load_photos())
    sampler = CropSampler(train, options.seed + 1, settings["cells"], turn=True)
    batch = CropSampler(held_out, options.seed + 2, settings["cells"] + 1)
    batch = batch.batch(settings["held_out"]).to(options.device)
    model = Denoiser(spectrum(train), settings["dim"], settings["depth"]).to(options.device)
    criterion = mle.AttentionMaskMseLoss(foreground_weight=2.0, background_weight=1.0)

    before = predict(model, batch)
    history = fit(model, criterion, sampler, batch, settings)
    after = predict(model, batch)
    estimates = {"noisy": batch.noisy, "before training": before, "after training": after}
    print_quality(batch, history, {name: quality(x, batch) for name, x in estimates.items()})
    print_comparison(
        loss_forms_on(after, batch.loss_arguments()),
        time_and_memory(options.device, options.quick),
    )
    noisy_psnr = quality(batch.noisy, batch).whole
    plot_training(history, noisy_psnr, options.output / "denoise_losses.png")
    plot_reconstructions(
        reconstructions(after, batch), options.output / "denoise_reconstructions.png"
    )
    for path in sorted(options.output.glob("denoise_*.png")):
        print(f"picture: {path}")


def fit(
    model: nn.Module, criterion: nn.Module, sampler: CropSampler, held_out: Batch, settings: dict
) -> History:
    steps = settings["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, 10 / steps)
    )
    history = History(held_out=[(0, *evaluate(model, criterion, held_out))])
    begin = time.perf_counter()
    progress = tqdm(range(1, steps + 1), desc="training", unit="step", mininterval=0.5)
    for step in progress:
        batch = sampler.batch(settings["crops"]).to(held_out.clean.device)
        loss = criterion(model(batch), **batch.loss_arguments())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.train.append(loss.item())
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            history.held_out.append((step, *evaluate(model, criterion, held_out)))
        progress.set_postfix(loss=history.train[-1], held_out_psnr=f"{history.held_out[-1][2]:.2f}")
    history.seconds = time.perf_counter() - begin
    return history


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch)


def evaluate(model: nn.Module, criterion: nn.Module, batch: Batch) -> tuple[float, float]:
    """(loss, PSNR in dB) of a batch."""
    estimate = predict(model, batch)
    loss = criterion(estimate, **batch.loss_arguments()).item()
    return loss, quality(estimate, batch).whole
