# SPDX-License-Identifier: BSD-3-Clause
"""Random masks of every source: block lists bit for bit those of create_block_mask."""

import random

import mask_cases as cases
import pytest
import torch
from mask_cases import BLOCKS, check, packed_case, same_block_mask

import masked_loss_ext as mle
from masked_loss_ext.reference import attention


def run_packed(seed, count, size):
    rng = random.Random(seed)
    for number in range(count):
        layout, relation, tokens, dense = packed_case(rng, size)
        block = rng.choice(BLOCKS)
        try:
            check(layout.intervals(**relation), dense, block)
            block_mask = layout.block_mask(**relation, block_size=block)
            same_block_mask(block_mask, dense.unsqueeze(0), block)
            for ours, theirs in zip(
                (layout.sample_ids, layout.positions, layout.visible), tokens, strict=False
            ):
                assert torch.equal(ours.to(theirs.dtype), theirs)
        except AssertionError as error:
            raise AssertionError(f"case {number} of seed {seed}: {layout} {relation}") from error


def run_source(source, seed, count, size):
    rng = random.Random(seed)
    for number in range(count):
        block = rng.choice(BLOCKS)
        try:
            check(*source(rng, size), block)
        except AssertionError as error:
            raise AssertionError(f"case {number} of seed {seed}: {source.__name__}") from error


@pytest.mark.parametrize("seed", range(4))
def test_packed_layouts(seed):
    run_packed(seed, 130, 130)


@pytest.mark.parametrize("source", cases.SOURCES)
def test_sources(source):
    run_source(source, 0, 55, 260)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(100, 116))
def test_packed_layouts_at_length(seed):
    run_packed(seed, 250, 500)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(100, 104))
@pytest.mark.parametrize("source", cases.SOURCES)
def test_sources_at_length(source, seed):
    run_source(source, seed, 150, 900)


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
