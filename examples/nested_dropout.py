#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""An image tokenizer with nested dropout: the first registers learn what matters most.

Every crop of a step keeps a random number of its registers; `PackedLayout` packs crops of unequal
size, `packed_attention` hides the dropped registers, `masked_mse` reads patches alone. Beside it
the same tokenizer without dropout, which spreads an image over all registers.

python examples/nested_dropout.py          about 70 seconds on two cores
python examples/nested_dropout.py --quick
"""

from __future__ import annotations

import examples_common as common
import torch
from acts.common.latents import spectrum
from acts.common.photos import CropSource, load_photos, split_photos
from acts.tokenizer.data import CELL, PAD_TO, REGISTERS, draw
from acts.tokenizer.measure import error_by_keep_k, flat_errors
from acts.tokenizer.model import Tokenizer, reconstruction_loss
from torch import nn

import masked_loss_ext as mle

CROPS, CELLS, LEARNING_RATE, SHOWN = 6, (4, 8), 2e-3, (1, 4, 16, 64)


def train(wanted, regions: list, nested: bool) -> Tokenizer:
    torch.manual_seed(wanted.seed)
    model = Tokenizer(spectrum(regions, CELL), depth=1)
    source = CropSource(regions, wanted.seed + 1, CELL, CELLS, turn=True)
    generator = torch.Generator().manual_seed(wanted.seed + 3)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    for _ in common.progress(wanted.steps, "nested dropout" if nested else "no dropout"):
        batch = draw(source, CROPS, 3)
        if nested:  # what is dropped takes no part in the whole network
            keep_k = mle.sample_keep_k(REGISTERS, CROPS, "pow2", generator=generator)
            layout = batch.layout(keep_k).compact(bucket=PAD_TO).layout
        else:
            layout = batch.layout(None)
        loss = reconstruction_loss(model, batch, layout)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=200, quick=4)
    regions, others = split_photos(load_photos())
    held_out = draw(CropSource(others, 2, CELL, CELLS), 8 if wanted.quick else 32)
    models = {name: train(wanted, regions, name == "nested") for name in ("nested", "plain")}
    for name, model in models.items():
        errors = error_by_keep_k(model, held_out)
        text = ", ".join(f"{errors[k].mse:.3f} with {k}" for k in SHOWN)
        print(f"squared error of pixels, held out, {name}: {text} of {REGISTERS} registers")
    few = {name: error_by_keep_k(model, held_out)[4].mse for name, model in models.items()}
    flat = flat_errors(held_out)
    print(
        f"from 4 registers: {few['nested']:.3f} with nested dropout, {few['plain']:.3f} without, "
        f"{flat.grey:.3f} for a grey image"
    )


if __name__ == "__main__":
    main()
