# SPDX-License-Identifier: BSD-3-Clause
"""Every way that we know to get an argument of an operator wrong, drawn by its type there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .good import Draw

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.bits8, torch.bits16, torch.uint4),
    *(torch.int1, torch.quint8, torch.qint32),
)
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e300, -1e300, 5e-324, 1e-39, 2.5)
# Sizes between these a machine may have the memory for, and the seconds to fill it.
WHOLE = (
    *(0, -1, 1, 2, 7, -100, 127, 129, 2**20),
    *(2**40, 2**47, 2**48, 2**48 + 1, 2**62, 2**63 - 1, 2**63, -(2**31), -(2**63), -(2**63) - 1),
    2**70,
)
WORDS = ("", "max", "mean", "none", "token", "mse", "prefix", "self", "mean\0", "é", "m" * 5000)
OBJECTS: tuple[Any, ...] = (None, "x", b"x", [1], [], (1, 2), {}, 1, True, 1.5, 2j, object(), len)
DATA = (math.nan, math.inf, -math.inf, 1e38, 1e-40, 0.0, -1.0)
LABELS = (-1, -100, -101, 100, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))


class Subclass(torch.Tensor):
    pass


def a_number(draw: Draw, good: Any) -> Any:
    return draw.choice((*NUMBERS, *WHOLE, 2**2000, *OBJECTS, *scalars()))


def a_whole_number(draw: Draw, good: Any) -> Any:
    return draw.choice((*WHOLE, *WHOLE, *NUMBERS, *OBJECTS, *scalars()))


def a_flag(draw: Draw, good: Any) -> Any:
    return draw.choice((not good, 2, *OBJECTS, *scalars()))


def a_word(draw: Draw, good: Any) -> Any:
    return draw.choice((*WORDS, *OBJECTS))


def scalars() -> tuple[Any, ...]:
    return np.float64(0.5), np.int64(3), np.array(2), torch.tensor(1), torch.tensor([1.0, 2.0])


def a_tensor(draw: Draw, good: Any) -> Any:
    """Of the good one, or of nothing like it."""
    if not isinstance(good, torch.Tensor):
        shape = draw.choice([(), (0,), (3,), (2, 5), (1, 1), (2, 5, 37)])
        good = draw.normal(*shape)
    ways = (
        of_another_shape,
        of_another_dtype,
        with_other_strides,
        with_other_data,
        of_another_kind,
    )
    return draw.choice(ways)(draw, good)


def of_another_shape(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    shape = list(x.shape)
    at = draw.randrange(len(shape)) if shape else 0
    changed = {
        "more": lambda: [*shape[:at], shape[at] + draw.choice([1, 3, 64]), *shape[at + 1 :]],
        "less": lambda: [*shape[:at], max(shape[at] - 1, 0), *shape[at + 1 :]],
        "none": lambda: [*shape[:at], 0, *shape[at + 1 :]],
        "one": lambda: [*shape[:at], 1, *shape[at + 1 :]],
        "dropped": lambda: shape[:at] + shape[at + 1 :],
        "turned": lambda: shape[::-1],
    }
    always: dict[str, Callable[[], list[int]]] = {
        "added": lambda: [*shape[:at], draw.choice([1, 2]), *shape[at:]],
        "number": lambda: [],
        "flat": lambda: [x.numel()],
        "many": lambda: [1] * 65,
        "empty": lambda: [0],
        "empty of any size": lambda: [0, 2**40],
    }
    new = draw.choice(list((changed | always if shape else always).values()))()
    values = x.flatten()
    if not math.prod(new) or not x.numel():
        return x.new_zeros(new)
    return values.repeat(math.prod(new) // x.numel() + 1)[: math.prod(new)].reshape(new)


def of_another_dtype(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    dtype = draw.choice(DTYPES)
    if dtype in (torch.quint8, torch.qint32):
        return torch.quantize_per_tensor(x.float(), 0.1, 0, dtype)
    try:
        return x.to(dtype)
    except (RuntimeError, NotImplementedError):
        return torch.empty(x.shape, dtype=dtype)


def with_other_strides(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    """What it holds is the same, or some of it; all of it lies in memory of its own."""
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda: torch.stack([x, x], -1)[..., 0],
        lambda: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        lambda: x.flatten()[:1].expand(x.shape) if x.numel() else x,
        lambda: x[..., :1].expand(x.shape),
        lambda: torch.as_strided(x.flatten().repeat(2), x.shape, [1] * x.dim()),
        lambda: x.to(memory_format=torch.channels_last),
    ]
    if not x.dim():
        return torch.stack([x, x])[1]
    try:
        return draw.choice(ways)()
    except RuntimeError:  # not of this rank
        return ways[0]()


def with_other_data(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone()
    if not x.numel() or x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        value = torch.tensor(draw.choice(DATA), dtype=torch.float64).to(x.dtype)
    else:
        value = torch.tensor(fitting(draw.choice(LABELS), x.dtype), dtype=x.dtype)
    if draw.random() < 0.5:
        return x.fill_(value)
    x.view(-1)[draw.randrange(x.numel())] = value
    return x


def fitting(value: int, dtype: torch.dtype) -> int:
    limit = torch.iinfo(dtype)
    return max(limit.min, min(value, limit.max))


def of_another_kind(draw: Draw, x: torch.Tensor) -> Any:
    ways: list[Callable[[], Any]] = [
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.to_sparse_csr(),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        lambda: x.to_mkldnn(),
        lambda: x.float().requires_grad_(),
        lambda: x.as_subclass(Subclass),
        lambda: torch.nn.Parameter(x.float()),
        lambda: torch._neg_view(x),
        lambda: torch.complex(x.float(), x.float()).conj(),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
        lambda: x.numpy(),
        lambda: x.tolist(),
        lambda: [x],
        lambda: x.flatten()[0].item(),
        lambda: draw.choice(OBJECTS),
    ]
    try:
        return draw.choice(ways)()
    except (RuntimeError, TypeError, IndexError, NotImplementedError):  # not of this rank or dtype
        return draw.choice(OBJECTS)


KINDS: dict[str, Callable[[Draw, Any], Any]] = {
    "Tensor": a_tensor,
    "int": a_whole_number,
    "SymInt": a_whole_number,
    "float": a_number,
    "bool": a_flag,
    "str": a_word,
}


def wrong(draw: Draw, kind: str, good: Any) -> Any:
    """kind: the type of the schema, as "Optional[Tensor]"."""
    return KINDS[kind.removeprefix("Optional[").removesuffix("]")](draw, good)
