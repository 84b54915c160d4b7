# SPDX-License-Identifier: BSD-3-Clause
"""The tables of docs/scale.md: the formulas, and an example that is carried to many GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .. import documents
from .machines import ETHERNET, PCIE, Group, ring_us, time_us, tree_us, whole
from .messages import (
    COUNT,
    DDP,
    FLOATS,
    HEAD,
    LAYERS,
    LOGITS,
    MODEL,
    NAMES,
    OTHERS,
    OURS,
    REDUCES,
    RING,
    VOCABULARY,
    Sent,
    messages,
    value,
)

# --- the example that is carried to many GPUs ----------------------------------------------------

# The sizes of Llama 3 8B in bfloat16, 8192 tokens a call: of a GPU, or of a tensor-parallel group.
EXAMPLE = {"N": 8192, "V": 128256, "D": 4096, "K": 1024, "P": 8_030_000_000, "L": 32, "b": 2}
# Assumed: an H100 multiplies bfloat16 at 989 TFLOPS at most, and a step comes to 0.4 of that.
FLOPS_PER_US = 989e6 * 0.4


def compute_us(tensor_ranks: int = 1) -> float:
    """6 operations for each parameter and token, those of a group spread over its ranks."""
    return 6 * EXAMPLE["P"] * EXAMPLE["N"] / FLOPS_PER_US / tensor_ranks


def example_us(way: str, group: Group, **sizes: int) -> float:
    return time_us(messages(way, R=group.ranks, **{**EXAMPLE, **sizes}), group)


def rows_until_slower(group: Group) -> int:
    """From so many rows on, ours takes longer than three all-reduces; 0 where it always does."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        slower = example_us(LOGITS, group, N=middle) > example_us(REDUCES, group, N=middle)
        low, high = (low, middle) if slower else (middle + 1, high)
    return low


# --- the tables ----------------------------------------------------------------------------------

# What test_scale.py counts, with 2 and with 4 processes.
COUNTED = {"N": 10, "V": 64, "D": 16, "P": 1024, "L": 1, "S": 201, "b": 4}
NOT_COUNTED = (RING,)
SIGNS = {"all_reduce": "all-reduce", "all_gather": "all-gather"}
DATA_RANKS = (8, 64, 1_000, 16_000, 100_000)
SEQUENCE_RANKS = (8, 64)
TENSOR_GROUPS = {
    "2, NVLink": Group(2, 2),
    "4, NVLink": Group(4, 4),
    "8, NVLink": Group(8, 8),
    "8, PCIe": Group(8, 8, inside=PCIE),
    "16, 2 machines": whole(16),
    "64, 8 machines": whole(64),
    "1 000, 125 machines": whole(1_000),
}


def formulas(ways: Mapping[str, Sequence[Sent]]) -> Iterable[list[str]]:
    yield ["what", "message", "times", "bytes that a rank hands over", "at 2 ranks", "at 4"]
    for way, every in ways.items():
        if not every:
            yield [NAMES[way], "none", "0", "0", "0", "0"]
        for i, sent in enumerate(every):
            name = NAMES[way] if i == 0 else ""
            kind = SIGNS.get(sent.kind, sent.kind.replace("_", "-"))
            yield [name, kind, *map(_shown, (sent.times, sent.bytes)), *_at(way, sent)]


def _shown(formula: str) -> str:
    return formula if formula.isdigit() else f"`{formula.replace('//', '/')}`"


def _at(way: str, sent: Sent) -> Iterable[str]:
    for ranks in (2, 4):
        if way in NOT_COUNTED:
            yield "not counted"
        else:
            yield str(value(sent.bytes, COUNTED | {"R": ranks}))


def data() -> Iterable[list[str]]:
    yield ["GPUs", "count, in a ring", "count, in a tree", "of a step", "gradients", "by 100 Gb/s"]
    for ranks in DATA_RANKS:
        group, (one,) = whole(ranks), messages(COUNT, R=ranks)
        slow = example_us(DDP, whole(ranks, outside=ETHERNET))
        share = example_us(COUNT, group) / compute_us()
        yield [
            spaced(ranks),
            time_text(ring_us(one, group)),
            time_text(tree_us(one, group)),
            share_text(share),
            time_text(example_us(DDP, group)),
            time_text(slow) if group.nodes > 1 else "",
        ]


def tensor() -> Iterable[list[str]]:
    others = ["3 all-reduces", "3 floats", "whole rows", "the layers' own"]
    yield ["ranks", "ours", "of a step", "held on a rank", *others]
    for name, group in TENSOR_GROUPS.items():
        ours = example_us(LOGITS, group)
        (message,) = messages(LOGITS, R=group.ranks, **EXAMPLE)
        others = [example_us(way, group) for way in (REDUCES, FLOATS, VOCABULARY, LAYERS)]
        step = compute_us(group.ranks) + others[-1]
        held = size_text(message.bytes * group.ranks)
        yield [name, time_text(ours), share_text(ours / step), held, *map(time_text, others)]


def sequence() -> Iterable[list[str]]:
    yield ["ranks of a sequence", "count", "keys and values", "tokens of the sequence"]
    for ranks in SEQUENCE_RANKS:
        group = whole(ranks)
        times = [time_text(example_us(way, group)) for way in (COUNT, RING)]
        yield [str(ranks), *times, spaced(ranks * EXAMPLE["N"])]


def crossover() -> Iterable[list[str]]:
    yield ["ranks", "rows from which three all-reduces end earlier"]
    for name, group in TENSOR_GROUPS.items():
        rows = rows_until_slower(group)
        yield [name, spaced(round(rows, -3)) if rows else "always"]


def forms() -> Iterable[list[str]]:
    yield ["8 ranks, NVLink", "logits form", "linear form"]
    group = Group(8, 8)
    n, v, d, b = EXAMPLE["N"], EXAMPLE["V"] // 8, EXAMPLE["D"], EXAMPLE["b"]
    rows, hidden = example_us(LOGITS, group), example_us(HEAD, group)
    yield ["the loss sends, forward", time_text(rows), time_text(rows)]
    yield ["the loss sends, backward", "0", time_text(hidden)]
    yield ["the head sends, backward", time_text(hidden), "0"]
    head = [k * n * d * v / FLOPS_PER_US for k in (6, 8)]
    yield ["products with the head's weight", *map(time_text, head)]
    yield ["logits kept on a rank", size_text(n * v * b), "a chunk of rows"]


TABLES: dict[str, Callable[[], Iterable[list[str]]]] = {
    "ours": lambda: formulas(OURS),
    "model": lambda: formulas(MODEL),
    "others": lambda: formulas(OTHERS),
    "data": data,
    "tensor": tensor,
    "crossover": crossover,
    "sequence": sequence,
    "forms": forms,
}


def _scaled(number: float, units: Sequence[str]) -> str:
    """In the unit that suits; a digit behind the point below 10."""
    i = 0
    while number >= 999.5 and i + 1 < len(units):
        number, i = number / 1000, i + 1
    return f"{number:.{1 if number < 9.95 else 0}f} {units[i]}"


def time_text(us: float) -> str:
    return _scaled(us, ("µs", "ms", "s"))


def size_text(size: float) -> str:
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def spaced(number: int) -> str:
    return f"{number:_}".replace("_", " ")


def share_text(share: float) -> str:
    return f"{100 * share:.2g} %"


def table(name: str) -> str:
    return documents.markdown(TABLES[name]())
