# SPDX-License-Identifier: BSD-3-Clause
"""What the attention masks refuse, in a sentence that names function and argument."""

import math

import pytest
import torch

import masked_loss_ext as mle

I = mle.RowIntervals  # noqa: E741
P = mle.PackedLayout
T = torch.tensor
LO = torch.zeros(1, 4, dtype=torch.int32)
PAIR = I(T([[0], [4]]).int(), T([[2], [6]]).int(), 8)
BATCHED = I.causal(4, offset=T([0, 2]))
LAYOUT = P([[4, 3]], [1], pad_to_multiple=8)
PLAN = LAYOUT.compact()
TOKENS = [torch.ones(4, 2), torch.ones(3, 2)]
Q = torch.randn(1, 1, 8, 16)
IDS = mle.generate_nested_dropout_mask_ids
NAN, INF = math.nan, math.inf
KEYS = ["a", "b"], "packed", "mask", "inner", "outer"
SWITCHES = (
    "per_subseq_embs",
    "return_materialized_mask",
    "zero_masked",
    "drop_masked",
    "allow_ragged",
)

REFUSED = [
    (lambda: I(LO, LO, True), "RowIntervals: kv_len must be an int, got bool"),
    (lambda: I(LO, LO, 2**40), "RowIntervals: kv_len must be in [0, 2147483647], got 10995"),
    (lambda: I(LO, LO, 10**60), "RowIntervals: kv_len must be in [0, 2147483647], got 1000000"),
    (lambda: I(LO, LO, "4"), "RowIntervals: kv_len must be an int, got str"),
    (lambda: I.full(10**60), "RowIntervals.full: q_len must be in [0, 2147483647]"),
    (lambda: I.full(True), "RowIntervals.full: q_len must be an int, got bool"),
    (lambda: I.full(2, 2**40), "RowIntervals.full: kv_len must be in [0, 2147483647]"),
    (lambda: I.causal(4, offset=1.5), "RowIntervals.causal: offset must be a"),
    (lambda: I.causal(4, offset=NAN), "RowIntervals.causal: offset must be a"),
    (lambda: I.causal(4, offset=INF), "RowIntervals.causal: offset must be a"),
    (lambda: I.causal(4, offset="1"), "RowIntervals.causal: offset must be a"),
    (lambda: I.causal(4, offset=None), "RowIntervals.causal: offset must be a"),
    (lambda: I.causal(4, offset=True), "RowIntervals.causal: offset must be an int, got bool"),
    (lambda: I.causal(4, offset=2**62), "RowIntervals.causal: offset must be in [-2147483647, 2"),
    (lambda: I.causal(4, offset=-(2**62)), "RowIntervals.causal: offset must be at least -21474"),
    (lambda: I.causal(4, offset=T([1.5])), "RowIntervals.causal: offset must be integers"),
    (lambda: I.causal(4, offset=T([[1]])), "RowIntervals.causal: offset must be an int or [B]"),
    (lambda: I.causal(4, offset=T(1.5)), "RowIntervals.causal: offset must be integers"),
    (
        lambda: I.sliding_window(4, True),
        "RowIntervals.sliding_window: window must be an int, got b",
    ),
    (lambda: I.sliding_window(4, NAN), "RowIntervals.sliding_window: window must be an int, got f"),
    (lambda: I.sliding_window(4, (1, -1)), "RowIntervals.sliding_window: window must not be neg"),
    (
        lambda: I.sliding_window(4, "12"),
        "RowIntervals.sliding_window: window must be an int, got s",
    ),
    (lambda: I.prefix_lm(4, -1), "RowIntervals.prefix_lm: prefix must not be negative"),
    (
        lambda: I.prefix_lm(4, T([-1])),
        "RowIntervals.prefix_lm: prefix must not be negative, got -1",
    ),
    (lambda: I.prefix_lm(4, True), "RowIntervals.prefix_lm: prefix must be an int, got bool"),
    (lambda: I.sinks(4, True), "RowIntervals.sinks: count must be an int, got bool"),
    (lambda: I.from_document_ids("ab"), "RowIntervals.from_document_ids: ids must be a tensor or"),
    (lambda: I.from_document_ids([]), "RowIntervals.from_document_ids: ids must be [S] or [B, S]"),
    (lambda: I.from_document_ids([1.5]), "RowIntervals.from_document_ids: ids must hold ints"),
    (
        lambda: I.from_document_ids([1], 1.5),
        "RowIntervals.from_document_ids: pad_id must be an int",
    ),
    (
        lambda: I.from_document_ids([1], "1"),
        "RowIntervals.from_document_ids: pad_id must be an int",
    ),
    (
        lambda: I.from_cu_seqlens(None),
        "RowIntervals.from_cu_seqlens: cu_seqlens must be a tensor or",
    ),
    (lambda: I.from_cu_seqlens([0, 10**60]), "RowIntervals.from_cu_seqlens: cu_seqlens must fit"),
    (
        lambda: I.from_cu_seqlens([0, 2**40]),
        "RowIntervals.from_cu_seqlens: cu_seqlens must hold at",
    ),
    (
        lambda: I.from_cu_seqlens([0, True]),
        "RowIntervals.from_cu_seqlens: cu_seqlens must hold ints",
    ),
    (lambda: I.from_cu_seqlens([0, 3], "5"), "RowIntervals.from_cu_seqlens: total_len must be an"),
    (
        lambda: I.from_cu_seqlens([0, 3], 10**60),
        "RowIntervals.from_cu_seqlens: total_len must be in",
    ),
    (lambda: I.from_padding([-1], 3), "RowIntervals.from_padding: valid must be lengths from 0 to"),
    (
        lambda: I.from_padding([5], 3),
        "RowIntervals.from_padding: valid must be lengths from 0 to s",
    ),
    (lambda: I.from_padding(None, 3), "RowIntervals.from_padding: valid must be a tensor, a list"),
    (lambda: I.from_padding([1], True), "RowIntervals.from_padding: seq_len must be an int, got b"),
    (lambda: I.from_padding([1], 2**40), "RowIntervals.from_padding: seq_len must be in [0, 214"),
    (lambda: I.from_padding(T([[1, 1]]), 7), "RowIntervals.from_padding: seq_len must be S of the"),
    (lambda: I.from_padding(T([[0.0, -INF]])), "RowIntervals.from_padding: valid must be on where"),
    (lambda: I.cross([[2, 1]], [[2, 1]]), "RowIntervals.cross: q_lengths must be [N], one length"),
    (lambda: I.cross([2**31], [1]), "RowIntervals.cross: q_len must be in [0, 2147483647]"),
    (lambda: I.cross([1], [1], [True]), "RowIntervals.cross: keep_k must hold ints, got bool"),
    (
        lambda: I.cross([1], [1], q_len=10**60),
        "RowIntervals.cross: q_len must be in [0, 2147483647]",
    ),
    (
        lambda: I.shared_prefix(2**40, [1]),
        "RowIntervals.shared_prefix: prefix_len must be in [0, 2",
    ),
    (lambda: I.shared_prefix(2, [2**31]), "RowIntervals.shared_prefix: seq_len must be in [0, 214"),
    (lambda: I.shared_prefix(2, None), "RowIntervals.shared_prefix: branch_lengths must be a list"),
    (
        lambda: I.block_diffusion(2**30, 2),
        "RowIntervals.block_diffusion: seq_len must be in [0, 107",
    ),
    (
        lambda: I.block_diffusion(4, True),
        "RowIntervals.block_diffusion: block must be an int, got b",
    ),
    (lambda: I.causal(4).ascii(0), "RowIntervals.ascii: width must be at least 1, got 0"),
    (lambda: I.causal(4).ascii("9"), "RowIntervals.ascii: width must be an int, got str"),
    (lambda: I.causal(4).ascii(batch=1), "RowIntervals.ascii: batch must be in [-1, 0], got 1"),
    (lambda: BATCHED.ascii(batch=2), "RowIntervals.ascii: batch must be in [-2, 1], got 2"),
    (lambda: BATCHED.ascii(batch=-3), "RowIntervals.ascii: batch must be at least -2, got -3"),
    (lambda: BATCHED.ascii(batch=0.5), "RowIntervals.ascii: batch must be an int, got float"),
    (lambda: I.causal(4).png("x", size=0), "RowIntervals.png: size must be at least 1, got 0"),
    (lambda: I.causal(4).png("x", block_size=0), "RowIntervals.png: block_size must be at least 1"),
    (lambda: I.causal(4).png("x", batch=2), "RowIntervals.png: batch must be in [-1, 0], got 2"),
    (lambda: PAIR.merged(1), "RowIntervals.merged: slots must be at least 2, which some row needs"),
    (lambda: PAIR.merged(-1), "RowIntervals.merged: slots must not be negative, got -1"),
    (lambda: PAIR.merged(9), "RowIntervals.merged: slots must be in [0, 8], got 9"),
    (lambda: PAIR.merged(True), "RowIntervals.merged: slots must be an int, got bool"),
    (lambda: I.causal(4).rows("0", 2), "RowIntervals.rows: q0 must be an int, got str"),
    (lambda: I.causal(4).rows(0, 1.5), "RowIntervals.rows: q1 must be an int, got float"),
    (lambda: I.causal(4).block_mask(10**60), "RowIntervals.block_mask: block_size must be in [1, "),
    (
        lambda: I.causal(4).block_mask(True),
        "RowIntervals.block_mask: block_size must be an int, go",
    ),
    (
        lambda: I.causal(4).stats(10**60),
        "RowIntervals.stats: block_size must be in [1, 2147483647]",
    ),
    (
        lambda: P([[10**60]]),
        "PackedLayout: segment_lengths must hold at most 2147483647 tokens, got",
    ),
    (
        lambda: P([[2**31]]),
        "PackedLayout: segment_lengths must hold at most 2147483647 tokens, got",
    ),
    (
        lambda: P([None]),
        "PackedLayout: a sample of segment_lengths must be a list of ints, got None",
    ),
    (
        lambda: P({"a": 1}),
        "PackedLayout: segment_lengths must be a list of lists of ints, got dict",
    ),
    (lambda: P(T([2.0])), "PackedLayout: segment_lengths must be integers, got torch.float32"),
    (
        lambda: P([3], keep_k="1"),
        "PackedLayout: keep_k must be a list of ints or a tensor, got str",
    ),
    (
        lambda: P([3], pad_to_multiple=2**40),
        "PackedLayout: pad_to_multiple must be in [1, 21474836",
    ),
    (
        lambda: P([3], pad_to_multiple=True),
        "PackedLayout: pad_to_multiple must be an int, got bool",
    ),
    (lambda: P([2**31 - 2]), "PackedLayout: segment_lengths, padded, must hold at most 2147483647"),
    (lambda: P([3], max_seq_len=10**60), "PackedLayout: max_seq_len must be in [0, 2147483647]"),
    (
        lambda: P([3, 3], align_samples=10**60),
        "PackedLayout: align_samples must be in [1, 21474836",
    ),
    (lambda: P([3], droppable=True), "PackedLayout: droppable must be an int, got bool"),
    (
        lambda: LAYOUT.intervals(sinks=True),
        "PackedLayout.intervals: sinks must be an int, got bool",
    ),
    (
        lambda: LAYOUT.intervals(window=INF),
        "PackedLayout.intervals: window must be an int, got float",
    ),
    (
        lambda: LAYOUT.intervals("prefix", prefix=1.5),
        "PackedLayout.intervals: prefix must be an int",
    ),
    (
        lambda: LAYOUT.intervals("prefix", prefix=True),
        "PackedLayout.intervals: prefix must hold int",
    ),
    (
        lambda: LAYOUT.intervals("prefix", prefix=T([-5])),
        "PackedLayout.intervals: prefix must not be",
    ),
    (
        lambda: LAYOUT.block_mask(block_size=10**60),
        "PackedLayout.block_mask: block_size must be in",
    ),
    (
        lambda: LAYOUT.block_mask(block_size="a"),
        "PackedLayout.block_mask: block_size must be an int",
    ),
    (lambda: LAYOUT.compact(align=0), "PackedLayout.compact: align must be at least 1, got 0"),
    (
        lambda: LAYOUT.compact(bucket=10**60),
        "PackedLayout.compact: bucket must be in [1, 2147483647]",
    ),
    (lambda: LAYOUT.compact(bucket=1.5), "PackedLayout.compact: bucket must be an int, got float"),
    (lambda: PLAN.gather(Q[0, 0], dim="a"), "CompactPlan.gather: dim must be an int, got str"),
    (
        lambda: PLAN.scatter(Q[0, 0, :5], fill="x"),
        "CompactPlan.scatter: fill must be a number, got",
    ),
    (lambda: LAYOUT.pack(None), "PackedLayout.pack: samples must be a list, got NoneType"),
    (lambda: LAYOUT.pack([5]), "PackedLayout.pack: samples[0] must be a list, got int"),
    (
        lambda: LAYOUT.pack([TOKENS], dim=5),
        "PackedLayout.pack: samples[0][0] must have 4 tokens in",
    ),
    (lambda: LAYOUT.pack([TOKENS], dim="a"), "PackedLayout.pack: dim must be an int, got str"),
    (lambda: LAYOUT.pack([TOKENS], fill="x"), "PackedLayout.pack: fill must be a number, got str"),
    (
        lambda: LAYOUT.pack([[TOKENS[0], torch.ones(3, 5)]]),
        "PackedLayout.pack: samples[0][1] must have the shape of samples[0][0] [4, 2] but in",
    ),
    (
        lambda: LAYOUT.unpack(Q[0, 0], dim=7),
        "PackedLayout.unpack: packed must have 8 tokens in dim",
    ),
    (
        lambda: LAYOUT.unpack(Q[0, 0], fill="x"),
        "PackedLayout.unpack: fill must be a number, got str",
    ),
    (lambda: mle.sample_keep_k(NAN, 2), "sample_keep_k: n must be an int, got float"),
    (lambda: mle.sample_keep_k(True, 2), "sample_keep_k: n must be an int, got bool"),
    (lambda: mle.sample_keep_k(2**31, 2), "sample_keep_k: n must be in [1, 2147483647], got 2147"),
    (lambda: mle.sample_keep_k([4, None], 2), "sample_keep_k: n must be an int, got NoneType"),
    (
        lambda: mle.sample_keep_k(4, 10**60),
        "sample_keep_k: batch must be in [0, 2147483647], got 1",
    ),
    (
        lambda: mle.sample_keep_k(4, 1, generator="numpy"),
        "sample_keep_k: generator must be a torch.",
    ),
    (
        lambda: mle.packed_attention(Q, Q, Q, LAYOUT, scale=NAN),
        "packed_attention: scale must be a f",
    ),
    (
        lambda: mle.packed_attention(Q, Q, Q, LAYOUT, scale=INF),
        "packed_attention: scale must be a f",
    ),
    (
        lambda: mle.packed_attention(Q, Q, Q, LAYOUT, scale="1"),
        "packed_attention: scale must be a n",
    ),
    (
        lambda: mle.packed_attention(Q, Q, Q, LAYOUT, scale=True),
        "packed_attention: scale must be a ",
    ),
    (
        lambda: mle.packed_attention(Q, Q, Q, I.causal(8), sinks=T([1, 2])),
        "packed_attention: sinks must be left out with RowIntervals",
    ),
    (lambda: IDS(None), "generate_nested_dropout_mask_ids: ps must be a list of shapes, got None"),
    (lambda: IDS("ab"), "generate_nested_dropout_mask_ids: ps must be a list of shapes, got str"),
    (lambda: IDS([4.5, 3]), "generate_nested_dropout_mask_ids: ps[0] must be an int or a list of"),
    (lambda: IDS([True, 3]), "generate_nested_dropout_mask_ids: ps[0] must hold ints, got bool"),
    (
        lambda: IDS([(4, -1), 3]),
        "generate_nested_dropout_mask_ids: ps[0] must not be negative, got",
    ),
    (lambda: IDS([10**60, 3]), "generate_nested_dropout_mask_ids: ps must hold at most 2147483647"),
    (
        lambda: IDS([4, 3], True),
        "generate_nested_dropout_mask_ids: keep_k_list must be an int, a l",
    ),
    (lambda: IDS([4, 3], [1], "9"), "generate_nested_dropout_mask_ids: max_seq_len must be an int"),
    (lambda: IDS([4, 3], [1], 10**60), "generate_nested_dropout_mask_ids: max_seq_len must be in"),
    (
        lambda: IDS([4, 3], [1], masked_id=NAN),
        "generate_nested_dropout_mask_ids: masked_id must be",
    ),
    (
        lambda: IDS([4, 3], [1], masked_id=-1.5),
        "generate_nested_dropout_mask_ids: masked_id must b",
    ),
    (
        lambda: IDS([4, 3], [1], masked_id=-(10**60)),
        "generate_nested_dropout_mask_ids: masked_id m",
    ),
    (
        lambda: IDS([4, 3], [1], num_sequences_per_sample=True),
        "generate_nested_dropout_mask_ids: num_sequences_per_sample must be an int, got bool",
    ),
    (
        lambda: mle.generate_nested_dropout_attention_mask([4, 3], isolate_subsequences="no"),
        "generate_nested_dropout_attention_mask: isolate_subsequences must be a bool, got 'no'",
    ),
    (
        lambda: I.full(4).block_mask(with_q="no"),
        "RowIntervals.block_mask: with_q must be a bool, got 'no'",
    ),
    (
        lambda: I.from_document_ids(T([1, 2, 1]), check="no"),
        "RowIntervals.from_document_ids: check must be a bool, got 'no'",
    ),
    *(
        (
            lambda name=name: mle.NestedDropoutSequencePacker(*KEYS, **{name: "no"}),
            f"NestedDropoutSequencePacker: {name} must be a bool, got 'no'",
        )
        for name in SWITCHES
    ),
]


@pytest.mark.parametrize("call,text", REFUSED, ids=[text[:60] for _, text in REFUSED])
def test_refused_in_a_sentence(call, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).startswith(text), str(caught.value)
