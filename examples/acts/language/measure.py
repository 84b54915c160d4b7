# SPDX-License-Identifier: BSD-3-Clause
"""The four-token loss beside F.cross_entropy: inside the training step, alone, and with garbage."""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss_ext as mle
from benchmarks.harness import Contender, clock_for

from ..common.cost import OURS
from .data import Batch
from .training import AHEAD, WEIGHTS

IN_PLACE = f"{OURS}, in place"
SLICED = "F.cross_entropy, logits sliced"
SHIFTED = "F.cross_entropy, labels shifted"
SHARES = tuple(w / sum(WEIGHTS) for w in WEIGHTS)
IGNORE = -100
PADDING = 0.45  # of the batches below, about that of the functions


def sliced(logits_list: Sequence[Tensor], labels: Tensor, mask: Tensor) -> Tensor:
    """As it is usually written: the rows that have a target are cut out, which copies them."""
    labels = labels.masked_fill(~mask, IGNORE)
    total = 0.0
    for ahead, (share, logits) in enumerate(zip(SHARES, logits_list, strict=True), 1):
        kept = logits[:, :-ahead].reshape(-1, logits.shape[-1])
        target = labels[:, ahead:].reshape(-1)
        total = total + share * F.cross_entropy(kept, target, ignore_index=IGNORE)
    return total


def shifted(logits_list: Sequence[Tensor], labels: Tensor, mask: Tensor) -> Tensor:
    """Without that copy: the labels move instead, and the last positions are ignored too."""
    labels = labels.masked_fill(~mask, IGNORE)
    total = 0.0
    for ahead, (share, logits) in enumerate(zip(SHARES, logits_list, strict=True), 1):
        target = F.pad(labels[:, ahead:], (0, ahead), value=IGNORE)
        total = total + share * F.cross_entropy(
            logits.flatten(0, -2), target.flatten(), ignore_index=IGNORE
        )
    return total


def ours(*, in_place: bool = False) -> Callable[..., Tensor]:
    criterion = mle.MultiTokenPredictionLoss(AHEAD, WEIGHTS, inplace_backward=in_place)
    return lambda logits_list, labels, mask: criterion(logits_list, labels, mask)[0]


FORMS: dict[str, Callable[..., Tensor]] = {
    OURS: ours(),
    IN_PLACE: ours(in_place=True),
    SLICED: sliced,
    SHIFTED: shifted,
}


@dataclass(frozen=True)
class FormOnBatch:
    """What a form makes of a batch of logits, and of the same with garbage in the padding."""

    value: float
    off_by: float  # relative to the reference in float64
    loss_with_garbage: str  # "same bits", "changed" or "NaN"
    gradient_with_garbage: str


@dataclass(frozen=True)
class StepCost:
    """Of a whole training step; medians."""

    step_us: float
    loss_us: float  # forward and backward of the loss, within the step


def separate(logits_list: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of their own, so that a loss can be differentiated apart from the model."""
    return [logits.detach().clone().requires_grad_(True) for logits in logits_list]


def loss_and_gradients(
    form: Callable[..., Tensor], logits_list: Sequence[Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    leaves = separate(logits_list)
    loss = form(leaves, batch.tokens, batch.attention_mask)
    loss.backward()
    return loss.detach(), torch.stack([leaf.grad for leaf in leaves])


def with_garbage(logits_list: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], Batch]:
    """NaN logits and labels that are no byte, wherever there is padding."""
    padding = ~batch.attention_mask
    logits_list = [x.masked_fill(padding[..., None], torch.nan) for x in logits_list]
    return logits_list, Batch(batch.tokens.masked_fill(padding, 99_999), batch.attention_mask)


def compare(value: Tensor, clean: Tensor) -> str:
    if value.isnan().any():
        return "NaN"
    return "same bits" if torch.equal(value, clean) else "changed"


def forms_on(logits_list: Sequence[Tensor], batch: Batch) -> dict[str, FormOnBatch]:
    wide = [logits.double() for logits in logits_list]
    truth, _ = mle.reference.multi_token_prediction_loss(
        wide, batch.tokens, batch.attention_mask, SHARES
    )
    found = {}
    for name, form in FORMS.items():
        loss, gradient = loss_and_gradients(form, logits_list, batch)
        garbage = loss_and_gradients(form, *with_garbage(logits_list, batch))
        same = (compare(garbage[0], loss), compare(garbage[1], gradient))
        found[name] = FormOnBatch(loss.item(), loss.item() / truth.item() - 1.0, *same)
    return found


def training_steps(model: nn.Module, batch: Batch, rounds: int) -> dict[str, StepCost]:
    """Whole steps with each loss in turn, in an order drawn anew each round, on a copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    clock = clock_for(str(batch.tokens.device))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    order, shuffle = list(FORMS), random.Random(0).shuffle
    for round_ in range(rounds + 1):
        shuffle(order)
        for name in order:
            marks = timed_step(model, optimizer, FORMS[name], batch, clock.mark)
            clock.finish()
            begin, before, after, end = marks
            sample = (clock.elapsed_us(begin, end), clock.elapsed_us(before, after))
            if round_ > 0:  # the first one warms caches and makes the optimizer's state
                samples[name].append(sample)
    medians = {n: [statistics.median(x) for x in zip(*s, strict=True)] for n, s in samples.items()}
    return {name: StepCost(*median) for name, median in medians.items()}


def timed_step(model, optimizer, form, batch: Batch, mark: Callable) -> tuple:
    """Readings of the clock: begin, before the loss, after its gradient, end."""
    begin = mark()
    optimizer.zero_grad()
    logits_list = model(batch.tokens)
    leaves = [logits.detach().requires_grad_(True) for logits in logits_list]
    before = mark()
    form(leaves, batch.tokens, batch.attention_mask).backward()
    after = mark()
    torch.autograd.backward(logits_list, [leaf.grad for leaf in leaves])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return begin, before, after, mark()


def random_batch(shape: tuple[int, int, int], device: torch.device) -> tuple[list[Tensor], Batch]:
    """Logits of ``shape`` [B, S, V] for each head, texts of lengths spread evenly."""
    rows, longest, classes = shape
    rng = torch.Generator().manual_seed(0)
    share = torch.linspace(1.0 - 2.0 * PADDING, 1.0, rows)
    mask = torch.arange(longest) < (share * longest).long()[:, None]
    tokens = torch.randint(classes, (rows, longest), generator=rng).masked_fill(~mask, 0)
    logits = [torch.randn(shape, generator=rng).to(device) for _ in range(AHEAD)]
    return logits, Batch(tokens, mask).to(device)


def contenders(shape: tuple[int, int, int], device: torch.device) -> list[Contender]:
    """The losses alone; the first input stands for the leaf whose gradient is dropped."""
    logits_list, batch = random_batch(shape, device)

    def call(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(_: Tensor, *heads: Tensor) -> Tensor:
            leaves = [head.detach().requires_grad_(True) for head in heads]
            return form(leaves, batch.tokens, batch.attention_mask)

        return run

    inputs = [(torch.zeros((), requires_grad=True), *logits_list)]
    return [Contender(name, call(form), inputs) for name, form in FORMS.items()]
