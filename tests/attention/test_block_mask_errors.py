# SPDX-License-Identifier: BSD-3-Clause
"""Bad input to the block-mask operators: an error that names operator, argument, rule and value."""

import re

import pytest
import torch

import masked_loss_ext  # noqa: F401  loads the operators

lists_op = torch.ops.masked_loss_ext.interval_block_lists
rows_op = torch.ops.masked_loss_ext.packed_rows
plan_op = torch.ops.masked_loss_ext.nested_dropout_plan

LO = torch.zeros(1, 1, 6, dtype=torch.int32)
OFFSETS, KEPT = torch.tensor([0, 2, 4, 6, 8]), torch.tensor([[2, 1], [2, 2]])
MANY, LONG = LO.expand(10**6, 1, 6), LO[..., :1].expand(1, 1, 2**31)
META = {"lo": LO.to("meta"), "kept": KEPT.to("meta"), "offsets": OFFSETS.to("meta")}


def check(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value), str(caught.value)


def on_meta(values):
    return [x.to("meta") if isinstance(x, torch.Tensor) else x for x in values]


def without_dtype(text):
    """PyTorch's C++ says Long where Python says torch.int64."""
    return re.split(", got (?=Int|Long|Float|Double)", text)[0]


LISTS = [
    ({"lo": LO.long()}, "lo must be int32 [B, R, Sq], got Long [1, 1, 6]"),
    ({"lo": LO.float()}, "lo must be int32 [B, R, Sq], got Float"),
    ({"lo": LO[0]}, "lo must be int32 [B, R, Sq], got Int [1, 6]"),
    ({"lo": LO.expand(1, 9, 6)}, "lo must have at most 8 intervals per row, got [1, 9, 6]"),
    ({"hi": LO.long()}, "hi must be int32 [B, R, Sq], got Long"),
    ({"hi": LO[..., :5]}, "hi must have the shape of lo [1, 1, 6], got [1, 1, 5]"),
    ({"hi": LO.expand(2, 1, 6)}, "hi must have the shape of lo [1, 1, 6], got [2, 1, 6]"),
    ({"kv_len": -1}, "kv_len must be in [0, 2147483647], got -1"),
    ({"kv_len": 2**31}, "kv_len must be in [0, 2147483647], got 2147483648"),
    ({"q_block": 0}, "q_block must be in [1, 2147483647], got 0"),
    ({"q_block": -128}, "q_block must be in [1, "),
    ({"kv_block": 0}, "kv_block must be in [1, 2147483647], got 0"),
    ({"kv_block": 2**31}, "kv_block must be in [1, 2147483647], got 2147483648"),
    ({"kv_len": 2**40}, "kv_len must be in [0, 2147483647], got 1099511627776"),
    ({"kv_len": 2**63 - 1}, "kv_len must be in [0, 2147483647], got 9223372036854775807"),
    ({"q_block": 2**62}, "q_block must be in [1, 2147483647], got 4611686018427387904"),
    ({"kv_block": -(2**63)}, "kv_block must be in [1, 2147483647], got -9223372036854775808"),
    (
        {"lo": MANY, "hi": MANY, "kv_len": 2**31 - 1, "q_block": 1, "kv_block": 1},
        "q_block and kv_block must leave at most 281474976710656 pairs of blocks, got 1000000 x 6 "
        "x 2147483647",
    ),
    ({"lo": LONG, "hi": LONG}, "the number of rows must be in [0, 2147483647], got 2147483648"),
]


@pytest.mark.parametrize("changes,text", LISTS)
def test_interval_block_lists(changes, text):
    arguments = {"lo": LO, "hi": LO, "kv_len": 6, "q_block": 4, "kv_block": 4, **changes}
    if "lo" in changes and "hi" not in changes:
        arguments["hi"] = arguments["lo"] if arguments["lo"].dtype == torch.int32 else LO
    check(lambda: lists_op(*arguments.values()), "interval_block_lists: " + text)
    fake = on_meta(arguments.values())
    check(lambda: lists_op(*fake), "interval_block_lists: " + without_dtype(text))


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
    ({"rows": -1}, "rows must be in [0, 2147483647], got -1"),
    ({"rows": 2**31}, "rows must be in [0, 2147483647]"),
    ({"rows": 7}, "segment_offsets must end within the 7 rows, got 8"),
    ({"offsets": torch.tensor([0, 2, 1, 6, 8])}, "segment_offsets must ascend from 0 or more"),
    ({"offsets": torch.tensor([-1, 2, 4, 6, 8])}, "from 0 or more, got -1 at 0"),
    ({"mode": "Causal"}, "mode must be full, causal, causal_last or prefix, got Causal"),
    ({"mode": ""}, "mode must be full, causal, causal_last or prefix, got "),
    ({"left": -1}, "window_left must be in [0, 281474976710656], got -1"),
    ({"right": -2}, "window_right must be in [0, 281474976710656], got -2"),
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
    ({"sinks": -1}, "sinks must be in [0, 281474976710656], got -1"),
    ({"dropped": "all"}, "dropped must be none, self or attend, got all"),
    ({"rows": 2**40}, "rows must be in [0, 2147483647], got 1099511627776"),
    ({"left": 2**63 - 1}, "window_left must be in [0, 281474976710656], got 9223372036854775807"),
    ({"right": 2**49}, "window_right must be in [0, 281474976710656], got 562949953421312"),
    ({"sinks": 2**63 - 1}, "sinks must be in [0, 281474976710656], got 9223372036854775807"),
]
READ = ("segment_offsets must end", "segment_offsets must ascend", "from 0 or more")


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
    if text.startswith(READ):
        return  # tensors on a device are not read
    check(lambda: rows_op(*on_meta(packed(changes))), without_dtype(text))
    check(lambda: plan_op(*on_meta(packed(changes))), without_dtype(text))


def test_block_sizes_of_the_plan():
    check(lambda: plan_op(*packed({}), 0, 128), "nested_dropout_plan: q_block must be in [1, ")
    check(lambda: plan_op(*packed({}), 128, -1), "nested_dropout_plan: kv_block must be in [1, ")
    fake = on_meta(packed({}))
    check(lambda: plan_op(*fake, 0, 128), "nested_dropout_plan: q_block must be in [1, 2147483647]")
    check(lambda: plan_op(*fake, 128, 2**62), "nested_dropout_plan: kv_block must be in [1, ")
    long = [OFFSETS, KEPT, 2**31 - 1]
    for arguments in (long, on_meta(long)):
        check(lambda a=arguments: plan_op(*a, q_block=1, kv_block=1), "2147483647 x 2147483647")


def test_more_than_there_is_means_all():
    """The largest that are taken: no sum with one overflows."""
    most = 2**48
    plain = rows_op(*packed({"mode": "causal"}))
    for changes in ({"left": most}, {"left": most, "right": most}, {"sinks": most}):
        for ours, theirs in zip(rows_op(*packed({"mode": "causal"} | changes)), plain, strict=True):
            assert torch.equal(ours, theirs), changes
    beyond = {"mode": "prefix", "prefix": torch.full((2,), 2**63 - 1), "rows": 8}
    full = rows_op(*packed({"rows": 8}))
    kept = {"kept": torch.full((2, 2), 2**63 - 1)}
    for ours, theirs in zip(rows_op(*packed(beyond)), full, strict=True):
        assert torch.equal(ours, theirs)
    lo, hi = rows_op(*packed(kept | {"rows": 8}))
    # samples of 2 + 2 tokens that join: one interval and an empty one per row
    assert lo.tolist() == [[0] * 4 + [4] * 4, [0] * 8] and hi.tolist() == [
        [4] * 4 + [8] * 4,
        [0] * 8,
    ]


def test_no_keys_no_queries():
    """Lists without an entry: null pointers, which memset and its like may not be given."""
    for shape, kv_len in (((2, 1, 6), 0), ((2, 1, 0), 5), ((2, 0, 6), 5), ((0, 1, 6), 5)):
        lo = torch.zeros(shape, dtype=torch.int32)
        lists = lists_op(lo, lo + 1, kv_len, 4, 4)
        nq, nk = -(-shape[2] // 4), -(-kv_len // 4)
        assert lists[0].shape == (shape[0], 1, nq) and lists[5].shape == (shape[0], 1, nk, nq)
        counts = [int(x.sum()) for x in (lists[0], lists[2], lists[4], lists[6])]
        assert counts == [0] * 4


def test_a_meta_tensor_among_others():
    check(lambda: lists_op(LO, META["lo"], 6), "one device, got cpu and meta")
    for op in (rows_op, plan_op):
        check(lambda op=op: op(META["offsets"], KEPT, 10), "one device, got cpu and meta")
        check(lambda op=op: op(OFFSETS, META["kept"], 10), "one device, got meta and cpu")
