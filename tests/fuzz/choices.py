# SPDX-License-Identifier: BSD-3-Clause
"""What a random case is made of, read off a byte string.

hypothesis draws the bytes, all of a case at once: a draw for every choice would take longer than
the operators. Byte 0 is the plainest choice everywhere, and that is what it shrinks them to.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from cases import FLOATING, MASK_DTYPES, _mask_values, stored_as

LENGTH = 96
LAYOUTS = (*("contiguous",) * 4, "transposed", "permuted", "sliced", "row_gaps", "misaligned")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CONVERTED = (torch.uint16, torch.uint32)
MASKS = (*MASK_DTYPES, *CONVERTED, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
POISON = ("nan", "inf", "-inf", "huge", "denormal")


@dataclass
class Choices:
    code: bytes
    at: int = 0
    reached: Counter = field(default_factory=Counter)  # calls that were compared, by operator
    said: dict = field(default_factory=dict)  # what the case is, for whoever reads a failure

    def byte(self):
        self.at += 1
        return self.code[self.at - 1] if self.at <= len(self.code) else 0

    def pick(self, choices):
        return choices[self.byte() % len(choices)]

    def below(self, number):
        return self.byte() % number

    def chance(self, share):
        return self.byte() >= 256 * (1 - share)

    def generator(self):
        """Four bytes decide about all numbers of a case."""
        seed = int.from_bytes(bytes(self.byte() for _ in range(4)), "big")
        return torch.Generator().manual_seed(seed)

    def layout(self):
        return self.pick(LAYOUTS)

    def dtype(self):
        return self.pick((torch.float32, torch.float64, torch.float16, torch.bfloat16))

    def mask_dtype(self):
        return self.pick(MASKS)

    def poison(self):
        return self.pick(POISON)

    def saw(self, *operators, calls=1):
        self.reached.update(dict.fromkeys(operators, calls))


def laid(tensor, layout):
    """The same values with other strides, as far as its rank allows; NaN lies between."""
    if tensor is None or tensor.dim() == 0 or (layout == "permuted" and tensor.dim() < 2):
        return tensor
    return stored_as(tensor, layout)


def mask_values(on, dtype):
    """On is what is not 0: other values than 1, too, and such as have low bytes of 0."""
    if dtype in MASK_DTYPES:
        return _mask_values(on, dtype)
    return on.to(torch.int32).to(dtype)


def poison_value(kind, dtype):
    info = torch.finfo(dtype)
    denormal = info.smallest_normal / 4
    values = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "huge": info.max}
    return values.get(kind, denormal)


def poisoned(tensor, off, kind):
    """A copy of the same strides with garbage where ``off`` and in between: a number of that kind,
    or the largest integer."""
    if tensor is None or tensor.dtype not in MASK_DTYPES:
        return tensor
    if tensor.dtype.is_floating_point:
        value = poison_value(kind, tensor.dtype)
    elif tensor.dtype == torch.bool:
        value = True
    else:
        value = torch.iinfo(tensor.dtype).max
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = tensor.storage_offset() + 1 + sum((n - 1) * step for n, step in steps if n)
    storage = torch.full((extent,), value, dtype=tensor.dtype)
    copy = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copy.copy_(torch.where(off, storage[0], tensor))


def used_by(on, shape):
    """Whether an entry of a tensor that is broadcast to ``on`` from ``shape`` belongs to any."""
    if tuple(shape) == tuple(on.shape):
        return on
    return on.long().sum_to_size(shape) > 0


def rounded(values, dtype):
    """float64 values that the dtype can hold."""
    return values.to(dtype) if dtype in FLOATING else values
