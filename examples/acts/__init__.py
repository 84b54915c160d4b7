# SPDX-License-Identifier: BSD-3-Clause
"""The acts of the demo: each trains something small on real data with the losses of the package.

An act is a package whose module ``act`` has ``run(options)``, which prints what it measured and
writes its pictures.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

# Name on the command line -> what it does. An act is imported only when it runs.
ACTS = {
    "denoise": "a transformer learns to denoise crops of photographs, of unequal size",
    "language": "a byte-level language model learns Python, from functions of unequal length",
    "tokenizer": "an image tokenizer learns to keep what matters in the first of its registers",
    "repetition": "the byte-level model with a penalty on what it would repeat (by name alone)",
}
BY_NAME_ALONE = ("repetition",)  # not run where no act is named
DEFAULT = [name for name in ACTS if name not in BY_NAME_ALONE]


EXTRAS = {"matplotlib", "numpy", "PIL", "sklearn", "tqdm"}  # what [demo] installs


@dataclass(frozen=True)
class Options:
    output: Path
    device: torch.device
    steps: int | None = None  # None: as many as the act thinks right
    quick: bool = False  # seconds, not a minute: everything runs, nothing is learnt well
    seed: int = 0


def run_act(name: str, options: Options) -> None:
    try:
        act = importlib.import_module(f"{__name__}.{name}.act")
    except ModuleNotFoundError as error:
        if error.name in EXTRAS:
            raise SystemExit(
                f"demo: {error.name} is missing; the demo's packages come with: "
                "pip install --no-build-isolation '.[demo]' (or make demo)"
            ) from None
        raise
    act.run(options)
