# SPDX-License-Identifier: BSD-3-Clause
"""How long messages take, by their number and bytes: on machines of any size, by assumed links."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from .messages import Message


class Link(NamedTuple):
    latency_us: float  # of a step of a collective
    gb_per_s: float  # of a GPU, one way


# Assumed. Bandwidths are the makers' peaks: NVLink 4 of an H100 900 GB/s both ways, PCIe 5 x16 128,
# a network of 400 or 100 Gb/s for each GPU. Latencies are those by which NCCL 2.28 chooses its
# algorithms (ncclTunerConstantsDefaults, LL).
NVLINK, PCIE = Link(0.6, 450), Link(1.0, 64)
INFINIBAND, ETHERNET = Link(5.0, 50), Link(5.0, 12.5)
START_US = 6.8


class Group(NamedTuple):
    """Ranks of a collective, ``per_node`` of them in each machine."""

    ranks: int
    per_node: int
    inside: Link = NVLINK
    outside: Link = INFINIBAND

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.per_node)

    def bytes_per_us(self, kind: str) -> float:
        """Of a GPU. In a collective the GPUs of a machine send over all its network cards, each its
        share; what one sends to the next goes over its own."""
        speed = self.inside.gb_per_s
        if self.nodes > 1:
            cards = 1 if kind == "send" else self.per_node
            speed = min(speed, cards * self.outside.gb_per_s)
        return speed * 1e3


def whole(ranks: int, outside: Link = INFINIBAND) -> Group:
    """All GPUs of machines of 8."""
    return Group(ranks, min(ranks, 8), outside=outside)


def arriving(message: Message, ranks: int) -> float:
    """Bytes that reach a rank, by the algorithms that send the fewest."""
    share = (ranks - 1) / ranks
    factor = {
        "all_reduce": 2 * share,
        "all_gather": ranks - 1,
        "reduce_scatter": share,
        "send": 1,
    }
    return message.bytes * factor[message.kind]


def ring_us(message: Message, group: Group) -> float:
    """A step for each rank, twice in an all-reduce; one where a rank sends to the next."""
    between = group.nodes - 1
    steps = (group.ranks - 1 - between) * group.inside.latency_us
    steps += between * group.outside.latency_us
    if message.kind == "all_reduce":
        steps *= 2
    elif message.kind == "send":
        steps = (group.outside if between else group.inside).latency_us
    return START_US + steps + arriving(message, group.ranks) / group.bytes_per_us(message.kind)


def tree_us(message: Message, group: Group) -> float:
    """Of an all-reduce: a chain in each machine and a tree of machines, up and down again."""
    steps = (min(group.per_node, group.ranks) - 1) * group.inside.latency_us
    steps += math.ceil(math.log2(group.nodes)) * group.outside.latency_us
    return START_US + 2 * steps + 2 * message.bytes / group.bytes_per_us(message.kind)


def time_us(sent: Iterable[Message], group: Group) -> float:
    """One after the other, each by the quicker algorithm."""
    total = 0.0
    for message in sent:
        time = ring_us(message, group)
        if message.kind == "all_reduce":
            time = min(time, tree_us(message, group))
        total += time
    return total
