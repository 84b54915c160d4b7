#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Gradient accumulation in a plain loop: four micro-batches that train as one batch does.

A byte-level language model on functions of unequal length. Each micro-batch is divided by the
tokens of the whole step, as `normalizer`; the usual mean of means is trained beside it.

python examples/accumulation.py          about 40 seconds on two cores
python examples/accumulation.py --quick
"""

from __future__ import annotations

import statistics

import examples_common as common
import torch
from torch import nn

import masked_loss_ext as mle

MICRO_BATCHES, ROWS, LEARNING_RATE = 4, 2, 3e-3


def backward_of(model: nn.Module, batches: list, normalizer: torch.Tensor | None) -> float:
    """Gradients of a step, micro-batch by micro-batch; the step's loss."""
    total = 0.0
    for batch in batches:
        loss = mle.masked_cross_entropy(
            model(batch.tokens), batch.tokens, batch.attention_mask, shift=1, normalizer=normalizer
        )
        if normalizer is None:  # what most loops do: a mean of each, divided by their number
            loss = loss / len(batches)
        loss.backward()
        total += loss.item()
    return total


def train(wanted, learn: list[bytes], name: str, by_token: bool):
    """(the model, how far each step's gradient was from that of the step as one batch)"""
    model = common.make_language_model(wanted.seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    sampler = common.sampler(learn, wanted.seed + 1, ROWS)
    off = []
    for step in common.progress(wanted.steps, name):
        batches = [sampler.batch() for _ in range(MICRO_BATCHES)]
        tokens = sum(batch.attention_mask[:, 1:].sum() for batch in batches)
        if step % 10 == 0:  # compared now and then, with the definition of the step's mean
            backward_of(model, batches, tokens)
            expected = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
        backward_of(model, batches, tokens if by_token else None)
        if step % 10 == 0:
            off.append(common.apart([p.grad for p in model.parameters()], expected))
        optimizer.step()
        optimizer.zero_grad()
    return model, statistics.mean(off)


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=250, quick=3)
    learn, held_out = common.texts(wanted.quick)
    batches = common.held_out_batches(held_out, wanted.quick)
    before = common.bits_per_byte(common.make_language_model(wanted.seed), batches)
    exact, _ = train(wanted, learn, "divided by the step's tokens", True)
    means, off = train(wanted, learn, "mean of means", False)
    print(f"gradients of the mean of means are off by {off:.0%} of their length")
    print(
        f"bits per byte, held out: {common.bits_per_byte(exact, batches):.3f} divided by the "
        f"step's tokens, {common.bits_per_byte(means, batches):.3f} by means of means, "
        f"{before:.3f} before training"
    )


if __name__ == "__main__":
    main()
