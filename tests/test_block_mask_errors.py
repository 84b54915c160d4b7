# SPDX-License-Identifier: BSD-3-Clause
"""Bad input to the block-mask operators: an error that names operator, argument, rule and value."""

import pytest
import torch

import masked_loss_ext  # noqa: F401  loads the operators

lists_op = torch.ops.masked_loss_ext.interval_block_lists
rows_op = torch.ops.masked_loss_ext.packed_rows
plan_op = torch.ops.masked_loss_ext.nested_dropout_plan

LO = torch.zeros(1, 1, 6, dtype=torch.int32)
OFFSETS, KEPT = torch.tensor([0, 2, 4, 6, 8]), torch.tensor([[2, 1], [2, 2]])
META = {"lo": LO.to("meta"), "kept": KEPT.to("meta"), "offsets": OFFSETS.to("meta")}


def check(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value), str(caught.value)


LISTS = [
    ({"lo": LO.long()}, "lo must be int32 [B, R, Sq], got Long [1, 1, 6]"),
    ({"lo": LO.float()}, "lo must be int32 [B, R, Sq], got Float"),
    ({"lo": LO[0]}, "lo must be int32 [B, R, Sq], got Int [1, 6]"),
    ({"lo": LO.expand(1, 9, 6)}, "lo must have at most 8 intervals per row, got [1, 9, 6]"),
    ({"hi": LO.long()}, "hi must be int32 [B, R, Sq], got Long"),
    ({"hi": LO[..., :5]}, "hi must have the shape of lo [1, 1, 6], got [1, 1, 5]"),
    ({"hi": LO.expand(2, 1, 6)}, "hi must have the shape of lo [1, 1, 6], got [2, 1, 6]"),
    ({"kv_len": -1}, "kv_len must be from 0 to 2147483647, got -1"),
    ({"kv_len": 2**31}, "kv_len must be from 0 to 2147483647, got 2147483648"),
    ({"q_block": 0}, "q_block must be from 1 to 2147483647, got 0"),
    ({"q_block": -128}, "q_block must be from 1 to"),
    ({"kv_block": 0}, "kv_block must be from 1 to 2147483647, got 0"),
    ({"kv_block": 2**31}, "kv_block must be from 1 to 2147483647, got 2147483648"),
]


@pytest.mark.parametrize("changes,text", LISTS)
def test_interval_block_lists(changes, text):
    arguments = {"lo": LO, "hi": LO, "kv_len": 6, "q_block": 4, "kv_block": 4, **changes}
    check(lambda: lists_op(*arguments.values()), "interval_block_lists: " + text)


SEVEN, FIVE = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
PACKED = [
    ({"offsets": OFFSETS.int()}, "segment_offsets must be int64 [N * G + 1], got Int [5]"),
    ({"offsets": OFFSETS[None]}, "segment_offsets must be int64 [N * G + 1], got Long [1, 5]"),
    ({"offsets": OFFSETS[:4]}, "must have one entry more than kept [2, 2], got [4]"),
    ({"kept": KEPT.int()}, "kept must be int64 [N, G], got Int [2, 2]"),
    ({"kept": KEPT[0]}, "kept must be int64 [N, G], got Long [2]"),
    ({"kept": KEPT.double()}, "kept must be int64 [N, G], got Double"),
    ({"kept": KEPT[:, :0]}, "kept must have a segment per sample, got [2, 0]"),
    (
        {"offsets": torch.zeros(10, dtype=torch.int64), "kept": SEVEN},
        "kept must have at most 8 segments per sample, got [1, 9]",
    ),
    (
        {"offsets": torch.zeros(6, dtype=torch.int64), "kept": FIVE, "sinks": 1, "left": 3},
        "kept must have at most 4 segments per sample where a window stands beside a prefix or "
        "sinks, got [1, 5]",
    ),
    ({"rows": -1}, "rows must be from 0 to 2147483647, got -1"),
    ({"rows": 2**31}, "rows must be from 0 to 2147483647"),
    ({"rows": 7}, "segment_offsets must end within the 7 rows, got 8"),
    ({"offsets": torch.tensor([0, 2, 1, 6, 8])}, "segment_offsets must ascend from 0 or more"),
    ({"offsets": torch.tensor([-1, 2, 4, 6, 8])}, "from 0 or more, got -1 at 0"),
    ({"mode": "Causal"}, "mode must be full, causal, causal_last or prefix, got Causal"),
    ({"mode": ""}, "mode must be full, causal, causal_last or prefix, got "),
    ({"left": -1}, "window_left must not be negative (None: unbounded), got -1"),
    ({"right": -2}, "window_right must not be negative (None: unbounded), got -2"),
    ({"mode": "prefix"}, "prefix must be given for mode prefix and for no other, got None"),
    ({"prefix": KEPT[0]}, "prefix must be given for mode prefix and for no other, got one for"),
    (
        {"mode": "prefix", "prefix": KEPT[0].int()},
        "prefix must be int64 [N], got Int [2]",
    ),
    (
        {"mode": "prefix", "prefix": OFFSETS},
        "prefix must have an entry per sample of kept [2, 2], got [5]",
    ),
    ({"sinks": -1}, "sinks must not be negative, got -1"),
    ({"dropped": "all"}, "dropped must be none, self or attend, got all"),
]


def packed(changes):
    arguments = {"offsets": OFFSETS, "kept": KEPT, "rows": 10, "mode": "full", "left": None}
    arguments |= {"right": None, "prefix": None, "sinks": 0, "dropped": "none"}
    return (arguments | changes).values()


@pytest.mark.parametrize("changes,text", PACKED)
def test_packed_rows_and_plan(changes, text):
    check(lambda: rows_op(*packed(changes)), "packed_rows: ")
    check(lambda: rows_op(*packed(changes)), text)
    check(lambda: plan_op(*packed(changes)), "nested_dropout_plan: ")
    check(lambda: plan_op(*packed(changes)), text)


def test_block_sizes_of_the_plan():
    check(lambda: plan_op(*packed({}), 0, 128), "nested_dropout_plan: q_block must be from 1")
    check(lambda: plan_op(*packed({}), 128, -1), "nested_dropout_plan: kv_block must be from 1")


def test_a_meta_tensor_among_others():
    check(lambda: lists_op(LO, META["lo"], 6), "one device, got cpu and meta")
    for op in (rows_op, plan_op):
        check(lambda op=op: op(META["offsets"], KEPT, 10), "one device, got cpu and meta")
        check(lambda op=op: op(OFFSETS, META["kept"], 10), "one device, got meta and cpu")
