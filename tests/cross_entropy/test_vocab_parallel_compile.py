# SPDX-License-Identifier: BSD-3-Clause
"""The operators of shards as torch.compile sees them; between ranks: tests/distributed."""

import pytest
import torch
from shard_calls import FORMS, backward_arguments, result_arguments, shard_arguments

import masked_loss_ext  # noqa: F401 (makes the operators)

sums_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_sums
linear_sums_op = torch.ops.masked_loss_ext._vocab_parallel_linear_cross_entropy_sums
results_op = torch.ops.masked_loss_ext.vocab_parallel_cross_entropy
linear_results_op = torch.ops.masked_loss_ext.vocab_parallel_linear_cross_entropy
backward_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_backward
inplace_op = torch.ops.masked_loss_ext._vocab_parallel_cross_entropy_backward_
linear_backward_op = torch.ops.masked_loss_ext._vocab_parallel_linear_cross_entropy_backward

SUMS = dict(zip(FORMS, (sums_op, linear_sums_op), strict=True))
RESULTS = dict(zip(FORMS, (results_op, linear_results_op), strict=True))
OPTIONS = {
    "plain": {},
    "statistics": {"statistics": True},
    "without labels": {"target": None, "statistics": True, "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1, "reduction": "none"},
    "schedule": {"schedule": torch.tensor([0.1, 0.0, 0.01, 1.0]).double(), "statistics": True},
    "weights": {
        "weight": torch.rand(9),
        "token_weight": torch.rand(2, 3),
        "label_smoothing": 0.2,
        "temperature": torch.tensor(0.5),
        "normalizer": torch.tensor(3.0),
    },
}
every_option = pytest.mark.parametrize("name", list(OPTIONS))
both_forms = pytest.mark.parametrize("form", FORMS)


@every_option
@both_forms
def test_opcheck(form, name):
    torch.library.opcheck(SUMS[form], (), shard_arguments(form, **OPTIONS[name]))
    arguments = result_arguments(form, **OPTIONS[name])
    for leaf in ("logits", "hidden", "linear_weight", "bias", "token_weight"):
        if arguments.get(leaf) is not None:
            arguments[leaf] = arguments[leaf].clone().requires_grad_()
    torch.library.opcheck(RESULTS[form], (), arguments)


@every_option
def test_opcheck_backward(name):
    arguments = backward_arguments("cross_entropy", **OPTIONS[name])
    torch.library.opcheck(backward_op, (), arguments)
    arguments = backward_arguments("cross_entropy", in_place=True, **OPTIONS[name])
    torch.library.opcheck(inplace_op, (), arguments)
    arguments = backward_arguments("linear_cross_entropy", **OPTIONS[name])
    torch.library.opcheck(linear_backward_op, (), arguments)


@both_forms
def test_fake_and_real_results_have_the_same_shapes(form):
    # A schedule lies on the CPU, wherever the others are.
    for options in OPTIONS.values():
        for op, make in ((SUMS[form], shard_arguments), (RESULTS[form], result_arguments)):
            given = make(form, **options)
            real = op(**given)
            fake = op(
                **{
                    k: v.to("meta") if isinstance(v, torch.Tensor) and k != "schedule" else v
                    for k, v in given.items()
                }
            )
            pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
            for a, b in pairs:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
