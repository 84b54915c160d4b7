# SPDX-License-Identifier: BSD-3-Clause
"""Every case of excluded_cases.py under the library that counts: ``python counted_excluded.py
LIBRARY`` prints, as JSON, one row of what was counted for each call, "wrong" among it."""

import json
import os
import sys

import torch

LINE = 64


def alone_on_lines(tensor, off):
    """Where off is on and nobody else is on the same line of the cache."""
    places = torch.zeros(tensor.shape, dtype=torch.int64)
    for d, stride in enumerate(tensor.stride()):
        shape = [-1 if i == d else 1 for i in range(tensor.dim())]
        places += (torch.arange(tensor.shape[d]) * stride).view(shape)
    lines = (tensor.data_ptr() + places * tensor.element_size()) // LINE
    return off & ~torch.isin(lines, lines[~off])


def wrong_accesses(counter, case, results):
    """Sentences; the number of bytes that were found unread, and of those written once."""
    wrong, unread, zeroed = [], 0, 0
    for name, off in case.excluded.items():
        tensor, off = case.given[name], off.expand(case.given[name].shape)
        reads, writes = counter.accesses(tensor)
        off = alone_on_lines(tensor, off) if case.elements else off
        if reads[off].any():
            wrong.append(f"{name}: {int(reads[off].any(-1).sum())} excluded elements are read")
        if writes.any() and name not in case.written():
            wrong.append(f"{name} is written")
        unread += reads[off].numel()
    for name, off in case.zeros.items():
        result = results[name]
        if result.numel() == 0:
            continue
        times = counter.accesses(result)[1][off.expand(result.shape)]
        if (times != 1).any() or (result[off.expand(result.shape)] != 0).any():
            wrong.append(f"{name}: where it is 0, written {times.unique().tolist()} times")
        zeroed += times.numel()
    return wrong, unread, zeroed


def count(counter, case):
    op = getattr(torch.ops.masked_loss_ext, case.operator).default
    with counter.counting():
        found = op(**case.given)
    found = [found] if isinstance(found, torch.Tensor) else list(found or [])
    written = [case.given[name] for name in case.written()]
    results = dict(zip(case.result_names(), [*found, *written], strict=True))
    wrong, unread, zeroed = wrong_accesses(counter, case, results)
    return {"operator": case.operator, "case": case.name, "wrong": wrong, "unread": unread,
            "zeroed": zeroed}  # fmt: skip


def main(library):
    torch.set_num_threads(1)
    from cpu_counted import Counter

    counter = Counter(library)
    from excluded_cases import FAMILIES, Case

    rows = [count(counter, case) for family in FAMILIES for case in family()]
    # of a mask that excludes nothing all is read: the same looks must find it
    case = next(c for c in FAMILIES[0]() if c.operator == "masked_squared_error")
    bare = Case("bare", case.operator, case.given | {"mask": None}, case.excluded)
    print(json.dumps({"rows": rows, "bare": count(counter, bare)}))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [os.path.dirname(os.path.dirname(here)), os.path.dirname(here)]
    main(sys.argv[1])
