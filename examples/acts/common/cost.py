# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of a loss beside other ways of writing it.

Time: all forms in turn, in an order drawn anew each round, medians (benchmarks/harness.py).
Memory: highest resident memory during one forward and backward, less what was resident before, in
a fresh process (benchmarks/memory.py); on CUDA the allocator's own peak.

A module that is measured has ``contenders(shape, device)``. As a script, ``python -m
acts.common.cost MODULE SHAPE DEVICE THREADS``, this one prints the memory of each as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.agreement import run_once
from benchmarks.harness import interleave, summarize
from benchmarks.machine import NeighbourMeter
from benchmarks.memory import peak_extra_bytes

OURS = "masked_loss_ext"
EXAMPLES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """Of forward and backward of each form on the CPU or GPU in use."""

    shape: tuple[int, ...]
    rounds: int
    step_us: dict[str, float]
    peak_bytes: dict[str, int] | None  # None: could not be measured, for this reason:
    why_no_peak: str
    crowded_cores: float | None  # cores that other programs kept busy, where that disturbs

    def milliseconds(self, name: str) -> str:
        return f"{self.step_us[name] / 1000:.2f} ms"

    def times_ours(self, name: str) -> str:
        return f"{self.step_us[name] / self.step_us[OURS]:.1f}"

    def peak(self, name: str) -> str:
        return "?" if self.peak_bytes is None else f"{self.peak_bytes[name] / 2**20:.1f} MiB"


def measure_cost(module: str, shape: tuple[int, ...], device: torch.device, rounds: int) -> Cost:
    forms = importlib.import_module(module).contenders(shape, device)
    with NeighbourMeter() as neighbours:
        samples = interleave(forms, str(device), rounds)
    del forms  # as large as what is about to be measured
    step_us = {name: summarize(s.total_us).median for name, s in samples.items()}
    peaks, why = peaks_apart(module, shape, device)
    return Cost(shape, rounds, step_us, peaks, why, disturbing_cores(neighbours, device))


def disturbing_cores(neighbours: NeighbourMeter, device: torch.device) -> float | None:
    """Cores that other programs kept busy, where that disturbed."""
    disturbed = device.type == "cpu" and neighbours.crowded(torch.get_num_threads())
    return neighbours.other_cores if disturbed else None


def peaks_apart(
    module: str, shape: tuple[int, ...], device: torch.device
) -> tuple[dict[str, int] | None, str]:
    """(bytes of each form, "") or (None, why not)."""
    if device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return None, "this system does not let a process reset its memory high-water mark"
    search = [str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        # Blocks of any size worth counting are mapped afresh and given back at once, so that
        # memory an earlier form left behind cannot hide a peak.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    }
    command = [sys.executable, "-m", "acts.common.cost", module, "x".join(map(str, shape))]
    command += [str(device), str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def print_doubts(*costs: Cost) -> None:
    """What a reader of the figures must know, if anything."""
    for why in {cost.why_no_peak for cost in costs if cost.peak_bytes is None}:
        print(f"peak memory is not known: {why}")
    crowded = [cost.crowded_cores for cost in costs if cost.crowded_cores is not None]
    if crowded:
        print(f"other programs kept {max(crowded):.1f} cores busy: step times are disturbed")


def main() -> None:
    module, shape, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    make = importlib.import_module(module).contenders
    forms = make(tuple(map(int, shape.split("x"))), torch.device(device))
    peaks = {
        form.name: peak_extra_bytes(lambda form=form: run_once(form), device) for form in forms
    }
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
