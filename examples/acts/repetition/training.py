# SPDX-License-Identifier: BSD-3-Clause
"""The same model trained twice on the same batches: cross entropy, and a penalty added to it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import masked_loss_ext as mle

from ..language.data import Batch, BatchSampler
from ..language.model import BYTES
from ..language.training import next_bytes

PLAIN, PENALISED = "cross entropy", "with penalty"
NGRAM = 8  # bytes: shorter ones recur in every program
NGRAM_WEIGHT, IMMEDIATE_WEIGHT = 1.0, 0.1
LEARNING_RATE = 5e-3
EVALUATIONS = 6  # spread over the training


@dataclass
class History:
    """Bits per byte of the cross entropy alone, whatever was minimised."""

    train: list[float] = field(default_factory=list)  # of each step's batch
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, of all held-out bytes
    penalties: list[float] = field(default_factory=list)  # of each step's batch, weighted, nats
    seconds: float = 0.0


class Objective(nn.Module):
    """Cross entropy of the next byte and, with ``penalised``, what may not be repeated."""

    def __init__(self, penalised: bool) -> None:
        super().__init__()
        self.penalised = penalised
        self.loss = mle.UnifiedLoss(
            BYTES,
            primary_loss_type="standard",
            label_smoothing=0.0,
            penalty_on="model",
            use_ngram_penalty=penalised,
            ngram_size=NGRAM,
            ngram_penalty_weight=NGRAM_WEIGHT,
            use_immediate_repetition_penalty=penalised,
            immediate_repetition_weight=IMMEDIATE_WEIGHT,
            shift_labels=True,
        )

    def forward(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, the cross entropy in it and the penalty in it."""
        found = self.loss(logits, batch.tokens, batch.attention_mask, return_detailed=True)
        total, main = found["total_loss"], found["main_loss"]
        if self.penalised:  # one thing is compared: predictions are not drawn to uniform as well
            total = total - found["ngram_penalty_breakdown"]["diversity"]
        return total, main, total - main


def fit(
    name: str, model: nn.Module, sampler: BatchSampler, held_out: Sequence[Batch], steps: int
) -> History:
    objective = Objective(name == PENALISED)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, 10 / steps)
    )
    history = History(held_out=[(0, bits_per_byte(model, held_out))])
    begin = time.perf_counter()
    for step in tqdm(range(1, steps + 1), desc=name, unit="step", mininterval=0.5):
        batch = sampler.batch().to(held_out[0].tokens.device)
        total, main, penalty = objective(model(batch.tokens)[0], batch)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.train.append(main.item() / math.log(2))
        history.penalties.append(penalty.item())
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            history.held_out.append((step, bits_per_byte(model, held_out)))
    history.seconds = time.perf_counter() - begin
    return history


@torch.no_grad()
def bits_per_byte(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of the real bytes that follow another."""
    losses = (next_bytes(model(b.tokens)[0], b.tokens, b.attention_mask, 1) for b in batches)
    real = sum(int(batch.attention_mask[:, 1:].sum()) for batch in batches)
    return sum(losses) / real / math.log(2)
