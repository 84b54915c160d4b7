# SPDX-License-Identifier: BSD-3-Clause
"""What PackedLayout, its plans and sample_keep_k refuse, in words."""

import pytest
import torch

import masked_loss_ext as mle

REFUSED = [
    (([[4, 3]], [-1]), {}, "keep_k must not be negative, got -1 for sample 0"),
    (([[4, 3]], torch.tensor([-1])), {}, "keep_k must not be negative, got -1"),
    (([[4, 3]], [[1, -2]]), {}, "keep_k must not be negative, got -2"),
    (([[4, 3]], [1, 2]), {}, "keep_k must have one entry per sample (1), got 2"),
    (([[4, 3]], torch.tensor([1, 2])), {}, "keep_k must have one entry per sample (1), got 2"),
    (([[4, 3]], []), {}, "keep_k must have one entry per sample (1), got 0"),
    (([[4, 3]], [[1, 2, 3]]), {}, "keep_k [N, G] must have one column per segment (2), got 3"),
    (([[4, 3]] * 2, [1, [1, 2]]), {}, "keep_k must be [N] or [N, G], got a mixture"),
    (([[4, 3]], torch.tensor([1.0])), {}, "keep_k must be integers, got torch.float32"),
    (([[4, 3]], torch.tensor(1)), {}, "keep_k must be [N] or [N, G], got []"),
    (([[4, 3]], [1.5]), {}, "keep_k must hold ints, got float"),
    (([[4, 3]], 1), {}, "keep_k must be a list of ints or a tensor, got int"),
    (([],), {}, "segment_lengths must hold at least one sample"),
    (([[4, 3], [2]],), {}, "segment_lengths must have as many segments (at least one)"),
    (([[]],), {}, "segment_lengths must have as many segments (at least one)"),
    (([[4, -3]],), {}, "segment_lengths must not be negative, got -3 in sample 0"),
    (([[4, 3.0]],), {}, "segment_lengths must hold ints, got float"),
    ((7,), {}, "segment_lengths must be a list of lists of ints, got int"),
    (([[4, 3]],), dict(max_seq_len=9, pad_to_multiple=3), "Only one of max_seq_len and pad_to"),
    (([[4, 3]],), dict(max_seq_len=6), "max_seq_len must hold all 7 tokens, got 6"),
    (([[4, 3]],), dict(pad_to_multiple=0), "pad_to_multiple must be at least 1, got 0"),
    (([[4, 3]],), dict(align_samples=0), "align_samples must be at least 1, got 0"),
    (([[4, 3]], [1]), dict(droppable=2), "droppable must be one of 2 segments, got 2"),
]


@pytest.mark.parametrize("arguments,keywords,text", REFUSED)
def test_bad_layouts(arguments, keywords, text):
    for function in (mle.PackedLayout, mle.nested_dropout_block_mask):
        given = arguments
        if function is mle.nested_dropout_block_mask and len(arguments) == 1:
            given = (*arguments, None)
        with pytest.raises((ValueError, TypeError)) as caught:
            function(*given, **keywords)
        assert f"PackedLayout: {text}" in str(caught.value)


BAD_RELATIONS = [
    (dict(mode="causal_first"), "mode must be full, causal, causal_last or prefix"),
    (dict(dropped="zero"), "dropped must be none, self or attend"),
    (dict(sinks=-1), "sinks must not be negative"),
    (dict(window=-1), "window must not be negative"),
    (dict(window=(1, 2, 3)), "window must be an int or (left, right)"),
    (dict(mode="prefix"), "prefix must be given for mode 'prefix'"),
    (dict(prefix=3), "prefix is for mode 'prefix', got mode 'full'"),
    (dict(mode="prefix", prefix=[1, 2]), "prefix must have one entry per sample (1), got 2"),
    (dict(mode="prefix", prefix=-1), "prefix must hold ints of at least 0, got -1"),
    (dict(mode="prefix", prefix=torch.ones(2).long()), "prefix must be [1], got [2]"),
]


@pytest.mark.parametrize("relation,text", BAD_RELATIONS)
def test_bad_relations(relation, text):
    layout = mle.PackedLayout([[4, 3]], [1])
    for function in (layout.intervals, layout.block_mask):
        with pytest.raises(ValueError) as caught:
            function(**relation)
        assert text in str(caught.value)


def test_bad_tensors():
    layout = mle.PackedLayout([[4, 3]], [1], pad_to_multiple=8)
    plan = layout.compact()
    cases = [
        (lambda: layout.pack([]), "PackedLayout.pack: samples must be a list of 1 samples"),
        (lambda: layout.pack([[torch.ones(4, 2)]]), "sample 0 must have 2 segments, got 1"),
        (lambda: layout.pack([[torch.ones(4, 2)] * 2]), "samples[0][1] must have 3 tokens in"),
        (lambda: layout.unpack(torch.ones(7, 2)), "packed must have 8 tokens in dimension -2"),
        (lambda: plan.gather(torch.ones(7, 2)), "CompactPlan.gather: x must have 8 tokens"),
        (lambda: plan.scatter(torch.ones(8, 2)), "CompactPlan.scatter: y must have 5 tokens"),
        (lambda: mle.sample_keep_k(4, 2, "linear"), "mode must be uniform, pow2 or uniform_pow2"),
        (lambda: mle.sample_keep_k(0, 2), "sample_keep_k: n must be at least 1, got 0"),
        (lambda: mle.sample_keep_k([1, 2], 3), "n must have one entry per sample (3), got 2"),
        (lambda: mle.sample_keep_k(6, 3, "pow2"), "n must be a power of two for mode 'pow2'"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert text in str(caught.value)
