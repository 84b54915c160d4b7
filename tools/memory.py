# SPDX-License-Identifier: BSD-3-Clause
"""What is left of many calls of every operator, good ones and refused ones: bytes that malloc has
given and blocks that Python has, per call. Exit 1 where it is more than nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import records
from .instrument import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "common")]

import torch  # noqa: E402
from growth import (  # noqa: E402
    CALLED_OFTEN,
    REFUSING_NOTHING,
    good_call,
    growth,
    refused,
    refused_call,
)

from tests.contracts.test_error_memory import CALLS as REFUSED_IN_PYTHON  # noqa: E402
from tests.contracts.test_memory_growth import LARGEST_BLOCKS, LARGEST_GROWTH  # noqa: E402


def measured(calls: int, call: Callable[[], object] | None) -> dict[str, object]:
    if call is None:
        return {"calls": 0, "bytes per call": "", "blocks per call": ""}
    found = growth(call, calls)
    return {
        "calls": calls,
        "bytes per call": round(found.bytes, 4),
        "blocks per call": round(found.blocks, 4),
    }


def row(
    name: str, calls: int, good: Callable | None, times: int, bad: Callable | None
) -> dict[str, object]:
    refusals = {f"refused {key}": value for key, value in measured(times, bad).items()}
    return {"operator": name, **measured(calls, good), **refusals}


def grows(row: dict[str, object]) -> bool:
    found = {key: float(str(value or 0)) for key, value in row.items() if key != "operator"}
    return any(
        value > (LARGEST_BLOCKS if "blocks" in key else LARGEST_GROWTH)
        for key, value in found.items()
        if "per call" in key
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.memory", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000, help="good ones")
    parser.add_argument("--refused", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="into docs/trust/memory.csv")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name in CALLED_OFTEN:
        bad = None if name in REFUSING_NOTHING else refused_call(name)
        rows.append(row(name, asked.calls, good_call(name), asked.refused, bad))
        print(*rows[-1].values(), flush=True)
    x = torch.randn(2, 5, requires_grad=True)
    for name, call in REFUSED_IN_PYTHON.items():
        bad = refused(lambda call=call: call(x))
        rows.append(row(f"refused by Python: {name}", 0, None, asked.refused, bad))
        print(*rows[-1].values(), flush=True)
    if asked.write:
        print(records.write("memory", rows))
    return int(any(map(grows, rows)))


if __name__ == "__main__":
    sys.exit(main())
