# SPDX-License-Identifier: BSD-3-Clause
"""The same model trained twice on the same batches: with the padding masked, and counted."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import masked_loss_ext as mle

from .data import Batch, BatchSampler

WEIGHTS = (1.0, 0.5, 0.3, 0.2)  # of the heads for t+1 .. t+4; the loss divides them by their sum
AHEAD = len(WEIGHTS)
LEARNING_RATE = 5e-3
EVALUATIONS = 6  # spread over the training


@dataclass
class History:
    """Losses are in bits per byte. "reported": with what this run takes for bytes."""

    train: list[float] = field(default_factory=list)  # a reported loss of the next byte each step
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # step, true, reported
    heads: list[float] = field(default_factory=list)  # at the end, true, a head each
    reported: float = math.nan  # at the end, of the next byte
    padding: float = 0.0  # share of the batches trained on
    seconds: float = 0.0


def fit(
    model: nn.Module,
    sampler: BatchSampler,
    held_out: Sequence[Batch],
    steps: int,
    *,
    masked: bool,
) -> History:
    """``held_out[0]`` is watched while training, all of it is measured at the end."""
    criterion = mle.MultiTokenPredictionLoss(AHEAD, WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, 10 / steps)
    )
    history = History()
    watch(history, 0, model, held_out[0], masked)
    begin = time.perf_counter()
    name = "padding masked" if masked else "padding counted"
    for step in tqdm(range(1, steps + 1), desc=name, unit="step", mininterval=0.5):
        batch = sampler.batch().to(held_out[0].tokens.device)
        logits = model(batch.tokens)
        loss, parts = criterion(logits, batch.tokens, batch.attention_mask if masked else None)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.train.append(float(parts["loss_t1"]) / math.log(2))
        history.padding += batch.padding() / steps
        if step % max(1, steps // EVALUATIONS) == 0 and step < steps:
            watch(history, step, model, held_out[0], masked)
    history.seconds = time.perf_counter() - begin
    history.heads, history.reported = bits_per_byte(model, held_out, masked)
    watch(history, steps, model, held_out[0], masked)
    return history


def watch(history: History, step: int, model: nn.Module, batch: Batch, masked: bool) -> None:
    heads, reported = bits_per_byte(model, [batch], masked)
    history.held_out.append((step, heads[0], reported))


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, batches: Sequence[Batch], masked: bool
) -> tuple[list[float], float]:
    """(of real bytes alone, a head each; of the next byte, as a run with or without mask says)."""
    true, reported = torch.zeros(AHEAD), torch.zeros(())
    real, counted = torch.zeros(AHEAD), 0
    for batch in batches:
        logits, mask = model(batch.tokens), batch.attention_mask
        for k in range(AHEAD):
            true[k] += next_bytes(logits[k], batch.tokens, mask, k + 1)
            real[k] += mask[:, k + 1 :].sum().item()
        blind = None if not masked else mask
        reported += next_bytes(logits[0], batch.tokens, blind, 1)
        counted += int(mask[:, 1:].sum()) if masked else mask[:, 1:].numel()
    return (true / real / math.log(2)).tolist(), (reported / counted / math.log(2)).item()


def next_bytes(logits: Tensor, tokens: Tensor, mask: Tensor | None, shift: int) -> float:
    """Sum of the losses, in nats."""
    return mle.masked_cross_entropy(logits, tokens, mask, shift=shift, reduction="sum").item()
