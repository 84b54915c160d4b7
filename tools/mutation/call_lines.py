# SPDX-License-Identifier: BSD-3-Clause
"""Wrong lines of what operators check and return, once for all devices."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "csrc/common/checks.h",
        "elementwise",
        "sizes are compared from the front where they broadcast from the back",
        "fit = tensor.size(d) == like.size(d + first) || (one_is_any && tensor.size(d) == 1);",
        "fit = tensor.size(d) == like.size(d) || (one_is_any && tensor.size(d) == 1);",
    ),
    Mutant(
        "csrc/common/checks.h",
        "cross entropy",
        "NaN passes for a number in its range",
        "if (value >= least && value <= most) return;",
        "if (!(value < least || value > most)) return;",
    ),
    Mutant(
        "csrc/common/layout_builder.h",
        "elementwise",
        "a dimension that is broadcast is walked",
        "stride_[d + first][operand] = tensor.size(d) == 1 ? 0 : tensor.stride(d);",
        "stride_[d + first][operand] = tensor.stride(d);",
    ),
    Mutant(
        "csrc/elementwise/call.h",
        "elementwise",
        "batch_mean divides by the tokens of a row",
        "case Reduction::kBatchMean: return size_or_one(0);",
        "case Reduction::kBatchMean: return size_or_one(1);",
    ),
    Mutant(
        "csrc/elementwise/call.h",
        "elementwise errors",
        "an error about the edit mask names the mask",
        'check_mask("edit_mask", in.edit_mask);',
        'check_mask("mask", in.edit_mask);',
    ),
    Mutant(
        "csrc/cross_entropy/arguments.h",
        "cross entropy errors",
        "segment ids of another shape are not refused, and are read beyond their end",
        '  if (in.segment_ids) check_per_row(op, "segment_ids", *in.segment_ids, rows);\n',
        "",
    ),
    Mutant(
        "csrc/cross_entropy/arguments.h",
        "cross entropy errors",
        "logits of which two rows share memory are written over",
        "    if (stride < extent) {",
        "    if (stride < 0) {",
    ),
    Mutant(
        "csrc/cross_entropy/call.h",
        "cross entropy",
        "a shift near 2^63 overflows, and labels before the first are read",
        "q.shift = std::min(shift, q.row_length);",
        "q.shift = shift;",
    ),
    Mutant(
        "csrc/linear_cross_entropy/call.h",
        "linear",
        "every chunk's hidden gradient is written over the first's",
        "out = torch::stable::narrow(out, 0, first, h.size(0));",
        "out = torch::stable::narrow(out, 0, 0, h.size(0));",
    ),
    Mutant(
        "csrc/linear_cross_entropy/flow.h",
        "linear",
        "a row into which only the gradient of its entropy flows gets none",
        "entry<A>(q.grad_entropy, row) != 0 || entry<A>(q.grad_log_prob, row) != 0;",
        "entry<A>(q.grad_log_prob, row) != 0;",
    ),
    Mutant(
        "csrc/repetition/call.h",
        "repetition",
        "tokens of any strides are read as if rows were side by side",
        "in.token_stride[d] = tokens.stride(d);",
        "in.token_stride[d] = d == 0 ? tokens.size(1) : 1;",
    ),
    Mutant(
        "csrc/cross_entropy_terms/call.h",
        "terms",
        "links without their pair pass, and a null pointer is read",
        "if (context_before.has_value() != ngram_after.has_value()) {",
        "if (!context_before.has_value() && ngram_after.has_value()) {",
    ),
]
