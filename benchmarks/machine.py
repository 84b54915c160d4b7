# SPDX-License-Identifier: BSD-3-Clause
"""What the figures depend on besides the code: the machine, the versions, who else was running."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

LEVEL = "MASKED_LOSS_EXT_CPU_CAPABILITY"  # read by the library when it is first asked


def take_level(level: str) -> None:
    """Run at this instruction-set level; an error where it cannot be had in this process."""
    os.environ[LEVEL] = level
    import masked_loss_ext  # noqa: F401  its operators

    if (got := torch.ops.masked_loss_ext.cpu_capability()) != level:
        raise ValueError(f"level {level} cannot be had, only {got}: this processor has no more")


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return named.group(1) if named else platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """Of the repository that this is run in, marked where code differs from it; empty: none."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        # Figures and pages are what a run writes, no part of what it measured.
        written = (":(exclude)benchmarks/results", ":(exclude)docs", ":(exclude)*.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    except OSError:  # no git here
        return ""
    return f"{name}-changed" if name and changed else name


def memory_bytes(device: str) -> int:
    """All that this machine, or its GPU, has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def environment(device: str, threads: int) -> dict[str, object]:
    """What the figures depend on besides the code; the same in every row of a run."""
    import masked_loss_ext  # here: tables are made from a CSV without it

    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        processor = processor_name()
        capability = torch.ops.masked_loss_ext.cpu_capability()
    return {
        "device": device,
        "processor": processor,
        "capability": capability,
        "threads": threads,
        "torch": torch.__version__,
        "masked_loss_ext": masked_loss_ext.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def machine_cpu_seconds() -> float:
    """CPU time that everything on this machine has used, what a host took away included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, fields)
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


class NeighbourMeter:
    """How many cores other programs kept busy inside the ``with`` block.

    On a machine with a core short, a parallel loop waits for a thread that is not running: times
    come out in steps of the scheduler's time slice, and say nothing about the code.
    """

    other_cores: float | None = None  # None: this system does not tell

    def __enter__(self) -> NeighbourMeter:
        self._start = self._reading()
        return self

    def __exit__(self, *_: object) -> None:
        if self._start is None:
            return
        wall, machine, own = (
            now - then for now, then in zip(self._reading(), self._start, strict=True)
        )
        self.other_cores = max(0.0, machine - own) / wall

    def _reading(self) -> tuple[float, float, float] | None:
        if not Path("/proc/stat").exists():
            return None
        usage = os.times()
        return time.perf_counter(), machine_cpu_seconds(), usage.user + usage.system

    def crowded(self, threads: int) -> bool:
        """Did the others leave fewer than ``threads`` cores (with 10 % of one for the system)?"""
        return (self.other_cores or 0.0) + threads > len(os.sched_getaffinity(0)) + 0.1
