# SPDX-License-Identifier: BSD-3-Clause
"""Nested dropout in dict pipelines: what is drawn, read and written, and what is not touched."""

import copy
import doctest
import pickle

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import masked_loss_ext as mle
from masked_loss_ext.attention import pipeline

Dropout = mle.AttentionMaskedNestedDropout


def registers(*lengths, width=4):
    return [torch.randn(1, n, width) for n in lengths]


# --- draws ---------------------------------------------------------------------------------------


def frequencies(mode, n, draws=4000, **options):
    dropout = Dropout("r", size_sampling_mode=mode, **options)
    counts = torch.zeros(2 * n + 1)
    for _ in range(draws):
        k = dropout.sample_keep_k(n)
        assert type(k) is int
        counts[k] += 1
    return counts / draws


@pytest.mark.parametrize(
    "mode,n,expected",
    [
        ("uniform", 5, {k: 1 / 5 for k in (1, 2, 3, 4, 5)}),
        ("pow2", 8, {k: 1 / 4 for k in (1, 2, 4, 8)}),
        ("uniform_pow2", 8, {1: 1 / 8, 2: 1 / 8, 4: 2 / 8, 8: 4 / 8}),
        # 5 ... 6 are rounded up to 8, more than there are: all six
        ("uniform_pow2", 6, {1: 1 / 6, 2: 1 / 6, 4: 2 / 6, 6: 2 / 6}),
    ],
)
@pytest.mark.parametrize("generator", ["torch default", "torch", "numpy"])
def test_distribution_of_keep_k(mode, n, expected, generator):
    generators = {
        "torch default": None,
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(0),
    }
    found = frequencies(mode, n, generator=generators[generator])
    for k in range(2 * n + 1):
        p = expected.get(k, 0.0)
        if p == 0:
            assert found[k] == 0, f"{k} is never drawn"
        else:  # five standard deviations
            assert abs(found[k] - p) < 5 * (p * (1 - p) / 4000) ** 0.5


def test_draws_repeat_with_their_generator():
    def draws(generator):
        dropout = Dropout("r", generator=generator)
        return [dropout.sample_keep_k(256) for _ in range(5)]

    assert draws(torch.Generator().manual_seed(3)) == draws(torch.Generator().manual_seed(3))
    assert draws(np.random.RandomState(3)) == draws(np.random.RandomState(3))
    state = np.random.get_state()
    np.random.seed(3)
    expected = draws("numpy")
    np.random.seed(3)
    assert expected == [int(np.random.randint(1, 257)) for _ in range(5)]
    np.random.set_state(state)


def test_no_register_keeps_none():
    assert Dropout("r").sample_keep_k(0) == 0


def test_wrong_draws_are_refused():
    with pytest.raises(ValueError, match="power of two, got 6") as error:
        Dropout("r", size_sampling_mode="pow2").sample_keep_k(6)
    assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match="size_sampling_mode must be .* got 'linear'"):
        Dropout("r", size_sampling_mode="linear")
    with pytest.raises(TypeError, match="generator must be"):
        Dropout("r", generator=3)


# --- AttentionMaskedNestedDropout ----------------------------------------------------------------


def test_training_writes_one_list_and_touches_no_token():
    tokens = registers(8, 3, 5)
    before = [x.clone() for x in tokens]
    given = {"r": tokens, "other": 1}
    data_dict = Dropout("r")(given)
    assert data_dict is given and set(data_dict) == {
        "r", "other", "nested_dropout_keep_k", "train_keep_k",
    }  # fmt: skip
    keep_k = data_dict["nested_dropout_keep_k"]
    assert keep_k is data_dict["train_keep_k"] and len(keep_k) == 3
    assert all(1 <= k <= n for k, n in zip(keep_k, (8, 3, 5), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(data_dict["r"], before, strict=True))
    assert not list(Dropout("r").parameters())


def test_training_key_can_be_left_out():
    data_dict = Dropout("r", "k", train_keep_k_write_key=None)({"r": registers(8)})
    assert set(data_dict) == {"r", "k"}


@pytest.mark.parametrize(
    "given,expected",
    [
        ([2, 0], [2, 0]),
        (3, [3, 3]),
        (np.array([2, 5]), [2, 5]),
        (torch.tensor([2, 99]), torch.tensor([2, 99])),
        ([torch.tensor(2), torch.tensor(1)], torch.tensor([2, 1])),
        ([2], [2]),  # the second sample keeps all
    ],
)
def test_evaluation_reads_keep_k(given, expected):
    data_dict = Dropout("r").eval()({"r": registers(8, 8), "eval_keep_k": given})
    found = data_dict["nested_dropout_keep_k"]
    assert type(found) is type(expected)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert "train_keep_k" not in data_dict


@pytest.mark.parametrize("missing", ["no key", "no entry", "None"])
def test_evaluation_without_keep_k_forgets_that_of_training(missing):
    dropout = Dropout("r", eval_keep_k_read_key=None if missing == "no key" else "eval_keep_k")
    data_dict = dropout({"r": registers(8)})
    assert "nested_dropout_keep_k" in data_dict
    if missing == "None":
        data_dict["eval_keep_k"] = None
    dropout.eval()(data_dict)
    assert "nested_dropout_keep_k" not in data_dict


def test_both_names_of_the_first_argument():
    for dropout in (Dropout("a"), Dropout(read_key="a"), Dropout(read_write_key="a")):
        assert dropout.read_key == dropout.read_write_key == "a"
        assert dropout.block_mask_write_key == "nested_dropout_block_mask"
    with pytest.raises(TypeError, match="read_key must be given"):
        Dropout()
    with pytest.raises(TypeError, match="read_key must be given"):
        Dropout("a", read_write_key="b")


@pytest.mark.parametrize(
    "keep_k,error,match",
    [
        ([3, -1], ValueError, r"eval_keep_k must not be negative, got \[3, -1\]"),
        (-1, ValueError, "must not be negative"),
        (torch.tensor([3, -1]), ValueError, "must not be negative"),
        ([1, 2, 3], ValueError, "at most one entry per sample, 2, got 3"),
        (torch.tensor([1, 2, 3]), ValueError, "at most one entry per sample, 2, got 3"),
        (torch.tensor([1.0, 2.0]), ValueError, "must be integers, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "one entry per sample"),
        ([1.5, 2], TypeError, "must be an int, a list of ints or an integer tensor"),
    ],
)
def test_wrong_keep_k(keep_k, error, match):
    with pytest.raises(error, match=match):
        Dropout("r").eval()({"r": registers(8, 8), "eval_keep_k": keep_k})


def test_samples_are_one_by_one():
    with pytest.raises(ValueError, match=r"r\[1\] must be .* batch dimension of 1, got"):
        Dropout("r")({"r": [torch.randn(1, 8, 4), torch.randn(2, 8, 4)]})
    with pytest.raises(TypeError, match="r must be a list of tensors"):
        Dropout("r")({"r": torch.randn(2, 8, 4)})


# --- MaskedNestedDropout -------------------------------------------------------------------------


def test_masked_nested_dropout_overwrites_in_place():
    dropout = mle.MaskedNestedDropout("r", 4)
    assert dropout.dropout_mask_token.shape == (4,)
    assert dropout.dropout_mask_token.abs().max() < 0.2  # standard deviation 0.02
    tokens = registers(8, 8, 8)
    before = [x.clone() for x in tokens]
    data_dict = dropout.eval()({"r": tokens, "eval_keep_k": [3, 0]})
    for i, k in enumerate((3, 0, 8)):
        assert data_dict["r"][i] is tokens[i]
        assert torch.equal(tokens[i][:, :k], before[i][:, :k])
        assert (tokens[i][:, k:] == dropout.dropout_mask_token).all()
    sum(x.sum() for x in tokens).backward()
    assert (dropout.dropout_mask_token.grad == 5 + 8).all()


def test_masked_nested_dropout_trains_and_evaluates():
    dropout = mle.MaskedNestedDropout("r", 4, size_sampling_mode="pow2")
    data_dict = dropout({"r": registers(8, 8)})
    assert set(data_dict) == {"r", "train_keep_k"}
    for x, k in zip(data_dict["r"], data_dict["train_keep_k"], strict=True):
        assert ((x == dropout.dropout_mask_token).all(-1).sum() == 8 - k).all()
    tokens = registers(8)
    before = tokens[0].clone()
    assert torch.equal(dropout.eval()({"r": tokens})["r"][0], before)
    leaf = {"r": [tokens[0].requires_grad_()], "eval_keep_k": [3]}
    with pytest.raises(RuntimeError, match="leaf"):
        dropout(leaf)


# --- documentation and copies --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*pipeline.__all__, "packed_attention"])
def test_docstring_examples(name):
    globs = {n: getattr(mle, n) for n in mle.__all__}
    globs |= {"torch": torch, "F": torch.nn.functional, "flex_attention": flex_attention}
    globs |= dict.fromkeys("qkv", torch.randn(1, 2, 256, 16))
    tests = doctest.DocTestFinder(recurse=False).find(getattr(mle, name), name, globs=globs)
    assert sum(len(test.examples) for test in tests)
    report = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_modules_can_be_pickled_and_copied():
    modules = [
        Dropout("r"),
        mle.MaskedNestedDropout("r", 4),
        mle.NestedDropoutSequencePacker(["p", "r"], "x", "m", "i", "o", pad_to_multiple=128),
        mle.SequenceUnpacker("x", ["p", "r"], "i", "o"),
    ]
    for module in modules:
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(other) == repr(module)
