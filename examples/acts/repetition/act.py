# SPDX-License-Identifier: BSD-3-Clause
"""Act "repetition": the byte-level model with and without a penalty on what it would repeat."""

from __future__ import annotations

import copy

import torch

from .. import Options
from ..language.data import BatchSampler, functions, source_files, split_files
from ..language.model import ByteModel, Counts
from ..language.report import print_data
from . import report
from .generation import Texts, continuations, held_out_texts
from .plots import plot_repetition
from .training import fit

FULL = {
    "steps": 280,
    "texts": 4,  # in a batch
    "longest": 640,  # bytes; what is longer is cut off
    "dim": 128,
    "depth": 2,
    "held_out": (3, 24),  # batches, texts in each
    "files": None,  # of the standard library: all
    "written": (32, 32, 224),  # texts, bytes of a prompt, bytes that follow it
}
QUICK = {
    "steps": 6,
    "texts": 4,
    "longest": 320,
    "dim": 64,
    "depth": 1,
    "held_out": (1, 8),
    "files": 32,
    "written": (4, 32, 96),
}
TEMPERATURES = (0.0, 1.0)  # 0: the most probable byte, always


def run(options: Options) -> None:
    settings = dict(QUICK if options.quick else FULL)
    steps, longest = options.steps or settings["steps"], settings["longest"]
    files = split_files(source_files()[: settings["files"]])
    train, others = map(functions, files)
    print_data(train, others, tuple(map(len, files)))
    batches, texts = settings["held_out"]
    sampler = BatchSampler(others, options.seed + 2, texts, longest)
    held_out = [sampler.batch().to(options.device) for _ in range(batches)]

    torch.manual_seed(options.seed)
    start = ByteModel(Counts(train, 1), longest, settings["dim"], settings["depth"])
    models = {name: copy.deepcopy(start).to(options.device) for name in report.RUNS}
    histories = {}
    for name, model in models.items():
        sampler = BatchSampler(train, options.seed + 1, settings["texts"], longest)
        histories[name] = fit(name, model, sampler, held_out, steps)
    report.print_losses(histories)

    real = held_out_texts(others, *settings["written"])
    written: dict[tuple[str, float], Texts] = {
        (name, temperature): continuations(model, real, temperature, options.seed)
        for temperature in TEMPERATURES
        for name, model in models.items()
    }
    report.print_repetition(real, written)
    report.print_samples(real, written)
    path = options.output / "repetition.png"
    plot_repetition(histories, real, written, path)
    print(f"picture: {path}")
