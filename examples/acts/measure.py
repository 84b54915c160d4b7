# SPDX-License-Identifier: BSD-3-Clause
"""The loss of the package beside other ways of writing it in PyTorch: value, NaN, time, memory.

Time: all forms in turn, in an order drawn anew each round, medians (benchmarks/harness.py).
Memory: highest resident memory during one forward and backward, less what was resident before, in
a fresh process (benchmarks/memory.py); on CUDA the allocator's own peak.

As a script, ``python -m acts.measure SHAPE DEVICE THREADS``, it prints the memory as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import masked_loss_ext as mle
from benchmarks.harness import Contender, interleave, run_once, summarize
from benchmarks.machine import NeighbourMeter
from benchmarks.memory import peak_extra_bytes
from benchmarks.squared_error import token_data

FOREGROUND, BACKGROUND = 2.0, 1.0
OURS = "masked_loss_ext"
SHAPE, SHAPE_QUICK = (32, 4096, 64), (4, 200, 64)
ROUNDS, ROUNDS_QUICK = 9, 3


def weighted_error(model_pred, target, edit_mask, weighting) -> Tensor:
    """[B, T]: mean over channels of the weighted squared error."""
    edit_weight = FOREGROUND * edit_mask + BACKGROUND * (1 - edit_mask)
    return ((model_pred - target) ** 2 * weighting * edit_weight[..., None]).mean(-1)


def times_mask(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return (error * attention_mask).sum() / attention_mask.sum()


def where_on_error(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return torch.where(attention_mask, error, 0.0).sum() / attention_mask.sum()


def where_on_operands(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    on = attention_mask[..., None]
    model_pred, target = torch.where(on, model_pred, 0.0), torch.where(on, target, 0.0)
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return error.sum() / attention_mask.sum()


def padding_blind(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    return weighted_error(model_pred, target, edit_mask, weighting).mean()


FORMS: dict[str, Callable[..., Tensor]] = {
    OURS: mle.AttentionMaskMseLoss(FOREGROUND, BACKGROUND),
    "PyTorch, error times mask": times_mask,
    "PyTorch, where on the error": where_on_error,
    "PyTorch, where on both inputs": where_on_operands,
    "PyTorch, mean over padding too": padding_blind,
}


@dataclass(frozen=True)
class FormOnBatch:
    """What one form makes of a batch, and of the same batch with one NaN in the padding."""

    value: float
    off_by: float  # relative to the reference in float64
    nan_loss_finite: bool
    nan_gradient_finite: bool


@dataclass(frozen=True)
class Cost:
    """Of forward and backward of each form on the CPU or GPU in use."""

    shape: tuple[int, ...]
    rounds: int
    step_us: dict[str, float]
    peak_bytes: dict[str, int] | None  # None: could not be measured, for this reason:
    why_no_peak: str
    crowded_cores: float | None  # cores that other programs kept busy, where that disturbs


def loss_forms_on(prediction: Tensor, arguments: dict[str, Tensor]) -> dict[str, FormOnBatch]:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    truth = mle.reference.masked_edit_token_mean_loss(prediction.double(), **wide).item()
    poisoned = prediction.clone()
    row, token = (~arguments["attention_mask"]).nonzero()[0].tolist()
    poisoned[row, token, 0] = torch.nan
    found = {}
    for name, form in FORMS.items():
        value = form(prediction, **arguments).item()
        leaf = poisoned.clone().requires_grad_(True)
        loss = form(leaf, **arguments)
        loss.backward()
        finite = (loss.isfinite().item(), leaf.grad.isfinite().all().item())
        found[name] = FormOnBatch(value, value / truth - 1.0, *finite)
    return found


def contenders(shape: tuple[int, ...], device: torch.device) -> list[Contender]:
    data = tuple(x.to(device) for x in token_data(shape, "right", torch.float32))
    data[0].requires_grad_(True)
    return [Contender(name, form, [data]) for name, form in FORMS.items()]


def time_and_memory(device: torch.device, quick: bool) -> Cost:
    shape, rounds = (SHAPE_QUICK, ROUNDS_QUICK) if quick else (SHAPE, ROUNDS)
    with NeighbourMeter() as neighbours:
        samples = interleave(contenders(shape, device), str(device), rounds)
    step_us = {name: summarize(s.total_us).median for name, s in samples.items()}
    disturbed = device.type == "cpu" and neighbours.crowded(torch.get_num_threads())
    peaks, why = peaks_apart(shape, device)
    return Cost(shape, rounds, step_us, peaks, why, neighbours.other_cores if disturbed else None)


def peaks_apart(shape: tuple[int, ...], device: torch.device) -> tuple[dict[str, int] | None, str]:
    """(bytes of each form, "") or (None, why not)."""
    if device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return None, "this system does not let a process reset its memory high-water mark"
    here = Path(__file__).resolve().parent.parent
    search = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        # Blocks of any size worth counting are mapped afresh and given back at once, so that
        # memory an earlier form left behind cannot hide a peak.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    }
    command = [sys.executable, "-m", "acts.measure", "x".join(map(str, shape)), str(device)]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def main() -> None:
    shape, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    forms = contenders(tuple(map(int, shape.split("x"))), torch.device(device))
    peaks = {
        form.name: peak_extra_bytes(lambda form=form: run_once(form), device) for form in forms
    }
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
