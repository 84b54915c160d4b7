# SPDX-License-Identifier: BSD-3-Clause
"""What the operators of shards refuse; what ranks find out about each other: tests/distributed and
test_vocab_parallel.py."""

import math

import pytest
import torch
from shard_calls import backward_arguments, result_arguments, shard_arguments

import masked_loss_ext  # noqa: F401 (makes the operators)

sums_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_sums
results_op = torch.ops.masked_loss_ext.vocab_parallel_cross_entropy
backward_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_backward
inplace_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_backward_
linear_sums_op = torch.ops.masked_loss_ext._vocab_parallel_linear_cross_entropy_sums
linear_results_op = torch.ops.masked_loss_ext.vocab_parallel_linear_cross_entropy
linear_backward_op = torch.ops.masked_loss_ext._vocab_parallel_linear_cross_entropy_backward

CALLS = {
    sums_op: lambda: shard_arguments("cross_entropy"),
    results_op: lambda: result_arguments("cross_entropy"),
    backward_op: lambda: backward_arguments("cross_entropy"),
    inplace_op: lambda: backward_arguments("cross_entropy", in_place=True),
    linear_sums_op: lambda: shard_arguments("linear_cross_entropy"),
    linear_results_op: lambda: result_arguments("linear_cross_entropy"),
    linear_backward_op: lambda: backward_arguments("linear_cross_entropy"),
}
ROWS_OF = {op: "hidden" if "linear" in str(op) else "logits" for op in CALLS}
every_operator = pytest.mark.parametrize("op", list(CALLS), ids=lambda op: str(op)[16:])


def refused(op, text, error=ValueError, **change):
    given = CALLS[op]() | change
    with pytest.raises(error, match=text) as info:
        op(**given)
    assert "vocab_parallel" in str(info.value)


@every_operator
def test_which_classes_they_are(op):
    refused(op, "vocab_start must be in .*, got -1", vocab_start=-1)
    refused(op, "vocab_size must be in .*, got 0", vocab_size=0)
    text = "vocab_size must be at least vocab_start and the shard's own classes, 5 [+] 4, got 8"
    refused(op, text, vocab_size=8)
    refused(op, "must be at least", vocab_start=2**47, vocab_size=2**47)


@every_operator
def test_shapes_dtypes_and_options(op):
    rows = ROWS_OF[op]
    text = f"target must have the shape of {rows} .* without the last dimension, got .2."
    refused(op, text, target=torch.tensor([1, 2]))
    refused(op, "target must be .*", target=torch.rand(2, 3))
    refused(op, "mask must have the shape", mask=torch.ones(3, 2))
    refused(op, r"weight must have one entry per class \[9\], got \[4\]", weight=torch.rand(4))
    refused(op, "reduction must be mean, sum or none, got median", reduction="median")
    refused(op, "label_smoothing must be in", label_smoothing=1.5)
    refused(op, "shift must not be negative", shift=-1)
    refused(op, f"{rows} must be", **{rows: torch.zeros(2, 3, 4, dtype=torch.int64)})


@pytest.mark.parametrize("op", [results_op, linear_results_op], ids=str)
def test_messages(op):
    right = CALLS[op]()["messages"]
    refused(op, "messages must be given", messages=None)
    for wrong in (right[0], right.float(), right[:, :-1], right[:0], right.T.contiguous().T):
        refused(
            op, r"messages must be what all ranks have made, float64 \[ranks, 30\]", messages=wrong
        )
    refused(op, "all together be vocab_size 9, got of the ranks 5 [+] 4", messages=right[1:])
    refused(op, "got of the ranks 5 [+] 4, 0 [+] 5", messages=right.flip(0))
    for value in (-math.inf, 2.5):  # no size, and not made an integer
        refused(op, f"got of the ranks {value} [+] ", messages=torch.full_like(right, value))


@pytest.mark.parametrize("op", [backward_op, inplace_op, linear_backward_op], ids=str)
def test_what_the_forward_returned(op):
    given = CALLS[op]()
    refused(op, "row_sums must be what the forward returned", row_sums=given["row_sums"][..., :1])
    refused(op, "totals must be what the forward returned", totals=given["totals"].float())
    refused(op, "log_prob must have the shape", log_prob=torch.rand(3))
    refused(op, "grad_loss must be a number", grad_loss=torch.rand(2))


def test_a_shard_without_classes_is_none():
    for form, of in (("cross_entropy", "logits"), ("linear_cross_entropy", "linear_weight")):
        given = shard_arguments(form, vocab_start=9)
        empty = given[of][..., :0] if of == "logits" else given[of][:0]
        bias = {"bias": given["bias"][:0]} if "bias" in given else {}
        op = sums_op if of == "logits" else linear_sums_op
        message = op(**given | {of: empty} | bias)
        assert message[-6:-3].tolist() == [9, 0, 9]
