# SPDX-License-Identifier: BSD-3-Clause
"""How many kernels a call of each operator launches, and what else it asks of the device, counted
by the simulator."""

import pytest
import torch
from cuda_sim import compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cases_terms import BY_NAME, Case, make
from simulated_block_mask import simulated_block_mask as simulated_operators
from simulated_linear import simulated_linear
from simulated_terms import SimulatedTerms

LIBRARIES = ("aten::", "cuda")  # what is no kernel of ours
TOKENS = torch.zeros(2, 5, dtype=torch.int64)
OFFSETS, KEPT = torch.tensor([0, 3]), torch.tensor([[2]])
ROWS = torch.zeros(1, 2, 9, dtype=torch.int32)
PARTS = Case("parts", "a row has several parts", (1, 2, 9001), mask=None, linked=False)


def operator(name, *arguments):
    def call():
        op = simulated_operators()
        op(name, *arguments)
        return op.sim

    return call


def terms(case):
    def call():
        op = SimulatedTerms()
        op(make(case, torch.float32))
        return op.sim

    return call


def linear(rows=5, **options):
    """Loss and gradients of so many rows, of which one does not count."""

    def call():
        op = simulated_linear()
        mask = torch.arange(rows) != 1
        hidden, weight = torch.randn(rows, 4), torch.randn(7, 4)
        op.sweep(hidden, weight, torch.zeros(rows, dtype=torch.int64), mask, **options)
        return op.sim

    return call


KEPT_ROWS = ["kept_counts", "kept_rows"]
CHUNK = ["aten::mm", "sweep", "aten::mm", "aten::mm"]  # logits, their gradient, two products of it
# What is called, and which kernels that launches; what has nothing to do launches none.
CALLS = {
    "rows": (operator("packed_rows", OFFSETS, KEPT, 5), ["packed_rows"]),
    "no rows": (operator("packed_rows", torch.tensor([0]), KEPT[:0], 0), []),
    "lists": (
        operator("interval_block_lists", ROWS, ROWS + 3, 9),
        ["block_classes", "block_lists"],
    ),
    "plan": (
        operator("nested_dropout_plan", OFFSETS, KEPT, 5),
        ["block_classes", "block_lists"],
    ),
    "empty plan": (operator("nested_dropout_plan", torch.tensor([0]), KEPT[:0], 0), []),
    "counts": (operator("repetition_counts", TOKENS), ["repetition_counts"]),
    "no counts": (operator("repetition_counts", TOKENS[:0]), []),
    "links": (operator("repetition_links", TOKENS), ["repetition_links"]),
    "no links": (operator("repetition_links", TOKENS[:0]), []),
    "terms": (terms(BY_NAME["classes_only"]), ["sums", "coefficients", "gradient"]),
    "terms of parts": (terms(PARTS), ["sums", "rows", "coefficients", "gradient"]),
    "terms with links": (
        terms(BY_NAME["all"]),
        ["sums", "rows", "coefficients", "gradient", "cells"],
    ),
    "no terms": (terms(BY_NAME["no_rows"]), []),
    "linear": (
        linear(num_valid=4),
        [*KEPT_ROWS, "take_rows", "totals", *CHUNK, "cudaMemset", "put_rows", "totals"],
    ),
    "linear that waits": (
        linear(),
        [
            *KEPT_ROWS,
            "cudaMemcpyAsync",
            "cudaStreamSynchronize",
            "take_rows",
            "totals",
            *CHUNK,
            "cudaMemset",
            "put_rows",
            "totals",
        ],
    ),
    "linear in chunks": (
        linear(num_valid=4, chunk_rows=2),
        [
            *KEPT_ROWS,
            "take_rows",
            "totals",
            *CHUNK,
            *CHUNK[:3],
            "aten::addmm",
            "cudaMemset",
            "put_rows",
            "totals",
        ],
    ),
    "linear of nothing": (linear(0), ["totals", "cudaMemset", "totals"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_a_call(name):
    call, kernels = CALLS[name]
    simulated_operators().sim.reset()
    sim = call()
    launches = sim.launches()
    sim.reset()
    assert len(launches) == len(kernels), launches
    for launch, kernel in zip(launches, kernels, strict=True):
        assert kernel in launch if kernel.startswith(LIBRARIES) else f"{kernel}_kernel" in launch
