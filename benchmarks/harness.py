# SPDX-License-Identifier: BSD-3-Clause
"""How a measurement is taken: check the results, then time the contenders in turn.

- A contender is timed only if its loss and its gradient agree with the reference in float64.
- All contenders of a case run in one process, round by round, in an order drawn anew each round,
  so that a slow minute of the machine falls on all of them and the ratios stay meaningful.
- A sample is the mean of as many calls as fill ``REGION_US``. Every call has its own clock
  readings, so that the gradient is dropped between calls outside the clock while each call still
  pays for the memory of the gradient it makes.
- The roof, a plain copy that moves the same number of bytes, runs in the same rounds.
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
COPY, FILL = "copy", "fresh fill"  # what every case is set beside, for information

# Arithmetic is fp32 inside for both dtypes. The loss is one long fp32 sum; an element of the
# gradient takes about six fp32 roundings and, for bf16, one more of at most 2^-8 at the end.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8 + 2e-6}


@dataclass(frozen=True)
class Contender:
    """``call(*inputs[i])`` gives the loss; the gradient goes to the first tensor of the tuple.

    Several tuples hold equal problems in different memory, so that on CUDA the data of one call is
    not in the L2 cache because the call before left it there.
    """

    name: str
    call: Callable[..., Tensor]
    inputs: Sequence[tuple]
    weigh: bool = True  # False: its peak memory says nothing beside the case's gradient


@dataclass(frozen=True)
class Problem:
    """A case with its data: the first contender is ours, the ratios are taken against it."""

    contenders: Sequence[Contender]
    reference: Callable[..., Tensor]  # the same call on float64 inputs
    bytes_moved: int  # what must be read and written, forward and backward
    gradient_bytes: int


@dataclass(frozen=True)
class Case:
    name: str
    summary: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Problem]
    targets: Mapping[str, float] = field(default_factory=dict)  # contender -> wanted ratio to ours


@dataclass(frozen=True)
class Agreement:
    loss_error: float  # relative
    gradient_error: float  # largest relative error of an element
    refusal: str = ""  # why this contender is not timed; empty: it agrees


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


class HostClock:
    """For calls that have finished when they return."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def finish(self) -> None:
        pass

    def elapsed_us(self, begin: int, end: int) -> float:
        return (end - begin) / 1000.0


class CudaClock:
    """Events on the current stream; they can be read once ``finish`` has waited for the device."""

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


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest |value - truth| / |truth|; where the truth is 0 only an exact 0 is no error."""
    truth = truth.double()
    difference = (value.double() - truth).abs_()
    scale = truth.abs().clamp_min_(torch.finfo(torch.float32).tiny)
    return difference.div_(scale).max().item() if truth.numel() else 0.0


def run_once(contender: Contender, index: int = 0) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one call, the gradient taken away from the input."""
    inputs = contender.inputs[index % len(contender.inputs)]
    inputs[0].grad = None
    loss = contender.call(*inputs)
    loss.backward()
    gradient, inputs[0].grad = inputs[0].grad, None
    return loss.detach(), gradient


def truth_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the reference, in float64, from our contender's data."""

    def widen(value):
        wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if wide else value

    leaf, *rest = (widen(value) for value in problem.contenders[0].inputs[0])
    leaf.requires_grad_(True)
    return run_once(Contender("reference", problem.reference, [(leaf, *rest)]))


def check(contender: Contender, truth: tuple[Tensor, Tensor]) -> Agreement:
    """Does it compute what the reference computes? A failure to run is a refusal too."""
    try:
        loss, gradient = run_once(contender)
    except Exception as error:  # the other contenders of the case must still be measured
        first_line = (str(error).splitlines() or ["no message"])[0]
        return Agreement(math.nan, math.nan, f"{type(error).__name__}: {first_line}")
    if gradient is None or gradient.shape != truth[1].shape:
        got = None if gradient is None else tuple(gradient.shape)
        return Agreement(math.nan, math.nan, f"gradient of shape {got}")
    loss_error = relative_error(loss, truth[0])
    gradient_error = relative_error(gradient, truth[1])
    loss_limit = LOSS_TOLERANCE[gradient.dtype]
    gradient_limit = GRADIENT_TOLERANCE[gradient.dtype]
    refusal = ""
    # "not <=" and not ">": a NaN is a refusal.
    if not loss_error <= loss_limit:
        refusal = f"loss is off by {loss_error:.1e}, allowed {loss_limit:.1e}"
    elif not gradient_error <= gradient_limit:
        refusal = f"gradient is off by {gradient_error:.1e}, allowed {gradient_limit:.1e}"
    return Agreement(loss_error, gradient_error, refusal)


def plain_copy(bytes_moved: int, device: str) -> Contender:
    """The roof: reads half of ``bytes_moved`` and writes the other half, to pages already there."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    pair = (source, torch.ones_like(source))
    return Contender(COPY, lambda source, target: target.copy_(source), [pair], weigh=False)


def fresh_fill(gradient_bytes: int, device: str) -> Contender:
    """For information: what a write of the gradient costs in memory that was just asked for."""
    like = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(like: Tensor) -> Tensor:
        return like.new_empty(gradient_bytes).fill_(1)

    return Contender(FILL, fill, [(like,)], weigh=False)


def timed_call(contender: Contender, clock: HostClock | CudaClock, index: int) -> tuple:
    inputs = contender.inputs[index % len(contender.inputs)]
    begin = clock.mark()
    result = contender.call(*inputs)
    middle = clock.mark()
    if result.requires_grad:
        result.backward()
    end = clock.mark()
    inputs[0].grad = None
    return begin, middle, end


def sample(contender: Contender, clock: HostClock | CudaClock, calls: int) -> tuple[float, float]:
    """Mean (total, forward) microseconds of a call."""
    # Warm caches: what the contender before left in them is no part of this one's time.
    timed_call(contender, clock, calls)
    marks = [timed_call(contender, clock, index) for index in range(calls)]
    clock.finish()
    total = sum(clock.elapsed_us(begin, end) for begin, _, end in marks)
    forward = sum(clock.elapsed_us(begin, middle) for begin, middle, _ in marks)
    return total / calls, forward / calls


def calls_needed(call_us: float) -> int:
    return max(1, min(MAX_CALLS, math.ceil(REGION_US / max(call_us, 1e-3))))


def interleave(
    contenders: Sequence[Contender], device: str, rounds: int, seed: int = 0
) -> dict[str, Samples]:
    """Time every contender ``rounds`` times, in an order drawn anew each round."""
    clock = clock_for(device)
    results = {}
    for contender in contenders:
        call_us = min(sample(contender, clock, 1)[0] for _ in range(3))
        results[contender.name] = Samples(calls_needed(call_us))
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
