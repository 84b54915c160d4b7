# SPDX-License-Identifier: BSD-3-Clause
"""Properties of attention masks: rows of packed samples, their block lists, and every source of
intervals against the dense mask by definition."""

import random

import mask_cases
import torch
from block_masks import assert_lists, packed_arguments, random_packed

from masked_loss_ext.ops import block_mask as layer
from masked_loss_ext.reference import attention
from tests.fuzz.choices import laid

TINY = ((2, 2), (1, 1), (4, 3), (16, 48), (3, 128))


def dice(c):
    """For case makers that throw their own."""
    return random.Random(int.from_bytes(bytes(c.byte() for _ in range(4)), "big"))


def packed_rows(c):
    """packed_rows, interval_block_lists of them, and nested_dropout_plan, which is both at once."""
    case, block = random_packed(dice(c), c.pick((1, 1, 2))), c.pick(TINY)
    c.said |= {**case, "block": block}
    arguments = packed_arguments(case)
    rows = arguments[2]
    lo, hi = layer.packed_rows(*arguments)
    tokens = attention.packed_tokens(case["segments"], case["kept"], rows) if rows else None
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    if rows:
        relation = {name: case[name] for name in ("mode", "prefix", "sinks", "dropped")}
        window = None if case["window"] == (None, None) else case["window"]
        mask = attention.packed_attention_mask(tokens, window=window, **relation)
    assert_lists((lo, hi), attention.mask_to_intervals(mask, lo.shape[0]))
    transposes = bool(c.below(2) == 0)
    lists = layer.interval_block_lists(lo[None], hi[None], rows, *block, transposes)
    expected = attention.block_lists(mask[None], *block, transposes)
    if rows:
        assert_lists(lists, expected)
    plan = layer.nested_dropout_plan(*arguments, *block)
    assert_lists(plan[:2], (lo, hi))
    assert_lists(plan[2:] if transposes else plan[2:6], lists if transposes else lists[:4])
    c.saw("packed_rows", "interval_block_lists", "nested_dropout_plan")


def intervals(c):
    """Any intervals: overlapping, unsorted, empty, beyond the ends, of any strides."""
    shape = c.pick((1, 2, 3)), c.pick((1, 2, 8, 3)), c.pick((3, 1, 7, 20, 33))
    kv_len, block, g = c.pick((4, 1, 9, 30, 65)), c.pick(TINY), c.generator()
    far = c.chance(0.1)
    lo, hi = (torch.randint(-3, kv_len + 4, shape, generator=g).int() for _ in range(2))
    if far:
        lo[..., 0], hi[..., -1] = -(2**31), 2**31 - 1
    c.said |= {"lo": list(shape), "kv_len": kv_len, "block": block, "far": far}
    mask = attention.interval_mask(lo, hi, kv_len)
    lists = layer.interval_block_lists(laid(lo, c.layout()), laid(hi, c.layout()), kv_len, *block)
    assert_lists(lists, attention.block_lists(mask, *block))
    c.saw("interval_block_lists")


def mask_sources(c):
    """Every way to a mask: the intervals, their mask_mod, and the BlockMask as create_block_mask
    makes it. Some 20 ms each."""
    source, size = c.pick(mask_cases.SOURCES), c.pick((20, 40, 8, 130))
    block, rng = c.pick(mask_cases.BLOCKS[::-1]), dice(c)
    c.said |= {"source": source.__name__, "size": size, "block": block}
    mask_cases.check(*source(rng, size), block)
    c.saw("interval_block_lists")


def packed_layouts(c):
    """PackedLayout with any relation. Some 20 ms each."""
    size, block, rng = c.pick((12, 40, 4, 130)), c.pick(mask_cases.BLOCKS[::-1]), dice(c)
    layout, relation, tokens, dense = mask_cases.packed_case(rng, size)
    c.said |= {"layout": layout, "relation": relation, "block": block}
    mask_cases.check(layout.intervals(**relation), dense, block)
    block_mask = layout.block_mask(**relation, block_size=block)
    mask_cases.same_block_mask(block_mask, dense.unsqueeze(0), block)
    found = (layout.sample_ids, layout.positions, layout.visible)
    for ours, theirs in zip(found, tokens, strict=False):
        assert torch.equal(ours.to(theirs.dtype), theirs)
    c.saw("packed_rows", "nested_dropout_plan")
