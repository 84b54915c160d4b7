# SPDX-License-Identifier: BSD-3-Clause
"""What one call of an operator may not read: the pieces of the tables of excluded_cases.py."""

from dataclasses import dataclass, field

import torch
from closed_pages import PAGE, rows_on_pages
from operator_calls import ops

NAN = float("nan")
NO_LABEL = torch.iinfo(torch.int64).min
FLOAT, DOUBLE, BF16, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """``excluded``: argument -> bool tensor, on at what may not be read, expanded to the argument's
    shape. ``zeros``: result -> where it is a gradient of 0, written once. ``elements``: the mask is
    one per element, so that a line of the cache may be read for a neighbour."""

    name: str
    operator: str
    given: dict
    excluded: dict
    zeros: dict = field(default_factory=dict)
    elements: bool = False

    def results(self, given=None):
        given = {
            n: x.clone() if n in self.written() else x for n, x in (given or self.given).items()
        }
        found = getattr(ops, self.operator).default(**given)
        found = [found] if isinstance(found, torch.Tensor) else list(found or [])
        return found + [given[name] for name in self.written()]

    def written(self):
        """Arguments that the operator writes: their pages stay open."""
        schema = getattr(ops, self.operator).default._schema
        return [a.name for a in schema.arguments if a.alias_info and a.name in self.given]

    def result_names(self):
        returns = getattr(ops, self.operator).default._schema.returns
        return [r.name for r in returns] + self.written()


def full(operator, given):
    """All arguments of an operator: the given ones, defaults, and yes to each gradient."""
    found = {}
    for a in getattr(ops, operator).default._schema.arguments:
        default = a.default_value if a.has_default_value() else None
        found[a.name] = given.get(a.name, True if a.name.startswith("needs_") else default)
    return found


def forward_results(operator, given):
    names = [r.name for r in getattr(ops, operator).default._schema.returns]
    found = getattr(ops, operator).default(**full(operator, given))
    return dict(zip(names, [found] if len(names) == 1 else found, strict=True))


def spoiled(values, off):
    """Garbage where off is on."""
    if values.is_floating_point():
        return values.masked_fill(off, NAN)
    return values.masked_fill(off, 85 if values.dtype != torch.int64 else NO_LABEL)


def case(name, operator, given, excluded, zeros=(), elements=False):
    excluded = {n: off for n, off in excluded.items() if given.get(n) is not None}
    given = {n: spoiled(x, excluded[n]) if n in excluded else x for n, x in given.items()}
    zeros = {n: off for n, off in dict(zeros).items()}
    return Case(name, operator, full(operator, given), excluded, zeros, elements)


def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape, dtype=FLOAT):
    return torch.randn(*shape, generator=generator()).to(dtype)


def on_pages(values):
    """As they are where a row is whole pages, else with each row on its own."""
    whole = values.shape[-1] * values.element_size() % PAGE == 0
    return values if whole else rows_on_pages(values)


def many_rows():
    """Of which each has one entry in a tensor: labels, weights. Whole pages of them are off."""
    off = torch.rand(6 * PAGE // 8, generator=generator()) < 0.3
    off[PAGE // 8 : 5 * PAGE // 8] = True
    return off
