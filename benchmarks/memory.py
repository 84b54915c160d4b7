# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory that one forward and backward needs beyond its inputs.

On a CPU it is read from the kernel (resident pages and their high-water mark), not from PyTorch's
allocator, so that what a library allocates past PyTorch counts as well. Each contender is measured
in a process of its own, where every block of 64 KiB or more is mapped afresh and given back at
once: memory that an earlier call left behind cannot hide a peak. On CUDA the caching allocator's
own peak is exact.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import cases_of
from .agreement import run_once
from .harness import Contender

SMALLEST_GRADIENT = 1 << 20  # below this the pages that any call touches are most of the peak
TIMEOUT_S = 600
LONG_STEP_S = 3.0


def status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE).group(1)) * 1024


def host_peak_bytes(step: Callable[[], object]) -> int:
    """Rise of the resident set while ``step`` runs, at its highest."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def cuda_peak_bytes(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_extra_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """The first run compiles, starts threads and fills caches; only the last one is measured.
    One more comes between them where the first took no more than ``LONG_STEP_S``."""
    started = time.perf_counter()
    step()
    if time.perf_counter() - started < LONG_STEP_S:
        step()
    measure = cuda_peak_bytes if torch.device(device).type == "cuda" else host_peak_bytes
    return measure(step)


def peak_of(contender: Contender, device: str) -> int:
    return peak_extra_bytes(lambda: run_once(contender), device)


def measure_apart(
    benchmark: str, case: str, contender: str, device: str, threads: int, made_of: str = ""
) -> tuple[int | None, str]:
    """(bytes, "") or (None, why not), measured in a fresh process, which finds the case by its name
    or makes it of ``made_of`` (harness.Case)."""
    if torch.device(device).type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return None, "this system does not let a process reset its memory high-water mark"
    command = [sys.executable, "-m", __name__, benchmark, case, contender]
    command += ["--device", device, "--threads", str(threads), "--made-of", made_of]
    block = str(1 << 16)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": block, "MALLOC_TRIM_THRESHOLD_": block}
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {TIMEOUT_S} s"
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"], ""


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of one contender, as JSON")
    parser.add_argument("benchmark")
    parser.add_argument("case")
    parser.add_argument("contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--made-of", default="")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    if wanted.made_of:
        case = importlib.import_module("benchmarks.workloads").made_again(
            wanted.made_of, wanted.device
        )
    else:
        every = cases_of(wanted.benchmark, wanted.device)
        case = next(case for case in every if case.name == wanted.case)
    problem = case.make()
    every = [*problem.contenders, *problem.beside]
    contender = next(one for one in every if one.name == wanted.contender)
    peak = peak_of(contender, wanted.device)
    print(json.dumps({"peak_extra_bytes": peak, "gradient_bytes": problem.gradient_bytes}))


if __name__ == "__main__":
    main()
