# SPDX-License-Identifier: BSD-3-Clause
"""Act "language": a byte-level model learns Python, four bytes ahead, from padded functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import masked_loss_ext as mle

from .. import Options
from ..common.cost import Cost, measure_cost, print_doubts
from . import measure, report
from .data import Batch, BatchSampler, functions, source_files, split_files
from .head import train_heads
from .model import ByteModel, Counts, write
from .plots import plot_bits, plot_costs, plot_heads, plot_losses
from .training import AHEAD, bits_per_byte, fit

FULL = {
    "steps": 280,
    "texts": 4,  # in a batch
    "longest": 640,  # bytes; what is longer is cut off
    "dim": 128,
    "depth": 2,
    "held_out": (3, 24),  # batches, texts in each
    "files": None,  # of the standard library: all
    "written": 240,  # bytes of a sample
    "step_rounds": 5,
    "cost_rounds": 5,
    "large": (4, 64, 32_000),  # texts, tokens, classes
    "head": {"classes": 50_000, "texts": 4, "longest": 256, "steps": 12},  # longest: in words
}
QUICK = {
    "steps": 6,
    "texts": 4,
    "longest": 320,
    "dim": 64,
    "depth": 1,
    "held_out": (1, 8),
    "files": 32,
    "written": 60,
    "step_rounds": 3,
    "cost_rounds": 3,
    "large": (2, 32, 2_000),
    "head": {"classes": 4_000, "texts": 2, "longest": 64, "steps": 3},
}
PROMPTS = ("def read(self", "def _parse")


def run(options: Options) -> None:
    settings = dict(QUICK if options.quick else FULL)
    steps = options.steps or settings["steps"]
    longest, device = settings["longest"], options.device
    files = split_files(source_files()[: settings["files"]])
    train, held_out_texts = map(functions, files)
    report.print_data(train, held_out_texts, tuple(map(len, files)))
    batches, texts = settings["held_out"]
    sampler = BatchSampler(held_out_texts, options.seed + 2, texts, longest)
    held_out = [sampler.batch().to(device) for _ in range(batches)]

    torch.manual_seed(options.seed)
    start = ByteModel(Counts(train, AHEAD), longest, settings["dim"], settings["depth"])
    models = {masked: copy.deepcopy(start).to(device) for masked in (True, False)}
    counts_alone, _ = bits_per_byte(models[True], held_out, masked=True)
    histories = {}
    for masked, model in models.items():
        sampler = BatchSampler(train, options.seed + 1, settings["texts"], longest)
        histories[masked] = fit(model, sampler, held_out, steps, masked=masked)
    report.print_training(histories[True], histories[False], counts_alone, held_out)

    batch = typical([sampler.batch() for _ in range(20)]).to(device)
    costs = print_costs(models[True], batch, settings)
    heads = train_heads(train, device, settings["head"], options.seed)
    report.print_heads(heads)
    print_doubts(*costs, heads.cost)
    samples = [
        write(models[True], prompt, settings["written"], options.seed, temperature=0.7)
        for prompt in PROMPTS
    ]
    report.print_sample(samples)
    plot_losses(histories[True], histories[False], options.output / "language_losses.png")
    plot_costs(costs, options.output / "language_costs.png")
    plot_heads(heads, options.output / "language_heads.png")
    bits = bits_of_each(models[True], held_out[0])
    plot_bits(held_out[0], bits, options.output / "language_bits.png")
    for path in sorted(options.output.glob("language_*.png")):
        print(f"picture: {path}")


def typical(batches: Sequence[Batch]) -> Batch:
    """The one with the median share of padding."""
    return sorted(batches, key=Batch.padding)[len(batches) // 2]


def print_costs(model: ByteModel, batch: Batch, settings: dict) -> list[Cost]:
    with torch.no_grad():
        logits_list = model(batch.tokens)
    device, rounds = batch.tokens.device, settings["cost_rounds"]
    small = (*batch.tokens.shape, logits_list[0].shape[-1])
    shapes = (small, settings["large"])
    costs = [measure_cost(measure.__name__, shape, device, rounds) for shape in shapes]
    steps = measure.training_steps(model, batch, settings["step_rounds"])
    report.print_step_costs(steps, measure.forms_on(logits_list, batch), costs[0], batch)
    report.print_large_vocabulary(costs[1])
    return costs


@torch.no_grad()
def bits_of_each(model: ByteModel, batch: Batch) -> Tensor:
    """[B, S] what each byte cost the model that read those before it."""
    nats = mle.masked_cross_entropy(
        model(batch.tokens)[0], batch.tokens, batch.attention_mask, shift=1, reduction="none"
    )
    return nats.roll(1, dims=1) / math.log(2)  # the last position has no next byte: its loss is 0
