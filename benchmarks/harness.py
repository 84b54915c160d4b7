# SPDX-License-Identifier: BSD-3-Clause
"""How a measurement is taken: the contenders in turn, once their results are known to agree.

- A contender whose results differ from the reference (agreement.py) is not timed.
- All contenders of a case run in one process, round by round, in an order drawn anew each round,
  so that a slow minute of the machine falls on all of them and the ratios stay meaningful.
- A sample is the mean of as many calls as fill ``REGION_US``. Every call has its own clock
  readings, so that the gradient is dropped between calls outside the clock while each call still
  pays for the memory of the gradient it makes. One more comes before them, for warm caches, but
  where a call takes longer than ``LONG_S``.
- On CUDA the device waits until all calls of a sample are queued: between their events lies what
  the device does, and nothing of the time that the host takes to launch it.
- What no contender can beat (a plain copy of the same bytes, a read of what must be read) runs in
  the same rounds.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

REGION_US = 2000.0
MAX_CALLS = 1000
LONG_S = 0.5  # what is in the caches when it begins is nothing to a call that takes longer
MOST_HOLD_US = 50_000.0  # a call that takes the host longer is not one that is measured this way
CYCLES_PER_US = 2000  # of the fastest GPUs; a slower one waits longer, which does no harm
PARTS = ("total", "forward", "backward")


@dataclass(frozen=True)
class Contender:
    """``call(*inputs[i])`` gives the loss, or several results with the loss first. Where the loss
    requires a gradient, the backward pass is part of the call. Where inputs do, the first is the
    one whose gradient is large.

    Several tuples hold equal problems in different memory, so that on CUDA the data of one call is
    not in the L2 cache because the call before left it there.
    """

    name: str
    call: Callable[..., Tensor | tuple]
    inputs: Sequence[tuple]
    weigh: bool = True  # False: its peak memory says nothing; that of a floor is never asked
    role: str = "rival"  # or "floor", which ours cannot beat, or "information" for the reader
    prepare: Callable[..., object] | None = None  # on the same inputs, before a call, untimed
    skip: str = ""  # why it is not even attempted; the tables say so
    bytes_moved: int = 0  # of a floor, where it differs from the problem's
    slack: float = 0.0  # of others' kernels: what loss and gradient may be off by more
    version: str = ""  # of the package that it comes from
    steps: int = 1  # that a call takes: its time is that of one
    began: Callable[[], object] | None = None  # the mark of a clock, set inside the call


@dataclass(frozen=True)
class Problem:
    """A case with its data: the first contender is ours, the ratios are taken against it."""

    contenders: Sequence[Contender]
    reference: Callable[..., Tensor | tuple]  # the same call on float64 inputs
    bytes_moved: int  # what must be read and written, forward and backward
    gradient_bytes: int  # where there is no backward pass: what the gradient would have; 0: none
    beside: Sequence[Contender] = ()  # floors and information: timed, not checked
    gradient_tolerance: float = 2e-6  # relative, of an element: about six fp32 roundings
    # An element of the first input's gradient that is smaller than this may be off by the same as
    # one of it; in the gradient of a further input the largest element is the unit.
    gradient_unit: float = 0.0
    left_bytes: int = 0  # of what every contender leaves behind: no part of its peak memory
    # On the inputs as they are: what the reference would give of float64 copies, results and
    # gradients, where such copies would be too large.
    truth: Callable[..., tuple] | None = None


@dataclass(frozen=True)
class View:
    """One table made of a case's samples: ``base`` is the one that the others are set beside."""

    name: str
    summary: str
    base: str = "ours"
    beside: Sequence[str] | None = None  # None: all others
    targets: Mapping[str, float] = field(default_factory=dict)  # the least: its time / base's
    limits: Mapping[str, float | None] = field(default_factory=dict)  # the most: base's time / its
    peak_limit: float | None = None  # the most: base's peak memory / gradient
    peak_limit_bytes: int | None = None  # the most: base's peak memory
    peak_shares: Mapping[str, float] = field(default_factory=dict)  # the most: base's peak / its
    peak_above: str = ""  # whose peak is no part of those that are shared
    time_limit_us: float | None = None  # the most: base's median
    names: Mapping[str, str] = field(default_factory=dict)  # contender -> what it is called here
    part: str = "total"  # of PARTS: what of the contenders' calls; a floor is always whole
    bytes_moved: int = 0  # by that part; 0: as the problem says


@dataclass(frozen=True)
class Case:
    name: str
    summary: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Problem]
    targets: Mapping[str, float] = field(default_factory=dict)  # contender -> wanted ratio to ours
    views: Sequence[View] = ()  # empty: one, of ours beside all others
    rounds: int | None = None  # None: as many as the command's default
    weigh: bool = True
    level: str = ""  # instruction-set level to be measured at; empty: that of the process
    made_of: str = ""  # by which another process makes it, where its name does not say it all

    def tables(self) -> Sequence[View]:
        return self.views or (View(self.name, self.summary, targets=self.targets),)


@dataclass(frozen=True)
class Summary:
    median: float
    minimum: float
    iqr: float  # third less first quartile


@dataclass
class Samples:
    """One entry a round, each the mean time of a call in that round."""

    calls_per_sample: int
    total_us: list[float] = field(default_factory=list)
    forward_us: list[float] = field(default_factory=list)

    def part(self, name: str) -> Samples:
        """The same samples, of ``name`` alone."""
        if name == "total":
            return self
        pairs = zip(self.total_us, self.forward_us, strict=True)
        forward = name == "forward"
        chosen = [first if forward else total - first for total, first in pairs]
        return Samples(self.calls_per_sample, chosen, list(self.forward_us))


class HostClock:
    """For calls that have finished when they return."""

    most_calls = MAX_CALLS

    def hold(self, host_us: float) -> None:
        pass

    def mark(self) -> int:
        return time.perf_counter_ns()

    def finish(self) -> None:
        pass

    def elapsed_us(self, begin: int, end: int) -> float:
        return (end - begin) / 1000.0


class CudaClock:
    """Events on the current stream; they can be read once ``finish`` has waited for the device."""

    most_calls = 48  # the queue of launches has 1024 places; where it is full the host has to wait

    def hold(self, host_us: float) -> None:
        """Keep the device busy with nothing while the host queues for ``host_us``."""
        torch.cuda._sleep(int(min(host_us, MOST_HOLD_US) * CYCLES_PER_US))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize()

    def elapsed_us(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1000.0


def clock_for(device: str) -> HostClock | CudaClock:
    return CudaClock() if torch.device(device).type == "cuda" else HostClock()


def summarize(samples: Sequence[float]) -> Summary:
    if len(samples) < 2:
        return Summary(samples[0], samples[0], 0.0)
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, min(samples), third - first)


def drop_gradients(inputs: tuple) -> list[Tensor | None]:
    """Those of the inputs that require one, taken away from them."""
    leaves = [one for one in inputs if isinstance(one, Tensor) and one.requires_grad]
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def timed_call(contender: Contender, clock: HostClock | CudaClock, index: int) -> tuple:
    inputs = contender.inputs[index % len(contender.inputs)]
    if contender.prepare is not None:
        contender.prepare(*inputs)
    begin = clock.mark()
    returned = contender.call(*inputs)
    middle = clock.mark()
    if contender.began is not None:
        begin = contender.began()
    loss = returned[0] if isinstance(returned, tuple) else returned
    if loss.requires_grad:
        loss.backward()
    end = clock.mark()
    drop_gradients(inputs)
    return begin, middle, end


def sample(contender: Contender, clock: HostClock | CudaClock, calls: int) -> tuple[float, float]:
    """Mean (total, forward) microseconds of a call."""
    # Warm caches: what the contender before left in them is no part of this one's time.
    started = time.perf_counter()
    marks = [timed_call(contender, clock, calls)]
    host_s = time.perf_counter() - started
    if calls > 1 or host_s < LONG_S:
        clock.hold(2 * calls * host_s * 1e6)
        marks = [timed_call(contender, clock, index) for index in range(calls)]
    clock.finish()
    total = sum(clock.elapsed_us(begin, end) for begin, _, end in marks)
    forward = sum(clock.elapsed_us(begin, middle) for begin, middle, _ in marks)
    steps = calls * contender.steps
    return total / steps, forward / steps


def calls_needed(call_us: float, most: int = MAX_CALLS) -> int:
    return max(1, min(most, math.ceil(REGION_US / max(call_us, 1e-3))))


def interleave(
    contenders: Sequence[Contender], device: str, rounds: int, seed: int = 0
) -> dict[str, Samples]:
    """Time every contender ``rounds`` times, in an order drawn anew each round."""
    clock = clock_for(device)
    results = {}
    for contender in contenders:
        call_us = sample(contender, clock, 1)[0]
        if call_us < 10 * REGION_US:  # a long call is one sample anyhow
            call_us = min(call_us, *(sample(contender, clock, 1)[0] for _ in range(2)))
        results[contender.name] = Samples(calls_needed(call_us, clock.most_calls))
    order, shuffle = list(contenders), random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for contender in order:
                samples = results[contender.name]
                total_us, forward_us = sample(contender, clock, samples.calls_per_sample)
                samples.total_us.append(total_us)
                samples.forward_us.append(forward_us)
    finally:
        gc.enable()
    return results
