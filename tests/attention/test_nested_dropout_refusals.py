# SPDX-License-Identifier: BSD-3-Clause
"""What the modules that hand a dict on refuse: missing entries, wrong shapes and numbers."""

import numpy as np
import pytest
import torch

import masked_loss_ext as mle

T = torch.tensor
PACKER = mle.NestedDropoutSequencePacker(["p", "r"], "o", "m", "i", "u", pad_to_multiple=128)
UNPACKER = mle.SequenceUnpacker("o", ["p", "r"], "i", "u")
DROPOUT = mle.AttentionMaskedNestedDropout("r")
X = [torch.randn(1, 4, 8)]
LONG = torch.zeros(1, 1, 8).expand(1, 2**30 - 1, 8)
PACKED = {"o": torch.randn(1, 8, 2), "i": [[(4,), (3,)]], "u": [(7,)]}

MISSING = [
    (PACKER, {"p": X}, "'r' (input_list_read_keys), but it holds 'p'"),
    (PACKER, {}, "'p' (input_list_read_keys), but it holds nothing"),
    (UNPACKER, {"x": 1}, "'o' (packed_seq_read_key), but it holds 'x'"),
    (UNPACKER, {"o": 1}, "'i' (inner_packed_shapes_read_key), but it holds 'o'"),
    (UNPACKER, {"o": 1, "i": 2}, "'u' (outer_packed_shapes_read_key), but it holds 'o', 'i'"),
    (DROPOUT, {"s": X}, "'r' (read_key), but it holds 's'"),
    (mle.MaskedNestedDropout("r", 8), {"s": X}, "'r' (read_key), but it holds 's'"),
    (
        mle.AttentionMaskedNestedDropout("r").eval(),
        {"eval_keep_k": [1]},
        "'r' (read_key), but it holds 'eval_keep_k'",
    ),
]


@pytest.mark.parametrize("module,entries,text", MISSING)
def test_a_missing_entry(module, entries, text):
    with pytest.raises(KeyError) as caught:
        module(entries)
    assert str(caught.value) == f"{type(module).__name__}: data_dict must hold {text}"


@pytest.mark.parametrize("module", [PACKER, UNPACKER, DROPOUT, mle.MaskedNestedDropout("r", 8)])
@pytest.mark.parametrize("wrong", [None, [1], "p"])
def test_no_dict(module, wrong):
    with pytest.raises(TypeError) as caught:
        module(wrong)
    kind = type(wrong).__name__
    assert str(caught.value) == f"{type(module).__name__}: data_dict must be a dict, got {kind}"


def packer(**options):
    return mle.NestedDropoutSequencePacker(["p", "r"], "o", "m", "i", "u", **options)


def unpack(**entries):
    return UNPACKER({**PACKED, **entries})


MODULES = [
    (lambda: packer(pad_to_multiple=True), "NestedDropoutSequencePacker: pad_to_multiple must be"),
    (lambda: packer(pad_to_multiple=0), "NestedDropoutSequencePacker: pad_to_multiple must be at"),
    (lambda: packer(max_seq_len=2**40), "NestedDropoutSequencePacker: max_seq_len must be in [0, "),
    (
        lambda: packer(pad_to_multiple=2**30)({"p": [LONG], "r": [LONG]}),
        "NestedDropoutSequencePacker: the packed length must be at most 2147483647, got 214748",
    ),
    (
        lambda: PACKER({"p": X, "r": X, "nested_dropout_keep_k": True}),
        "NestedDropoutSequencePacker: nested_dropout_keep_k must be an int, a list of ints",
    ),
    (
        lambda: PACKER({"p": X, "r": X, "nested_dropout_keep_k": "4"}),
        "NestedDropoutSequencePacker: nested_dropout_keep_k must be an int, a list of ints",
    ),
    (
        lambda: mle.NestedDropoutSequencePacker("pr", "o", "m", "i", "u"),
        "NestedDropoutSequencePacker: input_list_read_keys must be a list of keys, got str",
    ),
    (
        lambda: mle.SequenceUnpacker("o", None, "i", "u"),
        "SequenceUnpacker: inner_seq_write_keys must be a list of keys, got NoneType",
    ),
    (lambda: unpack(u=None), "SequenceUnpacker: u must be a list with an entry per sample, got N"),
    (lambda: unpack(u=[None]), "SequenceUnpacker: u[0] must be an int or a list of ints, got None"),
    (lambda: unpack(u=[(-7,)]), "SequenceUnpacker: u[0] must not be negative, got -7"),
    (lambda: unpack(u=[("a",)]), "SequenceUnpacker: u[0] must hold ints, got str"),
    (lambda: unpack(i=None), "SequenceUnpacker: i must be a list with an entry per sample, got N"),
    (lambda: unpack(i=[None]), "SequenceUnpacker: i[0] must be a list with an entry per sample"),
    (lambda: unpack(i=[[(-4,), (11,)]]), "SequenceUnpacker: i[0][0] must not be negative, got -4"),
    (lambda: unpack(i=[[(4,), (3.0,)]]), "SequenceUnpacker: i[0][1] must hold ints, got float"),
    (
        lambda: DROPOUT.sample_keep_k(-3),
        "AttentionMaskedNestedDropout.sample_keep_k: n must not be",
    ),
    (
        lambda: DROPOUT.sample_keep_k("a"),
        "AttentionMaskedNestedDropout.sample_keep_k: n must be an",
    ),
    (lambda: mle.MaskedNestedDropout("r", -1), "MaskedNestedDropout: dim must be at least 1, got"),
    (lambda: mle.MaskedNestedDropout("r", "8"), "MaskedNestedDropout: dim must be an int, got str"),
    (
        lambda: mle.MaskedNestedDropout("r", 1)({"r": [torch.zeros(1, 4, 8)]}),
        "MaskedNestedDropout: r[0] must be a floating tensor [1, n, 1], got torch.float32 [1, 4",
    ),
    (
        lambda: mle.MaskedNestedDropout("r", 8)({"r": [torch.zeros(1, 4, 8).long()]}),
        "MaskedNestedDropout: r[0] must be a floating tensor [1, n, 8], got torch.int64 [1, 4, 8]",
    ),
]


@pytest.mark.parametrize("call,text", MODULES, ids=[text[:60] for _, text in MODULES])
def test_modules_refuse_in_a_sentence(call, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).startswith(text), str(caught.value)


def test_shapes_of_ints_and_sizes():
    for shapes in ([[4, 3]], [[torch.Size([4]), np.array([3])]], [[(4,), T([3])]]):
        out = UNPACKER({**PACKED, "i": shapes, "u": [7]})
        assert out["p"][0].shape == (1, 4, 2) and out["r"][0].shape == (1, 3, 2)
