# SPDX-License-Identifier: BSD-3-Clause
"""Act "tokenizer": crops of photographs squeezed into registers, of which any number is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

import masked_loss_ext as mle

from .. import Options
from ..common.latents import spectrum
from ..common.photos import CropSource, load_photos, split_photos
from . import report
from .data import CELL, PAD_TO, REGISTERS, draw
from .measure import error_by_keep_k, flat_errors, same_bits_with_nan, step_costs
from .model import Tokenizer, reconstruction_loss
from .plots import plot_reconstructions

FULL = {"steps": 500, "crops": 8, "cells": (4, 8), "held_out": 48, "depth": 2}
QUICK = {"steps": 8, "crops": 4, "cells": (4, 6), "held_out": 8, "depth": 1}
ROUNDS, ROUNDS_QUICK = 7, 3  # of the timing
LEARNING_RATE = 2e-3
CANDIDATES = 3  # crops drawn for each one trained on


@dataclass
class History:
    train: list[float] = field(default_factory=list)  # a loss each step
    seconds: float = 0.0


def run(options: Options) -> None:
    settings = dict(QUICK if options.quick else FULL)
    steps = options.steps or settings["steps"]
    torch.manual_seed(options.seed)
    train, held_out = split_photos(load_photos())
    source = CropSource(train, options.seed + 1, CELL, settings["cells"], turn=True)
    held_out = CropSource(held_out, options.seed + 2, CELL, settings["cells"])
    held_out = draw(held_out, settings["held_out"]).to(options.device)
    model = Tokenizer(spectrum(train, CELL), depth=settings["depth"])
    model = model.to(options.device)

    keep_k = torch.Generator().manual_seed(options.seed + 3)
    flat = flat_errors(held_out)
    before = error_by_keep_k(model, held_out)
    history = fit(model, source, keep_k, settings["crops"], steps, options.device)
    by_keep_k = error_by_keep_k(model, held_out)
    report.print_errors(held_out, history, before, by_keep_k, model.code)
    report.print_summary(by_keep_k, flat)
    report.print_nan(same_bits_with_nan(model, held_out))
    batch = draw(source, settings["crops"], CANDIDATES).to(options.device)
    drawn = mle.sample_keep_k(REGISTERS, settings["crops"], "pow2", generator=keep_k)
    rounds = ROUNDS_QUICK if options.quick else ROUNDS
    report.print_costs(step_costs(model, batch, drawn, rounds), batch, drawn, rounds)
    path = options.output / "tokenizer_reconstructions.png"
    plot_reconstructions(model, held_out, by_keep_k, flat, path)
    print(f"picture: {path}")


def fit(
    model: Tokenizer,
    source: CropSource,
    generator: torch.Generator,
    crops: int,
    steps: int,
    device: torch.device,
) -> History:
    """Every crop of every step keeps a number of registers of its own: 1, 2, 4, ... or all.

    Each as likely: if all numbers were, few would be small, and one register would learn little.
    Nothing is needed of the dropped ones, so they are taken out, not masked: fewer tokens.
    """
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, 20 / steps)
    )
    history = History()
    begin = time.perf_counter()
    progress = tqdm(range(steps), desc="tokenizer", unit="step", mininterval=0.5)
    for _ in progress:
        batch = draw(source, crops, CANDIDATES).to(device)
        keep_k = mle.sample_keep_k(REGISTERS, crops, "pow2", generator=generator)
        layout = batch.layout(keep_k).compact(bucket=PAD_TO).layout
        loss = reconstruction_loss(model, batch, layout)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.train.append(loss.item())
        progress.set_postfix(loss=history.train[-1])
    history.seconds = time.perf_counter() - begin
    return history
