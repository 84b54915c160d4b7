# SPDX-License-Identifier: BSD-3-Clause
"""The data of the cross entropy cases, their contenders and their floors.

Half logits are set beside ``F.cross_entropy(logits.float(), ...)``: what Hugging Face's models do,
and the only one of PyTorch's forms that is as accurate as fp32. Floors are the reads and writes
alone that nobody can do without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss_ext as mle

from .contenders import as_words, compiled, fastest_read, huge_empty, placed
from .harness import Contender, Problem

SEED = 3
IGNORED = -100  # the default of all
SPREAD = 2.0  # standard deviation of the logits
# p = exp(z - lse) is off by the rounding of its exponent, up to 20 here, and p - 1 cancels: an
# element is right to so much of itself or, where it is below the mean probability, of that.
GRADIENT_TOLERANCE = 1e-5


def ours(logits, target):
    return mle.masked_cross_entropy(logits, target)


def ours_in_place(logits, target):
    return mle.masked_cross_entropy(logits, target, inplace_backward=True)


def ours_in_forward(logits, target):
    return mle.masked_cross_entropy(logits, target, gradient_in_forward=True)


def ours_with_statistics(logits, target):
    return mle.masked_cross_entropy(logits, target, return_stats=True)


def our_statistics(logits, mask):
    return mle.row_statistics(logits, mask=mask)


def eager(logits, target):
    return F.cross_entropy(logits, target)


def widened(logits, target):
    return F.cross_entropy(logits.float(), target)


def eager_statistics(logits, mask):
    lse = torch.logsumexp(logits, -1)
    entropy = lse - (torch.softmax(logits, -1) * logits).sum(-1)
    return torch.where(mask, lse, 0), torch.where(mask, entropy, 0)


def true_statistics(logits, target):
    return mle.reference.masked_cross_entropy(logits, target, return_stats=True)


def true_row_statistics(logits, mask):
    return mle.reference.row_statistics(logits, mask=mask)


def row_data(
    shape: tuple[int, int], dtype: torch.dtype, ignored: float, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N], exactly the share ``ignored`` of them IGNORED."""
    rows, classes = shape
    generator = torch.Generator(device).manual_seed(SEED)
    made = {"generator": generator, "device": device}
    logits = torch.randn(shape, **made).mul_(SPREAD).to(dtype)
    target = torch.randint(classes, (rows,), **made)
    target[torch.randperm(rows, **made)[: round(ignored * rows)]] = IGNORED
    return logits, target


def read_bytes(logits: Tensor, counted: Tensor) -> int:
    """One read of the rows that count."""
    return int(counted.sum()) * logits.shape[-1] * logits.itemsize


def restore_from(logits: Tensor) -> Callable[..., None]:
    """Undoes outside the clock what a call in place did: its next one finds logits, no gradient."""

    @torch.no_grad()
    def restore(overwritten: Tensor, *_: object) -> None:
        overwritten.copy_(logits)

    return restore


def counted_words(logits: Tensor, counted: Tensor) -> Tensor:
    """As many rows as count, without gaps between them, as what is read fastest."""
    return as_words(logits[: int(counted.sum())])


def train_floors(logits: Tensor, counted: Tensor, scratch: Tensor) -> list[Contender]:
    """Two reads of the rows that count and one write of all: to fresh memory, or to ``scratch``."""
    words = counted_words(logits, counted)
    read = fastest_read(words)
    size, device = logits.nbytes, str(logits.device)

    def read_twice_and_fill(words: Tensor) -> Tensor:
        read(words)
        read(words)
        return huge_empty(size, device)[: size // 4 * 4].view(torch.float32).fill_(1)

    def read_twice_and_overwrite(words: Tensor) -> Tensor:
        read(words)
        read(words)
        return scratch.detach().fill_(1)

    return [
        Contender("floor", read_twice_and_fill, [(words,)], role="floor"),
        Contender("floor in place", read_twice_and_overwrite, [(words,)], role="floor"),
    ]


def with_in_place(sets: list[tuple], counted: Tensor) -> tuple[Contender, list[Contender]]:
    """The call in place, on logits of its own, and the floors of both calls."""
    logits, target = sets[0]
    logits = logits.detach()
    scratch = logits.clone().requires_grad_(True)
    restore = restore_from(logits)
    in_place = Contender("ours in place", ours_in_place, [(scratch, target)], prepare=restore)
    return in_place, train_floors(logits, counted, scratch)


RIVALS = {torch.float32: ("eager", "compile"), torch.bfloat16: (".float()", "compiled .float()")}


def train_problem(shape, dtype, ignored: float, device: str, large: bool = True) -> Problem:
    """``large``: with the call in place and the floors, which a small problem has no use for."""
    sets = placed(row_data(shape, dtype, ignored), device)
    logits, target = sets[0]
    counted = target != IGNORED
    formula = eager if dtype == torch.float32 else widened
    calls = (ours, formula, compiled(formula))
    names = ("ours", *RIVALS[dtype])
    contenders = [Contender(name, call, sets) for name, call in zip(names, calls, strict=True)]
    floors = []
    if large:
        in_place, floors = with_in_place(sets, counted)
        contenders.append(in_place)
    return Problem(
        contenders,
        mle.reference.masked_cross_entropy,
        bytes_moved=2 * read_bytes(logits, counted) + logits.nbytes,
        gradient_bytes=logits.nbytes,
        beside=floors,
        gradient_tolerance=GRADIENT_TOLERANCE,
        gradient_unit=1 / (max(1, int(counted.sum())) * shape[-1]),
    )


def small_problem(shape, dtype, ignored: float, device: str) -> Problem:
    return train_problem(shape, dtype, ignored, device, large=False)


def reading_problem(data: tuple, device: str, calls: Mapping[str, Callable], reference) -> Problem:
    """Calls that only read the logits, beside one plain read of as many bytes."""
    sets = placed(data, device, gradient=False)
    logits, labels = sets[0]
    counted = labels if labels.dtype == torch.bool else labels != IGNORED
    words = counted_words(logits, counted)
    return Problem(
        [Contender(name, call, sets) for name, call in calls.items()],
        reference,
        bytes_moved=read_bytes(logits, counted),
        gradient_bytes=logits.nbytes,
        beside=[Contender("one read", fastest_read(words), [(words,)], role="floor")],
    )


def forward_problem(shape, dtype, ignored: float, device: str) -> Problem:
    calls = {
        "ours": ours,
        "ours with statistics": ours_with_statistics,
        "eager": eager,
        "compile": compiled(eager),
    }
    return reading_problem(row_data(shape, dtype, ignored), device, calls, true_statistics)


def statistics_problem(shape, dtype, ignored: float, device: str) -> Problem:
    calls = {
        "ours": our_statistics,
        "eager": eager_statistics,
        "compile": compiled(eager_statistics),
    }
    logits, target = row_data(shape, dtype, ignored)
    return reading_problem((logits, target != IGNORED), device, calls, true_row_statistics)
