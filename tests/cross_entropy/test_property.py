# SPDX-License-Identifier: BSD-3-Clause
"""Any combination of arguments, drawn at random, against the reference and against poison."""

import torch
from accuracy import assert_same_bits
from accuracy_cross_entropy import Expected, assert_all_accurate, evaluate, upstream_for
from cases import MASK_DTYPES, stored_as
from hypothesis import given, settings
from hypothesis import strategies as st

import masked_loss_ext as mle
from tests.cross_entropy.test_laws import counted, poisoned

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "transposed", "sliced", "row_gaps", "misaligned")
numbers = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from((0.1, 0.5, 1.0)),
        "temperature": st.sampled_from((0.5, 0.7, 2.0)),
        "softcap": st.sampled_from((3.0, 30.0)),
        "z_loss": st.sampled_from((1e-3, 0.3)),
        "focal_gamma": st.sampled_from((0.5, 1.0, 2.0, 5.0)),
        "shift": st.integers(0, 6),
    },
)


@st.composite
def problems(draw):
    """(inputs, options) of masked_cross_entropy."""
    rows = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    classes = draw(st.one_of(st.integers(1, 70), st.sampled_from((1000, 2049, 4100))))
    dtype = draw(st.sampled_from(FLOATING))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(LAYOUTS))
    row_layout = draw(st.sampled_from(LAYOUTS))
    options = draw(numbers)
    options["reduction"] = draw(st.sampled_from(("mean", "sum", "none")))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from((1, 7.5, 0.25)))
    logits = draw(st.sampled_from((0.1, 2.0, 10.0))) * torch.randn(*rows, classes, generator=g)
    label_dtype = draw(st.sampled_from((torch.int64, torch.int32, torch.int16)))
    target = torch.randint(0, classes, rows, generator=g)
    target[torch.rand(rows, generator=g) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -100
    inputs = {
        "logits": stored_as(logits.to(dtype), layout),
        "target": stored_as(target.to(label_dtype), row_layout),
    }
    if draw(st.booleans()):
        on = torch.rand(rows, generator=g) < draw(st.floats(0, 1))
        inputs["mask"] = stored_as(on.to(draw(st.sampled_from(MASK_DTYPES))), row_layout)
    if draw(st.booleans()):
        inputs["weight"] = torch.rand(classes, generator=g).to(dtype)
    if draw(st.booleans()):
        inputs["token_weight"] = stored_as(torch.randn(rows, generator=g).to(dtype), row_layout)
    if draw(st.booleans()):
        ids = torch.randint(0, 2, rows, generator=g)
        inputs["segment_ids"] = stored_as(ids.to(label_dtype), row_layout)
    return inputs, options


@settings(deadline=None, derandomize=True, max_examples=150)
@given(problem=problems())
def test_any_arguments(problem):
    inputs, options = problem
    upstream = upstream_for(inputs, options)
    on = counted(inputs, options)
    upstream = {k: torch.where(on, v, 0) if v.dim() else v for k, v in upstream.items()}
    actual = evaluate(mle.masked_cross_entropy, inputs, upstream, **options)
    assert_all_accurate(actual, Expected(inputs, upstream, **options))
    assert (actual["grad logits"][~on] == 0).all()
    bad, _ = poisoned(inputs, options, float("nan"), torch.iinfo(inputs["target"].dtype).max)
    for key, value in evaluate(mle.masked_cross_entropy, bad, upstream, **options).items():
        assert_same_bits(value, actual[key], key)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(problem=problems())
def test_any_arguments_in_place(problem):
    inputs, options = problem
    upstream = upstream_for(inputs, options)
    plain = evaluate(mle.masked_cross_entropy, inputs, upstream, **options)
    again = evaluate(mle.masked_cross_entropy, inputs, upstream, **options, inplace_backward=True)
    for key, value in plain.items():
        assert_same_bits(again[key], value, key)
