# SPDX-License-Identifier: BSD-3-Clause
"""One workload at several sizes: ``--scale N V share threads``.

N        rows, 1/4 to twice those of the workload;   V        classes, in the same steps
share    of the rows that count, 1 to 1/10;          threads  1, 2, 4 ... to those that are there
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import machine, measure, workloads
from .workloads import Workload

FACTORS = (0.25, 0.5, 1, 2)
SHARES = (1.0, 0.5, 0.25, 0.1)
BASE = "512 x 512 x 32768"
BASE_WORKLOAD = Workload("base", "head", (512, 512, 32768), "seconds on two cores", 0.4)
SIZES = {"N": "rows", "V": "classes"}
AXES = (*SIZES, "share", "threads")


def thread_counts() -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [count for count in (2**power for power in range(10)) if count <= cores]


def points(workload: Workload, axis: str, threads: int) -> list[tuple[float, Workload, int]]:
    """(place on the axis, what is run there, with so many threads)."""
    if axis == "threads":
        return [(count, workload, count) for count in thread_counts()]
    if axis == "share":
        return [(share, replace(workload, ignored=1 - share), threads) for share in SHARES]
    size = workload.axis(SIZES[axis])
    every = sorted({max(1, round(size * factor)) for factor in FACTORS})
    return [(value, workload.with_axes(**{SIZES[axis]: value}), threads) for value in every]


def takes(workload: Workload, axis: str) -> bool:
    kind = workloads.KINDS[workload.kind]
    if axis == "share":
        return kind.has_ignored
    return axis == "threads" or SIZES[axis] in kind.axes


def measured(workload: Workload, wanted: argparse.Namespace) -> Iterator[list[dict]]:
    """The tables of every point of every axis; ``scale`` and ``at`` of a row say which."""
    if unfit := [axis for axis in wanted.scale if not takes(workload, axis)]:
        raise SystemExit(f"{workload.name} cannot be scaled by {', '.join(unfit)}")
    if wanted.device != "cpu" and "threads" in wanted.scale:
        raise SystemExit("--scale threads must be on a CPU")
    for axis in wanted.scale:
        for at, one, threads in points(workload, axis, wanted.threads):
            if why := workloads.too_large_text(one, machine.memory_bytes(wanted.device)):
                print(f"! {axis} = {at:g} left out: {why}")
                continue
            case = workloads.case_of(replace(one, name=f"{one.name}_{axis}_{at:g}"), wanted.device)
            torch.set_num_threads(threads)
            here = argparse.Namespace(**{**vars(wanted), "threads": threads})
            for table in measure.measure_all([case], here):
                yield [{**row, "scale": axis, "at": at} for row in table]
    torch.set_num_threads(wanted.threads)
