# SPDX-License-Identifier: BSD-3-Clause
"""Layouts and masks of a million samples: time and memory in proportion to what they describe.

In processes of their own, for their memory alone; processor time, as machines may be busy. The
bounds lie between what was and what is: a compaction took ten times the layout's time, ids of two
million documents 5 s and 670 MiB, packed cross attention grew with the square of the samples.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, time, torch
import masked_loss_ext as mle
I, P = mle.RowIntervals, mle.PackedLayout
torch.set_num_threads(1)
P([[1]]).compact()
I.from_document_ids(torch.arange(5))
n = {n}
{prepare}
def used():
    return resource.getrusage(resource.RUSAGE_SELF)
before, started = used().ru_maxrss, used().ru_utime
{call}
print(json.dumps([used().ru_utime - started, (used().ru_maxrss - before) / 1024]))
assert {check}
"""

CASES = {
    # name: tokens, made before, measured, what must hold of it, seconds, MiB
    "compact": (
        10**6,
        "",
        "plan = P([1] * n).compact()",
        "plan.index.numel() == n and plan.index[-1] == n - 1",
        6,
        500,
    ),
    "compact_half": (
        10**6,
        "lengths = [[1, 1]] * (n // 2); keep = [0, 1] * (n // 4)",
        "plan = P(lengths, keep, pad_to_multiple=1).compact()",
        "plan.index[:4].tolist() == [0, 2, 3, 4] and plan.index.numel() == 3 * n // 4",
        6,
        500,
    ),
    "document_ids": (
        2 * 10**6,
        "ids = torch.arange(n)",
        "mask = I.from_document_ids(ids)",
        "mask.hi[0, -1] == n and mask.lo[0, -1] == n - 1",
        1.5,
        160,
    ),
    "document_ids_in_any_order": (
        2 * 10**6,
        "ids = torch.arange(n).flip(0).reshape(4, -1)",
        "mask = I.from_document_ids(ids)",
        "mask.hi[3, 0, -1] == n // 4",
        2.5,
        200,
    ),
    "cross": (
        10**5,
        "lengths = [1] * n",
        "mask = I.cross(lengths, lengths); tree = I.shared_prefix(3, lengths)",
        "mask.lo[0, -1] == n - 1 and tree.lo[1, -1] == n + 2",
        5,
        100,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_time_and_memory(name):
    n, prepare, call, check, seconds, mebibytes = CASES[name]
    program = PROGRAM.format(n=n, prepare=prepare, call=call, check=check)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, more = json.loads(done.stdout)
    assert took < seconds and more < mebibytes, (took, more)
