# SPDX-License-Identifier: BSD-3-Clause
"""The processes that the other tests of this room run in: failures are told, and nothing hangs."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError


def summed(value):
    """What a rank has, its process, and the sum over ranks."""
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total, os.getpid(), torch.get_num_threads()


def raises_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("a sentence")
    return "went well"


def dies_on(rank, before, seconds):
    """Rank ``rank`` is gone when, or while, the others wait for it."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    dist.barrier(group)
    if dist.get_rank() == rank:
        if not before:  # it has joined, and does not stay
            dist.all_reduce(torch.ones(2), group=group, async_op=True)
        os._exit(3)
    for _ in range(2):
        dist.all_reduce(torch.ones(2), group=group)
    return "nobody noticed"


def comes_late(rank, seconds):
    """Rank ``rank`` lives, but does not join in."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    if dist.get_rank() == rank:
        return "elsewhere"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="(?i)timed? ?out"):
        dist.all_reduce(torch.ones(2), group=group)
    return time.monotonic() - begin


def sleeps():
    if dist.get_rank() == 1:
        time.sleep(600)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_shared_by_the_tests_of_a_file(ranks, size):
    first, second = ranks(size).run(summed, 1.0), ranks(size).run(summed, 2.0)
    expected = size * (size + 1) / 2
    assert [total.item() for total, _, _ in first] == [expected] * size
    assert [total.item() for total, _, _ in second] == [2 * expected] * size
    processes = [pid for _, pid, _ in first]
    assert [pid for _, pid, _ in second] == processes and len({*processes, os.getpid()}) == size + 1
    assert {threads for _, _, threads in first} == {1}


def test_an_error_is_told_with_its_rank_and_the_next_run_has_new_processes(ranks):
    before = [pid for _, pid, _ in ranks(2).run(summed, 1.0)]
    with pytest.raises(RankError, match=r"(?s)^raises_on failed\nrank 1 of 2: raised.*a sentence"):
        ranks(2).run(raises_on, 1)
    after = [pid for _, pid, _ in ranks(2).run(summed, 1.0)]
    assert not {*before} & {*after}


@pytest.mark.parametrize("size,before", [(2, True), (2, False), (4, True)])
def test_a_rank_that_dies(ranks, size, before):
    """The others get torch.distributed's error: its neighbours at once, as its sockets are closed,
    those who wait for them within the group's timeout."""
    *others, last = ranks(size).outcomes(dies_on, size - 1, before, 4, grace=45)
    assert last.error.startswith("died with exit code 3")
    for other in others:
        assert other.error.startswith("raised") and "RuntimeError" in other.error, other
    assert len(ranks(size).run(summed, 1.0)) == size


def test_a_rank_that_does_not_join(ranks):
    waited, elsewhere = ranks(2).run(comes_late, 1, 2)
    assert elsewhere == "elsewhere" and 1 < waited < 30


def test_a_rank_that_never_comes_back_is_killed(ranks):
    with pytest.raises(RankError, match="rank 1 of 2: still running, killed"):
        ranks(2).run(sleeps, timeout=3)
    assert len(ranks(2).run(summed, 1.0)) == 2
