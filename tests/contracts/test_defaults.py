# SPDX-License-Identifier: BSD-3-Clause
"""Whatever torch.set_default_dtype and torch.set_default_device say, results are the same: every
constant takes dtype and device from the inputs or names them."""

import contextlib
import copy

import pytest
import torch
from unified_cases import CASES, batch, floating

import masked_loss_ext as mle
from masked_loss_ext import reference, unified
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from masked_loss_ext.ops.repetition import repetition_counts, repetition_links
from masked_loss_ext.reference import repetition as plain

DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def flat(result):
    """Tensors, numbers and texts of a result, in order."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [x for value in result for x in flat(value)]
    return [] if result is None else [result]


def check_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.device == y.device
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


# --- modules of the unified loss -----------------------------------------------------------------


def two_steps(module, case, surroundings):
    """Results, gradients of the inputs and buffers."""
    entries = batch()
    inputs = floating(entries, case.takes.values())
    for x in inputs:
        x.requires_grad_()
    with surroundings:
        for _ in range(2):
            result = module(**case.inputs(entries))
        grads = torch.autograd.grad(case.loss(result), inputs, allow_unused=True)
    return flat(result) + flat(list(grads)) + list(module.buffers())


def made(case, surroundings, parameters=None):
    """A module with the parameters given: as of any module, theirs are of the default dtype."""
    torch.manual_seed(0)
    with surroundings:
        module = case.make()
    for name, parameter in (parameters or {}).items():
        module.get_parameter(name).data = parameter.detach().clone()
    return module


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_under_a_default_dtype(case, dtype):
    plain = made(case, contextlib.nullcontext())
    other = made(case, default_dtype(dtype), dict(plain.named_parameters()))
    expected = two_steps(plain, case, contextlib.nullcontext())
    check_same(two_steps(other, case, default_dtype(dtype)), expected)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_modules_under_a_default_device(case):
    plain = made(case, contextlib.nullcontext())
    other = copy.deepcopy(plain)
    expected = two_steps(plain, case, contextlib.nullcontext())
    check_same(two_steps(other, case, default_device("meta")), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_counts_of_a_module_built_under_a_low_precision_default(dtype):
    """As loaders of large models do: 400000 tokens are infinite in float16, 4101 are 4096 in
    bfloat16."""
    with default_dtype(dtype):
        balancer = unified.AuxiliaryFreeMoEBalancer(2, momentum=0.0)
        for tokens in (4101, 400000):
            gate = torch.zeros(tokens, 2, dtype=torch.float32, requires_grad=True)
            out = balancer(gate, torch.zeros(tokens, 1, dtype=torch.int64))
            assert balancer.total_tokens.item() == tokens
            assert out["expert_counts"].tolist() == [tokens, 0]
            assert out["balancing_term"].item() == pytest.approx(0.1 * 0.05**2, rel=1e-6)


def test_the_temperature_does_not_drift_under_a_low_precision_default():
    with default_dtype(torch.bfloat16):
        loss_fn = unified.TemperatureScaledCrossEntropy(label_smoothing=0.0)
        logits = torch.zeros(1, 2, 5, dtype=torch.float32)
        for _ in range(19):  # of a constant loss the last ten move it
            loss_fn(logits, torch.zeros(1, 2, dtype=torch.int64))
    assert loss_fn.temperature.dtype == torch.float32
    assert loss_fn.temperature.item() == pytest.approx(0.9, abs=1e-6)


def test_shares_of_many_tokens_are_exact():
    """Ratios of integers are of the default dtype: 70000 is infinite in float16."""
    row = torch.arange(70000).reshape(1, -1)
    row[0, -1] = 0
    with default_dtype(torch.float16):
        penalty = unified.NGramRepetitionPenalty(1, 1.0, 70000)
        found = penalty.compute_ngram_repetition_penalty(row)
        run = unified.SequenceRepetitionDetector()(torch.zeros_like(row))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(1 / 70000, rel=1e-6)
    assert run["immediate_repetition_penalty"].item() == pytest.approx(69999.0**2, rel=1e-6)


# --- everything else that is public --------------------------------------------------------------


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


B, S, V, C = 2, 5, 7, 3
LOGITS, HEADS = noise(B, S, V), [noise(B, S, V, seed=k) for k in range(2)]
LABELS = torch.tensor([[1, 2, 1, 2, 5], [6, 6, 0, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
PRED, TARGET = noise(B, S, C), noise(B, S, C, seed=1)
EDIT, WEIGHTING = MASK * 0.5, noise(B, S, 1, seed=2).abs()
LENGTHS = torch.tensor([3, 5])
LATENTS = [noise(2, C), noise(4, C)]
IMAGE = (noise(1, 32, 48) > 0).to(torch.uint8)
IDS, POSITIONS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 0, 1, 2, 0, 1, 2]]).split(1)
QKV = [noise(1, 2, 8, 4, seed=k) for k in range(3)]
CLASS_WEIGHT = noise(V).abs()
HEAD = noise(V, V, seed=4)  # over hidden states as wide as there are classes
PAIRS = [[noise(1, n, C) for n in lengths] for lengths in ((4, 2), (3, 3))]
LAYOUT = {"segment_lengths": [[3, 2], [2, 1]], "keep_k": [1, 1], "device": "cpu"}
ROWS = {"mask": MASK, "label_smoothing": 0.1, "focal_gamma": 1.5, "z_loss": 0.1}
ATTENTION = {"attention_mask": MASK, "edit_mask": EDIT, "weighting": WEIGHTING}

LOSSES = {
    "masked_cross_entropy": lambda x: mle.masked_cross_entropy(x, LABELS, **ROWS),
    "cross_entropy_weights": lambda x: mle.masked_cross_entropy(
        x, LABELS, MASK, weight=CLASS_WEIGHT, token_weight=EDIT, temperature=0.7, softcap=5.0
    ),
    "cross_entropy_shift": lambda x: mle.masked_cross_entropy(
        x, LABELS, MASK, shift=1, segment_ids=SEGMENTS, normalizer=3.5
    ),
    "row_statistics": lambda x: mle.row_statistics(x, LABELS, MASK)[1].sum(),
    "module": lambda x: mle.MaskedCrossEntropyLoss(temperature=0.7)(x, LABELS, MASK),
    "heads": lambda x: mle.MultiTokenPredictionLoss(
        2, (2.0, 1.0), mask_sources=True, renormalize_empty_heads=True
    )([x, HEADS[1]], LABELS, MASK, segment_ids=SEGMENTS)[0],
    "linear_module": lambda x: mle.MaskedLinearCrossEntropyLoss(temperature=0.7, shift=1)(
        x, HEAD, LABELS, MASK, normalizer=3.5
    ),
    "linear_row_statistics": lambda x: mle.linear_row_statistics(x, HEAD, LABELS, MASK)[1].sum(),
    "heads_of_hidden": lambda x: mle.MultiTokenPredictionLoss(2, (2.0, 1.0), mask_sources=True)(
        x, LABELS, MASK, heads=[HEAD, (HEAD, CLASS_WEIGHT)]
    )[0],
    "reference_cross_entropy": lambda x: reference.masked_cross_entropy(x, LABELS, **ROWS),
    "terms": lambda x: sum(
        t.sum()
        for t in cross_entropy_terms(
            x, LABELS, MASK, temperature=0.7, links=repetition_links(LABELS, MASK, 2)
        )
        if t is not None and t.is_floating_point()
    ),
}
SQUARED = {
    "AttentionMaskMseLoss": lambda p: mle.AttentionMaskMseLoss()(p, TARGET, **ATTENTION),
    "edit_token_mean": lambda p: mle.masked_edit_token_mean_loss(p, TARGET, MASK, EDIT, WEIGHTING),
    "multi_resolution": lambda p: mle.compute_loss_multi_resolution(p, TARGET, MASK, EDIT),
    "MaskEditLoss": lambda p: mle.MaskEditLoss()(p, TARGET, WEIGHTING, EDIT),
    "MseLoss": lambda p: mle.MseLoss()(p, TARGET, 0.5),
    "masked_mse": lambda p: mle.masked_mse(p, TARGET, MASK),
    "masked_sse": lambda p: mle.masked_sse(p, TARGET, MASK),
    "reference_mse": lambda p: reference.masked_mse(p, TARGET, MASK),
}
WITHOUT_GRADIENT = {
    "count_targets": lambda: mle.MultiTokenPredictionLoss(2, (1, 1)).count_targets(LABELS, MASK),
    "repetition_counts": lambda: repetition_counts(LABELS, MASK, 2),
    "reference_counts": lambda: plain.repetition_counts(LABELS, MASK, 2),
    "reference_links": lambda: plain.repetition_links(LABELS, MASK, 2),
    "lengths_to_mask": lambda: mle.lengths_to_mask(LENGTHS),
    "pad_latents": lambda: mle.pad_latents_for_multi_res(LATENTS),
    "reference_pad": lambda: reference.pad_latents_for_multi_res(LATENTS),
    "unpad": lambda: mle.unpad(PRED, MASK),
    "mask_labels": lambda: mle.mask_labels(LABELS, MASK),
    "map_mask_to_latent": lambda: mle.map_mask_to_latent(IMAGE),
    "row_intervals": lambda: [
        mle.RowIntervals.from_document_ids(IDS).dense(),
        mle.RowIntervals.from_position_ids(POSITIONS).dense(),
    ],
    "packed_attention": lambda: mle.packed_attention(
        *QKV, mle.RowIntervals.from_document_ids(IDS), backend="sdpa"
    ),
    "packed_layout": lambda: packed_layout(mle.PackedLayout(**LAYOUT, pad_to_multiple=4)),
    "mask_ids": lambda: mle.generate_nested_dropout_mask_ids(
        [torch.Size([3]), torch.Size([2])], [1], 8, device="cpu"
    ),
    "packer": lambda: packed(),
    "check_padding": lambda: str(mle.check_padding(padded_step, {"pred": PRED}, MASK)),
}


def packed_layout(layout):
    plan = layout.compact(bucket=4)
    x = torch.arange(2.0 * layout.padded_len, dtype=torch.float32, device="cpu").reshape(1, -1, 2)
    short = plan.gather(x)
    return [
        *(layout.sample_ids, layout.positions, layout.segment_ids, layout.visible),
        *(layout.cu_seqlens, layout.kept, layout.intervals("causal").dense()),
        *(short, plan.scatter(short)),
    ]


def packed():
    keys = (["p", "r"], "packed", "mask", "inner", "outer")
    packer = mle.NestedDropoutSequencePacker(
        *keys, pad_to_multiple=128, return_materialized_mask=True
    )
    data = packer({"p": PAIRS[0], "r": PAIRS[1], "nested_dropout_keep_k": [1, 2]})
    back = mle.SequenceUnpacker("packed", ["p2", "r2"], "inner", "outer")(data)
    return [data["packed"], data["mask"], *back["p2"], *back["r2"]]


def padded_step(given):
    return mle.masked_mse(given["pred"], TARGET, MASK)


def value_and_gradients(function, x, surroundings):
    """Of second order, too: plain PyTorch stands in for the operators there."""
    x = x.clone().requires_grad_()
    with surroundings:
        loss = function(x)
        first = torch.autograd.grad(loss, x, create_graph=True)[0]
        if not first.requires_grad:
            return [loss, first]
        return [loss, first, torch.autograd.grad(first.square().sum(), x)[0]]


@pytest.mark.parametrize("name", [*LOSSES, *SQUARED])
@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_losses(name, default):
    function, x = (LOSSES[name], LOGITS) if name in LOSSES else (SQUARED[name], PRED)
    surroundings = default_device(default) if default == "meta" else default_dtype(default)
    expected = value_and_gradients(function, x, contextlib.nullcontext())
    check_same(value_and_gradients(function, x, surroundings), expected)


@pytest.mark.parametrize("name", [*LOSSES, *SQUARED])
@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_tangents(name, default):
    function, x = (LOSSES[name], LOGITS) if name in LOSSES else (SQUARED[name], PRED)
    surroundings = default_device(default) if default == "meta" else default_dtype(default)
    direction = torch.ones_like(x)
    expected = torch.func.jvp(function, (x,), (direction,))
    with surroundings:
        found = torch.func.jvp(function, (x,), (direction,))
    check_same(flat(found), flat(expected))


@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_gradient_in_forward(default):
    def both():
        x = LOGITS.clone().requires_grad_()
        loss = mle.masked_cross_entropy(x, LABELS, MASK, gradient_in_forward=True)
        return [loss, torch.autograd.grad(2 * loss, x)[0]]

    expected = both()
    with default_device(default) if default == "meta" else default_dtype(default):
        check_same(both(), expected)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_functions_without_gradient(name, default):
    function = WITHOUT_GRADIENT[name]
    expected = flat(function())
    with default_device(default) if default == "meta" else default_dtype(default):
        check_same(flat(function()), expected)
