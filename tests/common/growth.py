# SPDX-License-Identifier: BSD-3-Clause
"""What calls leave behind: bytes that malloc has given and blocks that Python has, per call."""

import ctypes
import gc
import sys
from typing import NamedTuple

import torch
from operator_calls import RETURNING_STRINGS, arguments_of, operators, ops

# What returns a string loses it in PyTorch, 50 bytes for each; it is called once in a process.
CALLED_OFTEN = sorted(set(operators()) - RETURNING_STRINGS)
REFUSING_NOTHING = {"_snapshot"}
NUMBERS_OF_NO_KIND = torch.ones(3, dtype=torch.complex64)


class Growth(NamedTuple):
    """Per call."""

    bytes: float
    blocks: float


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )]  # fmt: skip


def can_count():
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def allocated():
    """Bytes that malloc has given and not got back: exact, other than the resident memory."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def growth(call, calls):
    """Of so many calls, after a tenth as many that fill what is filled once."""
    with torch.no_grad():
        for _ in range(calls // 10):
            call()
        gc.collect()
        before = allocated(), sys.getallocatedblocks()
        for _ in range(calls):
            call()
        gc.collect()
        after = allocated(), sys.getallocatedblocks()
    return Growth(*((new - old) / calls for old, new in zip(before, after, strict=True)))


def good_call(name):
    op, arguments = getattr(ops, name).default, arguments_of(name)
    return lambda: op(**arguments)


def refused_call(name):
    """With its first tensor of a dtype that no operator takes."""
    op, arguments = getattr(ops, name).default, dict(arguments_of(name))
    first = next(a.name for a in op._schema.arguments if str(a.type) == "Tensor")
    arguments[first] = NUMBERS_OF_NO_KIND
    return refused(lambda: op(**arguments))


def refused(call):
    """The same call, whose error is caught; it must come."""

    def caught():
        try:
            call()
        except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return
        raise AssertionError("the call is not refused")

    return caught
