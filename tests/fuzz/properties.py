# SPDX-License-Identifier: BSD-3-Clause
"""All properties, by name. A new operator needs one: test_operators.py looks."""

from tests.fuzz import block_masks, cross_entropy, linear, squared_error, terms
from tests.fuzz.engine import Property

SQUARED = squared_error.OPERATORS
ROWS = ("masked_cross_entropy", "_masked_cross_entropy_backward")
SWEPT = (
    "_masked_cross_entropy_sweep",
    "_masked_cross_entropy_sweep_",
    "_masked_cross_entropy_scale_gradient_",
)
PACKED = ("packed_rows", "nested_dropout_plan")

PROPERTIES = (
    Property("squared_error", squared_error.operator, SQUARED),
    Property("token_losses", squared_error.token_losses, SQUARED),
    Property("element_losses", squared_error.element_losses, SQUARED),
    Property(
        "cross_entropy",
        cross_entropy.cross_entropy,
        (*ROWS, "_masked_cross_entropy_backward_", *cross_entropy.SHARDED),
    ),
    Property("cross_entropy_sweep", cross_entropy.cross_entropy_sweep, SWEPT),
    Property("row_statistics", cross_entropy.row_statistics, ROWS),
    Property(
        "linear_cross_entropy",
        linear.linear_cross_entropy,
        (*linear.FORWARD, *linear.SHARDED),
    ),
    Property("linear_sweep", linear.linear_sweep, ("_linear_cross_entropy_sweep",)),
    Property("linear_row_statistics", linear.linear_row_statistics, linear.FORWARD),
    Property("terms", terms.terms, terms.TERMS),
    Property("repetition", terms.repetition, ("repetition_counts", "repetition_links")),
    Property("packed_rows", block_masks.packed_rows, (*PACKED, "interval_block_lists")),
    Property("intervals", block_masks.intervals, ("interval_block_lists",)),
    Property("mask_sources", block_masks.mask_sources, ("interval_block_lists",), share=0.05),
    Property("packed_layouts", block_masks.packed_layouts, PACKED, share=0.05),
)
BY_NAME = {prop.name: prop for prop in PROPERTIES}
