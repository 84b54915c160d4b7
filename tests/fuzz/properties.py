# SPDX-License-Identifier: BSD-3-Clause
"""All properties, by name. A new operator needs one: test_operators.py looks."""

from tests.fuzz import (
    aggregate,
    block_masks,
    bounds,
    cross_entropy,
    linear,
    multi_token,
    padding,
    squared_error,
    terms,
    transforms,
    unified,
)
from tests.fuzz.engine import Property

SQUARED = squared_error.OPERATORS
ROWS = ("masked_cross_entropy", "_masked_cross_entropy_backward")
SWEPT = (
    "_masked_cross_entropy_sweep",
    "_masked_cross_entropy_sweep_",
    "_masked_cross_entropy_scale_gradient_",
)
COPIES = (*ROWS, "_masked_cross_entropy_backward_", *cross_entropy.SHARDED)
PACKED = ("packed_rows", "nested_dropout_plan")
LISTS = ("interval_block_lists",)
COUNTED = ("repetition_counts", "repetition_links")

# Of each family first what compares operators, then what is made of them.
PROPERTIES = (
    Property("squared_error", squared_error.operator, SQUARED),
    Property("token_losses", squared_error.token_losses, SQUARED, share=0.3),
    Property("element_losses", squared_error.element_losses, SQUARED, share=0.3),
    Property("cross_entropy", cross_entropy.cross_entropy, COPIES),
    Property("cross_entropy_sweep", cross_entropy.cross_entropy_sweep, SWEPT),
    Property("row_statistics", cross_entropy.row_statistics, ROWS, share=0.3),
    Property("linear_cross_entropy", linear.linear_cross_entropy, linear.FORWARD + linear.SHARDED),
    Property("linear_sweep", linear.linear_sweep, ("_linear_cross_entropy_sweep",)),
    Property("linear_row_statistics", linear.linear_row_statistics, linear.FORWARD, share=0.3),
    Property("terms", terms.terms, terms.TERMS),
    Property("repetition", terms.repetition, COUNTED),
    Property("packed_rows", block_masks.packed_rows, PACKED + LISTS),
    Property("intervals", block_masks.intervals, LISTS, share=0.3),
    Property("mask_sources", block_masks.mask_sources, LISTS, share=0.02, examples=40),
    Property("packed_layouts", block_masks.packed_layouts, PACKED, share=0.02, examples=40),
    Property("aggregate_tokens", aggregate.aggregate_tokens, share=0.1),
    Property("rows_by_name", aggregate.rows_by_name, share=0.1),
    Property("tokens_by_name", aggregate.tokens_by_name, share=0.1),
    Property("padding", padding.padding, share=0.1),
    Property("multi_token_prediction", multi_token.multi_token_prediction, share=0.1),
    Property("hidden_state_mtp", multi_token.hidden_state_mtp, share=0.1, examples=40),
    Property("unified_loss", unified.unified_loss, share=0.05, examples=30),
    Property("unified_modules", unified.unified_modules, share=0.1),
    Property("bounds", bounds.bounds, share=0.1, examples=200),
    Property("labels", bounds.labels, share=0.1, examples=100),
    Property("transforms", transforms.transforms, share=0.03),
    Property("compiled", transforms.compiled, share=0.001, examples=2),
)
BY_NAME = {prop.name: prop for prop in PROPERTIES}
