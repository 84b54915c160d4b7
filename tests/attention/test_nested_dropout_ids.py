# SPDX-License-Identifier: BSD-3-Clause
"""Ids of the tokens of a packed sequence under nested dropout, and the rule of attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import masked_loss_ext as mle

mask_ids = mle.generate_nested_dropout_mask_ids
attention_mask = mle.generate_nested_dropout_attention_mask


def dense(mask_mod, size):
    return mask_mod(None, None, torch.arange(size).unsqueeze(1), torch.arange(size))


def test_ids_by_hand():
    ps = [torch.Size([2]), torch.Size([3]), (1, 2), 2]
    assert mask_ids(ps, [1, 2]).tolist() == [0, 0, 1, -2, -2, 2, 2, 3, 3]
    assert mask_ids(ps, [0, 9], 11).tolist() == [0, 0, -2, -2, -2, 2, 2, 3, 3, -1, -1]
    assert mask_ids(ps, [1]).tolist() == [0, 0, 1, -2, -2, 2, 2, 3, 3]
    assert mask_ids(ps, None, masked_id=-7).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert mask_ids(ps, torch.tensor([1, 1]), masked_id=-7).tolist()[3:5] == [-7, -7]
    # one sub-sequence per sample, three per sample: the last is cut
    assert mask_ids([2, 3], [1, 1], num_sequences_per_sample=1).tolist() == [0, -2, 1, -2, -2]
    assert mask_ids([1, 2, 2], [1], num_sequences_per_sample=3).tolist() == [0, 1, 1, 2, -2]
    assert mask_ids([], []).tolist() == []
    assert mask_ids(ps, [1, 2]).dtype == torch.int64


def test_rule_by_hand():
    mask_mod, ids = attention_mask([1, 2, 1, 1], [1, 1], 6)
    assert ids.tolist() == [0, 1, -2, 2, 3, -1]
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert dense(mask_mod, 6).int().tolist() == expected
    isolated = dense(attention_mask([1, 2, 1, 1], [1, 1], 6, isolate_subsequences=True)[0], 6)
    assert torch.equal(isolated, torch.diag(torch.tensor([1, 1, 0, 1, 1, 0]).bool()))


@pytest.mark.parametrize("isolate,entries", [(False, 1_183_744), (True, 1_052_672)])
def test_one_image_of_1024_patches_and_256_registers(isolate, entries):
    ps = [torch.Size([32, 32]), torch.Size([256])]
    mask_mod, _ = attention_mask(ps, [64], isolate_subsequences=isolate)
    assert dense(mask_mod, 1280).sum() == entries
    if not isolate:
        blocks = create_block_mask(mask_mod, None, None, 1280, 1280, device="cpu")
        assert blocks.full_kv_num_blocks.sum() == 64 and blocks.kv_num_blocks.sum() == 17


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_rule_is_that_of_the_ids(group, isolate):
    g = torch.Generator().manual_seed(group)
    for _ in range(10):
        ps = torch.randint(0, 5, (3 * group,), generator=g).tolist()
        keep_k = torch.randint(0, 6, (3,), generator=g)
        arguments = ps, keep_k, sum(ps) + 3, None, -2, group
        mask_mod, ids = attention_mask(*arguments, isolate_subsequences=isolate)
        assert torch.equal(ids, mask_ids(*arguments))
        sample = ids if isolate else ids // group
        expected = (sample[:, None] == sample) & (ids >= 0)[:, None] & (ids >= 0)
        assert torch.equal(dense(mask_mod, len(ids)), expected)


@pytest.mark.parametrize("function", [mask_ids, attention_mask])
def test_wrong_ids(function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: ps must hold num_sequences_per_sample=2"):
        function([2, 3, 1], [1])
    with pytest.raises(ValueError, match="max_seq_len must hold all 5 tokens, got 4") as error:
        function([2, 3], [1], 4)
    assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match="keep_k_list must not be negative"):
        function([2, 3], [-1])
    with pytest.raises(ValueError, match="at most one entry per sample, 1, got 2"):
        function([2, 3], [1, 1])
    with pytest.raises(ValueError, match="masked_id must be negative, .* got 5"):
        function([2, 3], [1], masked_id=5)
    with pytest.raises(ValueError, match="num_sequences_per_sample must be at least 1, got 0"):
        function([2, 3], [1], num_sequences_per_sample=0)
