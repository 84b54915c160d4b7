# SPDX-License-Identifier: BSD-3-Clause
"""Arguments by name of the operators of shards: of the second of two, with the messages of both."""

import torch

OPS = torch.ops.masked_loss_ext
FORMS = ("cross_entropy", "linear_cross_entropy")
ROWS, WIDTH, CLASSES, START = (2, 3), 4, 9, 5


def shard_arguments(form, dtype=torch.float32, **options):
    """Of the operator that makes the message."""
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, ROWS, generator=g)
    target[0, 1] = -100
    given = {"target": target, "mask": torch.rand(ROWS, generator=g) < 0.8}
    given |= {"vocab_start": START, "vocab_size": CLASSES, **options}
    hidden = torch.randn(*ROWS, WIDTH, generator=g).to(dtype)
    weight = torch.randn(CLASSES, WIDTH, generator=g).to(dtype)
    if form == "cross_entropy":
        return {"logits": (hidden @ weight.T)[..., START:].contiguous(), **given}
    bias = torch.randn(CLASSES - START, generator=g).to(dtype)
    return {"hidden": hidden, "linear_weight": weight[START:], "bias": bias, **given}


def result_arguments(form, dtype=torch.float32, **options):
    """Of the operator that makes the results."""
    given = shard_arguments(form, dtype, **options)
    sums = getattr(OPS, f"_vocab_parallel_{form}_sums")
    first = {**given, "vocab_start": 0}
    if form == "cross_entropy":
        first["logits"] = torch.randn(*ROWS, START).to(dtype)
    else:
        first["linear_weight"] = torch.randn(START, WIDTH).to(dtype)
        first["bias"] = torch.randn(START).to(dtype)
    return {**given, "messages": torch.stack([sums(**first), sums(**given)])}


def backward_arguments(form, dtype=torch.float32, in_place=False, **options):
    given = result_arguments(form, dtype, **options)
    forward = getattr(OPS, f"vocab_parallel_{form}").default
    results = dict(zip([r.name for r in forward._schema.returns], forward(**given), strict=True))
    given = {**results, **given, "grad_loss": torch.ones_like(results["loss"])}
    given |= dict.fromkeys(("grad_lse", "grad_entropy", "grad_log_prob"))
    name = f"_vocab_parallel_{form}_backward" + "_" * in_place
    wanted = [a.name for a in getattr(OPS, name).default._schema.arguments]
    given["needs_token_weight"] = given.get("token_weight") is not None
    return {argument: given[argument] for argument in wanted if argument in given}
