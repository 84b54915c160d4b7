# SPDX-License-Identifier: BSD-3-Clause
"""Each figure that has a target, beside it: met, or missed by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FORMS = {"%": "{:.1f} % of {}", "x": "{:.2f}x {}", "us": "{:.1f} us {}", "MiB": "{:.1f} MiB {}"}
COSTS = ("us", "MiB")


@dataclass(frozen=True)
class Verdict:
    case: str
    what: str
    value: float
    wanted: float
    unit: str  # "%" of a floor's speed, "x" a rival's speed, "us" of time, "MiB" of memory
    met: bool

    @property
    def shortfall(self) -> float:
        """0 where the target is met, else what is missing as a share of it."""
        if self.met:
            return 0.0
        # Of what it costs there is too much, of the others too little.
        ratio = self.value / self.wanted
        return 1 - (1 / ratio if self.unit in COSTS else ratio)

    def text(self) -> str:
        amount = FORMS[self.unit]
        sign = "<=" if self.unit in COSTS else ">="
        said = f"{self.case} {amount.format(self.value, self.what)} ({sign} {self.wanted:g} wanted)"
        return f"{said}: met" if self.met else f"{said}: missed by {self.shortfall:.1%}"


def verdicts_of(row: Mapping[str, object]) -> list[Verdict]:
    """Of a row of figures, as it is written to a CSV or read from one."""
    found = []

    def number(column: str) -> float | None:
        value = row.get(column)
        return None if value in (None, "") else float(value)

    def add(what: str, value: float, wanted: float, unit: str, column: str) -> None:
        met = row.get(column) == "yes"
        found.append(Verdict(str(row["case"]), what, value, wanted, unit, met))

    name, target = str(row["contender"]), number("target")
    if target is not None and row.get("met"):
        if row["role"] == "floor":  # the longest time, as a share of the floor's speed
            add(name, 100 / number("distance"), round(100 / target, 1), "%", "met")
        else:
            add(name, number("ratio_of_medians"), target, "x", "met")
    if row.get("time_met"):
        add("of time", number("median_us"), number("time_limit_us"), "us", "time_met")
    if (limit := number("peak_limit_bytes")) is not None and row.get("peak_met"):
        mib = 1 << 20
        add("of memory", number("peak_extra_bytes") / mib, limit / mib, "MiB", "peak_met")
    return found


def lines_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    return [verdict.text() for row in rows for verdict in verdicts_of(row)]
