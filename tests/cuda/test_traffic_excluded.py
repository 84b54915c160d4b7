# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels read of what the mask excludes, counted under the simulator: nothing, of
every operator in the table of excluded_cases.py; each gradient of 0 is written once.

Of a mask per element a pack of 16 bytes is read where one of its elements is selected.
"""

import pytest
import torch
from cuda_sim import compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from excluded_cases import FAMILIES, Case
from simulated import counting_simulator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sim():
    return counting_simulator()


@pytest.fixture(autouse=True)
def fresh_device(sim):
    yield
    sim.reset()


def accesses(sim, tensor):
    """(reads, writes) of each element, for any strides."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    places = tensor.shape, tensor.stride(), tensor.storage_offset()
    return tuple(one.as_strided(*places) for one in sim.accesses(storage))


def wrong_accesses(sim, case):
    written = case.written()
    given = {
        name: sim.upload(x, writable=name in written) if isinstance(x, torch.Tensor) else x
        for name, x in case.given.items()
    }
    with sim.counting():
        found = getattr(sim.ops, case.operator).default(**given)
        found = [found] if isinstance(found, torch.Tensor) else list(found or [])
        results = dict(
            zip(case.result_names(), [*found, *(given[n] for n in written)], strict=True)
        )
        wrong = []
        for name, off in case.excluded.items():
            reads = accesses(sim, given[name])[0][off.expand(given[name].shape)]
            if reads.any() and not case.elements:
                wrong.append(f"{name}: {int((reads > 0).sum())} excluded elements are read")
        for name, off in case.zeros.items():
            if results[name].numel() == 0:
                continue
            writes = accesses(sim, results[name])[1][off.expand(results[name].shape)]
            # hidden states': by the stream's memset, which is no kernel
            if (writes != (name != "grad_hidden")).any():
                wrong.append(f"{name}: written {writes.unique().tolist()} times where it is 0")
            if sim.download(results[name])[off.expand(results[name].shape)].any():
                wrong.append(f"{name}: not 0 where nothing flows")
    return wrong


def cases_of(family):
    """Of each operator the first call and the one of most arguments."""
    found = {}
    for case in family():
        first, most = found.get(case.operator, (case, case))
        more = len(case.excluded) > len(most.excluded)
        found[case.operator] = (first, case if more else most)
    return {id(case): case for pair in found.values() for case in pair}.values()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_nothing_excluded_is_read(sim, family):
    for case in cases_of(family):
        wrong = wrong_accesses(sim, case)
        assert not wrong, f"{case.operator} {case.name}: {wrong}"


def test_reading_shows(sim):
    """Of a mask that excludes nothing all is read: the same looks find it."""
    case = next(c for c in FAMILIES[0]() if c.operator == "masked_squared_error")
    bare = Case("bare", case.operator, case.given | {"mask": None}, case.excluded)
    assert "prediction" in " ".join(wrong_accesses(sim, bare))
