# SPDX-License-Identifier: BSD-3-Clause
"""One table of what every operator may not read, forward and backward.

A case is one call of one operator: its arguments by name, and for each of them, if it has any, the
places that the mask excludes, which hold garbage. To have another operator tested, add a family to
FAMILIES, or the operator to REASONS with why nothing of its arguments is excluded.
"""

import torch
from closed_pages import PAGE
from excluded_case import (
    BF16,
    DOUBLE,
    FLOAT,
    HALF,
    Case,
    case,
    forward_results,
    full,
    generator,
    many_rows,
    on_pages,
    randn,
)  # fmt: skip
from excluded_rows import (
    all_terms,
    cross_entropies,
    cross_entropy_of_rows,
    linear_cross_entropies,
    scaling_by_1,
    shards,
)  # fmt: skip

__all__ = ["FAMILIES", "REASONS", "Case", "full"]

REASONS = {
    "interval_block_lists": "has no mask: each interval is a mask itself",
    "packed_rows": "has no mask: it makes one",
    "nested_dropout_plan": "has no mask: it makes one",
    "_snapshot": "copies what it is given",
    "_half_products": "has no tensor",
    "_version": "has no tensor",
    "cpu_capability": "has no tensor",
}

# --- squared error -------------------------------------------------------------------------------

OFF_ROWS = torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()  # first and last, neighbours and single ones


def squared_error_passes(name, given, excluded, elements=False):
    given = full("masked_squared_error", given)
    forward = forward_results("masked_squared_error", given)
    yield case(name, "masked_squared_error", given, excluded, elements=elements)
    grad = torch.rand(forward["loss"].shape, generator=generator()).to(forward["loss"].dtype)
    given = {**given, "grad_loss": grad, "count": forward["count"]}
    off = excluded["prediction"]
    if grad.dim() == 2:
        excluded = {**excluded, "grad_loss": off}
    elif grad.dim() == 1 and not elements:
        excluded = {**excluded, "grad_loss": off[:, 0]}
    given["needs_weighting"] = given["weighting"] is not None
    zeros = {} if elements else {"grad_prediction": off, "grad_target": off}
    yield case(name, "_masked_squared_error_backward", given, excluded, zeros, elements)


def squared_errors():
    losses = ("mse", "l1", "smooth_l1", "huber", "pseudo_huber")
    reductions = ("mean", "token", "none", "sum", "batch_mean", "token_sum")
    pairs = [(FLOAT, FLOAT), (BF16, BF16), (BF16, FLOAT), (DOUBLE, DOUBLE), (HALF, HALF)]
    for i, loss in enumerate(losses):
        for mask in ("rows", "elements"):
            for j, (p, t) in enumerate(pairs if loss == "mse" else pairs[:2]):
                reduction = reductions[(i + j) % len(reductions)]
                for weighted in (False, True):
                    name = f"{loss} {reduction} {mask} {p} {t}" + " weighted" * weighted
                    options = {"loss": loss, "reduction": reduction}
                    yield from squared_error(name, mask, p, t, weighted, options)


def squared_error(name, mask, p, t, weighted, options):
    rows, columns = len(OFF_ROWS), 3 * PAGE // 2
    if mask == "rows":
        columns -= 5  # not whole pages: the rest of a row's last page is nobody's
        off = OFF_ROWS[:, None].expand(rows, columns)
        given = {"mask": ~OFF_ROWS}
    else:
        off = torch.rand(rows, columns, generator=generator()) < 0.8
        off.view(-1)[3 * PAGE // 2 + 7 : 7 * PAGE + 5] = True  # whole pages, and not to their ends
        off[rows - 1, 1::3] = True
        given = {"mask": ~off}
    given["prediction"] = on_pages(randn(rows, columns, dtype=p))
    given["target"] = on_pages(randn(rows, columns, dtype=t) + 1)
    excluded = {"prediction": off, "target": off}
    if weighted:
        given["weighting"] = on_pages(randn(rows, columns))
        given["edit_mask"] = on_pages(torch.rand(rows, columns, generator=generator()))
        excluded |= {"weighting": off, "edit_mask": off}
    yield from squared_error_passes(name, given | options, excluded, mask == "elements")


def squared_error_of_rows():
    off = many_rows()
    n = len(off)
    given = {"prediction": randn(n, 4), "target": randn(n, 4), "mask": ~off, "reduction": "token"}
    given |= {"edit_mask": torch.rand(n, generator=generator()), "weighting": randn(n, 1)}
    excluded = {"edit_mask": off, "weighting": off[:, None]}
    wide = off[:, None].expand(n, 4)
    excluded |= {"prediction": wide, "target": wide}
    yield from squared_error_passes("numbers of rows", given, excluded)


# --- rows of tokens ------------------------------------------------------------------------------


def repetitions():
    for dtype in (torch.int64, torch.int32):
        length = 6 * PAGE // dtype.itemsize
        tokens = torch.randint(4, (2, length), generator=generator()).to(dtype)
        off = torch.rand(2, length, generator=generator()) < 0.2
        off[:, length // 6 : length // 2] = True
        for operator in ("repetition_counts", "repetition_links"):
            given = {"tokens": tokens, "valid": ~off, "ngram_size": 2}
            yield case(str(dtype), operator, given, {"tokens": off})


FAMILIES = (
    squared_errors, squared_error_of_rows, cross_entropies, cross_entropy_of_rows, scaling_by_1,
    shards, linear_cross_entropies, all_terms, repetitions,
)  # fmt: skip
