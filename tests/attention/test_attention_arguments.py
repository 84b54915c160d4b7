# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of the attention masks: what is taken in any natural form, and what has a meaning at
its ends. What is refused: test_attention_refusals.py."""

import numpy as np
import pytest
import torch

import masked_loss_ext as mle

I = mle.RowIntervals  # noqa: E741
P = mle.PackedLayout
T = torch.tensor
LO = torch.zeros(1, 4, dtype=torch.int32)
PAIR = I(T([[0], [4]]).int(), T([[2], [6]]).int(), 8)
IDS = mle.generate_nested_dropout_mask_ids


def rows(intervals):
    return ["".join(".#"[x] for x in row) for row in intervals.dense().int().tolist()]


# --- natural forms -------------------------------------------------------------------------------


def same(ours, theirs):
    assert torch.equal(ours.lo, theirs.lo) and torch.equal(ours.hi, theirs.hi)
    assert ours.kv_len == theirs.kv_len


FORMS = [list, tuple, np.array, torch.tensor, iter, lambda x: np.array(x, dtype=np.uint8)]


@pytest.mark.parametrize("form", FORMS)
def test_lists_arrays_and_tensors_are_lengths(form):
    assert P(form([2, 3])).segment_lengths == ((2,), (3,))
    same(I.cross(form([1, 2]), form([2, 2]), form([1, 5])), I.cross([1, 2], [2, 2], [1, 5]))
    same(I.shared_prefix(1, form([2, 1])), I.shared_prefix(1, [2, 1]))
    same(I.from_cu_seqlens(form([0, 1, 3])), I.from_cu_seqlens([0, 1, 3]))
    same(I.from_padding(form([1, 3]), 3), I.from_padding([1, 3], 3))
    same(I.from_document_ids(form([5, 5, 3])), I.from_document_ids(T([5, 5, 3])))
    same(I.from_position_ids(form([0, 1, 0])), I.from_position_ids(T([0, 1, 0])))
    same(I.causal(2, 4, offset=form([1, 2])), I.causal(2, 4, offset=T([1, 2])))
    same(I.prefix_lm(3, form([0, 2])), I.prefix_lm(3, T([0, 2])))
    prefixes = P([[4, 3]] * 2).intervals("prefix", prefix=form([2, 5]))
    same(prefixes, P([[4, 3]] * 2).intervals("prefix", prefix=[2, 5]))
    assert P([[4, 3]] * 2, form([1, 2])).kept.tolist() == [[4, 1], [4, 2]]
    assert IDS(form([2, 2]), [1]).tolist() == [0, 0, 1, -2]
    assert mle.sample_keep_k(form([1, 1]), 2).tolist() == [1, 1]


def test_ranges_and_rows_of_any_kind():
    assert P(range(2, 4)).segment_lengths == ((2,), (3,))
    for row in (range(2, 4), np.array([2, 3]), T([2, 3]), torch.Size([2, 3])):
        assert P([row, [2, 3]]).segment_lengths == ((2, 3), (2, 3))
    same(I.from_cu_seqlens(range(0, 7, 3)), I.from_cu_seqlens([0, 3, 6]))
    same(I.from_padding(np.array([[0, 1], [1, 1]])), I.from_padding(T([[0, 1], [1, 1]])))
    same(I.sliding_window(4, np.array([1, 0])), I.sliding_window(4, (1, 0)))
    same(I.from_padding([], 3), I.from_padding(torch.zeros(0, dtype=torch.int64), 3))


@pytest.mark.parametrize("one", [2, T(2), np.int64(2), np.array(2), T(2, dtype=torch.uint8)])
def test_one_number_in_any_form(one):
    same(I.causal(3, 6, offset=one), I.causal(3, 6, offset=2))
    assert rows(I.causal(2, 4, offset=one)) == ["###.", "####"]
    assert rows(I.prefix_lm(3, one)) == ["##.", "##.", "###"]
    assert rows(I.sliding_window(2, (1, 0), 4, offset=one)) == [".##.", "..##"]
    assert rows(P([3], pad_to_multiple=1).intervals("prefix", prefix=one)) == ["##.", "##.", "###"]
    assert I(LO, LO, one).kv_len == 2 and type(I(LO, LO, one).kv_len) is int


def test_results_of_lists_are_on_the_default_device():
    torch.set_default_device("meta")
    try:
        made = [
            *(I.from_cu_seqlens([0, 3]), I.from_padding([1, 2], 3), I.from_document_ids([0, 1])),
            *(I.from_position_ids([0, 1]), I.cross([1], [1]), I.shared_prefix(1, [1])),
            *(I.causal(3, offset=[1, 2]), I.causal(3), P([[4, 3]], [1]).intervals()),
        ]
        assert {str(x.device) for x in made} == {"meta"}
        # and whatever that is, what is asked for elsewhere is there, and draws come from the CPU
        assert P([[4, 3]], [1], device="cpu").compact().index.tolist() == [0, 1, 2, 3, 4]
        assert mle.AttentionMaskedNestedDropout("r").sample_keep_k(1) == 1
    finally:
        torch.set_default_device(None)


# --- meanings at the ends ------------------------------------------------------------------------


@pytest.mark.parametrize("far", [4, 2**31 - 1, 2**62, 2**63 - 1, 10**60])
def test_more_than_there_is_means_all(far):
    assert rows(I.sliding_window(3, far)) == ["###"] * 3
    assert rows(I.sliding_window(3, (far, 0))) == ["#..", "##.", "###"]
    assert rows(I.prefix_lm(3, far)) == ["###"] * 3
    assert rows(I.sinks(3, far)) == ["###"] * 3
    assert rows(I.block_diffusion(2, far)) == ["##..", "##..", "..##", "..##"]
    layout = P([[2, 1]], [far], pad_to_multiple=1)
    assert rows(layout.intervals(window=far)) == ["###"] * 3
    assert rows(layout.intervals("causal", window=0, sinks=far)) == ["#..", "##.", "###"]
    assert rows(layout.intervals("prefix", prefix=far)) == ["###"] * 3
    assert rows(I.cross([1], [2], [far])) == ["##"]
    assert IDS([2, 2], far).tolist() == [0, 0, 1, 1]


def test_offsets():
    assert rows(I.causal(3, offset=-2)) == ["...", "...", "#.."]
    assert rows(I.causal(2, 4, offset=2**31 - 1)) == ["####", "####"]
    for value in (2**63 - 1, 2**62):  # in a tensor, which on a device is not read
        assert I.causal(2, 4, offset=T([value])).dense().all()
        assert not I.causal(2, 4, offset=T([-value])).dense().any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.int64])
def test_positions_that_do_not_begin_at_0_or_jump(dtype):
    def begins(*positions):
        return I.from_position_ids(T(positions).to(dtype)).lo.flatten().tolist()

    assert begins(5, 6, 7) == [0, 0, 0], "the middle of a document"
    assert begins(0, 1, 7, 8) == [0, 0, 2, 2], "a jump begins another"
    assert begins(3, 2, 1) == [0, 1, 2] and begins(1, 1, 1) == [0, 1, 2]
    limit = torch.iinfo(dtype)
    if dtype != torch.int64:
        assert begins(limit.max, limit.min) == [0, 1], "where a counter wraps a document ends"
    if limit.min < 0:
        assert begins(-1, -1, 0, 1) == [0, 1, 2, 2], "0 begins one, whatever stood before"


def test_ids_that_the_dtype_cannot_hold():
    ids = T([255, 255, 1], dtype=torch.uint8)
    assert rows(I.from_document_ids(ids, -1)) == ["##.", "##.", "..#"], "255 is not -1"
    assert rows(I.from_document_ids(ids, 255)) == ["...", "...", "..#"]
    assert rows(I.from_document_ids(ids, 10**60)) == ["##.", "##.", "..#"]


def test_slots_of_merged():
    assert PAIR.merged(0).lo.tolist() == [[0], [4]] and PAIR.merged().lo.shape == (2, 1)
    four = PAIR.merged(4)
    assert four.lo.flatten().tolist() == [0, 4, 0, 0] and four.hi.flatten().tolist() == [2, 6, 0, 0]
    touching = I(T([[0], [2]]).int(), T([[2], [6]]).int(), 8)
    assert touching.merged(1).hi.tolist() == [[6]]
    before = I(T([[-5], [1], [-5]]).int(), T([[-2], [3], [0]]).int(), 8)
    assert before.merged(0).lo.tolist() == [[1]], "what lies before the keys takes no slot"


def test_draws_of_extreme_sizes():
    assert mle.sample_keep_k(2**31 - 1, 4).max() < 2**31
    assert (mle.sample_keep_k(2**31 - 1, 4, "uniform_pow2") <= 2**31 - 1).all()
    assert mle.sample_keep_k(T([1, 2**30]), 2, "pow2")[0] == 1
    assert mle.sample_keep_k(5, 0).tolist() == []
