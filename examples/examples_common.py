# SPDX-License-Identifier: BSD-3-Clause
"""What the examples of one process share: switches, a progress bar, texts, bits per byte."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before PyTorch loads its OpenMP runtime: see demo.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402
from acts.common.language_model import LanguageModel  # noqa: E402
from acts.language.data import (  # noqa: E402
    Batch,
    BatchSampler,
    functions,
    source_files,
    split_files,
)
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import masked_loss_ext as mle  # noqa: E402

QUICK_FILES = 24  # of the standard library
LONGEST = 256  # bytes of a text that are kept


def parse_arguments(description: str | None, steps: int, quick: int) -> argparse.Namespace:
    """``steps`` of the whole run, and those of ``--quick``."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"seconds: {quick} steps")
    parser.add_argument("--steps", type=int, help=f"optimizer steps, {steps} if nothing is said")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    if wanted.steps is None:
        wanted.steps = quick if wanted.quick else steps
    if wanted.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {wanted.steps}")
    torch.manual_seed(wanted.seed)
    return wanted


def progress(steps: int, name: str) -> Iterator[int]:
    return tqdm(range(steps), desc=name, unit="step", mininterval=0.5)


def texts(quick: bool) -> tuple[list[bytes], list[bytes]]:
    """Functions of Python's standard library: (to learn, held out)."""
    learn, held_out = split_files(source_files()[: QUICK_FILES if quick else None])
    return functions(learn), functions(held_out)


def sampler(chosen: Sequence[bytes], seed: int, size: int) -> BatchSampler:
    return BatchSampler(chosen, seed, size, LONGEST)


def make_language_model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(LONGEST)


@torch.no_grad()
def bits_per_byte(logits_of: Callable[[Tensor], Tensor], batches: Sequence[Batch]) -> float:
    """Of real bytes alone, whatever was trained on."""
    total, count = 0.0, 0
    for batch in batches:
        total += mle.masked_cross_entropy(
            logits_of(batch.tokens), batch.tokens, batch.attention_mask, shift=1, reduction="sum"
        ).item()
        count += int(batch.attention_mask[:, 1:].sum())
    return total / count / math.log(2)


def held_out_batches(chosen: Sequence[bytes], quick: bool) -> list[Batch]:
    drawn = sampler(chosen, 12345, 16)
    return [drawn.batch() for _ in range(1 if quick else 8)]


def apart(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Length of the difference, relative to what is expected."""
    norm = nn.utils.get_total_norm
    off = [x - y for x, y in zip(gradients, expected, strict=True)]
    return (norm(off) / norm(list(expected))).item()
