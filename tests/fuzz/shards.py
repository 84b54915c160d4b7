# SPDX-License-Identifier: BSD-3-Clause
"""The operators of shards of a vocabulary, all shards in one process: what passes between ranks is
handed over here."""

import torch
from sharded import shards_of
from simulated_cross_entropy import OUTPUTS as RESULTS

from tests.fuzz.agreement import assert_bits

OPS = torch.ops.masked_loss_ext
SAVED = ("row_sums", "entropy", "log_prob", "smooth_distance", "totals")
CUTS = ([1], [1, 1], [2, 1, 1], [1, 0, 2], [0, 3, 1])


def some_shards(c, classes):
    """(vocab_start, columns) of each; of some none."""
    return shards_of(c.pick(CUTS), classes)


def operator_arguments(problem):
    """Those of the native operators for rows, by name."""
    plain, options, wide = problem.plain, dict(problem.options), problem.wide
    given = {name: plain.get(name) for name in ("target", "mask", "token_weight", "segment_ids")}
    given["weight"] = plain["weight"].to(wide) if "weight" in plain else None
    temperature = plain.get("temperature", options.pop("temperature", None))
    for name, number in (
        ("temperature", temperature),
        ("normalizer", options.pop("normalizer", None)),
    ):
        is_number = number is not None and not isinstance(number, torch.Tensor)
        given[name] = torch.tensor(float(number), dtype=torch.float64) if is_number else number
    return {**given, **options}


def merged_by_hand(forms, problem, shards, up):
    """The results of whole rows and what each shard's backward returns, in place too; forms: names
    of the operators, without their prefix; shards: the arguments of each."""
    sums, results, *backwards = (getattr(OPS, name) for name in forms)
    shared = operator_arguments(problem) | {"statistics": True}
    messages = torch.stack([sums(**shared, **shard) for shard in shards])
    every = [results(**shared, **shard, messages=messages) for shard in shards]
    first = dict(zip(RESULTS, every[0], strict=True))
    for other in every[1:]:
        assert_bits(dict(zip(RESULTS, other, strict=True)), first, "another rank")
    shared |= {name: first[name] for name in SAVED}
    shared |= {f"grad_{name}": grad.to(problem.wide) for name, grad in up.items()}
    shared |= {"statistics": False, "normalizer": None}
    grads = [[backward(**shared, **shard) for shard in shards] for backward in backwards]
    return first, grads
