# SPDX-License-Identifier: BSD-3-Clause
"""What is measured on a GPU, each figure with its target as a ratio within one run.

forward_*    masked cross entropy, loss alone, bf16: a share of the bandwidth of one plain read of
             the rows that count, and ahead of torch.compile and of the kernels of others.
backward_*   the same, backward alone: a share of a plain copy that moves as many bytes.
fused_*      both in one sweep, the gradient made in the forward: a share of the same copy, as it
             moves as much.
train_*      forward and backward one after the other, beside the others; no target.
tokens_*     masked squared error, forward and backward: a share of a plain copy of the bytes of the
             valid tokens, and twice as fast as torch.compile.
linear_*     the logit-free functions: see cuda_linear_cases.py.
plan_*       the block mask of 51 samples at 64k tokens, keep_k on the device: time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import masked_loss_ext as mle

from . import block_mask, cuda_linear_cases, rivals, squared_error
from . import cross_entropy_problems as problems
from .contenders import COPY, compiled, fastest_read, placed, plain_copy
from .harness import Case, Contender, Problem, View

BF16, FP32 = torch.bfloat16, torch.float32
# name, rows and classes (1 GB of logits), the same under --quick
SIZES = (
    ("128k", (4096, 128256), (32, 2048)),
    ("32k", (16384, 32000), (64, 500)),
    ("256k", (2048, 256000), (16, 4096)),
)
READ, COPIED, TOKENS_COPIED = 0.95, 0.90, 0.85  # shares of the bandwidth of a read or a copy
FUSED = "ours in one sweep"
OTHERS = ("compile", *rivals.NAMES)
TOKEN_SHAPES = (
    ("tokens_c64", (32, 4096, 64), (4, 200, 64)),
    ("tokens_c16", (64, 16384, 16), (4, 200, 16)),
)
PLAN_US, PLAN_TOKENS, PLAN_TOKENS_QUICK = 60.0, 65536, 2560
ROUNDS = 15


def cross_entropy_contenders(sets: Sequence[tuple]) -> list[Contender]:
    found = [
        Contender("ours", problems.ours, sets),
        Contender("compile", compiled(problems.widened), sets),
    ]
    return found + rivals.contenders(*sets[0])


def row_problem(
    shape: tuple[int, int], ignored: float, device: str, gradient: bool
) -> tuple[Problem, Tensor]:
    """Ours beside the others, without a floor; and which rows count."""
    sets = placed(problems.row_data(shape, BF16, ignored, device), device, gradient)
    logits, target = sets[0]
    counted = target != problems.IGNORED
    read = problems.read_bytes(logits, counted)
    problem = Problem(
        cross_entropy_contenders(sets),
        mle.reference.masked_cross_entropy,
        bytes_moved=2 * read + logits.nbytes if gradient else read,
        gradient_bytes=logits.nbytes,
        gradient_tolerance=problems.GRADIENT_TOLERANCE,
        gradient_unit=1 / (max(1, int(counted.sum())) * shape[-1]),
    )
    return problem, counted


def forward_problem(shape: tuple[int, int], ignored: float, device: str) -> Problem:
    problem, counted = row_problem(shape, ignored, device, gradient=False)
    words = problems.counted_words(problem.contenders[0].inputs[0][0], counted)
    moved = problem.bytes_moved
    read = Contender("one read", fastest_read(words), [(words,)], role="floor", bytes_moved=moved)
    return replace(problem, beside=[read])


def train_problem(shape: tuple[int, int], ignored: float, device: str) -> Problem:
    """The copy moves what the backward does: it reads the rows that count and writes all."""
    problem, counted = row_problem(shape, ignored, device, gradient=True)
    ours, *others = problem.contenders
    fused = Contender(FUSED, problems.ours_in_forward, ours.inputs)
    moved = backward_bytes(ours.inputs[0][0].shape, int(counted.sum()))
    copy = replace(plain_copy(moved, device), bytes_moved=moved)
    return replace(problem, contenders=[ours, fused, *others], beside=[copy])


def backward_bytes(shape: Sequence[int], counted: int) -> int:
    rows, classes = shape
    return (rows + counted) * classes * BF16.itemsize


def forward_case(size: str, shape: tuple[int, int], ignored: float, device: str) -> Case:
    name = f"forward_{size}" + ("_ignored_40" if ignored else "")
    view = View(
        name,
        ignored_text(ignored),
        beside=(*OTHERS, "one read"),
        targets=dict.fromkeys(OTHERS, 1.0),
        limits={"one read": 1 / READ},
    )
    return case_of(view, shape, BF16, lambda: forward_problem(shape, ignored, device))


def train_case(size: str, shape: tuple[int, int], ignored: float, device: str) -> Case:
    end = "_ignored_40" if ignored else ""
    moved = backward_bytes(shape, shape[0] - round(ignored * shape[0]))
    text, beside_copy = ignored_text(ignored), {"beside": (COPY,), "limits": {COPY: 1 / COPIED}}
    views = [
        View(f"train_{size}{end}", text, beside=(FUSED, *OTHERS)),
        View(f"backward_{size}{end}", text, part="backward", bytes_moved=moved, **beside_copy),
        View(f"fused_{size}{end}", text, base=FUSED, bytes_moved=moved, **beside_copy),
    ]
    made = case_of(views[0], shape, BF16, lambda: train_problem(shape, ignored, device))
    return replace(made, views=views)


def ignored_text(ignored: float) -> str:
    return f"{100 * ignored:.0f} % ignored"


def case_of(view: View, shape: tuple, dtype: torch.dtype, make: Callable[[], Problem]) -> Case:
    return Case(
        view.name, view.summary, shape, dtype, make, views=[view], rounds=ROUNDS, weigh=False
    )


def cross_entropy_cases(device: str, quick: bool) -> list[Case]:
    """The most telling first: a run that is cut short has measured those."""
    found = []
    for place, (size, full, small) in enumerate(SIZES):
        shape = small if quick else full
        for ignored in (0.0, 0.4) if place == 0 else (0.0,):
            found.append(forward_case(size, shape, ignored, device))
            found.append(train_case(size, shape, ignored, device))
    return found


def squared_error_cases(device: str, quick: bool) -> list[Case]:
    found = []
    for name, full, small in TOKEN_SHAPES:
        shape = small if quick else full
        view = View(
            name,
            squared_error.PADDING["right"],
            beside=("eager", "compile", COPY),
            targets={"compile": 2.0},
            limits={COPY: 1 / TOKENS_COPIED},
        )

        def make(shape=shape) -> Problem:
            return squared_error.token_problem(shape, "right", FP32, device)

        found.append(case_of(view, shape, FP32, make))
    return found


def plan_problem(length: int, device: str) -> Problem:
    """The native operator alone; beside it the whole call, which makes its offsets on the host."""
    samples = length // block_mask.SAMPLE
    parts = torch.tensor([[block_mask.PATCHES, block_mask.REGISTERS]] * samples)
    offsets = torch.cat([parts.new_zeros(1), parts.reshape(-1).cumsum(0)])
    generator = torch.Generator().manual_seed(block_mask.SEED)
    keep_k = mle.sample_keep_k(block_mask.REGISTERS, samples, generator=generator)
    kept = torch.stack([parts[:, 0], keep_k], 1)
    plan = torch.ops.masked_loss_ext.nested_dropout_plan

    def ours(kept: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return plan(offsets, kept, length, "full")

    def on_the_host(kept: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.to(kept.device) for one in plan(offsets.cpu(), kept.cpu(), length, "full"))

    def whole(kept: Tensor, offsets: Tensor) -> Tensor:
        made = mle.nested_dropout_block_mask(
            parts.tolist(), kept[:, 1].contiguous(), "full", max_seq_len=length
        )
        return made.kv_indices

    data = (kept.to(device), offsets.to(device))
    call = Contender("whole call", whole, [data], weigh=False, role="information")
    ours_alone = Contender("ours", ours, [data])
    return Problem([ours_alone], on_the_host, bytes_moved=0, gradient_bytes=0, beside=[call])


def block_mask_cases(device: str, quick: bool) -> list[Case]:
    length = PLAN_TOKENS_QUICK if quick else PLAN_TOKENS
    view = View("plan_64k", "51 x (1024 + 256), keep_k on the device", time_limit_us=PLAN_US)
    shape = (length, length)
    return [case_of(view, shape, torch.bool, lambda: plan_problem(length, device))]


CASES = {
    "squared_error": squared_error_cases,
    "block_mask": block_mask_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": cuda_linear_cases.cases,
}


def cases(benchmark: str, device: str = "cuda", quick: bool = False) -> list[Case]:
    """On another device than a GPU the targets mean nothing; tests run them there all the same."""
    return CASES[benchmark](device, quick)
