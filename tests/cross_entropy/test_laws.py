# SPDX-License-Identifier: BSD-3-Clause
"""Rows that do not count change no bit; rows do not know each other; nor do threads."""

import pytest
import torch
from accuracy import assert_same_bits
from accuracy_cross_entropy import evaluate, upstream_for
from cases_cross_entropy import BY_NAME, EVERYTHING, REDUCTIONS, make, options_of

import masked_loss_ext as mle
from masked_loss_ext.reference.cross_entropy import counted_rows

NAN, INF = float("nan"), float("inf")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POISONED = [
    *(
        "padded",
        "one_counts",
        "mask_float16",
        "target_uint8",
        "rank_4",
        "rank_4_shift",
        "many_rows",
    ),
    *("few_of_many", "nothing_counts", "nothing_weighted", "row_gaps_none", "row_slice_mean"),
    *("v1025", "v32769", "both_weights_mean", "banned_mean", "normalizer_weight", "permuted_mean"),
    *(f"segments_{r}" for r in REDUCTIONS),
    *("transposed_mean", "misaligned_none", "temperatures_everything", "temperatures_shift"),
]


def counted(inputs, options):
    return counted_rows(
        inputs["logits"],
        inputs["target"],
        inputs.get("mask"),
        options.get("ignore_index", -100),
        options.get("shift", 0),
        inputs.get("segment_ids"),
    )[1]


def scored_by(on, shift):
    """Which positions hold the label and weight of a row that counts."""
    back = torch.zeros_like(on)
    length = on.shape[-1] - shift
    back[..., shift:] = on[..., :length] if length > 0 else False
    return back


def like(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def poisoned(inputs, options, value, label):
    """value in each row that does not count, label and value where no counted row looks."""
    on = counted(inputs, options)
    bad = {**inputs, "logits": like(inputs["logits"]).masked_fill_(~on.unsqueeze(-1), value)}
    read = scored_by(on, options.get("shift", 0))
    if "token_weight" in inputs:
        bad["token_weight"] = like(inputs["token_weight"]).masked_fill_(~read, value)
    if "mask" in inputs:  # else the label itself says which rows count
        off = inputs["mask"] == 0
        bad["target"] = like(inputs["target"]).masked_fill_(off, label)
    return bad, on


@pytest.mark.parametrize("name", POISONED)
def test_rows_that_do_not_count_change_no_bit(name):
    inputs, options = make(BY_NAME[name], torch.float32), options_of(BY_NAME[name])
    upstream = upstream_for(inputs, options)
    on = counted(inputs, options)
    for key, value in upstream.items():
        upstream[key] = torch.where(on, value, 0) if value.dim() else value
    clean = evaluate(mle.masked_cross_entropy, inputs, upstream, **options)
    largest = torch.iinfo(inputs["target"].dtype).max
    for value, label in ((NAN, largest), (INF, -7), (-INF, 0), (3e38, -100)):
        if label < 0 and inputs["target"].dtype == torch.uint8:
            label = 200
        bad, on = poisoned(inputs, options, value, label)
        up = {k: v.masked_fill(~on, value) if v.dim() else v for k, v in upstream.items()}
        results = evaluate(mle.masked_cross_entropy, bad, up, **options)
        for key, result in clean.items():
            assert_same_bits(results[key], result, f"{value}: {key}")
        assert (results["grad logits"][~on] == 0).all()
        for key in ("lse", "entropy", "log_prob", "hit", "argmax"):
            assert (results[key][~on] == 0).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [3, 16, 65, 1025, 5000])
def test_poison_in_every_dtype(classes, dtype):
    logits = torch.randn(6, classes).to(dtype)
    target = torch.tensor([0, 1, 2, -100, 2, 1])
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    off = torch.tensor([False, True, False, True, True, False])
    weight = torch.rand(classes)
    for reduction in REDUCTIONS:
        options = {**EVERYTHING, "reduction": reduction, "weight": weight}
        inputs = {"logits": logits, "target": target, "mask": mask}
        clean = evaluate(mle.masked_cross_entropy, inputs, **options)
        for value in (NAN, INF):
            bad = {**inputs, "logits": logits.masked_fill(off[:, None], value)}
            for key, result in evaluate(mle.masked_cross_entropy, bad, **options).items():
                assert_same_bits(result, clean[key], f"{value} {reduction}: {key}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("extra", [{}, EVERYTHING, {"normalizer": 5.0}, {"shift": 2}], ids=str)
@pytest.mark.parametrize("by", ["mask", "label", "shift"])
def test_nothing_counts(reduction, extra, by):
    """0, attached; gradients 0: in a batch of NaN, with labels that do not exist."""
    if extra.get("normalizer") and reduction != "mean":
        extra = {}
    options = {**extra, "reduction": reduction}
    logits = torch.full((2, 3, 40), NAN, requires_grad=True)
    target = torch.full((2, 3), -100 if by == "label" else 99)
    mask = torch.zeros(2, 3) if by == "mask" else None
    if by == "shift":
        options["shift"] = 3
    weight, t = torch.rand(40), torch.full((2, 3), NAN, requires_grad=True)
    for weights in ({}, {"weight": weight}, {"weight": weight, "token_weight": t}):
        logits.grad = t.grad = None
        loss, s = mle.masked_cross_entropy(
            logits, target, mask, **weights, **options, return_stats=True
        )
        assert loss.requires_grad and (loss == 0).all()
        total = loss.sum() + s.lse.sum() + s.entropy.sum() + s.log_prob.sum()
        assert total == 0 and not s.hit.any()
        total.backward()
        assert logits.grad.shape == logits.shape and (logits.grad == 0).all()
        assert "token_weight" not in weights or (t.grad == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at", [0, 17, 700, 2499])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_nan_in_a_counted_row_propagates(value, at, options):
    if value == INF:
        options = {k: v for k, v in options.items() if k != "softcap"}  # a cap makes inf finite
    x = torch.randn(4, 2500)
    x[2, at] = value
    x.requires_grad_()
    target = torch.tensor([5, 6, 7, 8])
    each, stats = mle.masked_cross_entropy(
        x, target, **options, reduction="none", return_stats=True
    )
    assert each.isfinite().tolist() == [True, True, False, True]
    assert stats.entropy.isfinite().tolist() == [True, True, False, True]
    (grad,) = torch.autograd.grad(each.sum(), x)
    assert grad.isfinite().all(-1).tolist() == [True, True, False, True]
    for reduction in ("mean", "sum"):
        assert not mle.masked_cross_entropy(x, target, **options, reduction=reduction).isfinite()


def test_nan_weights_of_counted_rows_propagate():
    x, target = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    t = torch.tensor([1.0, NAN, 1, 1])
    each = mle.masked_cross_entropy(x, target, token_weight=t, reduction="none")
    assert each.isnan().tolist() == [False, True, False, False]
    w = torch.ones(9)
    w[2] = NAN
    each = mle.masked_cross_entropy(x, target, weight=w, reduction="none")
    assert each.isnan().tolist() == [False, False, True, False]


VARIED = [
    "v1025_everything",
    "v128256",
    "two_rows",
    "one_row",
    "many_rows",
    "few_of_many",
    "rank_4",
]


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_for_any_number_of_threads(name, reduction):
    inputs = make(BY_NAME[name], torch.float32)
    options = {**options_of(BY_NAME[name]), "reduction": reduction}
    upstream = upstream_for(inputs, options)
    results = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        results.append(evaluate(mle.masked_cross_entropy, inputs, upstream, **options))
    for result in results[1:]:
        for key, value in result.items():
            assert_same_bits(value, results[0][key], key)


@pytest.mark.parametrize("classes", [7, 33, 1025, 20000])
def test_a_row_does_not_depend_on_the_others(classes):
    """Alone, among others, in another place and beside rows that do not count: the same bits."""
    g = torch.Generator().manual_seed(1)
    inputs = {
        "logits": 3 * torch.randn(9, classes, generator=g),
        "target": torch.randint(0, classes, (9,), generator=g),
        "token_weight": torch.rand(9, generator=g),
    }
    options = {**EVERYTHING, "weight": torch.rand(classes, generator=g), "reduction": "none"}
    whole = evaluate(mle.masked_cross_entropy, inputs, **options)
    order = torch.randperm(9, generator=g)
    for rows in ([4], [8, 0], [2, 3, 4, 5, 6], order.tolist()):
        some = {name: value[rows] for name, value in inputs.items()}
        for key, value in evaluate(mle.masked_cross_entropy, some, **options).items():
            assert_same_bits(value, whole[key][rows], f"{rows}: {key}")
    mask = torch.arange(9) % 3 == 0
    masked = evaluate(mle.masked_cross_entropy, {**inputs, "mask": mask}, **options)
    for key, value in masked.items():
        assert_same_bits(value[mask], whole[key][mask], key)


@pytest.mark.parametrize("name", ["padded", "both_weights_mean", "rank_4", "v1025_everything"])
def test_dropping_a_row_is_deleting_it(name):
    inputs, options = make(BY_NAME[name], torch.float64), options_of(BY_NAME[name])
    on = counted(inputs, options)
    fewer = {k: v if k == "weight" else v[on] for k, v in inputs.items() if k != "mask"}
    for reduction in ("mean", "sum"):
        options["reduction"] = reduction
        whole = evaluate(mle.masked_cross_entropy, inputs, stats=False, **options)
        part = evaluate(mle.masked_cross_entropy, fewer, stats=False, **options)
        for key, value in part.items():
            torch.testing.assert_close(whole[key] if key == "loss" else whole[key][on], value)


def stored_bytes(tensor):
    """What lies between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["row_gaps_mean", "rows_sliced", "misaligned_none", "many_rows"])
def test_inputs_are_never_written(name, reduction):
    """Not under no_grad either, nor with rows to zero."""
    inputs = make(BY_NAME[name], torch.float32)
    options = {**options_of(BY_NAME[name]), "reduction": reduction}
    upstream = upstream_for(inputs, options)
    tensors = {**inputs, **{f"upstream {k}": v for k, v in upstream.items()}}
    before = {k: (stored_bytes(v), v._version) for k, v in tensors.items()}
    evaluate(mle.masked_cross_entropy, inputs, upstream, **options)
    with torch.no_grad():
        mle.masked_cross_entropy(**inputs, **options)
    mle.row_statistics(inputs["logits"], inputs["target"], inputs.get("mask"))
    for key, value in tensors.items():
        assert torch.equal(stored_bytes(value), before[key][0]), key
        assert value._version == before[key][1], key
