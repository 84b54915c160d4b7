# SPDX-License-Identifier: BSD-3-Clause
"""What a rank sends: each collective that is called, with the bytes that it hands over."""

from collections import Counter
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROOMS = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_MESSAGES = ("wait_tensor", "wrap_tensor_autograd", "monitored_barrier")
# c10d and the functional collectives have names of their own; "coalesced" are several in one.
_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
}


class Message(NamedTuple):
    kind: str  # "all_reduce", "all_gather", "reduce_scatter", "broadcast", ...
    bytes: int  # of the tensors that this rank hands over


class Messages(TorchDispatchMode):
    """``with Messages() as sent``: ``sent.all`` are the messages in order, in forward and backward.

    Counted where PyTorch dispatches them, on the thread of the ``with``: those of DDP's reducer too
    where the backward runs there, as it does on the CPU. An all-gather of n bytes brings n from
    every other rank; an all-reduce of n bytes is one of two halves, 2 (ranks - 1) / ranks * n for
    the usual ring.
    """

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own messages come here then
        if function.namespace in _ROOMS:
            name = function._schema.name.split("::")[1].strip("_")
            if name not in _NO_MESSAGES:
                self.all.append(Message(_kind(name), _bytes(name, args)))
        return function(*args, **(kwargs or {}))

    @property
    def bytes(self):
        """Of all messages."""
        return sum(message.bytes for message in self.all)

    def kinds(self):
        """How often each kind was called."""
        return dict(Counter(message.kind for message in self.all))


def _kind(name):
    return next((kind for start, kind in _KINDS.items() if name.startswith(start)), name)


def _bytes(name, args):
    """Of what is sent: the second argument of those that take the result first."""
    result_first = name.startswith(("allgather", "reduce_scatter")) and _tensors(args[1])
    sent = args[1] if result_first else args[0]
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(sent))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
