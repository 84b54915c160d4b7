# SPDX-License-Identifier: BSD-3-Clause
"""What random masks are held against (tests/fuzz/block_masks.py): by hand, and wrong on purpose."""

import pytest
from mask_cases import same_block_mask

import masked_loss_ext as mle
from masked_loss_ext.reference import attention


def test_the_definition_itself():
    """The reference, by hand: two samples of 2 patches and 3 registers, 1 and 2 of them kept."""
    lengths, kept = [[2, 3], [2, 3]], [[2, 1], [2, 2]]
    tokens = attention.packed_tokens(lengths, kept, 11)

    def rows(**relation):
        mask = attention.packed_attention_mask(tokens, **relation)
        return ["".join(".#"[x] for x in row) for row in mask.int().tolist()]

    first, second, none = "###........", ".....####..", "..........."
    assert rows() == [first] * 3 + [none] * 2 + [second] * 4 + [none] * 2
    assert rows(mode="causal_last") == [
        *("##.........", "##.........", "###........", none, none),
        *(".....##....", ".....##....", ".....###...", ".....####..", none, none),
    ]
    assert rows(mode="causal", window=(1, None), sinks=1, dropped="self")[5:] == [
        *(".....#.....", ".....##....", ".....###...", ".....#.##..", ".........#.", none)
    ]
    assert rows(mode="prefix", prefix=[0, 3], dropped="attend")[3:6] == [
        *("###........", "###........", ".....###...")
    ]


def test_a_wrong_list_is_noticed():
    layout = mle.PackedLayout([[100, 60], [100, 60]], [10, 60], pad_to_multiple=64)
    tokens = attention.packed_tokens([[100, 60]] * 2, [[100, 10], [100, 60]], layout.padded_len)
    dense = attention.packed_attention_mask(tokens).unsqueeze(0)
    block_mask = layout.block_mask(block_size=32)
    same_block_mask(block_mask, dense, (32, 32))
    block_mask.full_kv_indices[0, 0, 1, -1] += 1  # beyond the count: even that
    with pytest.raises(AssertionError, match="full_kv_indices"):
        same_block_mask(block_mask, dense, (32, 32))
