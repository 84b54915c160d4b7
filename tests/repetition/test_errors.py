# SPDX-License-Identifier: BSD-3-Clause
"""Bad input to the repetition operators: an error that names operator, argument, rule and value."""

import pytest
import torch

from masked_loss_ext.ops import repetition

counts_op = torch.ops.masked_loss_ext.repetition_counts
links_op = torch.ops.masked_loss_ext.repetition_links
OPERATORS = {"repetition_counts": counts_op, "repetition_links": links_op}
PUBLIC = {name: getattr(repetition, name) for name in OPERATORS}

TOKENS = torch.zeros(2, 6, dtype=torch.int64)
INTEGERS = "tokens must be uint8, int8, int16, int32 or int64, got "
CASES = [
    ((TOKENS.float(),), INTEGERS + "Float"),
    ((TOKENS.bool(),), INTEGERS + "Bool"),
    ((TOKENS[0],), "tokens must be [B, S], got [6]"),
    ((TOKENS[None],), "tokens must be [B, S], got [1, 2, 6]"),
    (
        (TOKENS[:, :1].expand(2, 2**30 + 1),),
        "tokens must have at most 1073741824 positions per row, got [2, 1073741825]",
    ),
    ((TOKENS, TOKENS[:1]), "valid must have the shape of tokens [2, 6], got [1, 6]"),
    ((TOKENS, TOKENS[:, :5]), "valid must have the shape of tokens [2, 6], got [2, 5]"),
    ((TOKENS, TOKENS[0]), "valid must have the shape of tokens [2, 6], got [6]"),
    ((TOKENS, TOKENS.to(torch.complex64)), "valid must be bool, integer or floating, "),
    ((TOKENS, None, 0), "ngram_size must be in [1, 9223372036854775807], got 0"),
    ((TOKENS, None, -4), "ngram_size must be in [1, 9223372036854775807], got -4"),
]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("arguments,text", CASES)
def test_arguments(name, arguments, text):
    for call in (OPERATORS[name], PUBLIC[name]):
        with pytest.raises(ValueError) as caught:
            call(*arguments)
        assert f"{name}: {text}" in str(caught.value), str(caught.value)
    # The fakes refuse the same; of dtypes Python has other names.
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(ValueError) as caught:
        OPERATORS[name](*meta)
    start = " ".join(text.split()[:3])
    assert f"{name}: {start}" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    "arguments,text",
    [
        ((TOKENS, None, 10**60), "ngram_size must be in [1, 9223372036854775807], got 1000"),
        ((TOKENS, None, 2.0), "ngram_size must be an int, got float"),
        ((TOKENS, None, True), "ngram_size must be an int, got bool"),
        ((TOKENS, None, "2"), "ngram_size must be an int, got str"),
        (([[1, 2]],), "tokens must be a torch.Tensor, got list"),
        ((TOKENS, [[1, 2]]), "valid must be a torch.Tensor, got list"),
        ((TOKENS.to_sparse(),), "tokens must be a dense tensor, got layout torch.sparse_coo"),
        ((TOKENS, -TOKENS.double() - 1), "valid must be on where it is not 0, got negative"),
    ],
)
def test_what_the_dispatcher_would_refuse(name, arguments, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        PUBLIC[name](*arguments)
    assert f"{name}: {text}" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_unsigned_tokens_and_masks(name, dtype):
    tokens = torch.tensor([[1, 1, 2, 1, 1]])
    valid = torch.tensor([[1, 1, 1, 0, 1]])
    expected = PUBLIC[name](tokens, valid, 2)
    got = PUBLIC[name](tokens.to(dtype), valid.to(dtype), 2)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_meta_tensor_among_others(name):
    pairs = [(TOKENS, TOKENS.to("meta"), "cpu"), (TOKENS.to("meta"), TOKENS, "meta")]
    for tokens, valid, device in pairs:
        with pytest.raises(ValueError) as caught:
            OPERATORS[name](tokens, valid)
        assert f"{name}: valid must be on the device of tokens ({device})" in str(caught.value)
