# SPDX-License-Identifier: BSD-3-Clause
"""A model of words with tens of thousands of classes, trained with its logits and without them.

The loss is the same number in each form; what differs is what a step takes. The head is the
table of the words' vectors, as in many language models.
"""

from __future__ import annotations

import copy
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss_ext as mle
from benchmarks.harness import Contender, clock_for
from benchmarks.machine import NeighbourMeter

from ..common.cost import OURS, Cost, disturbing_cores, peaks_apart
from ..common.transformer import Block
from .data import END, Batch, BatchSampler

WORD = re.compile(rb"\w+|\n *|[^\w\n]")  # an indented line's beginning is one
UNKNOWN = 1
FULL_LOGITS, PLAIN_LOGITS = f"{OURS}, of logits", "F.cross_entropy, of logits"
DIM, LEARNING_RATE, IGNORE = 128, 2e-3, -100
PADDING = 0.45  # of the batches whose memory is measured, about that of the functions


def vocabulary(texts: Sequence[bytes], classes: int) -> dict[bytes, int]:
    """The most frequent words, from 2 on."""
    counts = Counter(word for text in texts for word in WORD.findall(text))
    return {word: place for place, (word, _) in enumerate(counts.most_common(classes - 2), 2)}


def in_words(texts: Sequence[bytes], index: Mapping[bytes, int]) -> list[list[int]]:
    return [[index.get(word, UNKNOWN) for word in WORD.findall(text)] for text in texts]


class WordModel(nn.Module):
    """[B, S] words -> hidden states [B, S, DIM]; logits are their product with ``words.weight``."""

    def __init__(self, classes: int, longest: int) -> None:
        super().__init__()
        self.words = nn.Embedding(classes, DIM)
        self.position = nn.Embedding(longest, DIM)
        for table in (self.words, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.block = Block(DIM, DIM // 32, causal=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.block(x))


def without_logits(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    return mle.masked_linear_cross_entropy(
        hidden, head, batch.tokens, batch.attention_mask, shift=1
    )


def of_logits(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    logits = F.linear(hidden, head)
    return mle.masked_cross_entropy(logits, batch.tokens, batch.attention_mask, shift=1)


def of_plain_logits(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    labels = batch.tokens.masked_fill(~batch.attention_mask, IGNORE)
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return F.cross_entropy(F.linear(hidden, head).flatten(0, 1), target.flatten())


FORMS: dict[str, Callable[..., Tensor]] = {
    OURS: without_logits,
    FULL_LOGITS: of_logits,
    PLAIN_LOGITS: of_plain_logits,
}


@dataclass(frozen=True)
class HeadRun:
    """The same training by each form; a step's time is that of forward, backward and optimizer."""

    cost: Cost
    losses: dict[str, list[float]]  # nats per word, a number a step
    padding: float  # share of the batches
    words: int  # in the vocabulary; the other classes are never seen


def train_heads(texts: Sequence[bytes], device: torch.device, settings: dict, seed: int) -> HeadRun:
    """Step by step in turn, on the same batches, in an order drawn anew each step."""
    classes, longest = settings["classes"], settings["longest"]
    index = vocabulary(texts, classes)
    sampler = BatchSampler(in_words(texts, index), seed, settings["texts"], longest)
    torch.manual_seed(seed)
    start = WordModel(classes, longest).to(device)
    models = {name: copy.deepcopy(start) for name in FORMS}
    optimizers = {n: torch.optim.AdamW(m.parameters(), LEARNING_RATE) for n, m in models.items()}
    clock, shuffle = clock_for(str(device)), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    losses: dict[str, list[float]] = {name: [] for name in FORMS}
    padding, order = 0.0, list(FORMS)
    with NeighbourMeter() as neighbours:
        for _ in range(settings["steps"]):
            batch = sampler.batch().to(device)
            padding += batch.padding() / settings["steps"]
            shuffle(order)
            for name in order:
                begin = clock.mark()
                loss = train_step(models[name], optimizers[name], FORMS[name], batch)
                end = clock.mark()
                clock.finish()
                times[name].append(clock.elapsed_us(begin, end))
                losses[name].append(loss.item())
    step_us = {name: statistics.median(one) for name, one in times.items()}
    del models, optimizers
    shape = (settings["texts"], longest, classes)
    peaks, why = peaks_apart(__name__, shape, device)
    disturbed = disturbing_cores(neighbours, device)
    cost = Cost(shape, settings["steps"], step_us, peaks, why, disturbed)
    return HeadRun(cost, losses, padding, len(index))


def train_step(
    model: WordModel, optimizer: torch.optim.Optimizer, form: Callable[..., Tensor], batch: Batch
) -> Tensor:
    optimizer.zero_grad()
    loss = form(model(batch.tokens), model.words.weight, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def contenders(shape: tuple[int, int, int], device: torch.device) -> list[Contender]:
    """Forward and backward of the model by each form, on words drawn at random."""
    rows, longest, classes = shape
    torch.manual_seed(0)
    model = WordModel(classes, longest).to(device)
    lengths = torch.linspace(1.0 - 2.0 * PADDING, 1.0, rows) * longest
    mask = torch.arange(longest) < lengths.long()[:, None]
    tokens = torch.randint(classes, (rows, longest)).masked_fill(~mask, END)
    batch = Batch(tokens, mask).to(device)

    def call(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *_: form(model(batch.tokens), model.words.weight, batch)

    inputs = [tuple(model.parameters())]  # named, so that their gradients are dropped
    return [Contender(name, call(form), inputs) for name, form in FORMS.items()]
